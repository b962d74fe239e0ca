"""From tiles to kernel calls: what one step computes on the keys it has.

tiles       bands of scores of one rank's queries against a buffer of keys, one document at a time
keys        keys that no tile reads are dropped from the buffer, so they are not fetched either, but by an all-gather
calls       tiles that fit one window, with queries and keys both increasing, are one varlen call
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from dtensor_ring.planning.mask import Band, Tile, coalesce, tiles_between
from dtensor_ring.planning.runs import Piece, unions


class TokenRange(NamedTuple):
    """Keys [start, stop) of those that rank `owner` stores, which arrive from rank `peer`; their gradients go back there.

    Both are the owner where keys travel in one hop. A peer that is not the owner has the keys from an earlier step, or its number
    in the transport's group is another than its number in the layout: `owner` counts as layouts do, `peer` as the transport does.
    """

    owner: int
    start: int
    stop: int
    peer: int

    @classmethod
    def of_owner(cls, owner: int, start: int, stop: int) -> TokenRange:
        """A range that its owner sends itself."""
        return cls(owner, start, stop, owner)

    @property
    def size(self) -> int:
        """How many keys the range has."""
        return self.stop - self.start


class Segment(NamedTuple):
    """Queries [q0, q1) against keys [k0, k1); `row` is the batch row, 0 when the documents are the same in all rows."""

    row: int
    q0: int
    q1: int
    k0: int
    k1: int


@dataclass(frozen=True, slots=True)
class KernelCall:
    """One kernel call: segments with disjoint, increasing queries and keys under one bottom-right window (left, right)."""

    window: tuple[int, int]
    segments: tuple[Segment, ...]

    @property
    def queries(self) -> tuple[int, int]:
        """The first query of the first segment, and the end of the last one, where all are in one batch row."""
        return self.segments[0].q0, self.segments[-1].q1

    @property
    def keys(self) -> tuple[int, int]:
        """The same of the keys."""
        return self.segments[0].k0, self.segments[-1].k1


@dataclass(frozen=True, slots=True)
class Step:
    """What one step computes: the keys it needs, in buffer order, and the calls on that buffer.

    `sums` says that the gradient of some key is summed from several, of calls here or of ranks that the key was passed on to, so
    that gradients are kept and travel in float32; calls on other batch rows add zeros, which round nothing. `cells` counts the
    scores.
    """

    keys: tuple[TokenRange, ...] = ()
    calls: tuple[KernelCall, ...] = ()
    cells: int = 0
    sums: bool = False

    @property
    def key_count(self) -> int:
        """How many keys the step's buffer holds."""
        return sum(piece.size for piece in self.keys)


def document_tiles(queries: Sequence[Piece], keys: Sequence[Piece], band: Band) -> list[Tile]:
    """The tiles of a rank's queries against keys of the same document.

    Neighbours are joined, and tiles whose windows kernels would misread are cut.
    """
    # Sorted by document first: all pairs of pieces would be quadratic in documents, and pieces of two documents share no score.
    of_document = by_document(keys)
    tiles: list[Tile] = []
    for document, q_pieces in by_document(queries).items():
        tiles += tiles_of_document(q_pieces, of_document.get(document, []), band)
    return tiles


def by_document(pieces: Iterable[Piece]) -> dict[int, list[Piece]]:
    """Pieces by their document."""
    sorted_by: dict[int, list[Piece]] = {}
    for piece in pieces:
        sorted_by.setdefault(piece.document, []).append(piece)
    return sorted_by


def tiles_of_document(queries: Sequence[Piece], keys: Sequence[Piece], band: Band) -> list[Tile]:
    """The tiles of queries and keys of one document, as `document_tiles`."""
    # Joined before they are cut for the kernel: half of a cut tile would not join with its neighbour any more.
    tiles = coalesce([tile for q in queries for k in keys for tile in tiles_between(q, k, band)])
    return [part for tile in tiles for part in tile.split_misread()]


def keep_needed(keys: Sequence[TokenRange], tiles: list[tuple[int, Tile]]) -> tuple[tuple[TokenRange, ...], list[tuple[int, Tile]]]:
    """Drop keys that no tile reads, and renumber the keys of the tiles.

    A window or documents leave holes in the buffer that was planned for. What no tile reads is not fetched, so the buffer closes
    up: every tile moves back by as many keys as were dropped before it.
    """
    needed = unions((tile.k0, tile.k1) for _, tile in tiles)
    lows = [low for low, _ in needed]
    kept: list[TokenRange] = []
    offset = 0
    for held in keys:
        # Both are in buffer order, so the needed ranges that meet this one stand together; the first may begin before it.
        first = max(bisect_right(lows, offset) - 1, 0)
        for low, high in needed[first : bisect_left(lows, offset + held.size)]:
            start, stop = max(low - offset, 0), min(high - offset, held.size)
            if start < stop:
                kept.append(TokenRange(held.owner, held.start + start, held.start + stop, held.peer))
        offset += held.size
    starts = list(accumulate((high - low for low, high in needed), initial=0))
    moved = []
    for row, tile in tiles:
        # A tile's keys lie in one needed range, since ranges that touch were joined: it moves as that range does.
        at = bisect_right(lows, tile.k0) - 1
        moved.append((row, tile.moved(0, starts[at] - lows[at])))
    return tuple(kept), moved


def step_of(keys: tuple[TokenRange, ...], tiles: list[tuple[int, Tile]]) -> Step:
    """The step that computes tiles, given as (batch row, tile), on a buffer of keys."""
    return Step(keys, _group(tiles), sum(tile.cells for _, tile in tiles), are_summed(tiles))


def are_summed(tiles: list[tuple[int, Tile]]) -> bool:
    """Whether some key is in several of a step's tiles, given as (batch row, tile): its gradient is then summed from several."""
    # Counted by batch row: calls on two rows read the same places of the buffer, but other keys.
    return any(deepest([(t.k0, t.k1) for r, t in tiles if r == row]) > 1 for row in {row for row, _ in tiles})


def _group(tiles: list[tuple[int, Tile]]) -> tuple[KernelCall, ...]:
    """Put tiles that one kernel call can serve together: one window, queries and keys both increasing and disjoint."""
    # A varlen kernel takes segments as cumulative lengths, so they must follow one another in queries and in keys. A tile that
    # fits no open call begins one: a few windows serve thousands of documents.
    open_calls: list[tuple[tuple[int, int], list[Segment]]] = []
    # A window other than the tile's own may mean the same scores in its box (causal and full for one query): that saves a call.
    for row, tile in sorted(tiles):
        segment = Segment(row, tile.q0, tile.q1, tile.k0, tile.k1)
        for window, segments in open_calls:
            last = segments[-1]
            after = last.row < row or (last.row == row and last.q1 <= tile.q0 and last.k1 <= tile.k0)
            if after and tile.fits(window):
                segments.append(segment)
                break
        else:
            open_calls.append((tile.window, [segment]))
    return tuple(KernelCall(window, tuple(segments)) for window, segments in open_calls)


def deepest(ranges: list[tuple[int, int]]) -> int:
    """Counts how many ranges overlap at the place where most of them do."""
    # An end sorts before a beginning at the same place: ranges that only touch do not overlap.
    edges = sorted([(low, 1) for low, _ in ranges] + [(high, -1) for _, high in ranges])
    return max(accumulate(change for _, change in edges), default=0)
