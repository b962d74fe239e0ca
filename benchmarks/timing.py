"""Timing that compares fairly: what is compared runs in turns, long enough to reach the same clocks, and medians count.

A GPU that has just been idle, or that runs short bursts, clocks higher than one under load: a baseline measured apart, or in
shorter blocks, would flatter itself by several per cent. So every block of calls lasts about the same time, and blocks alternate.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Effort:
    """How long is measured.

    Attributes:
        rounds: blocks of every call, whose median counts.
        block: milliseconds that a block lasts, at least.
    """

    rounds: int = 5
    block: float = 40.0


def in_turns(calls: Sequence[Call], effort: Effort, device: torch.device) -> list[list[float]]:
    """Milliseconds a call: one list of rounds for each of `calls`, measured block by block in turns."""
    counts = [max(1, round(effort.block / max(_block(call, 2, device), 1e-3))) for call in calls]
    rounds = [[_block(call, count, device) for call, count in zip(calls, counts, strict=True)] for _ in range(effort.rounds)]
    return [list(times) for times in zip(*rounds, strict=True)]


def _block(call: Call, count: int, device: torch.device) -> float:
    """Milliseconds a call over `count` calls, after one that is not counted."""
    call()
    if device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - begin) * 1e3 / count
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / count


def host_time(call: Call, device: torch.device, calls: int = 30) -> float:
    """Milliseconds of host time a call; the least of five blocks, since a host that does other things only ever takes longer."""

    def block() -> float:
        _wait(device)
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        spent = time.perf_counter() - begin
        _wait(device)
        return spent * 1e3 / calls

    call()
    return min(block() for _ in range(5))


def peak_memory(call: Call, device: torch.device) -> float:
    """MiB allocated at the peak of one call, beyond what was allocated before it; 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    _wait(device)
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    _wait(device)
    return (torch.cuda.max_memory_allocated(device) - held) / 2**20


def launches(call: Call, device: torch.device) -> int:
    """Kernels and copies that one call starts on the GPU; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    call()
    _wait(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        _wait(device)
    return sum(event.device_type == torch.profiler.DeviceType.CUDA for event in profile.events())


def ratio(ideal: Sequence[float], ours: Sequence[Sequence[float]]) -> float:
    """The median over rounds of the ideal time over the slowest of ours."""
    return statistics.median(best / max(times) for best, times in zip(ideal, zip(*ours, strict=True), strict=True))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
