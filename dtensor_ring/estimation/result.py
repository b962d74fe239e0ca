"""An estimate as a value: for JSON, and as text of 80 columns."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any

from dtensor_ring.estimation.ledger import PARTS
from dtensor_ring.estimation.memory import Checkpoint, StepMemory, Training
from dtensor_ring.estimation.step_time import StepTime
from dtensor_ring.planning.devices import CHIPS
from dtensor_ring.planning.problem import AttentionProblem

_GIB = 2**30
# The CUDA context, and NCCL's buffers of a few groups. Not PyTorch's, and not measured here.
OUTSIDE = _GIB
# What PyTorch's allocator had of the GPU over what it had given out, at the end of the cases of `benchmarks/estimate.py`: 1.04
# to 1.30.
KEPT = 1.15


@dataclass(frozen=True, slots=True)
class Estimate:
    """Memory and time of one training step on one GPU; prints as a table.

    Attributes:
        training: what was estimated: the model, tokens of a GPU, precision and so on.
        mesh: axes and their ranks.
        problem: the attention of layers without a window, or of the first window.
        memory: bytes by phase and part.
        peaks: the most bytes of a step for each way of checkpointing.
        time: seconds by what takes them; None without a device.
        device: what times are of; "" for none.
        kernels: attention kernels by window that times are of.
        notes: what was assumed.
    """

    training: Training
    mesh: tuple[tuple[str, int], ...]
    problem: AttentionProblem
    memory: StepMemory
    peaks: tuple[tuple[Checkpoint, int], ...]
    time: StepTime | None = None
    device: str = ""
    kernels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        """Bytes that PyTorch's allocator gives out at most."""
        return self.memory.peak.bytes

    def facts(self) -> dict[str, Any]:
        """All of it as values that JSON can hold: bytes and seconds."""
        return _facts(self)

    def __str__(self) -> str:
        return _table(self)


def _facts(estimate: Estimate) -> dict[str, Any]:
    """All of it: bytes and seconds."""
    training, time = estimate.training, estimate.time
    return {
        "model": {"name": training.model.name, "type": training.model.model_type, "parameters": training.model.parameters},
        "mesh": dict(estimate.mesh),
        "tokens": training.tokens,
        "length": estimate.problem.q_length,
        "parallel": training.parallel,
        "shards": training.shards,
        "checkpoint": training.checkpoint,
        "loss": training.loss,
        "optimizer": training.optimizer,
        "memory": {
            "peak": estimate.peak,
            "at": estimate.memory.peak.moment,
            "saved": estimate.memory.saved,
            "phases": {p.name: {"bytes": p.bytes, "at": p.moment, "parts": dict(p.parts)} for p in estimate.memory.phases},
            "peaks": dict(estimate.peaks),
        },
        "time": None
        if time is None
        else {
            "device": estimate.device,
            "kernels": list(estimate.kernels),
            "step": time.step,
            "parts": {name: getattr(time, name) for name in _TIMES},
            "hidden": time.hidden,
            "tokens_per_second": time.tokens_per_second,
            "mfu": time.mfu,
        },
        "fits": _fits(estimate),
        "notes": list(estimate.notes),
    }


_TIMES = ("matmul", "attention", "elementwise", "recomputed", "exchange", "optimizer")
_WORDS = {
    "fsdp": "FSDP2",
    "ddp": "DDP",
    "none": "whole weights",
}
_RECOMPUTED = {"none": "nothing recomputed", "full": "layers recomputed", "attention": "layers recomputed but attention"}


def _table(estimate: Estimate) -> str:
    """For people."""
    training = estimate.training
    model = training.model
    gpus = 1
    for _, ranks in estimate.mesh:
        gpus *= ranks
    mesh = " x ".join(f"{axis}={ranks}" for axis, ranks in estimate.mesh) or "one GPU"
    shards = f" over {training.shards}" if training.shards > 1 else ""
    lines = [
        f"{model.name}, {model.parameters:.3g} weights, {mesh}, {training.tokens} tokens on each of {gpus} GPUs",
        f"{estimate.problem.q_length} tokens a row, {_WORDS[training.parallel]}{shards}, {_RECOMPUTED[training.checkpoint]}, "
        f"{training.loss} loss, {training.optimizer}",
        "",
        f"{'GiB on one GPU, at most':<26}" + "".join(f"{phase.name:>13}" for phase in estimate.memory.phases),
    ]
    for part in PARTS:
        held = [dict(phase.parts)[part] for phase in estimate.memory.phases]
        if any(held):
            lines.append(f"  {part:<24}" + "".join(f"{count / _GIB:>13.2f}" for count in held))
    lines.append(f"  {'all':<24}" + "".join(f"{phase.bytes / _GIB:>13.2f}" for phase in estimate.memory.phases))
    peaks = ", ".join(f"{way} {count / _GIB:.2f}" for way, count in estimate.peaks)
    lines += ["", f"peak: {estimate.peak / _GIB:.2f} GiB, in {estimate.memory.peak.moment}", f"  by checkpoint: {peaks}"]
    lines += _fit_lines(estimate)
    lines += _time_lines(estimate)
    lines += [f"note: {note}" for note in estimate.notes]
    return "\n".join(textwrap.fill(line, 80, subsequent_indent="    ") if len(line) > 80 else line for line in lines)


def _fits(estimate: Estimate) -> bool | None:
    """Whether the peak fits the device, with what is not PyTorch's; None without a device."""
    return None if not estimate.device else estimate.peak + OUTSIDE <= CHIPS[estimate.device].memory


def _fit_lines(estimate: Estimate) -> list[str]:
    if not estimate.device:
        return []
    memory = CHIPS[estimate.device].memory
    left = (memory - OUTSIDE - estimate.peak) / _GIB
    if left < 0:
        verdict = f"does NOT fit: {-left:.1f} GiB too much"
    elif estimate.peak * KEPT + OUTSIDE > memory:
        verdict = f"fits with {left:.1f} GiB to spare, which fragments may take"
    else:
        verdict = f"fits with {left:.1f} GiB to spare"
    return [f"  {estimate.device} has {memory / _GIB:.0f} GiB, about {OUTSIDE / _GIB:.0f} of them CUDA's and NCCL's: {verdict}"]


def _time_lines(estimate: Estimate) -> list[str]:
    time = estimate.time
    if time is None:
        return ["time: name a device, such as h100"]
    parts = ", ".join(f"{name} {getattr(time, name) * 1e3:.0f}" for name in _TIMES)
    return [
        f"step: {time.step * 1e3:.0f} ms on {estimate.device}, predicted, with {', '.join(estimate.kernels)}",
        f"  {parts}",
        f"  {time.tokens_per_second:.0f} tokens/s a GPU, MFU {time.mfu:.1%}",
    ]


__all__ = ["KEPT", "OUTSIDE", "Estimate"]
