"""What a rank sends, read off the table of who holds what, is what the other ranks' own steps need; and reading it stays cheap."""

from __future__ import annotations

from itertools import pairwise

import pytest
from helpers import examples
from hypothesis import example, given
from hypothesis import strategies as st

from dtensor_ring.planning import kernel_calls
from dtensor_ring.planning.documents import Documents
from dtensor_ring.planning.holders import Arc, holders
from dtensor_ring.planning.layout import Layout
from dtensor_ring.planning.mask import Band
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.schedule import KeySend, _book, plan
from dtensor_ring.planning.steps import Steps

IN_ORDER = ["contiguous", "zigzag", "zigzag/documents"]
LAYOUTS = [*IN_ORDER, "stripe:1", "stripe:3"]
CAUSAL = Band(0, None)


@st.composite
def bands(draw):
    """Causal, full, narrow and wide windows, and bands that leave the diagonal out, or everything."""
    side = st.one_of(st.none(), st.integers(-6, 14), st.integers(0, 60))
    return draw(st.one_of(st.sampled_from([CAUSAL, Band()]), st.builds(Band, st.just(0), side), st.builds(Band, side, side)))


@st.composite
def problems(draw):
    """Every layout, mask, strategy and number of stages, with and without documents, in one row of bounds or several."""
    layout, world, length = Layout.parse(draw(st.sampled_from(LAYOUTS))), draw(st.integers(1, 9)), draw(st.integers(0, 80))
    k_length, documents = length, None
    if layout.cut or draw(st.booleans()):
        bounds = st.lists(st.integers(0, length), max_size=8).map(lambda inner: (0, *sorted(inner), length))
        documents = Documents(tuple(draw(st.lists(bounds, min_size=1, max_size=1 if layout.cut else 3))))
    elif draw(st.booleans()):
        k_length = draw(st.integers(0, 80))
    strategy, stages = draw(st.sampled_from(["ring", "ring", "gather"])), draw(st.integers(0, 9))
    return AttentionProblem(layout, draw(bands()), length, k_length, world, strategy, documents, stages)


@examples(600)
@given(problems())
@example(AttentionProblem(Layout("zigzag"), Band(None, 6), 36, 36, 7, "ring", Documents.from_lengths([10, 19, 7])))
@example(AttentionProblem(Layout("zigzag"), Band(-9, None), 40, 40, 4, "gather", Documents(((0, 9, 40), (0, 31, 40)))))
@example(AttentionProblem(Layout("contiguous"), Band(0, 25), 40, 40, 4, "ring", Documents.from_lengths([7, 33])))
@example(AttentionProblem(Layout("zigzag"), Band(-3, 7), 8, 80, 5))
def test_a_rank_sends_what_planning_for_every_other_rank_finds(problem):
    if problem.collective:  # one all-gather, nothing is sent to anybody
        return
    steps = Steps(problem)
    for index in range(steps.count):
        made = [steps.make(rank, index) for rank in range(problem.world)]
        for rank in range(problem.world):
            found = {}
            for other, step in enumerate(made):
                ranges = tuple(keys for keys in step.keys if keys.owner == rank)
                if other != rank and ranges:
                    found[other] = KeySend(other, ranges, step.sums)
            sends = plan(problem, rank).sends[index]
            assert {send.rank: send for send in sends} == found
            assert len(sends) == len(found)


@given(problems())
def test_no_rank_is_planned_for_but_the_one_that_is_asked_for(problem):
    if not problem.in_order:  # of stripes, what others need is read off their steps
        return
    _book.cache_clear()
    plan(problem, problem.world - 1)
    book = _book(problem)
    assert list(book.plans) == [problem.world - 1]
    assert not book.needs


@st.composite
def tables(draw):
    """What a table of holders is made of."""
    layout, world = Layout.parse(draw(st.sampled_from(IN_ORDER))), draw(st.integers(1, 9))
    lengths = draw(st.lists(st.integers(0, 30), max_size=8))
    documents = Documents.from_lengths(lengths) if layout.cut or draw(st.booleans()) else None
    return layout, sum(lengths), world, documents


@given(tables())
def test_the_table_has_every_token_where_its_rank_stores_it(case):
    layout, length, world, documents = case
    table = holders(layout, length, world, documents)
    bounds = None if documents is None else documents.bounds[0]
    assert [token for held in table.runs for token in range(held.start, held.stop)] == list(range(length))
    for rank in range(world):
        tokens = layout.tokens(length, world, rank, bounds)
        for held in table.of_rank[rank]:
            assert held.rank == rank
            assert tokens[held.offset : held.offset + held.stop - held.start] == list(range(held.start, held.stop))
        assert sum(held.stop - held.start for held in table.of_rank[rank]) == len(tokens)
    assert sorted(held for of_rank in table.of_rank for held in of_rank) == list(table.runs)


@given(tables(), st.data())
def test_runs_between_two_positions_are_those_that_hold_them(case, data):
    layout, length, world, documents = case
    table = holders(layout, length, world, documents)
    low, high = sorted(data.draw(st.tuples(st.integers(-3, length + 3), st.integers(-3, length + 3))))
    between = list(table.between(low, high))
    assert [t for held in between for t in range(held.start, held.stop)] == list(range(max(low, 0), min(high, length)))
    whole = list(table.around(low, high))
    assert whole == [held for held in table.runs if held.start < high and low < held.stop]
    for part, run in zip(between, whole, strict=True):
        assert part.offset - run.offset == part.start - run.start
    for rank in range(world):
        assert list(table.of_rank_between(rank, low, high)) == [held for held in between if held.rank == rank]


@given(tables(), st.data())
def test_shared_documents_are_those_in_several_runs_and_tell_what_neighbouring_ranks_hold(case, data):
    layout, length, world, documents = case
    table = holders(layout, length, world, documents)
    (shared,), (documents_of,) = table.shared, table.documents_of
    bounds = (0, length) if documents is None else documents.bounds[0]
    in_runs = [[run for run in table.runs if run.start < high and low < run.stop] for low, high in pairwise(bounds)]
    least = 1 if documents is None else 2  # without documents the sequence counts as shared in any case
    assert list(shared) == [document for document, runs in enumerate(in_runs) if len(runs) >= least]
    arc = Arc(data.draw(st.integers(0, world - 1)), data.draw(st.integers(1, world)), world)
    ranks = [(arc.first + i) % world for i in range(arc.size)]
    assert list(arc) == ranks
    assert sorted(ranks) == [rank for some in arc.ranges for rank in some]
    assert [rank for rank in range(world) if rank in arc] == sorted(ranks)
    for document, of in shared.items():
        assert (of.start, of.stop) == (bounds[document], bounds[document + 1])
        assert list(of.parts) == list(dict.fromkeys(run.rank for run in in_runs[document]))
        for rank in range(world):
            assert list(of.parts.get(rank, ())) == [held for held in table.between(of.start, of.stop) if held.rank == rank]
            assert (document in documents_of[rank]) == (rank in of.parts)
        positions = of.held_by(arc)
        expected = [t for held in table.between(of.start, of.stop) if held.rank in ranks for t in range(held.start, held.stop)]
        assert [token for low, high in positions for token in range(low, high)] == expected
        assert all(before < after for (_, before), (after, _) in pairwise(positions)), "neighbours are joined"


def packed(documents: int, length: int) -> Documents:
    """Documents whose lengths go from very short to a quarter of the sequence."""
    shares = [2.0 ** (-9 * i / documents) for i in range(documents)]
    lengths = [int(length * share / sum(shares)) for share in shares]
    lengths[0] += length - sum(lengths)
    order = sorted(range(documents), key=lambda i: i * 7919 % 10007)  # short and long ones in turn
    return Documents.from_lengths([lengths[i] for i in order])


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("strategy", ["ring", "gather"])
@pytest.mark.parametrize("band", [CAUSAL, Band(0, 255)], ids=["causal", "window"])
@pytest.mark.parametrize("world", [8, 64, 512])
@pytest.mark.parametrize("documents", [1, 50, 2000])
def test_a_plan_looks_at_its_documents_and_at_a_few_pairs_for_each_rank(layout, strategy, band, world, documents, monkeypatch):
    """Operations are counted, not timed: pairs of pieces that tiles are made of."""
    length = 1 << 18
    bounds = packed(documents, length)
    pairs, tiles_between = [0], kernel_calls.tiles_between

    def counted(*arguments):
        pairs[0] += 1
        return tiles_between(*arguments)

    monkeypatch.setattr(kernel_calls, "tiles_between", counted)
    for stages in (1, 4, world - 1) if strategy == "ring" else (0,):
        problem = AttentionProblem(Layout.parse(layout), band, length, length, world, strategy, bounds, stages)
        for rank in (0, world // 2, world - 1):
            _book.cache_clear()
            pairs[0] = 0
            plan(problem, rank)
            table, _ = problem.holders
            (shared,), (documents_of,) = table.shared, table.documents_of
            # A border between two runs lies in one document, which it cuts into one part more.
            parts = sum(len(held) for of in shared.values() for held in of.parts.values())
            assert parts <= 2 * (len(table.runs) - 1)
            own = len(problem.q_pieces(rank, 0)) + len(documents_of[rank])
            assert pairs[0] <= own + 4 * parts, (stages, rank)


@pytest.mark.parametrize("world", [8, 64, 512])
def test_runs_of_all_ranks_are_dealt_at_once_and_equal_those_of_each(world):
    documents = packed(60, 1 << 14)
    (bounds,) = documents.bounds
    for text in LAYOUTS if world < 64 else [text for text in LAYOUTS if "/" not in text]:
        layout = Layout.parse(text)
        dealt = layout.deal(1 << 14, world, bounds)
        assert dealt == tuple(layout.runs(1 << 14, world, rank, bounds) for rank in range(world))
