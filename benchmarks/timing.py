"""Timing that compares fairly: what is compared runs in turns, long enough to reach the same clocks, and medians count.

A GPU that has just been idle, or that runs short bursts, clocks higher than one under load: a baseline measured apart, or in
shorter blocks, would flatter itself by several per cent. So every block of calls lasts about the same time, and blocks alternate.
On real ranks blocks begin together, and the time of the slowest rank is that of all.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

Call = Callable[[], object]


def join_ranks(device: str) -> torch.device:
    """The device of this rank, "cuda" or "cpu", once the ranks that torchrun started have met over NCCL or gloo."""
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        mine = torch.device("cuda", torch.cuda.current_device())
        dist.init_process_group("nccl", device_id=mine)
        return mine
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    return torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Effort:
    """How long is measured.

    Attributes:
        rounds: blocks of every call, whose median counts.
        block: milliseconds that a block lasts, at least.
    """

    rounds: int = 5
    block: float = 40.0


@dataclass(frozen=True, slots=True)
class Stopwatch:
    """Measures calls on one device.

    Attributes:
        device: where calls run.
        effort: how long `in_turns` measures.
        together: whether the ranks of the default process group measure together: then all make the same calls, begin each block
            at the same time, and every figure is that of the rank with the largest.
    """

    device: torch.device
    effort: Effort = field(default_factory=Effort)
    together: bool = False

    def in_turns(self, calls: Sequence[Call]) -> list[list[float]]:
        """Milliseconds a call: one list of rounds for each of `calls`, measured block by block in turns."""
        counts = [max(1, round(self.effort.block / max(self.block(call, 2), 1e-3))) for call in calls]
        rounds = [[self.block(call, count) for call, count in zip(calls, counts, strict=True)] for _ in range(self.effort.rounds)]
        return [list(times) for times in zip(*rounds, strict=True)]

    def shortly(self, calls: Sequence[Call], least: float = 5.0) -> list[float]:
        """Milliseconds a call, over a block of at least `least` each: enough to find the slowest."""
        first = [self.block(call, 1) for call in calls]
        counts = [round(least / max(each, 1e-3)) for each in first]
        return [self.block(call, n) if n > 1 else each for call, n, each in zip(calls, counts, first, strict=True)]

    def block(self, call: Call, count: int, *, warm_up: bool = True) -> float:
        """Milliseconds a call over `count` calls, after one that is not counted, unless there is to be none."""
        if warm_up:
            call()
        if self.together:
            self.wait()  # NCCL's barrier is a collective on the GPU: what was queued before it must be over on all ranks
            dist.barrier()
        if self.device.type != "cuda":
            begin = time.perf_counter()
            for _ in range(count):
                call()
            return self.largest((time.perf_counter() - begin) * 1e3 / count)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return self.largest(start.elapsed_time(end) / count)

    def host_time(self, call: Call, calls: int = 3, blocks: int = 5) -> float:
        """Milliseconds of host time a call; the least of all blocks, since a host that does other things only ever takes longer.

        A block is short: once some thousand kernels are queued, the host waits for the GPU.
        """

        def block() -> float:
            self.wait()
            begin = time.perf_counter()
            for _ in range(calls):
                call()
            return (time.perf_counter() - begin) * 1e3 / calls

        call()
        least = min(block() for _ in range(blocks))
        self.wait()
        return self.largest(least)

    def peak_memory(self, call: Call) -> float:
        """MiB allocated at the peak of one call, beyond what was allocated before it; 0 on a CPU."""
        if self.device.type != "cuda":
            return 0.0
        self.wait()
        held = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self.wait()
        return self.largest((torch.cuda.max_memory_allocated(self.device) - held) / 2**20)

    def launches(self, call: Call) -> int:
        """Kernels and copies that one call starts on the GPU; 0 on a CPU."""
        if self.device.type != "cuda":
            return 0
        call()
        counts = []
        for _ in range(2):  # what a profiler starts for itself is seen the first time
            self.wait()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
                call()
                self.wait()
            on_gpu = (event for event in profile.events() if event.device_type == torch.profiler.DeviceType.CUDA)
            counts.append(sum(not event.name.startswith("dtensor_ring,") for event in on_gpu))  # names of ours are no kernels
        return int(self.largest(min(counts)))

    def largest(self, value: float) -> float:
        """The largest value of all ranks that measure together."""
        if not self.together:
            return value
        every = torch.tensor(float(value), dtype=torch.float64, device=self.device)
        dist.all_reduce(every, op=dist.ReduceOp.MAX)
        return every.item()

    def wait(self) -> None:
        """Wait until the device has done what was queued."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def ratio(ideal: Sequence[float], ours: Sequence[Sequence[float]]) -> float:
    """The median over rounds of the ideal time over the slowest of ours."""
    return statistics.median(best / max(times) for best, times in zip(ideal, zip(*ours, strict=True), strict=True))
