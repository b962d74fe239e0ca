from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import get_args

import pytest
from flash_windows import as_flash_attn_2
from helpers import examples
from hypothesis import example, given
from hypothesis import strategies as st

from dtensor_ring.debug import balance
from dtensor_ring.planning.documents import Documents
from dtensor_ring.planning.layout import Kind, Layout
from dtensor_ring.planning.mask import Band
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.schedule import plan
from dtensor_ring.planning.steps import Steps

LAYOUTS = [*map(Layout, get_args(Kind)), Layout("stripe", 2), Layout("stripe", 3)]
CAUSAL, FULL = Band(0, None), Band()


@st.composite
def problems(draw):
    world, length = draw(st.integers(1, 5)), draw(st.integers(0, 40))
    k_length = draw(st.one_of(st.just(length), st.integers(0, 40)))
    bound = st.one_of(st.none(), st.integers(-6, 14))
    band = draw(st.sampled_from([CAUSAL, FULL, Band(0, draw(st.integers(0, 12))), Band(draw(bound), draw(bound))]))
    if band.lo is not None and band.hi is not None and band.lo > band.hi:
        band = Band(band.hi, band.lo)
    documents = None
    if k_length == length and draw(st.booleans()):
        cuts = st.lists(st.integers(0, length), max_size=5)
        documents = Documents(tuple((0, *sorted(draw(cuts)), length) for _ in range(draw(st.integers(1, 2)))))
    return AttentionProblem(
        draw(st.sampled_from(LAYOUTS)), band, length, k_length, world, draw(st.sampled_from(["ring", "gather"])), documents
    )


def computed(problem: AttentionProblem, row: int, reading=lambda window, longest_k: window) -> Counter[tuple[int, int]]:
    """How often the plans compute each (query position, key position) of a batch row, by brute force.

    `reading` is how a kernel reads a window where the longest segment of a call has so many keys.
    """
    seen: Counter[tuple[int, int]] = Counter()
    keys_of = [problem.layout.tokens(problem.k_length, problem.world, rank) for rank in range(problem.world)]
    for rank in range(problem.world):
        queries = problem.layout.tokens(problem.q_length, problem.world, rank)
        for step in plan(problem, rank).steps:
            buffer = [keys_of[rows.owner][i] for rows in step.keys for i in range(rows.start, rows.stop)]
            for call in step.calls:
                left, right = reading(call.window, max(s.k1 - s.k0 for s in call.segments))
                for segment in call.segments:
                    if len(problem.bounds) > 1 and segment.row != row:
                        continue
                    offset = (segment.k1 - segment.k0) - (segment.q1 - segment.q0)
                    for i in range(segment.q1 - segment.q0):
                        for j in range(segment.k1 - segment.k0):
                            if (left < 0 or j >= i + offset - left) and (right < 0 or j <= i + offset + right):
                                seen[queries[segment.q0 + i], buffer[segment.k0 + j]] += 1
    return seen


def allowed(problem: AttentionProblem, row: int) -> set[tuple[int, int]]:
    band, shift, bounds = problem.band, problem.k_length - problem.q_length, problem.bounds[row]
    document = (lambda token: 0) if bounds is None else (lambda token: Documents.find(bounds, token))
    return {
        (p, t)
        for p in range(problem.q_length)
        for t in range(problem.k_length)
        if (band.lo is None or p + shift - t >= band.lo)
        and (band.hi is None or p + shift - t <= band.hi)
        and document(p) == document(t)
    }


@examples(600)
@given(problems())
@example(AttentionProblem(Layout("stripe", 3), Band(0, 7), 40, 40, 3, "ring", Documents.from_lengths([11, 29])))
@example(AttentionProblem(Layout("zigzag"), CAUSAL, 7, 40, 4, "gather"))
def test_every_allowed_score_is_computed_exactly_once_and_no_other(problem):
    for row in range(len(problem.bounds)):
        assert computed(problem, row) == Counter(allowed(problem, row))


@examples(400)
@given(problems())
@example(
    AttentionProblem(Layout("contiguous"), Band(0, 25), 40, 40, 4, "ring", Documents.from_lengths([7, 33]))
)  # more rows than keys
@example(AttentionProblem(Layout("zigzag"), Band(-9, None), 24, 24, 4))  # a side ahead of as many tokens as there are keys
def test_flash_attention_2_reads_the_windows_of_plans_as_they_are_meant(problem):
    for row in range(len(problem.bounds)):
        assert computed(problem, row, as_flash_attn_2) == Counter(allowed(problem, row))


@examples(300)
@given(problems())
def test_work_is_counted_in_scores(problem):
    rows = range(len(problem.bounds))
    assert sum(plan(problem, rank).cells for rank in range(problem.world)) == sum(len(allowed(problem, row)) for row in rows)


@examples(300)
@given(problems())
def test_what_a_rank_sends_is_what_the_others_expect_and_a_call_reads(problem):
    for rank in range(problem.world):
        each = plan(problem, rank)
        for index, step in enumerate(each.steps):
            read = {key for call in step.calls for s in call.segments for key in range(s.k0, s.k1)}
            if not problem.collective:
                assert read == set(range(step.key_count))
            for source in {rows.owner for rows in step.keys} - {rank}:
                if not problem.collective:
                    (sent,) = [send for send in plan(problem, source).sends[index] if send.rank == rank]
                    assert sent.ranges == tuple(rows for rows in step.keys if rows.owner == source)
                    assert sent.sums == step.sums
        expected = sum(
            rows.owner == rank
            for other in range(problem.world)
            if other != rank
            for step in plan(problem, other).steps
            for rows in step.keys
        )
        if not problem.collective:
            assert sum(len(send.ranges) for sends in each.sends for send in sends) == expected


@examples(200)
@given(problems())
def test_segments_of_a_call_are_disjoint_and_increasing_in_rows_and_keys(problem):
    for rank in range(problem.world):
        for step in plan(problem, rank).steps:
            for call in step.calls:
                for a, b in zip(call.segments, call.segments[1:], strict=False):
                    assert a.row < b.row or (a.q1 <= b.q0 and a.k1 <= b.k0)


@examples(300)
@given(problems())
def test_no_rank_but_the_takers_has_keys_of_a_rank_in_a_step(problem):
    if problem.collective:  # one all-gather, nothing is sent to anybody
        return
    steps = Steps(problem)
    for index in range(steps.count):
        peers = [{keys.peer for keys in steps.make(other, index).keys} for other in range(problem.world)]
        for rank in range(problem.world):
            served = steps.takers(rank, index)
            assert len(served) == len({*served, rank}) - 1
            assert {other for other in range(problem.world) if other != rank and rank in peers[other]} <= set(served)


def test_no_plan_is_made_for_a_strategy_that_has_no_steps():
    problem = AttentionProblem(Layout("zigzag"), CAUSAL, 16, 16, 4, "ulysses")
    for unplanned in (problem, replace(problem, strategy="unheard of")):
        with pytest.raises(AssertionError, match=f"no plan is made for strategy {unplanned.strategy!r}"):
            plan(unplanned, 0)
    assert plan(problem.planned, 0).cells == 16 * 17 // 2
    assert replace(problem, strategy="ring").planned == replace(problem, strategy="ring")


@examples(300)
@given(problems())
@example(AttentionProblem(Layout("contiguous"), FULL, 40, 40, 3))
def test_contributions_are_counted_for_every_row(problem):
    for rank in range(problem.world):
        each = plan(problem, rank)
        counts = Counter((s.row, i) for step in each.steps for call in step.calls for s in call.segments for i in range(s.q0, s.q1))
        assert each.q_parts == max(counts.values(), default=0)
        assert all(row in range(len(problem.bounds)) for row, _ in counts)


@examples(300)
@given(problems())
@example(AttentionProblem(Layout("zigzag"), CAUSAL, 40, 40, 4, "ring", Documents(((0, 9, 40), (0, 31, 40)))))
def test_sums_tell_where_a_key_row_takes_part_in_several_calls(problem):
    for rank in range(problem.world):
        for step in plan(problem, rank).steps:
            uses = Counter((s.row, j) for call in step.calls for s in call.segments for j in range(s.k0, s.k1))
            assert step.sums == (max(uses.values(), default=0) > 1)


def causal(kind: str, world: int, length: int, strategy: str = "ring", block: int = 1) -> list:
    problem = AttentionProblem(Layout(kind, block), CAUSAL, length, length, world, strategy)
    return [plan(problem, rank) for rank in range(world)]


@pytest.mark.parametrize("world", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["zigzag", "stripe"])
def test_balanced_layouts_make_one_call_a_step_the_own_one_causal(kind, world):
    for each in causal(kind, world, 64 * world):
        assert [len(step.calls) for step in each.steps] == [1] * world
        assert each.steps[0].calls[0].window == (-1, 0)
        assert len(each.steps[0].calls[0].segments) == 1
        if kind == "zigzag":
            assert all(step.calls[0].window == (-1, -1) for step in each.steps[1:])


@pytest.mark.parametrize("world", [2, 4])
def test_a_stripe_of_blocks_adds_one_packed_call_a_visitor(world):
    for each in causal("stripe", world, 16 * world, block=4):
        assert [len(step.calls) for step in each.steps] == [1] + [2] * (world - 1)


@pytest.mark.parametrize("world", [2, 3, 4, 8])
@pytest.mark.parametrize("length", [1, 7, 64, 1000, 1023])
def test_zigzag_work_is_equal_within_a_row_of_scores(world, length):
    work = [each.cells for each in causal("zigzag", world, length)]
    assert max(work) - min(work) <= 2 * length  # a token more or less on a rank is a row and a column of scores at most
    if length % (2 * world) == 0:
        assert max(work) == min(work) == length * (length + 1) // 2 // world


@pytest.mark.parametrize("world", [2, 4, 8])
def test_stripe_work_differs_by_one_score_a_token(world):
    length = 32 * world
    work = [each.cells for each in causal("stripe", world, length)]
    assert max(work) - min(work) == (world - 1) * length // world


@pytest.mark.parametrize("world", [2, 4, 8])
def test_contiguous_balance_is_known(world):
    chunk = 32
    plans = causal("contiguous", world, chunk * world)
    assert [each.cells for each in plans] == [chunk * chunk * rank + chunk * (chunk + 1) // 2 for rank in range(world)]
    assert balance(plans) == pytest.approx((chunk * world + 1) / (chunk * (2 * world - 1) + 1))


@pytest.mark.parametrize("world", [2, 4, 8])
def test_rows_sent_follow_the_formulas(world):
    chunk = 16
    length = 2 * world * chunk
    for rank, each in enumerate(causal("zigzag", world, length)):
        # ranks after this one need its early chunk, ranks before it both chunks
        assert each.key_tokens_sent == (world - 1 - rank) * chunk + rank * 2 * chunk
        assert each.messages == world - 1
    for rank, each in enumerate(causal("contiguous", world, length)):
        assert each.key_tokens_sent == (world - 1 - rank) * 2 * chunk
    for rank, each in enumerate(causal("stripe", world, length)):
        # ranks before this one attend strictly before its last token
        assert each.key_tokens_sent == (world - 1) * 2 * chunk - rank
    for each in causal("zigzag", world, length, "gather"):
        assert each.key_tokens_sent == (world - 1) * 2 * chunk


@pytest.mark.parametrize("window", [3, 10])
@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
def test_a_window_fetches_only_the_keys_around_each_run_and_makes_one_call(kind, window):
    world, chunk = 4, 64
    problem = AttentionProblem(Layout(kind), Band(0, window), 2 * world * chunk, 2 * world * chunk, world)
    assert problem.is_halo
    sent = 0
    for rank in range(world):
        each = plan(problem, rank)
        assert each.calls == 1
        sent += each.key_tokens_sent
    # every boundary between runs of two ranks is crossed by `window` keys, once
    boundaries = world - 1 if kind == "contiguous" else 2 * world - 2
    assert sent == boundaries * window


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(2, 4), st.integers(0, 50))
@example([4] * 32, 4, 30)  # whole documents fetch nothing, however long the window
def test_documents_cut_one_by_one_are_a_halo_where_a_window_fetches_at_most_twice_the_local_keys(lengths, world, window):
    documents = Documents.from_lengths(lengths)
    problem = AttentionProblem(
        Layout.parse("zigzag/documents"), Band(0, window), documents.length, documents.length, world, "ring", documents
    )
    (bounds,) = problem.bounds
    fetched = [
        sum(min(window, run.start - bounds[Documents.find(bounds, run.start)]) for run in problem.q_runs(rank))
        for rank in range(world)
    ]
    assert problem.is_halo == (max(fetched) * world <= 2 * documents.length)


def test_a_window_with_documents_makes_one_call_too():
    documents = Documents.from_lengths([100, 3, 1, 200, 208])
    for kind in ("contiguous", "zigzag"):
        problem = AttentionProblem(Layout(kind), Band(0, 10), 512, 512, 4, "ring", documents)
        assert [plan(problem, rank).calls for rank in range(4)] == [1] * 4


def test_packed_documents_send_only_what_crosses_ranks():
    documents = Documents.from_lengths([8] * 8)
    problem = AttentionProblem(Layout("contiguous"), CAUSAL, 64, 64, 4, "ring", documents)
    assert [plan(problem, rank).key_tokens_sent for rank in range(4)] == [0, 0, 0, 0]
    straddling = AttentionProblem(Layout("contiguous"), CAUSAL, 64, 64, 4, "gather", Documents.from_lengths([14, 4, 46]))
    assert [plan(straddling, rank).key_tokens_sent for rank in range(4)] == [2, 14 + 14, 16, 0]


def test_causal_gather_needs_no_merging_where_keys_lie_in_order():
    for kind in ("contiguous", "zigzag"):
        for each in causal(kind, 4, 64, "gather"):
            assert each.q_parts == 1
