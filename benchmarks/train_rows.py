"""Rows of `benchmarks.train_step`, and the peaks of GPUs by which MFU is counted."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.record import device_name

PEAKS = {"H100": 989.4, "H200": 989.4, "A100": 312.0}  # TFLOP/s, dense bfloat16, from NVIDIA's data sheets


@dataclass
class Row:
    """One line of the table: times in milliseconds of forward and of a step, of the slowest rank.

    Attributes:
        ratio: of ring_plan at W=1, plain attention's time over its own; of others on real ranks, their time over ring_plan's.
        wrong: why it has no time.
    """

    model: str
    attention: str
    kernel: str
    layers: int
    recomputed: bool
    world: int
    tokens: int
    emulated: bool
    sharded: bool = False
    target: str = ""
    ms: tuple[float, float] = (0.0, 0.0)
    ratio: tuple[float, float] | None = None
    tokens_per_second: float = 0.0
    mfu: float | None = None
    peak_gib: float = 0.0
    wrong: str = ""

    def line(self) -> str:
        """As the table prints it."""
        name = f"{self.attention}{' emulated' if self.emulated else ''}{', recomputed' if self.recomputed else ''}"
        start = f"{name:<42}{self.layers:>7}{self.world:>4}{self.tokens:>8}"
        if self.wrong:
            return f"{start}  {self.wrong}"
        figures = f"{self.ms[0]:>10.2f}{self.ms[1]:>10.2f}{self.tokens_per_second:>10.0f}"
        mfu = "" if self.mfu is None else f"{self.mfu:.1%}"
        pair = "" if self.ratio is None else f"{self.ratio[0]:>9.3f}{self.ratio[1]:>7.3f}"
        return f"{start}{figures}{mfu:>8}{self.peak_gib:>9.1f}{pair}"


HEADER = (
    f"{'attention':<42}{'layers':>7}{'W':>4}{'tokens':>8}{'fwd ms':>10}{'step ms':>10}{'tokens/s':>10}{'MFU':>8}{'peak GiB':>9}"
)


def peak_of(device: torch.device) -> float | None:
    """TFLOP/s of a GPU that is known."""
    return next((peak for name, peak in PEAKS.items() if name in device_name(device)), None)
