"""Which kinds of blocks an attention gives its kernel, on any rank: what kernels judge beside dtypes and features.

zigzag, causal, "ring"       square causal (own keys), full (all others)
zigzag, causal, "gather"     square causal, rectangular causal
any mask but full, with documents      every kind
"""

from __future__ import annotations

from dtensor_ring.ops.kernels import EVERY_KIND, BlockKind
from dtensor_ring.planning.kernel_calls import KernelCall
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.schedule import Plan, plan


def is_varlen(call: KernelCall, problem: AttentionProblem) -> bool:
    """Whether a call goes to the kernel as a varlen block. One segment that is in all batch rows alike is a dense block."""
    # Where batch rows have documents of their own, a segment is in one row only, while a dense block covers all of them.
    return len(call.segments) > 1 or len(problem.bounds) > 1


def kinds_of_plan(of_rank: Plan) -> frozenset[BlockKind]:
    """List the kinds of blocks that one rank's plan has."""
    return frozenset(
        BlockKind.of(call.window, [(s.q1 - s.q0, s.k1 - s.k0) for s in call.segments], varlen=is_varlen(call, of_rank.problem))
        for step in of_rank.steps
        for call in step.calls
    )


def block_kinds(problem: AttentionProblem) -> frozenset[BlockKind]:
    """The kinds of blocks that ranks may have, all of them together: the same set on every rank.

    Ranks choose their kernel by this set, each for itself. What makes their choices one is that nothing here is known to one rank
    only: layout, mask, lengths, world and strategy are compared over the ranks before a call. Without documents they make the plans
    of all ranks, and the set is that of all these plans. A rank's own plan would not do: under strategy "gather" the first rank of
    a causal attention has nothing but square blocks, and the others have rectangles.

    With documents the set says no more than the mask does. `Slices` differ from rank to rank, so that no rank knows the others'
    plans. `Documents` are the same on every rank, but differ from batch to batch: planning for all ranks would cost the host as
    many plans for each batch, and a kernel that came and went with the bounds of documents would round one batch so and the next
    one otherwise.
    """
    problem = problem.planned
    if problem.documents is not None:
        # Without a mask every segment is full. With one a document may be cut anywhere, so nothing can be left out.
        unmasked = problem.band.lo is None and problem.band.hi is None
        return frozenset(kind for kind in EVERY_KIND if kind.mask == "full") if unmasked else EVERY_KIND
    return frozenset().union(*(kinds_of_plan(plan(problem, rank)) for rank in range(problem.world)))
