"""Whether a case computes attention, before it is timed: its plans over threads, with few tokens, against float64 on one device.

The error of every rank together is compared with that of the same kernel on one device: at most 1.3 times as large for out, 1.5 for
gradients, in root mean squares. That kernel itself may be off by some roundings of its dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.problems import problem_of
from dtensor_ring.comm import LoopbackTransport
from dtensor_ring.ops.executors.plan_executor import Executor
from dtensor_ring.ops.kernels import KERNELS, Kernel, Saved, SoftmaxParams
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.schedule import plan

_ALLOWED = {"out": 1.3, "dq": 1.5, "dk": 1.5, "dv": 1.5}
_ROUNDINGS = 16


def small(case: Case, tokens: int, most_ranks: int = 8, multiple: int = 1) -> Case:
    """The case with fewer tokens and ranks: windows and documents shrink in proportion, no document to nothing.

    Lengths of documents become multiples of `multiple`.
    """
    world = min(case.world, most_ranks)
    if not case.lengths:
        fewer = min(tokens, case.tokens)
        return replace(case, world=world, tokens=fewer, mask=_narrowed(case.mask, fewer / case.tokens))
    shrink = max(1, case.length // (world * tokens))
    lengths = tuple(multiple * max(1, length // (shrink * multiple)) for length in case.lengths)
    lengths = (*lengths, -sum(lengths) % world) if sum(lengths) % world else lengths
    return replace(case, world=world, tokens=sum(lengths) // world, lengths=lengths)


def _narrowed(mask: str, factor: float) -> str:
    """A window whose sides are `factor` times as long; -1, which is unbounded, and 0 stay."""
    kind, colon, sides = mask.partition(":")
    return (
        kind
        + colon
        + ",".join(str(max(1, int(side * factor)) if side > 0 else side) for side in map(int, filter(None, sides.split(","))))
    )


def wrong_numbers(case: Case, kernel: Kernel, device: torch.device, dtype: torch.dtype, tokens: int = 256) -> str:
    """What is wrong with the case's plans on this kernel; empty if nothing is."""
    # In as many stages as are timed: fewer tokens left to themselves would have others.
    stages = problem_of(case, kernel.name).stages
    problem = problem_of(small(replace(case, stages=stages or None), tokens))
    shapes = [(1, problem.q_length, heads, case.head_dim) for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads)]
    whole = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
    softmax = SoftmaxParams(case.head_dim**-0.5)
    exact = alone(problem, KERNELS["math"], softmax, [x.double() for x in whole])
    single = alone(problem, kernel, softmax, whole)
    ours = _attention(problem, kernel, softmax, whole)
    return faults([measured(*each) for each in zip(exact, single, ours, strict=True)], dtype)


class Measured(NamedTuple):
    """Root mean squares of one tensor: our error, the kernel's own on one device, and its size."""

    error: float
    unavoidable: float
    size: float


def measured(exact: Tensor, single: Tensor, ours: Tensor) -> Measured:
    """The errors of one tensor."""
    error, unavoidable, size = (x.double().square().mean().sqrt().item() for x in (ours - exact, single - exact, exact))
    return Measured(error, unavoidable, size)


def faults(found: Sequence[Measured], dtype: torch.dtype, patience: float = 1.0) -> str:
    """What is wrong about out, dq, dk and dv; errors may be `patience` times as large as those of ours may. Empty if nothing is."""
    listed = []
    for (name, allowed), (error, unavoidable, size) in zip(_ALLOWED.items(), found, strict=True):
        if not unavoidable <= _ROUNDINGS * torch.finfo(dtype).eps * size:
            listed.append(f"{name} of the kernel itself is off by {unavoidable / size:.2g} of its size")
        if not error <= patience * allowed * max(unavoidable, 1e-7):
            listed.append(f"{name} {error / max(unavoidable, 1e-7):.2f} x the kernel's own error")
    return ", ".join(listed)


def alone(problem: AttentionProblem, kernel: Kernel, softmax: SoftmaxParams, whole: list[Tensor]) -> list[Tensor]:
    """Out, dq, dk, dv of the whole sequence on one device, of q, k, v and dout."""
    return _attention(replace(problem, world=1, strategy="ring"), kernel, softmax, whole)


def _attention(problem: AttentionProblem, kernel: Kernel, softmax: SoftmaxParams, whole: list[Tensor]) -> list[Tensor]:
    """Out, dq, dk, dv of the whole sequence, computed by all ranks of a problem."""
    tokens = [torch.tensor(problem.q_tokens(rank), device=whole[0].device) for rank in range(problem.world)]

    def one_rank(transport: LoopbackTransport) -> list[Tensor]:
        executor = Executor(plan(problem, transport.rank), transport, kernel, softmax)
        q, k, v, dout = (x[:, tokens[transport.rank]].contiguous() for x in whole)
        out, lse = executor.forward(q, k, v)
        return [out, *executor.backward(Saved(q, k, v, out, lse), dout)[:3]]

    shares = LoopbackTransport.run(problem.world, one_rank)
    results = []
    for parts in zip(*shares, strict=True):
        result = torch.empty((1, problem.q_length, *parts[0].shape[2:]), device=parts[0].device, dtype=parts[0].dtype)
        for index, part in zip(tokens, parts, strict=True):
            result[:, index] = part
        results.append(result)
    return results
