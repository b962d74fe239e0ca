"""Keys that travel and gradients that come back: the right rows, each row's sum, and no work that grows with the documents."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from threading import get_ident

import pytest
import torch
from helpers import LAYOUTS, SEED, make_case, share
from torch.utils._python_dispatch import TorchDispatchMode

from dtensor_ring.comm import LoopbackTransport, Pending
from dtensor_ring.ops.executors.collective import gather, scatter
from dtensor_ring.ops.executors.exchange import Exchange
from dtensor_ring.ops.executors.gradients import GradSum
from dtensor_ring.ops.executors.plan_executor import Executor
from dtensor_ring.ops.kernels import KERNELS, Saved, SoftmaxParams
from dtensor_ring.planning.documents import Documents
from dtensor_ring.planning.layout import Layout
from dtensor_ring.planning.mask import Band, mask_text
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.schedule import Plan, plan

HEADS, DIM = 2, 3
PACKED = ("contiguous", "zigzag", "zigzag/documents")
MASKS = {"causal": (True, (-1, -1)), "window": (True, (9, 0)), "both sides": (False, (4, 3)), "full": (False, (-1, -1))}


class CountedOps(TorchDispatchMode):
    """How many operators ran inside."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def random_documents(count: int, length: int, seed: int = 0) -> Documents:
    return Documents(((0, *sorted(random.Random(seed).sample(range(1, length), count - 1)), length),))


def problem_of(
    layout: str, strategy: str, world: int, mask: str, documents: Documents | None, length: int = 64
) -> AttentionProblem:
    length = documents.length if documents else length
    return AttentionProblem(Layout.parse(layout), Band.parse(mask_text(*MASKS[mask])), length, length, world, strategy, documents)


def same_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype


def peers_of(each: Plan, index: int) -> int:
    """Ranks that a rank sends to or gets keys from in a step."""
    return len(each.sends[index]) + len({rows.owner for rows in each.steps[index].keys} - {each.rank})


def sweep() -> Iterator[AttentionProblem]:
    for world, strategy in ((2, "ring"), (3, "ring"), (3, "gather"), (4, "gather")):
        for mask in MASKS:
            for layout in LAYOUTS:
                yield problem_of(layout, strategy, world, mask, None)
            for count, seed in ((2, 1), (9, 2), (40, 3)):
                for layout in (*PACKED, "stripe:3"):
                    yield problem_of(layout, strategy, world, mask, random_documents(count, 64, seed))
            rows = Documents(tuple(random_documents(n, 64, n).bounds[0] for n in (3, 11)))
            yield problem_of("zigzag", strategy, world, mask, rows)


# Batches of one row are tried on every second problem, of two rows on the others; both on all as slow tests.
SWEPT = [pytest.param(0, 1, id="1"), pytest.param(1, 2, id="2")]
SWEPT += [pytest.param(None, batch, id=f"{batch} every", marks=pytest.mark.slow) for batch in (1, 2)]


def part_of_sweep(half: int | None) -> list[AttentionProblem]:
    """All problems, or half of them."""
    return list(sweep())[half or 0 :: 1 if half is None else 2]


def shard(problem: AttentionProblem, rank: int, batch: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Keys whose elements tell rank, batch row and stored row."""
    rows = torch.arange(problem.k_local(rank), dtype=torch.float64)[None, :, None, None] + 1000 * rank
    whole = rows + 100_000 * torch.arange(batch)[:, None, None, None] + 0.25 * torch.arange(HEADS)[:, None]
    return whole.repeat(1, 1, 1, DIM).to(dtype)


@pytest.mark.parametrize(("half", "batch"), SWEPT)
def test_a_step_gets_its_rows_in_order_and_the_plan_says_what_travels(half, batch):
    for problem in part_of_sweep(half):
        shards = [shard(problem, rank, batch) for rank in range(problem.world)]

        def rank_body(transport, problem=problem, shards=shards):
            each = plan(problem, transport.rank)
            exchange = Exchange(each, transport, same_dtype)
            k = shards[transport.rank]
            for index, step in enumerate(each.steps):
                before = transport.traffic.copy()
                keys, values = exchange.fetch(index, (k, k[..., :2] + 0.5), "forward").wait()
                wanted = [shards[rows.owner][:, rows.start : rows.stop] for rows in step.keys] or [k[:, :0]]
                assert torch.equal(keys, torch.cat(wanted, 1))
                assert torch.equal(values, torch.cat(wanted, 1)[..., :2] + 0.5)
                if not problem.collective:
                    sent, rows = (
                        transport.traffic.since(before),
                        sum(keys.size for send in each.sends[index] for keys in send.ranges),
                    )
                    assert (sent.messages, sent.bytes) == (2 * len(each.sends[index]), batch * rows * HEADS * (DIM + 2) * 8)

        LoopbackTransport.run(problem.world, rank_body)


def gradients(problem: AttentionProblem, rank: int, index: int, batch: int, dtype: torch.dtype) -> torch.Tensor:
    """The gradients that a rank's step finds for its key buffer."""
    generator = torch.Generator().manual_seed(100 * rank + index)
    return torch.randn(
        (batch, plan(problem, rank).steps[index].key_count, HEADS, DIM), generator=generator, dtype=torch.float64
    ).to(dtype)


@pytest.mark.parametrize(("half", "batch"), SWEPT)
def test_an_own_row_gets_the_sum_of_what_all_steps_found_for_it(half, batch):
    for problem in part_of_sweep(half):
        sums = [torch.zeros(batch, problem.k_local(rank), HEADS, DIM, dtype=torch.float64) for rank in range(problem.world)]
        for rank in range(problem.world):
            for index, step in enumerate(plan(problem, rank).steps):
                grad, offset = gradients(problem, rank, index, batch, torch.float64), 0
                for rows in step.keys:
                    sums[rows.owner][:, rows.start : rows.stop] += grad[:, offset : offset + rows.size]
                    offset += rows.size

        def rank_body(transport, problem=problem, sums=sums):
            each = plan(problem, transport.rank)
            exchange = Exchange(each, transport, same_dtype)
            like = shard(problem, transport.rank, batch)
            own = GradSum((like, like[..., :2]))
            for index in range(len(each.steps)):
                grad = gradients(problem, transport.rank, index, batch, torch.float64)
                exchange.give_back(index, (grad, grad[..., :2].contiguous()), own).wait()
            for total, wanted in zip(own.result(torch.float64), (sums[transport.rank], sums[transport.rank][..., :2]), strict=True):
                torch.testing.assert_close(total, wanted, rtol=0, atol=1e-12)

        LoopbackTransport.run(problem.world, rank_body)


@pytest.mark.parametrize("half", [0, 1])
def test_the_sweep_has_a_row_that_one_peer_needs_twice(half):
    sends = [
        send for problem in part_of_sweep(half) for r in range(problem.world) for sent in plan(problem, r).sends for send in sent
    ]
    assert any(a.start < b.stop and b.start < a.stop for send in sends for i, a in enumerate(send.ranges) for b in send.ranges[:i])


SUMMED = [(layout, mask) for layout in (*PACKED, "stripe:3") for mask in MASKS]


@pytest.mark.parametrize(("layout", "mask"), SUMMED)
def test_gradients_in_16_bits_are_summed_in_float32_own_part_first_then_by_peer(layout, mask):
    problem = problem_of(layout, "gather", 4, mask, random_documents(12, 96, 3))
    wanted = []
    for owner in range(4):
        total = torch.zeros(2, problem.k_local(owner), HEADS, DIM)
        for rank in (owner, *(r for r in range(4) if r != owner)):
            grad, offset = gradients(problem, rank, 0, 2, torch.bfloat16).float(), 0
            for rows in plan(problem, rank).steps[0].keys:
                if rows.owner == owner:
                    total[:, rows.start : rows.stop] += grad[:, offset : offset + rows.size]
                offset += rows.size
        wanted.append(total)

    def rank_body(transport):
        like = shard(problem, transport.rank, 2, torch.bfloat16)
        own = GradSum((like, like))
        grad = gradients(problem, transport.rank, 0, 2, torch.bfloat16)
        Exchange(plan(problem, transport.rank), transport, same_dtype).give_back(0, (grad, grad.clone()), own).wait()
        totals = own.result(torch.float32)
        assert all(torch.equal(total, wanted[transport.rank]) for total in totals)

    LoopbackTransport.run(4, rank_body)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "stripe"])
def test_gradients_of_one_stage_are_summed_in_float32_own_part_first_then_by_peer(layout):
    """Also where each peer returns one range of keys, which needs no index."""
    problem = replace(problem_of(layout, "ring", 4, "full", None), stages=1)
    wanted = []
    for owner in range(4):
        total = torch.zeros(1, problem.k_local(owner), HEADS, DIM)
        for index, rank in ((0, owner), *((1, rank) for rank in range(4) if rank != owner)):
            grad, offset = gradients(problem, rank, index, 1, torch.bfloat16).float(), 0
            for rows in plan(problem, rank).steps[index].keys:
                if rows.owner == owner:
                    total[:, rows.start : rows.stop] += grad[:, offset : offset + rows.size]
                offset += rows.size
        wanted.append(total)

    def rank_body(transport):
        like = shard(problem, transport.rank, 1, torch.bfloat16)
        own, exchange = GradSum((like, like)), Exchange(plan(problem, transport.rank), transport, same_dtype)
        for index in (0, 1):
            grad = gradients(problem, transport.rank, index, 1, torch.bfloat16)
            exchange.give_back(index, (grad, grad.clone()), own).wait()
        assert all(torch.equal(total, wanted[transport.rank]) for total in own.result(torch.float32))

    LoopbackTransport.run(4, rank_body)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("strategy", ["ring", "gather"])
@pytest.mark.parametrize("layout", PACKED)
def test_the_operators_of_a_transfer_grow_with_peers_and_not_with_documents(layout, strategy, batch):
    world = 4
    for count in (2, 200):
        problem = problem_of(layout, strategy, world, "causal", random_documents(count, 1600))

        def rank_body(transport, problem=problem):
            each = plan(problem, transport.rank)
            exchange = Exchange(each, transport, same_dtype)
            k = shard(problem, transport.rank, batch)
            for _ in range(2):  # index tensors are made the first time
                counts = []
                own = GradSum((k, k))
                for index in range(len(each.steps)):
                    with CountedOps() as fetched:
                        keys = exchange.fetch(index, (k, k), "forward").wait()
                    grads = keys[0].clone(), keys[1].clone()
                    with CountedOps() as returned:
                        exchange.give_back(index, grads, own).wait()
                        if index + 1 < len(each.steps):  # as a backward pass does before the next return
                            own.flush()
                    counts.append((fetched.count, returned.count, peers_of(each, index)))
            return counts

        for counts in LoopbackTransport.run(world, rank_body):
            for fetched, returned, peers in counts:  # a peer's slice, view, and what the loopback transport does with a message
                assert fetched <= 2 * (6 + 4 * peers)
                assert returned <= 2 * (12 + 4 * peers)


def test_some_rank_gets_sums_of_one_peer_and_single_gradients_of_another():
    plans = [
        plan(problem_of(layout, "gather", 4, mask, random_documents(12, 96, 3)), r) for layout, mask in SUMMED for r in range(4)
    ]
    assert any({send.sums for send in each.sends[0]} == {True, False} for each in plans)


def test_one_range_of_own_keys_is_fetched_without_a_copy():
    problem = problem_of("zigzag", "ring", 2, "causal", random_documents(5, 64))

    def rank_body(transport):
        k, v = shard(problem, transport.rank, 2), shard(problem, transport.rank, 2)
        keys, values = Exchange(plan(problem, transport.rank), transport, same_dtype).fetch(0, (k, v), "forward").wait()
        assert (keys.data_ptr(), values.data_ptr()) == (k.data_ptr(), v.data_ptr())

    LoopbackTransport.run(2, rank_body)


@pytest.mark.parametrize("strategy", ["ring", "gather"])
@pytest.mark.parametrize("layout", PACKED)
def test_packed_results_are_bitwise_the_same_in_twenty_runs(layout, strategy):
    documents = random_documents(7, 60, 4)
    case = make_case(60, documents=documents, dtype=torch.bfloat16)
    problem = case.problem(layout, 3, strategy)

    def rank_body(transport):
        q, k, v, dout = (share(x, layout, 3, transport.rank, documents=documents).contiguous() for x in (*case.inputs, case.dout))
        executor = Executor(plan(problem, transport.rank), transport, KERNELS["torch_cpu"], SoftmaxParams(0.3, deterministic=True))
        runs = []
        for _ in range(20):
            out, lse = executor.forward(q, k, v, SEED)
            runs.append((out, lse, *executor.backward(Saved(q, k, v, out, lse), dout, SEED)[:3]))
        return runs

    for first, *others in LoopbackTransport.run(3, rank_body):
        assert all(torch.equal(a, b) for run in others for a, b in zip(first, run, strict=True))


@pytest.mark.parametrize("length", [24, 22])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_keys_and_values_of_all_ranks_travel_together_and_are_copied_only_where_they_lie_apart(layout, batch, length):
    """Values of another head dim, shares of other lengths: the keys in order, and gradients summed for the rank that has them."""
    world, problem = 3, problem_of(layout, "gather", 3, "full", None, length)
    whole = torch.randn(batch, length, HEADS, DIM), torch.randn(batch, length, HEADS, 5)

    def of_rank(transport: LoopbackTransport):
        todo, kv = plan(problem, transport.rank), tuple(share(x, layout, world, transport.rank) for x in whole)
        gathered: list[torch.Tensor] = []
        all_gather = transport.all_gather
        transport.all_gather = lambda rows: Pending(lambda: gathered.append(got := all_gather(rows).wait()) or got)
        k, v = gather(todo, transport, kv).wait()
        own = GradSum(kv)
        scatter(todo, transport, (transport.rank * k, -v), own).wait()
        return k, v, gathered[0].untyped_storage().data_ptr() == k.untyped_storage().data_ptr(), own.result(k.dtype)

    found = LoopbackTransport.run(world, of_rank)
    for rank, (k, v, is_view, grads) in enumerate(found):
        assert k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
        order = torch.cat([torch.arange(rows.start, rows.stop) + 100 * rows.owner for rows in plan(problem, rank).steps[0].keys])
        tokens = torch.tensor([problem.k_tokens(place // 100)[place % 100] for place in order.tolist()])
        assert all(torch.equal(mine, x[:, tokens]) for mine, x in zip((k, v), whole, strict=True))
        assert is_view == (layout == "contiguous" and batch == 1 and length % world == 0)
        kv = [share(x, layout, world, rank) for x in whole]
        torch.testing.assert_close(grads[0], sum(range(world)) * kv[0])
        torch.testing.assert_close(grads[1], -world * kv[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_start_a_transfer_in_steps_in_which_something_travels_alone(layout, monkeypatch):
    """Own keys come first, and no rank takes part in an exchange for them: a plan has as many as it has stages, three times."""
    world, started = 3, []
    exchange = LoopbackTransport.exchange
    monkeypatch.setattr(
        LoopbackTransport, "exchange", lambda self, *messages: started.append(self.rank) or exchange(self, *messages)
    )
    for stages in (1, 2):
        problem = problem_of(layout, "ring", world, "causal", None).staged(stages)
        started.clear()
        case = make_case(64, heads=(HEADS, HEADS), dim=DIM)

        def of_rank(transport: LoopbackTransport, problem=problem, case=case):
            q, k, v, dout = (share(x, layout, world, transport.rank).contiguous() for x in (*case.inputs, case.dout))
            executor = Executor(plan(problem, transport.rank), transport, KERNELS["math"], SoftmaxParams(1.0))
            out, lse = executor.forward(q, k, v, seed=SEED)
            executor.backward(Saved(q, k, v, out, lse), dout, seed=SEED)

        LoopbackTransport.run(world, of_rank)
        # Keys in both passes, and gradients.
        assert sorted(started) == [rank for rank in range(world) for _ in range(3 * stages)]


@pytest.mark.parametrize(("stages", "sums"), [(1, 0), (2, 2), (3, 3)])
def test_gradients_of_queries_do_not_pile_up_over_the_steps(stages, sums, monkeypatch):
    """With one stage they wait for the own keys'; with more each step's are added to one sum before the next."""
    flushed, flush = Counter(), GradSum.flush

    def counted(total: GradSum) -> None:
        flushed[get_ident()] += len(total.likes) == 1  # dq alone; dk and dv have another sum
        flush(total)

    monkeypatch.setattr(GradSum, "flush", counted)
    problem, case = problem_of("zigzag", "ring", 4, "causal", None).staged(stages), make_case(64, heads=(HEADS, HEADS), dim=DIM)

    def of_rank(transport: LoopbackTransport) -> int:
        q, k, v, dout = (share(x, "zigzag", 4, transport.rank).contiguous() for x in (*case.inputs, case.dout))
        executor = Executor(plan(problem, transport.rank), transport, KERNELS["math"], SoftmaxParams(1.0))
        out, lse = executor.forward(q, k, v)
        executor.backward(Saved(q, k, v, out, lse), dout)
        return flushed[get_ident()]

    assert LoopbackTransport.run(4, of_rank) == [sums] * 4


def test_a_step_without_transfers_has_own_keys_alone_on_every_rank():
    begin_alone = 0
    for problem in sweep():
        plans = [plan(problem, rank) for rank in range(problem.world)]
        assert len({each.begins_alone for each in plans}) == 1
        if plans[0].begins_alone:
            begin_alone += 1
            for each in plans:
                assert not each.sends[0]
                assert {keys.owner for keys in each.steps[0].keys} <= {each.rank}
    assert begin_alone > 10
    # Who makes a plan by hand has not promised that.
    assert not Plan(problem, 0, plans[0].steps, plans[0].sends, 1).begins_alone
