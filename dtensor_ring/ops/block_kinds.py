"""Which kinds of blocks an attention gives its kernel, on any rank, and of which lengths: what kernels judge beside features.

zigzag, causal, "ring"       square causal (own keys), full (all others)
zigzag, causal, "gather"     square causal, rectangular causal
any mask but full, with documents      every kind
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from dtensor_ring.ops.kernels import EVERY_KIND, BlockKind
from dtensor_ring.planning.kernel_calls import KernelCall
from dtensor_ring.planning.mask import Band
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
    only: layout, mask, lengths, world and strategy are compared over the ranks before a call. Without documents the set is that of
    the plans of all ranks. A rank's own plan would not do: under strategy "gather" the first rank of
    a causal attention has nothing but square blocks, and the others have rectangles.

    With documents the set says no more than the mask does. `Slices` differ from rank to rank, so that no rank knows the others'
    plans. `Documents` are the same on every rank, but differ from batch to batch: planning for all ranks would cost the host as
    many plans for each batch, and a kernel that came and went with the bounds of documents would round one batch so and the next
    one otherwise.
    """
    return frozenset(each_kind(problem))


def each_kind(problem: AttentionProblem) -> Iterator[BlockKind]:
    """`block_kinds` one by one, in an order that is the same on every rank, each as soon as it is known; some come repeatedly.

    Who looks for one kind need not wait for the plans of all ranks, which take seconds for some hundred of them. The usual case
    takes no plan at all: a ring over chunks of one length.
    """
    problem = problem.planned
    kinds = _kinds_without_plans(problem)
    if kinds is not None:
        yield from sorted(kinds)
        return
    for rank in range(problem.world):
        yield from sorted(kinds_of_plan(plan(problem, rank)))


def _kinds_without_plans(problem: AttentionProblem) -> frozenset[BlockKind] | None:
    """What `block_kinds` gives where no plan is needed to know it; None elsewhere."""
    unmasked = problem.band == Band()
    if problem.documents is not None:
        # Without a mask every segment is full. With one a document may be cut anywhere, so nothing can be left out.
        return frozenset(kind for kind in EVERY_KIND if kind.mask == "full") if unmasked else EVERY_KIND
    if not problem.q_length or not problem.k_length:
        return None
    if unmasked:
        return frozenset({BlockKind("full", False)})
    if problem.strategy != "ring" or problem.q_length != problem.k_length or block_grain(problem) == 1:
        return None
    # Whole chunks before or after each other, and each rank's own: these follow each other in position order, so that all of them
    # together are one square.
    own = BlockKind("square causal", False)
    return frozenset({own} if problem.world == 1 else {own, BlockKind("full", False)})


def block_grain(problem: AttentionProblem) -> int:
    """A number that divides the queries and the keys of every block of every rank; 1 where blocks may have any lengths.

        zigzag, 65536 tokens over 8 ranks      4096: all chunks have as many, and blocks consist of whole chunks
        zigzag, 65537 tokens over 8 ranks      1: some chunk has one more
        stripes, 65536 tokens over 8 ranks     8192 for a full mask, whose blocks are whole shares; 1 for a causal one
        windows, documents                     1

    It is known without a plan, and the same on every rank, since it depends on nothing that they have not compared.
    """
    problem = problem.planned
    layout, world, lengths = problem.layout, problem.world, (problem.q_length, problem.k_length)
    if problem.documents is not None or problem.band not in (Band(), Band(0)):
        return 1
    if world == 1:  # every layout is one chunk in position order
        parts = dealt = 1
    elif layout.chunks:
        parts = dealt = world * layout.chunks
    else:
        parts, dealt = world, world * layout.block
    if any(length % dealt for length in lengths) or (problem.band == Band(0) and not problem.in_order):
        return 1
    return math.gcd(*(length // parts for length in lengths))
