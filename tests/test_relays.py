"""Owner and peer apart: plans whose keys come from a rank that does not own them are right, forward and backward."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import count

import pytest
import torch
from helpers import LAYOUTS, SEED, Case, assert_exact, assert_like_kernel, make_case, share, single_device, solved, whole
from sweeps import swept

from dtensor_ring.comm import LoopbackTransport
from dtensor_ring.ops.executors.plan_executor import Executor
from dtensor_ring.ops.kernels import KERNELS, Saved, SoftmaxParams
from dtensor_ring.planning import schedule
from dtensor_ring.planning.documents import Documents
from dtensor_ring.planning.kernel_calls import Step, TokenRange, document_tiles, step_of
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.schedule import KeySend, Plan, plan
from dtensor_ring.tools.drawing import draw

Hop = tuple[int, int]  # owner and peer
DOCUMENTS = Documents.from_lengths([9, 1, 17, 30])


_NUMBERS = count()


@pytest.fixture
def planned(monkeypatch):
    """Lets a function of the test make the plans of a strategy, whose name it gives: new ones, since much is kept by problem."""
    original, makers = schedule._plan, {}

    def dispatch(book, rank):
        make = makers.get(book.problem.strategy)
        return original(book, rank) if make is None else make(book.problem, rank)

    def put(make: Callable[[AttentionProblem, int], Plan]) -> str:
        name = f"of a test {next(_NUMBERS)}"
        makers[name] = make
        return name

    monkeypatch.setattr(schedule, "_plan", dispatch)
    return put


def run(case: Case, layout: str, world: int, strategy: str, kernel: str, order: list[int]) -> tuple[torch.Tensor, ...]:
    """out, lse, dq, dk, dv; rank r of the layout is rank `order[r]` of the transport. Bytes are those that `explain` says."""
    problem = case.problem(layout, world, strategy)

    def rank_body(transport: LoopbackTransport):
        rank = order.index(transport.rank)
        q, k, v, dout = (share(x, layout, world, rank, documents=case.documents).contiguous() for x in (*case.inputs, case.dout))
        executor = Executor(plan(problem, rank), transport, KERNELS[kernel], SoftmaxParams(case.q.shape[-1] ** -0.5))
        cost = executor.explain(q, k, v)
        out, lse = executor.forward(q, k, v, SEED)
        forward = transport.traffic.copy()
        grads = executor.backward(Saved(q, k, v, out, lse), dout, SEED)[:3]
        backward = transport.traffic.since(forward)
        assert ((forward.messages, forward.bytes), (backward.messages, backward.bytes)) == (cost.forward, cost.backward)
        return rank, (out, lse, *grads)

    results = [tensors for _, tensors in sorted(LoopbackTransport.run(world, rank_body), key=lambda result: result[0])]
    dims = (1, 2, 1, 1, 1)
    return tuple(whole([tensors[i] for tensors in results], layout, dim, case.documents) for i, dim in enumerate(dims))


def renumbered(base: str, order: list[int]) -> Callable[[AttentionProblem, int], Plan]:
    """The planner's plans, sent over a transport whose ranks count in another order than the layout's."""

    def make(problem: AttentionProblem, rank: int) -> Plan:
        known = plan(replace(problem, strategy=base), rank)
        assert not known.problem.collective
        steps = tuple(replace(s, keys=tuple(k._replace(peer=order[k.peer]) for k in s.keys)) for s in known.steps)
        sends = tuple(
            tuple(s._replace(rank=order[s.rank], ranges=tuple(k._replace(peer=order[k.peer]) for k in s.ranges)) for s in sent)
            for sent in known.sends
        )
        return replace(known, problem=problem, steps=steps, sends=sends)

    return make


@pytest.mark.parametrize(
    ("packed", "layout", "base", "mask"),
    swept(
        [True, False],
        [*LAYOUTS, "zigzag/documents"],
        ["ring", "gather"],
        ["causal", "full", "window"],
        kept=lambda packed, layout, base, _: packed or (base == "ring" and layout != "zigzag/documents"),
    ),
)
def test_messages_go_to_the_peer_and_keys_are_the_owners(planned, packed, layout, base, mask):
    order = [2, 0, 3, 1]
    strategy = planned(renumbered(base, order))
    case, exact = solved(57, mask=mask, documents=DOCUMENTS if packed else None)
    assert_exact(run(case, layout, 4, strategy, "math", order), exact)


def relayed(hops: Callable[[int, int], Hop], steps: int) -> Callable[[AttentionProblem, int], Plan]:
    """Plans of whole shards: in step i of rank r, `hops(r, i)` says whose keys come, and from whom."""

    def step(problem: AttentionProblem, rank: int, index: int) -> Step:
        owner, peer = hops(rank, index)
        keys = (TokenRange(owner, 0, problem.k_local(owner), peer),) if problem.k_local(owner) else ()
        tiles = [
            (row, tile)
            for row in range(len(problem.bounds))
            for tile in document_tiles(
                problem.q_pieces(rank, row), problem.k_pieces(problem.k_runs(owner), row), problem.position_band
            )
        ]
        passed_on = any(hops(r, i) == (owner, rank) for r in range(problem.world) if r != rank for i in range(index + 1, steps))
        made = step_of(keys, tiles)
        return replace(made, sums=made.sums or (passed_on and owner != rank))

    def make(problem: AttentionProblem, rank: int) -> Plan:
        sends: list[tuple[KeySend, ...]] = []
        mine = [hops(rank, i)[0] for i in range(steps)]
        for index in range(steps):
            sent = []
            for other in (r for r in range(problem.world) if r != rank and hops(r, index)[1] == rank):
                theirs = step(problem, other, index)
                owner = hops(other, index)[0]
                if theirs.keys:
                    sent.append(KeySend(other, theirs.keys, theirs.sums, None if owner == rank else mine.index(owner)))
            sends.append(tuple(sent))
        every = tuple(step(problem, rank, i) for i in range(steps))
        return Plan(problem, rank, every, tuple(sends), 2 * steps, relays=True)

    return make


def around(world: int) -> Callable[[int, int], Hop]:
    """Every rank gets keys from the rank before it only: the ring of a text book."""
    return lambda rank, index: ((rank - index) % world, rank if index == 0 else (rank - 1) % world)


def two_hosts(rank: int, index: int) -> Hop:
    """Ranks 0 1 | 2 3: the neighbour's keys, those of the counterpart on the other host, and the neighbour's counterpart's."""
    neighbour, counterpart = rank ^ 1, rank ^ 2
    return [(rank, rank), (neighbour, neighbour), (counterpart, counterpart), (rank ^ 3, neighbour)][index]


PATTERNS = [(around(2), 2), (around(3), 3), (around(4), 4), (two_hosts, 4)]


@pytest.mark.parametrize(
    ("hops", "world", "packed", "layout", "mask"),
    swept(
        [hops for hops, _ in PATTERNS],
        [2, 3, 4],
        [True, False],
        [*LAYOUTS, "zigzag/documents"],
        ["causal", "full", "window"],
        kept=lambda hops, world, packed, layout, _: (hops, world) in PATTERNS and (packed or layout != "zigzag/documents"),
    ),
)
def test_keys_that_are_passed_on_and_gradients_that_return_through_the_same_ranks_are_exact(
    planned, hops, world, packed, layout, mask
):
    strategy = planned(relayed(hops, world))
    case, exact = solved(57, mask=mask, documents=DOCUMENTS if packed else None)
    assert_exact(run(case, layout, world, strategy, "math", list(range(world))), exact)


@pytest.mark.parametrize("length", [1, 3, 7])
def test_ranks_without_tokens_pass_on_nothing(planned, length):
    strategy = planned(relayed(around(4), 4))
    case = make_case(length)
    assert_exact(run(case, "zigzag", 4, strategy, "math", [0, 1, 2, 3]), case.exact())


@pytest.mark.parametrize(("hops", "world"), PATTERNS)
def test_gradients_in_16_bits_are_summed_in_float32_at_every_rank_on_their_journey(planned, hops, world):
    strategy = planned(relayed(hops, world))
    case = make_case(200, dim=32, dtype=torch.bfloat16)
    found = run(case, "zigzag", world, strategy, "torch_cpu", list(range(world)))
    assert_like_kernel(found, single_device(case, "torch_cpu"), case.exact())


def test_relays_and_other_numbers_go_together(planned):
    order = random.Random(1).sample(range(4), 4)

    def make(problem: AttentionProblem, rank: int) -> Plan:
        known = relayed(two_hosts, 4)(problem, rank)
        steps = tuple(replace(s, keys=tuple(k._replace(peer=order[k.peer]) for k in s.keys)) for s in known.steps)
        sends = tuple(tuple(s._replace(rank=order[s.rank]) for s in sent) for sent in known.sends)
        return replace(known, steps=steps, sends=sends)

    strategy = planned(make)
    case = make_case(40)
    assert_exact(run(case, "zigzag", 4, strategy, "math", order), case.exact())


def test_two_levels_send_half_as_many_keys_between_hosts(planned):
    strategy = planned(relayed(two_hosts, 4))

    def crossing(name: str) -> int:
        problem = make_case(64, mask="full").problem("zigzag", 4, name)
        plans = [plan(problem, rank) for rank in range(4)]
        keys = [(each.rank, keys) for each in plans for step in each.steps for keys in step.keys]
        return sum(each.size for rank, each in keys if rank // 2 != each.peer // 2)

    assert 2 * crossing(strategy) == crossing("ring")


def test_a_drawing_says_whose_keys_come_from_whom(planned):
    strategy = planned(relayed(two_hosts, 4))
    text = " ".join(draw(make_case(64, mask="full").problem("contiguous", 4, strategy), [0]).split())
    assert "step 2: rank 2 [0, 16)" in text
    assert "step 3: rank 3's from 1 [0, 16)" in text
    assert "sends rank 2's [0, 16) to rank 1" in text
