"""`calibrate`: the figures of this machine's GPU, measured: a `CostModel` for choosing stages and predicting times.

    dense full and causal blocks of several lengths, packed ones of short segments, a window      times of a call
    the same with head dims 64 and 256                                                            how times grow with head dims
    a merge and a copy of 8192 tokens                                                             bytes a second
    a short call without waiting                                                                  host time

Each kernel's times are fitted by those of `Speed`. Calls run in blocks of some milliseconds in turns, so that all of them meet the
same clocks, on random numbers, which draw more power than equal ones.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch

from dtensor_ring.ops.executors.merge import merge_
from dtensor_ring.ops.executors.parts import OutputPart
from dtensor_ring.ops.kernels import (
    KERNELS,
    Block,
    BlockKind,
    Kernel,
    KernelRequirements,
    Saved,
    SoftmaxParams,
    VarlenMetadata,
    VarlenSegment,
)
from dtensor_ring.planning.cost_model import CostModel, KernelSpeed, Speed, Work
from dtensor_ring.planning.devices import KNOWN

HEADS, KV_HEADS, DTYPE = 32, 8, torch.bfloat16  # heads as in an 8B Llama model
TOKENS = 8192
_CAUSAL, _FULL = (-1, 0), (-1, -1)
Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Effort:
    """How long is measured: blocks of each call, and the milliseconds of one."""

    rounds: int = 5
    block: float = 20.0


class Shape(NamedTuple):
    """One call that is timed: queries and keys of each segment, one for a dense call, and the window."""

    segments: tuple[tuple[int, int], ...]
    window: tuple[int, int]
    head_dim: int = 128

    @property
    def work(self) -> Work:
        """What one head computes."""
        total = Work()
        for queries, keys in self.segments:
            total = total.plus(Work.of_segment(queries, keys, self.window))
        return total

    @property
    def kind(self) -> BlockKind:
        """What kernels are asked about."""
        return BlockKind.of(self.window, self.segments, varlen=len(self.segments) > 1)


def shapes(tokens: int = TOKENS) -> list[Shape]:
    """What is timed: calls like those of plans, for ranks of `tokens` tokens, which 64 divides."""
    dense = [
        *(Shape(((n, n),), _FULL) for n in (tokens // 8, tokens // 2, tokens)),
        *(Shape(((n, n),), _CAUSAL) for n in (tokens // 16, tokens // 8, tokens // 4, tokens // 2, tokens)),
        *(Shape(((tokens // n, 2 * tokens),), _FULL) for n in (2, 8, 16)),  # few queries against many keys
        Shape(((tokens, tokens),), (tokens // 4 - 1, 0)),
    ]
    packed = [
        Shape(((n, n),) * (tokens // n), window)
        for n in (tokens // 64, tokens // 32, tokens // 16, tokens // 8)
        for window in (_FULL, _CAUSAL)
    ]
    parts = [tokens * share // 64 for share in (1, 2, 3, 5, 9, 15, 29)]  # one long document among short ones
    uneven = Shape(tuple((n + 7 * i, n + 7 * i) for i, n in enumerate(parts)), _CAUSAL)
    return [*dense, *packed, uneven]


def calibrate(device: torch.device, effort: Effort | None = None, tokens: int = TOKENS) -> CostModel:
    """Measure a GPU: every kernel that runs on it, merging, copying and the host; half a minute a kernel.

    Raises:
        ValueError: the device is no CUDA GPU, of whose time alone the model knows.
    """
    if device.type != "cuda":
        raise ValueError(f"calibrate measures a CUDA GPU, and found {device}: run it on the machine that the model is for")
    effort = effort or Effort()
    kernels = [(name, kernel) for name, kernel in sorted(KERNELS.items()) if name != "math" and kernel.refuses(_need(128)) is None]
    properties = torch.cuda.get_device_properties(device)
    merge, copy = bandwidths(device, effort, tokens)
    speeds = tuple((name, speed_of(kernel, device, effort, tokens)) for name, kernel in kernels)
    hosts = [host_times(kernel, device) for _, kernel in kernels]
    forward, backward = max(f for f, _ in hosts), max(b for _, b in hosts)
    source = f"measured with torch {torch.__version__}"
    # A step costs the host about five times a call of its kernel: it fetches, waits, merges and looks up what is planned.
    # That alone cannot be timed by itself: it is taken from `devices`.
    step = KNOWN["h100"].step
    return CostModel(
        properties.name, source, speeds, properties.multi_processor_count, merge, copy, step, 5 * forward, 5 * backward
    )


def speed_of(kernel: Kernel, device: torch.device, effort: Effort, tokens: int = TOKENS) -> KernelSpeed:
    """One kernel, forward and backward, by the shapes that it takes."""
    timed = [shape for shape in shapes(tokens) if kernel.refuses_block(shape.kind) is None]
    times = measured(kernel, timed, device, effort)
    speeds = []
    for direction in (0, 1):
        speed = fitted([(shape.work, each[direction]) for shape, each in zip(timed, times, strict=True)])
        speeds.append(speed)
    causal = timed.index(Shape(((tokens, tokens),), _CAUSAL))
    for name, head_dim in (("narrow", 64), ("wide", 256)):
        if kernel.refuses(_need(head_dim)) is None:
            (of_dim,) = measured(kernel, [timed[causal]._replace(head_dim=head_dim)], device, effort)
            speeds = [replace(s, **{name: t / of_128}) for s, t, of_128 in zip(speeds, of_dim, times[causal], strict=True)]
    return KernelSpeed(*speeds)


def fitted(timed: Sequence[tuple[Work, float]]) -> Speed:
    """The speed that comes closest to measured nanoseconds of `HEADS` heads, each weighted by its own time."""
    rows = [[x / t for x in (1.0, HEADS * w.rows, HEADS * w.edges, HEADS * w.columns, HEADS * w.blocks)] for w, t in timed]
    gram = [[sum(row[i] * row[j] for row in rows) for j in range(5)] for i in range(5)]
    sums = [sum(row[i] for row in rows) for i in range(5)]
    found = [0.0] * 5
    # One number after the other, none below 0, until nothing changes: five of them need no library.
    for _ in range(20000):
        for i in range(5):
            rest = sums[i] - sum(gram[i][j] * found[j] for j in range(5) if j != i)
            found[i] = max(0.0, rest / gram[i][i]) if gram[i][i] else 0.0
    return Speed(*found)


def measured(kernel: Kernel, timed: Sequence[Shape], device: torch.device, effort: Effort) -> list[tuple[float, float]]:
    """Nanoseconds of each shape, forward and backward."""
    calls = [call for shape in timed for call in calls_of(kernel, shape, device)]
    counts = [max(1, round(effort.block * 1e6 / max(_block(call, 2, device), 1.0))) for call in calls]
    rounds = [[_block(call, count, device) for call, count in zip(calls, counts, strict=True)] for _ in range(effort.rounds)]
    medians = [statistics.median(times) for times in zip(*rounds, strict=True)]
    return list(zip(medians[::2], medians[1::2], strict=True))


def calls_of(kernel: Kernel, shape: Shape, device: torch.device) -> tuple[Call, Call]:
    """The kernel's forward and its backward on random tensors of a shape."""
    queries, keys = (sum(lengths) for lengths in zip(*shape.segments, strict=True))
    packed = len(shape.segments) > 1
    batch = () if packed else (1,)
    q, dout = (torch.randn((*batch, queries, HEADS, shape.head_dim), device=device, dtype=DTYPE) for _ in range(2))
    k, v = (torch.randn((*batch, keys, KV_HEADS, shape.head_dim), device=device, dtype=DTYPE) for _ in range(2))
    varlen = VarlenMetadata.of(list(_segments(shape)), queries, keys, device) if packed else None
    block = Block(shape.window, SoftmaxParams(shape.head_dim**-0.5), varlen)
    result = kernel.forward(q, k, v, block)
    saved = Saved(q, k, v, result.out.to(DTYPE), result.lse)
    return lambda: kernel.forward(q, k, v, block), lambda: kernel.backward(saved, dout, block)


def _segments(shape: Shape) -> Iterator[VarlenSegment]:
    q_ends = pairwise(accumulate((q for q, _ in shape.segments), initial=0))
    k_ends = pairwise(accumulate((k for _, k in shape.segments), initial=0))
    for (q0, q1), (k0, k1) in zip(q_ends, k_ends, strict=True):
        yield VarlenSegment(q0, q1, k0, k1)


def bandwidths(device: torch.device, effort: Effort, tokens: int = TOKENS) -> tuple[float, float]:
    """Bytes a second of merging a block into a running out, and of copying keys."""
    out, block = (torch.randn((1, tokens, HEADS, 128), device=device, dtype=DTYPE) for _ in range(2))
    lse, block_lse = (torch.randn((1, HEADS, tokens), device=device) for _ in range(2))
    merged = _times(lambda: merge_(out, lse, [OutputPart(0, block, block_lse)]), device, effort)
    copied = _times(lambda: block.clone(), device, effort)
    return (2 * out.nbytes + block.nbytes) / merged * 1e9, 2 * block.nbytes / copied * 1e9


def host_times(kernel: Kernel, device: torch.device) -> tuple[float, float]:
    """Nanoseconds that the host takes for a short call, forward and backward, while the GPU keeps up."""
    times = []
    for call in calls_of(kernel, Shape(((256, 256),), _CAUSAL), device):
        spent = []
        for _ in range(5):
            _wait(device)
            begin = time.perf_counter_ns()
            for _ in range(20):
                call()
            spent.append((time.perf_counter_ns() - begin) / 20)
        times.append(min(spent))
    _wait(device)
    return times[0], times[1]


def _times(call: Call, device: torch.device, effort: Effort) -> float:
    count = max(1, round(effort.block * 1e6 / max(_block(call, 2, device), 1.0)))
    return statistics.median(_block(call, count, device) for _ in range(effort.rounds))


def _block(call: Call, count: int, device: torch.device) -> float:
    """Nanoseconds a call over `count` calls, after one that is not counted."""
    call()
    if device.type != "cuda":
        begin = time.perf_counter_ns()
        for _ in range(count):
            call()
        return (time.perf_counter_ns() - begin) / count
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e6 / count


def _need(head_dim: int) -> KernelRequirements:
    return KernelRequirements("cuda", DTYPE, head_dim, head_dim, training=True)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


__all__ = ["Effort", "Shape", "bandwidths", "calibrate", "calls_of", "fitted", "host_times", "measured", "shapes", "speed_of"]
