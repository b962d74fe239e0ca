from __future__ import annotations

import itertools
from collections import Counter
from typing import get_args

import pytest
from flash_windows import as_flash_attn_2
from helpers import examples
from hypothesis import assume, example, given
from hypothesis import strategies as st

from dtensor_ring.planning.layout import Kind, Layout
from dtensor_ring.planning.mask import Band, Tile, coalesce, joined, mask_text, tiles_between
from dtensor_ring.planning.runs import Run, cut

bound = st.one_of(st.none(), st.integers(-15, 15))
boxes = st.tuples(st.integers(0, 6), st.integers(1, 8), st.integers(0, 6), st.integers(1, 8))


def cells_of(box, lo, hi):
    q0, q1, k0, k1 = box
    return {(i, j) for i in range(q0, q1) for j in range(k0, k1) if (lo is None or i - j >= lo) and (hi is None or i - j <= hi)}


def cells(tile):
    return cells_of((tile.q0, tile.q1, tile.k0, tile.k1), tile.lo, tile.hi)


def window_cells(tile, window):
    """Scores of a bottom-right window on the tile's box, as flash-attn defines it."""
    left, right = window
    offset = tile.k_count - tile.q_count
    return {
        (tile.q0 + i, tile.k0 + j)
        for i in range(tile.q_count)
        for j in range(tile.k_count)
        if (left < 0 or j >= i + offset - left) and (right < 0 or j <= i + offset + right)
    }


@st.composite
def tiles(draw):
    q0, rows, k0, columns = draw(boxes)
    tile = Tile.trimmed(q0, q0 + rows, k0, k0 + columns, draw(bound), draw(bound))
    return tile if tile is not None else Tile(q0, q0 + rows, k0, k0 + columns)


@given(boxes, bound, bound)
def test_a_trimmed_tile_has_the_same_scores_and_no_idle_row_or_column(box, lo, hi):
    q0, rows, k0, columns = box
    found = Tile.trimmed(q0, q0 + rows, k0, k0 + columns, lo, hi)
    wanted = cells_of((q0, q0 + rows, k0, k0 + columns), lo, hi)
    if found is None:
        assert not wanted
        return
    assert cells(found) == wanted
    assert found.cells == len(wanted)
    assert {i for i, _ in wanted} == set(range(found.q0, found.q1))
    assert {j for _, j in wanted} == set(range(found.k0, found.k1))


@given(tiles())
def test_the_window_of_a_tile_is_never_negative_and_means_its_scores(tile):
    left, right = tile.window
    assert left >= -1
    assert right >= -1
    assert window_cells(tile, tile.window) == cells(tile)


@given(tiles(), st.integers(-1, 9), st.integers(-1, 9))
@example(Tile(0, 9, 0, 3), 3, -1)
def test_a_tile_fits_a_window_only_if_it_means_the_same_scores_beside_any_longer_segment(tile, left, right):
    longest = range(max(tile.k_count, right + 1), 20)
    readings = [(left, right), *(as_flash_attn_2((left, right), keys) for keys in longest)]
    assert tile.fits((left, right)) == all(window_cells(tile, reading) == cells(tile) for reading in readings)


@given(tiles())
@example(Tile(0, 10, 0, 2, 0, 8))  # cut twice
@example(Tile(0, 10, 0, 2, None, 8))
def test_splitting_a_misread_window_keeps_the_scores_and_leaves_none_misread(tile):
    parts = tile.split_misread()
    assert sum((part.cells for part in parts), 0) == tile.cells
    assert set().union(*(cells(part) for part in parts)) == cells(tile)
    for part in parts:
        assert part.fits(part.window)
        for longest in range(part.k_count, 20):
            assert window_cells(part, as_flash_attn_2(part.window, longest)) == cells(part)


@given(tiles())
@example(Tile(0, 6, 5, 8, -5, -2))
def test_a_tile_is_split_only_where_its_window_is_misread_or_looks_as_far_ahead_as_it_has_keys(tile):
    misread = window_cells(tile, as_flash_attn_2(tile.window, tile.k_count)) != cells(tile)
    if tile.split_misread() == (tile,):
        assert not misread
    else:
        assert misread or tile.window[1] == tile.k_count


@given(tiles(), st.integers(-9, 9), st.integers(-9, 9))
def test_moving_a_tile_moves_its_scores(tile, q, k):
    assert cells(tile.moved(q, k)) == {(i + q, j + k) for i, j in cells(tile)}


@st.composite
def neighbours(draw):
    """Two disjoint tiles: mostly a tile cut at a row, a column or a diagonal, else any two."""
    whole, cut_at = draw(tiles()), draw(st.sampled_from(["row", "column", "diagonal", "any"]))
    q0, q1, k0, k1, lo, hi = whole.q0, whole.q1, whole.k0, whole.k1, whole.lo, whole.hi
    if cut_at == "row":
        at = draw(st.integers(q0, q1))
        a, b = Tile.trimmed(q0, at, k0, k1, lo, hi), Tile.trimmed(at, q1, k0, k1, lo, hi)
    elif cut_at == "column":
        at = draw(st.integers(k0, k1))
        a, b = Tile.trimmed(q0, q1, k0, at, lo, hi), Tile.trimmed(q0, q1, at, k1, lo, hi)
    elif cut_at == "diagonal":
        at = draw(st.integers(q0 - k1, q1 - k0))
        low, high = at if lo is None else max(lo, at), at - 1 if hi is None else min(hi, at - 1)
        a, b = Tile.trimmed(q0, q1, k0, k1, lo, high), Tile.trimmed(q0, q1, k0, k1, low, hi)
    else:
        a, b = whole, draw(tiles())
    assume(a is not None and b is not None and not cells(a) & cells(b))
    return (a, b) if draw(st.booleans()) else (b, a)


def test_joined_tiles_cover_exactly_both_and_most_parts_of_a_tile_join():
    joins = Counter()

    @examples(400)
    @given(neighbours())
    def check(pair):
        whole = joined(*pair)
        joins[whole is not None] += 1
        if whole is not None:
            assert cells(whole) == cells(pair[0]) | cells(pair[1])
            assert Tile.trimmed(whole.q0, whole.q1, whole.k0, whole.k1, whole.lo, whole.hi) == whole

    check()
    assert joins[True] > joins.total() / 3, joins


@given(tiles(), st.data())
def test_a_box_cut_into_a_grid_joins_to_one_tile_again(tile, data):
    q0, q1, k0, k1 = tile.q0, tile.q1, tile.k0, tile.k1
    row, column = data.draw(st.integers(q0, q1)), data.draw(st.integers(k0, k1))
    boxes = [(a, b, c, d) for a, b in ((q0, row), (row, q1)) for c, d in ((k0, column), (column, k1)) if a < b and c < d]
    assert coalesce(data.draw(st.permutations([Tile(*box) for box in boxes]))) == [Tile(q0, q1, k0, k1)]


@given(st.lists(neighbours(), min_size=1, max_size=3))
def test_coalesced_tiles_cover_the_same_scores_once(pairs):
    parts = [tile.moved(20 * i, 20 * i) for i, pair in enumerate(pairs) for tile in pair]
    found = coalesce(parts)
    assert set().union(*(cells(tile) for tile in found)) == set().union(*(cells(tile) for tile in parts))
    assert sum(tile.cells for tile in found) == sum(tile.cells for tile in parts)
    assert not any(joined(a, b) for a, b in itertools.combinations(found, 2))


def test_the_own_shard_of_a_zigzag_is_one_causal_tile():
    a, b, c = Tile(0, 4, 0, 4, 0), Tile(4, 8, 0, 4), Tile(4, 8, 4, 8, 0)
    assert coalesce([c, a, b]) == [Tile(0, 8, 0, 8, 0)]


layouts = st.sampled_from([*map(Layout, get_args(Kind)), Layout("stripe", 2), Layout("stripe", 4)])


@given(layouts, st.integers(1, 50), st.integers(1, 4), bound, bound, st.data())
def test_tiles_between_two_ranks_are_the_band_of_positions(layout, length, world, lo, hi, data):
    rank, source = data.draw(st.integers(0, world - 1)), data.draw(st.integers(0, world - 1))
    queries, keys = layout.tokens(length, world, rank), layout.tokens(length, world, source)
    wanted = {
        (i, j)
        for i, p in enumerate(queries)
        for j, t in enumerate(keys)
        if (lo is None or p - t >= lo) and (hi is None or p - t <= hi)
    }
    found = [
        tile
        for q in cut(layout.runs(length, world, rank), None)
        for k in cut(layout.runs(length, world, source), None)
        for tile in tiles_between(q, k, Band(lo, hi))
    ]
    assert sum(tile.cells for tile in found) == len(wanted)
    assert set().union(*(cells(tile) for tile in found)) == wanted


@given(st.integers(1, 30), st.integers(0, 30), bound, bound)
def test_single_tokens_meet_runs_of_any_stride(count, start, lo, hi):
    (single,), (run,) = cut((Run(start, 1),), None), cut((Run(2, count, 3),), None)
    tiles_found = tiles_between(single, run, Band(lo, hi))
    wanted = {(0, j) for j, t in enumerate(run.run.tokens()) if (lo is None or start - t >= lo) and (hi is None or start - t <= hi)}
    assert set().union(*(cells(tile) for tile in tiles_found)) == wanted


@pytest.mark.parametrize(
    ("is_causal", "window", "text", "band"),
    [
        (True, (-1, -1), "causal", Band(0, None)),
        (False, (-1, -1), "full", Band(None, None)),
        (True, (7, -1), "window:7,0", Band(0, 7)),
        (True, (7, 0), "window:7,0", Band(0, 7)),
        (False, (7, 3), "window:7,3", Band(-3, 7)),
        (False, (-1, 0), "window:-1,0", Band(0, None)),
    ],
)
def test_causal_and_windows_become_bands(is_causal, window, text, band):
    assert mask_text(is_causal, window) == text
    assert Band.parse(text) == band


def test_a_causal_window_cannot_look_ahead():
    with pytest.raises(ValueError, match="looks 2 tokens ahead but is_causal=True"):
        mask_text(True, (3, 2))
    with pytest.raises(ValueError, match="a side is a number of tokens, or -1"):
        mask_text(False, (-2, 0))
