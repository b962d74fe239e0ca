"""Kernels judge the blocks of all ranks' plans, on every rank alike, and one that gets a kind of them wrong is not used."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from helpers import LAYOUTS, MASKS, line, make_case, run_loopback, share, some_or_every
from sweeps import swept

from dtensor_ring import Contiguous, from_local, full_tensor, ring_attention
from dtensor_ring.ops import block_kinds as module
from dtensor_ring.ops import kernels, operator
from dtensor_ring.ops import prepare as prepare_module
from dtensor_ring.ops.block_kinds import block_grain, block_kinds, each_kind, kinds_of_plan
from dtensor_ring.ops.kernels import EVERY_KIND, KERNELS, Block, BlockKind, KernelRequirements, SoftmaxParams, choose_kernel
from dtensor_ring.ops.kernels.block import VarlenMetadata, VarlenSegment
from dtensor_ring.ops.kernels.math import MathKernel
from dtensor_ring.planning.documents import Documents, Slices
from dtensor_ring.planning.layout import Layout
from dtensor_ring.planning.mask import Band
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.schedule import plan

SQUARE, RECTANGULAR, FULL, WINDOW = (BlockKind(mask, False) for mask in ("square causal", "rectangular causal", "full", "window"))
NEED = KernelRequirements("cpu", torch.float32, 64, 64)
DOCUMENTS = [None, Documents.from_lengths([9, 1, 23]), Documents(((0, 9, 33), (0, 20, 33)))]


class TopLeft(MathKernel):
    """As cuDNN: its causal mask begins top-left, so that it is wrong for rectangles; and it takes no varlen blocks."""

    name: ClassVar[str] = "top_left"

    def __init__(self) -> None:
        self.kinds = []

    def refuses_block(self, kind):
        if kind.varlen:
            return "takes no varlen blocks"
        return "aligns causal masks top-left" if kind.mask == "rectangular causal" else None

    def forward(self, q, k, v, block):
        self.kinds.append(block.kind(q, k))
        return super().forward(q, k, v, block)


@contextmanager
def installed():
    """The stand-in, first among the kernels; what calls chose with it is forgotten afterwards."""
    kernel = TopLeft()
    kernels.KERNELS = {kernel.name: kernel, **KERNELS}
    try:
        yield kernel
    finally:
        kernels.KERNELS = KERNELS
        prepare_module._CALLS.clear()
        operator._resolved.cache_clear()


@pytest.fixture
def top_left():
    with installed() as kernel:
        yield kernel


@pytest.mark.parametrize(
    ("window", "lengths", "kind"),
    [
        ((-1, -1), (5, 9), FULL),
        ((-1, 0), (5, 5), SQUARE),
        ((-1, 0), (5, 9), RECTANGULAR),
        ((-1, 0), (9, 5), RECTANGULAR),
        ((3, 0), (5, 5), WINDOW),
        ((-1, 2), (5, 5), WINDOW),
    ],
)
def test_the_kind_of_a_dense_block(window, lengths, kind):
    q, k = (torch.empty(1, length, 1, 8) for length in lengths)
    assert Block(window, SoftmaxParams(1.0)).kind(q, k) == kind


def test_one_rectangle_among_the_segments_of_a_varlen_block_makes_it_rectangular():
    square, wide = VarlenSegment(0, 4, 0, 4), VarlenSegment(4, 6, 4, 9)
    x = torch.empty(9, 1, 8)
    for segments, mask in (((square,), "square causal"), ((square, wide), "rectangular causal")):
        varlen = VarlenMetadata.of(segments, 6, 9, torch.device("cpu"))
        assert Block((-1, 0), SoftmaxParams(1.0), varlen).kind(x[:6], x) == BlockKind(mask, True)
    assert str(BlockKind("full", True)) == "varlen full"
    assert str(FULL) == "full"


def test_zigzag_gives_the_ring_squares_and_gathering_rectangles():
    problem = AttentionProblem(Layout("zigzag"), Band(0), 64, 64, 4)
    assert block_kinds(problem) == {SQUARE, FULL}
    assert block_kinds(replace(problem, strategy="gather")) == {SQUARE, RECTANGULAR}
    assert block_kinds(replace(problem, strategy="ulysses")) == {SQUARE}
    for documents in (*DOCUMENTS[1:], Slices((0, 4, 16), (0, 8, 32), 0)):
        assert block_kinds(replace(problem, documents=documents)) == EVERY_KIND
    unmasked = replace(problem, band=Band(), documents=DOCUMENTS[1])
    assert block_kinds(unmasked) == {FULL, BlockKind("full", True)}


def problems(world: int, every: bool):
    """Problems over as many ranks, with lengths that they share evenly and lengths that they do not, down to none at all.

    Or every fourth, other ones over other numbers of ranks: each strategy, length, mask and layout is in every part.
    """
    return itertools.islice(_problems(world), 0 if every else world % 4, None, 1 if every else 4)


def _problems(world: int):
    lengths = [
        *((n, n) for n in (0, 1, world, 2 * world, 6 * world, 6 * world + 1)),
        (2 * world, 4 * world),
        (4 * world, 6 * world),
    ]
    layouts, bands = ("zigzag", "contiguous", "stripe:1", "stripe:2"), (Band(0), Band(), Band(0, 3))
    for layout, band, (q_length, k_length) in itertools.product(layouts, bands, [*lengths, (3, 0)]):
        ring = AttentionProblem(Layout.parse(layout), band, q_length, k_length, world)
        yield from (replace(ring, strategy="gather"), replace(ring, strategy="ulysses"), ring, ring.staged(1), ring.staged(2))


@some_or_every
@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
def test_kinds_that_are_known_without_plans_are_those_of_the_plans(world, every):
    without = 0
    for problem in problems(world, every):
        planned = problem.planned
        of_plans = frozenset().union(*(kinds_of_plan(plan(planned, rank)) for rank in range(planned.world)))
        assert block_kinds(problem) == of_plans, problem
        without += module._kinds_without_plans(planned) is not None
    assert without


@some_or_every
@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
def test_a_grain_divides_the_queries_and_the_keys_of_every_block(world, every):
    found = set()
    for problem in problems(world, every):
        planned, grain = problem.planned, block_grain(problem)
        found.add(grain)
        for rank in range(planned.world):
            for length in lengths_of_blocks(plan(planned, rank)):
                assert length % grain == 0, f"rank {rank} of {problem}: a block has {length} tokens, which {grain} does not divide"
    assert {1, 2, 3} <= found


def lengths_of_blocks(of_rank) -> set[int]:
    segments = [segment for step in of_rank.steps for call in step.calls for segment in call.segments]
    return {length for _, q0, q1, k0, k1 in segments for length in (q1 - q0, k1 - k0)}


@pytest.mark.parametrize(
    ("layout", "band", "length", "grain"),
    [
        ("zigzag", Band(0), 65536, 4096),
        ("zigzag", Band(0), 65537, 1),
        ("contiguous", Band(0), 65536, 8192),
        ("stripe:1", Band(), 65536, 8192),
        ("stripe:1", Band(0), 65536, 1),
        ("stripe:3", Band(), 65544, 8193),
        ("zigzag", Band(0, 4095), 65536, 1),
    ],
)
def test_the_grain_of_eight_ranks(layout, band, length, grain):
    problem = AttentionProblem(Layout.parse(layout), band, length, length, 8)
    assert block_grain(problem) == grain
    assert block_grain(replace(problem, documents=Documents.from_lengths([length]))) == 1


def test_a_ring_over_even_chunks_is_judged_without_a_plan_and_others_up_to_the_first_kind_that_is_refused(top_left, monkeypatch):
    planned = []

    def counting(problem, rank):
        planned.append(rank)
        return plan(problem, rank)

    monkeypatch.setattr(module, "plan", counting)
    problem = AttentionProblem(Layout("zigzag"), Band(0), 1 << 20, 1 << 20, 64)
    for even in (
        problem,
        problem.staged(1),
        replace(problem, strategy="ulysses"),
        replace(problem, band=Band(), strategy="gather"),
    ):
        assert choose_kernel(None, NEED, lambda even=even: each_kind(even)) is top_left
    assert not planned
    gathered = replace(problem, layout=Layout("contiguous"), strategy="gather")
    assert choose_kernel(None, NEED, lambda: each_kind(gathered)).name == "torch_cpu"
    assert planned == [0, 1]


def test_the_plan_of_one_rank_does_not_tell_what_the_others_compute():
    problem = AttentionProblem(Layout("contiguous"), Band(0), 64, 64, 4, "gather")
    assert kinds_of_plan(plan(problem, 0)) == {SQUARE}
    assert kinds_of_plan(plan(problem, 1)) == {RECTANGULAR}
    assert block_kinds(problem) == {SQUARE, RECTANGULAR}


@pytest.mark.parametrize(("layout", "strategy", "documents", "mask"), swept(LAYOUTS, ["ring", "gather"], DOCUMENTS, MASKS))
def test_kernels_get_no_blocks_of_other_kinds_than_they_judged(layout, strategy, documents, mask):
    for k_length in (33, 40) if documents is None else (33,):
        case = make_case(33, k_length=k_length, mask=mask, documents=documents, heads=(2, 1), dim=4)
        kernel = TopLeft()
        run_loopback(case, layout, 3, strategy, kernel)
        judged = block_kinds(case.problem(layout, 3, strategy))
        assert set(kernel.kinds) <= judged
        assert documents is not None or set(kernel.kinds) == judged


def test_a_kernel_that_refuses_a_kind_of_block_is_passed_over(top_left):
    assert choose_kernel(None, NEED, lambda: {SQUARE, FULL, WINDOW}) is top_left
    assert choose_kernel(None, NEED, lambda: {SQUARE, RECTANGULAR}).name == "torch_cpu"
    assert choose_kernel(None, NEED, lambda: {BlockKind("full", True)}).name == "torch_cpu"


def test_the_error_of_a_kernel_asked_for_by_name_has_its_reason_and_the_kind(top_left):
    assert choose_kernel("top_left", NEED, lambda: {SQUARE}) is top_left
    text = "top_left: aligns causal masks top-left, and this attention may have rectangular causal blocks"
    with pytest.raises(NotImplementedError, match=f"kernel 'top_left' refuses this attention. {text}"):
        choose_kernel("top_left", NEED, lambda: {SQUARE, RECTANGULAR})


def test_kinds_are_worked_out_only_for_kernels_that_refuse_one():
    def kinds():
        raise AssertionError("no kernel in the list refuses a kind of block")

    assert choose_kernel(None, NEED, kinds).name == "torch_cpu"
    assert choose_kernel("math", NEED, kinds).name == "math"


def chosen_over_ranks():
    """Under "gather" rank 0 has nothing but a square block, and yet refuses with the rank that has a rectangle."""
    mesh, rank = line(), torch.distributed.get_rank()
    case = make_case(22, dtype=torch.float32)
    with installed() as kernel:
        placed = [from_local(share(x, "contiguous", 2, rank), mesh, [Contiguous(1)], length=22) for x in case.inputs]
        with pytest.raises(NotImplementedError) as failure:
            ring_attention(*placed, strategy="gather", kernel="top_left")
        assert not kernel.kinds
        ring_attention(*placed, strategy="gather")
        assert not kernel.kinds
        out, lse = ring_attention(*placed, strategy="ring", return_lse=True)
        assert set(kernel.kinds) == ({SQUARE} if rank == 0 else {SQUARE, FULL})
    found = full_tensor(out), full_tensor(lse)
    for mine, exact in zip(found, case.exact(), strict=False):
        torch.testing.assert_close(mine, exact, rtol=0, atol=1e-5)
    return str(failure.value)


def test_ranks_refuse_a_kernel_together_whatever_their_own_blocks_are(pools):
    first, second = pools.run(2, chosen_over_ranks)
    assert first == second
    assert "top_left: aligns causal masks top-left, and this attention may have rectangular causal blocks" in first
