"""What the library wants to reach: the table of targets, and the cases of emulate's presets, which measure it.

A target is met where the median of five rounds taken in turns is at least the target less 0.01, with everything left at its
default. Of a target with several cases (long tails) the worst one counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from benchmarks import cases as suite
from benchmarks.cases import Case
from benchmarks.links import Link
from dtensor_ring.ops.kernels import KERNELS, KernelRequirements

LAYER = "a layer under ring_plan, 512 tokens, over SDPA's"
LAYOUTS = "packings drawn anew: plain zigzag's time over that of per_document=True"
STAGE = "host time of a stage, whatever the documents"
MODEL = "8B shapes, W=1, 8k and 16k tokens: plain SDPA's time over ours"

# A kernel of several packages or names: the first that does not refuse is measured.
FAMILIES = {"FA2": ("torch_flash", "flash_attn_2"), "FA4": ("flash_attn_4",), "cuDNN": ("cudnn", "torch_cudnn")}
SLACK = 0.01
PLANNING = ((1000, 30.0), (10_000, 250.0))  # milliseconds that a rank's plan of a new batch of up to so many documents may take
SLOW = Link(gigabytes=45.0)
NODES = Link(node=8)
PACKED = "zigzag/documents"  # the layout that the library proposes for packed documents


@dataclass(frozen=True, slots=True)
class Target:
    """What is to be reached in some cases by one family of kernels.

    Attributes:
        name: what tables call it; cases and rows carry it.
        family: of kernels; "best" is any.
        fwd: the figure of the forward pass.
        both: the same for forward and backward together.
        measure: which pair of a row is meant: "ratio" to the ideal, "tflops" a GPU, or "over_ms", milliseconds more than without.
        benchmark: which one measures it.
    """

    name: str
    family: str
    fwd: float
    both: float
    measure: Literal["ratio", "tflops", "over_ms"] = "ratio"
    benchmark: str = "emulate"

    @property
    def smaller_is_better(self) -> bool:
        """Whether the figure is a cost."""
        return self.measure == "over_ms"

    @property
    def unit(self) -> str:
        """Of the figures, as tables print it; empty for ratios."""
        return {"ratio": "", "tflops": "TFLOP/s", "over_ms": "ms"}[self.measure]

    def met(self, value: float, aim: float) -> bool:
        """Whether a figure reaches `fwd` or `both`."""
        if self.smaller_is_better:
            return value <= aim
        return value >= aim - (SLACK if self.measure == "ratio" else 0)

    def shown(self, value: float) -> str:
        """The figure with the digits that decide."""
        return f"{value:.0f}" if self.measure == "tflops" else f"{value:.3f}"


TARGETS = (
    Target("zigzag, W=8, 200 GB/s", "FA2", 1.05, 1.04),
    Target("zigzag, W=8, 200 GB/s", "FA4", 0.98, 0.98),
    Target("zigzag, W=8, 200 GB/s", "cuDNN", 0.93, 0.97),
    Target("zigzag, W=8, 45 GB/s", "FA2", 1.00, 1.01),
    Target("zigzag, W=8, 45 GB/s", "FA4", 0.93, 0.94),
    Target("zigzag, W=8, 45 GB/s", "cuDNN", 0.88, 0.92),
    Target("zigzag, W=64, 200 GB/s in a node of 8, 45 between", "FA2", 0.97, 0.97),
    Target("not causal, W=8", "FA2", 0.98, 0.98),
    Target("not causal, W=8", "FA4", 0.98, 0.98),
    Target("window 4096, 32k a rank", "FA2", 0.95, 0.95),
    Target("list 1, packed", "FA2", 0.96, 0.92),
    Target("list 2, packed", "FA2", 0.91, 0.87),
    Target("list 3, packed", "FA2", 0.94, 0.90),
    Target("list 4, packed", "FA2", 0.88, 0.84),
    Target("long tails, packed", "FA2", 0.88, 0.92),
    Target("long tails, packed", "FA4", 0.80, 0.85),
    Target("zigzag, W=8, 64:8 heads", "best", 660, 575, "tflops"),
    Target(LAYOUTS, "FA2", 0.99, 0.99, "ratio", "layouts"),
    Target(LAYOUTS, "FA4", 0.99, 0.99, "ratio", "layouts"),
    Target(STAGE, "FA2", 0.10, 0.20, "over_ms", "layouts"),
    Target(LAYER, "FA2", 0.15, 0.4, "over_ms", "host_cost"),
    Target(MODEL, "best", 1.0, 1.0, "ratio", "train_step"),
    Target("two real ranks, zigzag", "FA2", 0.99, 0.985, "ratio", "attention"),
    Target("two real ranks, zigzag", "FA4", 0.97, 0.97, "ratio", "attention"),
    Target("two real ranks, packed", "FA2", 0.93, 0.93, "ratio", "attention"),
)


def family_of(kernel: str) -> str:
    """The family of a kernel; its own name where it has none."""
    return next((family for family, names in FAMILIES.items() if kernel in names), kernel)


def available(need: KernelRequirements) -> dict[str, str]:
    """For each family the name of a kernel that can be measured here; none on a CPU."""
    found = {}
    for family, names in FAMILIES.items():
        usable = [name for name in names if name in KERNELS and KERNELS[name].refuses(need) is None]
        if usable:
            found[family] = usable[0]
    return found


def quick(kernel: str | None) -> list[Case]:
    """Six cases that say within a minute whether a change helped."""
    cases = [
        suite.batch(8),
        suite.batch(8, link=SLOW),
        suite.full(8),
        *list(suite.lists(8, layout=PACKED))[3:],
        *suite.tails(8, [1, 2], layout=PACKED),
    ]
    return [replace(case, kernel=kernel) for case in cases]


def targets(kernels: dict[str, str], seeds: Iterable[int]) -> Iterator[Case]:
    """The cases of every target whose kernels are there; where none is there, on a CPU, all by the library's choice."""
    cases = _cases(seeds)
    for target in TARGETS:
        if target.benchmark != "emulate":
            continue
        if target.family == "best":
            names = list(kernels.values())
        elif kernels:
            names = [kernels[target.family]] if target.family in kernels else []
        else:
            names = [None] if target.family == "FA2" else []
        for name in names:
            yield from (replace(case, kernel=name, target=target.name) for case in cases[target.name])


def extra(kernels: dict[str, str]) -> Iterator[Case]:
    """Cases without a target that explain those with one: two ranks, and NCCL in place of the copy engine."""
    for link in (Link(), SLOW, Link(model="nccl")):
        yield suite.batch(2, link=link, kernel=kernels.get("FA2"))
    yield suite.batch(8, link=Link(model="nccl"), kernel=kernels.get("FA2"))


def real_ranks(kernels: dict[str, str], world: int) -> Iterator[Case]:
    """The cases of `benchmarks.attention` that have targets, of two ranks; of more ranks the same without."""
    for family in ("FA2", "FA4"):
        if family in kernels or (not kernels and family == "FA2"):
            target = "two real ranks, zigzag" if world == 2 else ""
            yield suite.batch(world, kernel=kernels.get(family), target=target)
    target = "two real ranks, packed" if world == 2 else ""
    yield from suite.lists(world, layout=PACKED, kernel=kernels.get("FA2"), target=target)


def need_of(device: torch.device, dtype: torch.dtype) -> KernelRequirements:
    """What every case asks of a kernel."""
    return KernelRequirements(device.type, dtype, 128, 128, training=True)


def _cases(seeds: Iterable[int]) -> dict[str, list[Case]]:
    """The cases of each target, by its name."""
    packed = {f"list {number}, packed": [case] for number, case in enumerate(suite.lists(8, layout=PACKED), 1)}
    return {
        "zigzag, W=8, 200 GB/s": [suite.batch(8)],
        "zigzag, W=8, 45 GB/s": [suite.batch(8, link=SLOW)],
        "zigzag, W=64, 200 GB/s in a node of 8, 45 between": [suite.batch(64, link=NODES)],
        "not causal, W=8": [suite.full(8)],
        "window 4096, 32k a rank": [suite.window(8)],
        **packed,
        "long tails, packed": list(suite.tails(8, seeds, layout=PACKED)),
        "zigzag, W=8, 64:8 heads": [suite.batch(8, heads=64)],
    }
