from __future__ import annotations

import ast
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dtensor_ring
from dtensor_ring.planning.documents import Documents
from dtensor_ring.planning.layout import _KINDS, Kind, Layout, PackedLayout, work_balance
from dtensor_ring.planning.runs import Run, cut

layouts = st.sampled_from([*map(Layout, get_args(Kind)), Layout("stripe", 2), Layout("stripe", 5)])


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("contiguous", [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]),
        ("zigzag", [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]]),
        ("stripe", [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]]),
        ("stripe:2", [[0, 1, 8, 9], [2, 3, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15]]),
    ],
)
def test_sixteen_tokens_over_four_ranks_are_as_pictured(text, rows):
    assert [Layout.parse(text).tokens(16, 4, rank) for rank in range(4)] == rows


@given(layouts, st.integers(0, 200), st.integers(1, 9))
def test_every_token_has_one_rank_and_totals_differ_by_at_most_one(layout, length, world):
    held = [layout.tokens(length, world, rank) for rank in range(world)]
    assert sorted(token for tokens in held for token in tokens) == list(range(length))
    assert max(map(len, held)) - min(map(len, held)) <= 1
    assert [layout.local_length(length, world, rank) for rank in range(world)] == [len(tokens) for tokens in held]


@given(st.integers(0, 40), st.integers(1, 6))
def test_divisible_lengths_are_cut_as_the_usual_chunks(chunk, world):
    length = 2 * world * chunk
    for rank in range(world):
        early = list(range(rank * chunk, (rank + 1) * chunk))
        late = list(range((2 * world - 1 - rank) * chunk, (2 * world - rank) * chunk))
        assert Layout("zigzag").tokens(length, world, rank) == early + late
        assert Layout("contiguous").tokens(length, world, rank) == list(range(2 * rank * chunk, 2 * (rank + 1) * chunk))


@given(st.integers(0, 100), st.integers(1, 6))
def test_a_stripe_of_single_tokens_puts_token_t_on_rank_t_mod_world(length, world):
    for rank in range(world):
        assert Layout("stripe").tokens(length, world, rank) == list(range(rank, length, world))


def test_every_kind_of_layout_is_dealt_and_read_from_its_name():
    assert get_args(Kind) == tuple(_KINDS)
    assert tuple(Layout.parse(kind).kind for kind in _KINDS) == get_args(Kind)


@given(layouts)
def test_a_layout_is_read_back_from_its_text(layout):
    assert Layout.parse(str(layout)) == layout


@pytest.mark.parametrize("text", ["", "zig", "stripe:0", "stripe:-1", "zigzag:2", "contiguous:1", "stripe:x"])
def test_an_unknown_layout_is_refused(text):
    with pytest.raises(ValueError, match=r"unknown layout .*use 'contiguous', 'zigzag'"):
        Layout.parse(text)


runs = st.one_of(
    st.builds(Run, st.integers(0, 20), st.integers(1, 20), st.integers(1, 5)),
    st.integers(2, 4).flatmap(
        lambda block: st.builds(
            lambda start, blocks, gap: Run(start, blocks * block, block + gap, block),
            st.integers(0, 9),
            st.integers(1, 5),
            st.integers(1, 9),
        )
    ),
)


@given(runs, st.integers(0, 120))
def test_first_at_or_after_finds_the_first_token_from_a_position_on(run, position):
    tokens = run.tokens()
    assert run.first_at_or_after(position) == next((i for i, token in enumerate(tokens) if token >= position), len(tokens))


@given(layouts, st.integers(0, 60), st.integers(1, 5), st.lists(st.integers(0, 60), max_size=6))
def test_cutting_at_documents_keeps_every_token_its_place_and_its_document(layout, length, world, cuts):
    bounds = (0, *sorted(min(c, length) for c in cuts), length)
    for rank in range(world):
        tokens = layout.tokens(length, world, rank)
        pieces = cut(layout.runs(length, world, rank), bounds)
        assert [token for piece in pieces for token in piece.run.tokens()] == tokens
        for piece in pieces:
            assert tokens[piece.offset : piece.offset + piece.run.count] == piece.run.tokens()
            low, high = bounds[piece.document], bounds[piece.document + 1]
            assert all(low <= token < high for token in piece.run.tokens())


def test_planning_knows_no_process_groups():
    files = list((Path(dtensor_ring.__file__).parent / "planning").glob("*.py"))
    assert len(files) >= 6
    for file in files:
        tree = ast.parse(file.read_text())
        names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert not [name for name in names if name.startswith("torch.distributed")]


@given(
    st.sampled_from(["stripe", "stripe:3"]),
    st.lists(st.integers(0, 20), min_size=1, max_size=6),
    st.integers(1, 5),
    st.one_of(st.none(), st.integers(1, 9)),
)
def test_work_balance_of_stripes_is_that_of_counted_scores(name, lengths, world, reach):
    layout, documents = Layout.parse(name), Documents.from_lengths(lengths)
    bounds = documents.bounds[0]
    work = [0] * world
    for rank in range(world):
        for token in layout.tokens(documents.length, world, rank, bounds):
            seen = token - bounds[Documents.find(bounds, token)] + 1
            work[rank] += seen if reach is None else min(seen, reach)
    wanted = sum(work) / world / max(work) if max(work) else 1.0
    assert work_balance(layout, documents, world, reach) == pytest.approx(wanted)


@given(
    st.sampled_from(["contiguous", "zigzag", "zigzag/documents"]),
    st.lists(st.integers(0, 700), min_size=1, max_size=6),
    st.integers(1, 5),
    st.one_of(st.none(), st.integers(1, 900)),
)
def test_work_balance_of_chunks_is_that_of_counted_blocks(name, lengths, world, reach):
    layout, documents = Layout.parse(name), Documents.from_lengths(lengths)
    bounds = documents.bounds[0]
    work = [0.0] * world
    for rank in range(world):
        for piece in cut(layout.runs(documents.length, world, rank, bounds), bounds):
            positions = [token - bounds[piece.document] for token in piece.run.tokens()]
            work[rank] += 0.5
            for row in (positions[i : i + 128] for i in range(0, len(positions), 128)):
                seen = {key // 128 for key in (0 if reach is None else max(0, row[0] - reach + 1), row[-1])}
                work[rank] += max(seen) - min(seen) + 0.5
    wanted = sum(work) / world / max(work) if max(work) else 1.0
    assert work_balance(layout, documents, world, reach) == pytest.approx(wanted)


def test_a_packed_layout_is_its_layout_under_one_row_of_documents():
    layout, bounds = Layout.parse("zigzag/documents"), (0, 9, 10, 40)
    packed = PackedLayout(layout, Documents((bounds,)))
    for rank in range(3):
        assert packed.tokens(40, 3, rank) == layout.tokens(40, 3, rank, bounds)
        assert packed.runs(40, 3, rank) == layout.runs(40, 3, rank, bounds)
        assert packed.local_length(40, 3, rank) == len(packed.tokens(40, 3, rank))
    with pytest.raises(ValueError, match="needs one row of documents for the whole batch, found 2: pack the rows into one"):
        PackedLayout(layout, Documents((bounds, (0, 40))))
