"""What `explain` says an attention costs is what its ranks count while they run, whatever carries it out."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import LAYOUTS, Case, make_case, share, some_or_every
from sweeps import swept
from torch.utils._python_dispatch import TorchDispatchMode

from dtensor_ring.comm import AloneTransport, LoopbackTransport, Transport
from dtensor_ring.ops.executors.head_groups import in_groups
from dtensor_ring.ops.executors.plan_executor import Executor
from dtensor_ring.ops.executors.protocol import AttentionExecutor
from dtensor_ring.ops.executors.ulysses import UlyssesExecutor
from dtensor_ring.ops.kernels import KERNELS, Saved, SoftmaxParams
from dtensor_ring.planning.costs import AttentionShape, RankCost, cost_of, costs
from dtensor_ring.planning.documents import Documents
from dtensor_ring.planning.layout import Layout
from dtensor_ring.planning.mask import Band
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.schedule import plan

KERNEL = {torch.bfloat16: "torch_cpu", torch.float64: "math"}


def executor_of(case: Case, layout: str, strategy: str, transport: Transport, group: int) -> AttentionExecutor:
    problem, options = case.problem(layout, transport.world, strategy), SoftmaxParams(0.3)
    kernel = KERNELS[KERNEL[case.q.dtype]]
    if strategy == "ulysses":
        return UlyssesExecutor(problem, transport, kernel, options)
    return in_groups(Executor(plan(problem, transport.rank), transport, kernel, options), group)


def run(case: Case, layout: str, world: int, strategy: str, group: int = 0) -> list[RankCost]:
    """Each rank's cost as its executor explains it, after it was compared with what the rank sent."""

    def rank_body(transport: LoopbackTransport) -> RankCost:
        q, k, v, dout = (
            share(x, layout, world, transport.rank, documents=case.documents).contiguous() for x in (*case.inputs, case.dout)
        )
        executor = executor_of(case, layout, strategy, transport, group)
        cost = executor.explain(q, k, v)
        assert transport.traffic.messages == 0, "explaining sends nothing"
        out, lse = executor.forward(q, k, v)
        forward = transport.traffic.copy()
        executor.backward(Saved(q, k, v, out, lse), dout)
        backward = transport.traffic.since(forward)
        assert (forward.messages, forward.bytes) == cost.forward
        assert (backward.messages, backward.bytes) == cost.backward
        assert (cost.rank, cost.tokens) == (transport.rank, q.shape[1])
        return cost

    return LoopbackTransport.run(world, rank_body)


def shape_of_case(case: Case) -> AttentionShape:
    batch, _, heads, dim = case.q.shape
    itemsize = case.q.dtype.itemsize
    return AttentionShape(heads, case.k.shape[2], dim, case.v.shape[3], batch, itemsize, itemsize)


def assert_costs(case: Case, layout: str, world: int, strategy: str) -> None:
    explained, problem, shape = run(case, layout, world, strategy), case.problem(layout, world, strategy), shape_of_case(case)
    assert explained == [cost_of(problem, rank, shape) for rank in range(world)]
    all_ranks = costs(problem, shape)
    assert all_ranks.tokens == tuple(cost.tokens for cost in explained)
    assert all_ranks.work == tuple(cost.work for cost in explained)
    assert all_ranks.bytes == tuple(cost.forward.bytes for cost in explained)
    rows = 1 if case.documents is not None and case.documents.rows > 1 else shape.batch
    whole = plan(case.problem("contiguous", 1, "ring"), 0)
    assert sum(all_ranks.work) == whole.cells * rows * shape.heads


SENT_LAYOUTS = [*LAYOUTS, "zigzag/documents"]
SENT_BY = ["ring", "gather", "ulysses"]


@some_or_every
@pytest.mark.parametrize(("layout", "strategy", "mask"), swept(SENT_LAYOUTS, SENT_BY, ["causal", "full", "window"]))
def test_ranks_send_what_their_executors_explain_forward_and_backward(layout, strategy, mask, every):
    """Each number of ranks, packed and not, in both dtypes; or three of them, the other three of the next layout or strategy."""
    dtypes, turn = (torch.bfloat16, torch.float64), SENT_LAYOUTS.index(layout) + SENT_BY.index(strategy)
    for i, (world, packed) in enumerate(itertools.product((1, 2, 4), (False, True))):
        if not every and (world // 2 + packed + turn) % 2:
            continue
        if layout == "zigzag/documents" and not packed:
            continue
        documents = Documents.from_lengths([10, 3, 30, 7]) if packed else None
        for dtype in dtypes if every else (dtypes[(i + i // 2) % 2],):
            case = make_case(50, mask=mask, documents=documents, dtype=dtype, heads=(8, 2))
            assert_costs(case, layout, world, strategy)


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (8, 2), (8, 8)])
@pytest.mark.parametrize("layout", ["zigzag", "stripe"])
def test_heads_that_change_places_are_counted_with_their_copies(heads, layout):
    for world, lengths in itertools.product((2, 4), ((33, 33), (7, 40), (3, 3))):  # three tokens leave a rank of four without any
        case = make_case(lengths[0], k_length=lengths[1], heads=heads, v_dim=5)
        assert_costs(case, layout, world, "ulysses")


@pytest.mark.parametrize("strategy", ["ring", "gather", "ulysses"])
def test_batch_rows_with_documents_of_their_own_are_counted_once(strategy):
    rows = Documents(((0, 9, 40), (0, 31, 40)))
    assert_costs(make_case(40, documents=rows, heads=(4, 2)), "zigzag", 2, strategy)


@pytest.mark.parametrize("strategy", ["ring", "gather"])
def test_groups_of_heads_send_as_many_bytes_in_more_messages(strategy):
    case = make_case(40, heads=(8, 4))
    whole = run(case, "zigzag", 2, strategy)
    for size in (1, 2, 3, 4):
        groups = -(-4 // size)
        for cost, all_at_once in zip(run(case, "zigzag", 2, strategy, size), whole, strict=True):
            assert (cost.work, cost.calls) == (all_at_once.work, groups * all_at_once.calls)
            assert cost.forward == (groups * all_at_once.forward.messages, all_at_once.forward.bytes)
            assert cost.backward == (groups * all_at_once.backward.messages, all_at_once.backward.bytes)


class NoOperators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func.name()} ran")


@pytest.mark.parametrize("strategy", ["ring", "ulysses"])
def test_explaining_reads_shapes_only(strategy):
    executor = executor_of(make_case(64, heads=(4, 2)), "zigzag", strategy, AloneTransport(), 0)
    q, k, v = (torch.empty(2, 64, heads, 8, dtype=torch.float64, device="meta") for heads in (4, 2, 2))
    with NoOperators():
        first, second = executor.explain(q, k, v), executor.explain(q, k, v)
    assert first == second
    assert first.work == 2 * 4 * 64 * 65 // 2


def test_costs_of_ulysses_make_no_plan_and_share_the_work_evenly():
    length, world, itemsize = 10_000_000, 32, 2
    problem = AttentionProblem(Layout("zigzag"), Band(0, None), length, length, world, "ulysses")
    counted = costs(problem, AttentionShape())
    assert counted.balance == 1.0
    assert set(counted.work) == {length * (length + 1) // 2}  # one head of 32 on each of 32 ranks
    # queries, outputs, and a copy of a key head and its values for each rank, all of 128 numbers; lse in float32
    assert set(counted.bytes) == {(world - 1) * length // world * (4 * 128 * itemsize + 4)}


def test_heads_that_cannot_be_shared_out_are_refused_with_the_numbers_that_could():
    problem = AttentionProblem(Layout("zigzag"), Band(0, None), 64, 64, 4, "ulysses")
    for ask in (lambda shape: costs(problem, shape), lambda shape: cost_of(problem, 0, shape)):
        with pytest.raises(ValueError, match=r"6 query and 2 key heads cannot be shared by 4 ranks: 1, 2, 6 ranks could"):
            ask(AttentionShape(heads=6, kv_heads=2))
