"""Which calls of a plan go to the kernel as which kind of block."""

from __future__ import annotations

from dtensor_ring.planning.kernel_calls import KernelCall
from dtensor_ring.planning.schedule import AttentionProblem


def is_varlen(call: KernelCall, problem: AttentionProblem) -> bool:
    """Whether a call goes to the kernel as a varlen block. One segment that is in all batch rows alike is a dense block."""
    return len(call.segments) > 1 or len(problem.bounds) > 1
