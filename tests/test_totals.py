"""Totals counted without plans are those of the plans."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dtensor_ring.planning import totals as module
from dtensor_ring.planning.documents import Documents, Slices
from dtensor_ring.planning.layout import Kind, Layout
from dtensor_ring.planning.mask import Band
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.schedule import plan
from dtensor_ring.planning.totals import Totals, fetched_by, totals

LAYOUTS = [*get_args(Kind), "stripe:2", "stripe:3", "stripe:8", "zigzag/documents"]
short = st.integers(0, 12)
sides = st.one_of(st.none(), st.integers(0, 12))


@st.composite
def bands(draw):
    """Causal, full, windows to one or both sides, and bands beside the diagonal, also empty ones."""
    if draw(st.integers(0, 3)) == 0:
        return Band(draw(st.integers(-6, 6)), draw(st.integers(-6, 6)))
    ahead, back = draw(sides), draw(sides)
    return Band(None if ahead is None else -ahead, back)


@st.composite
def problems(draw, lengths=short, most=8):
    """Every layout with every kind of mask, with and without documents."""
    layout, world = Layout.parse(draw(st.sampled_from(LAYOUTS))), draw(st.integers(1, 6))
    strategy = draw(st.sampled_from(["ring", "gather"]))
    if layout.cut or draw(st.booleans()):
        parts = draw(st.lists(lengths, max_size=most))
        total = sum(parts)
        return AttentionProblem(layout, draw(bands()), total, total, world, strategy, Documents.from_lengths(parts))
    total = draw(st.integers(0, 96))
    return AttentionProblem(layout, draw(bands()), total, total, world, strategy)


def of_plans(problem):
    plans = [plan(problem, rank) for rank in range(problem.world)]
    return Totals(
        tuple(len(problem.q_tokens(rank)) for rank in range(problem.world)),
        tuple(each.cells for each in plans),
        tuple(fetched_by(each) for each in plans),
        tuple(each.key_tokens_sent for each in plans),
    )


@given(problems())
@example(AttentionProblem(Layout("stripe", 2), Band(0, 1), 95, 95, 3))
@example(AttentionProblem(Layout("zigzag"), Band(0, 3), 96, 96, 6))
def test_totals_are_those_of_the_plans(problem):
    assert totals(problem) == of_plans(problem)


@given(problems(st.integers(0, 90), most=3))
def test_totals_of_long_documents_are_those_of_the_plans(problem):
    assert totals(problem) == of_plans(problem)


@given(
    st.sampled_from([layout for layout in LAYOUTS if "/" not in layout]),
    bands(),
    st.integers(0, 40),
    st.integers(0, 40),
    st.integers(1, 5),
    st.sampled_from(["ring", "gather"]),
)
def test_totals_of_two_lengths_are_those_of_the_plans(layout, band, q_length, k_length, world, strategy):
    problem = AttentionProblem(Layout.parse(layout), band, q_length, k_length, world, strategy)
    assert totals(problem) == of_plans(problem)


@given(
    st.lists(st.integers(0, 40), min_size=2, max_size=3), bands(), st.sampled_from(["contiguous", "zigzag", "stripe", "stripe:2"])
)
def test_totals_of_batch_rows_that_differ_are_those_of_the_plans(ends, band, layout):
    documents = Documents(tuple((0, end, 40) for end in ends))
    problem = AttentionProblem(Layout.parse(layout), band, 40, 40, 3, "ring", documents)
    assert totals(problem) == of_plans(problem)


@pytest.mark.parametrize("layout", ["stripe", "stripe:2", "stripe:5"])
@pytest.mark.parametrize("documents", [None, Documents.from_lengths([203, 7, 190])])
@pytest.mark.parametrize("band", [Band(0, 0), Band(0, 2), Band(-1, 1), Band(-2, 0)])
def test_windows_narrower_than_a_stripe_leave_gaps_that_are_counted(layout, documents, band):
    """Rounds left out inside documents are added again: the sequence has many more than the window reaches."""
    problem = AttentionProblem(Layout.parse(layout), band, 400, 400, 5, "ring", documents)
    assert module._has_gaps(problem)
    assert totals(problem) == of_plans(problem)


def test_slices_are_counted_by_their_plans():
    problem = AttentionProblem(Layout("contiguous"), Band(0, None), 8, 16, 2, "gather", Slices((0, 3, 8), (0, 5, 12), 2))
    assert totals(problem) == of_plans(problem)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strategy", ["ring", "gather"])
def test_totals_make_no_plan(monkeypatch, layout, strategy):
    monkeypatch.setattr(module, "plan", lambda *_: pytest.fail("a plan was made"))
    documents = Documents.from_lengths([300_000, 700_000])
    for band in (Band(0, None), Band(), Band(0, 4096), Band(0, 16)):
        problem = AttentionProblem(
            Layout.parse(layout), band, 1_000_000, 1_000_000, 64, strategy, documents if "/" in layout else None
        )
        counted = totals(problem)
        assert sum(counted.tokens) == 1_000_000
        assert 0 < counted.balance <= 1
        assert counted.scores[counted.most_loaded] == max(counted.scores)
