"""From tiles to kernel calls: what one step computes on the keys it has.

tiles       bands of scores of one rank's queries against a buffer of keys, one document at a time
keys        rows that no tile reads are dropped from the buffer, so they are not fetched either
calls       tiles that fit one window, with rows and keys both increasing, are one varlen call
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from dtensor_ring.planning.mask import Band, Tile, coalesce, tiles_between
from dtensor_ring.planning.runs import Piece


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
        """How many keys."""
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
    """One kernel call: segments with disjoint, increasing rows and keys under one bottom-right window (left, right)."""

    window: tuple[int, int]
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """What one step computes: the key rows it needs, in buffer order, and the calls on that buffer.

    `sums` tells that some key row takes part in more than one call, so that its gradients are added in float32 before they
    travel; calls on other batch rows add zeros, which round nothing. `cells` counts the scores.
    """

    keys: tuple[TokenRange, ...] = ()
    calls: tuple[KernelCall, ...] = ()
    cells: int = 0
    sums: bool = False

    @property
    def rows(self) -> int:
        """Key rows in the buffer."""
        return sum(piece.size for piece in self.keys)


def document_tiles(queries: Sequence[Piece], keys: Sequence[Piece], band: Band) -> list[Tile]:
    """Tiles of a rank's queries against keys of the same document, neighbours joined, tiles cut whose windows kernels misread."""
    of_document: dict[int, list[Piece]] = {}
    for key in keys:
        of_document.setdefault(key.document, []).append(key)
    by_document: dict[int, list[Piece]] = {}
    for query in queries:
        by_document.setdefault(query.document, []).append(query)
    found: list[Tile] = []
    for document, q_pieces in by_document.items():
        k_pieces = of_document.get(document, [])
        found += coalesce([tile for q in q_pieces for k in k_pieces for tile in tiles_between(q, k, band)])
    return [part for tile in found for part in tile.split_misread()]


def keep_needed(keys: Sequence[TokenRange], tiles: list[tuple[int, Tile]]) -> tuple[tuple[TokenRange, ...], list[tuple[int, Tile]]]:
    """Drop key rows that no tile reads, and renumber the columns of the tiles."""
    needed = unions((tile.k0, tile.k1) for _, tile in tiles)
    lows = [low for low, _ in needed]
    kept: list[TokenRange] = []
    offset = 0
    for rows in keys:
        first = max(bisect_right(lows, offset) - 1, 0)
        for low, high in needed[first : bisect_left(lows, offset + rows.size)]:
            start, stop = max(low - offset, 0), min(high - offset, rows.size)
            if start < stop:
                kept.append(TokenRange(rows.owner, rows.start + start, rows.start + stop, rows.peer))
        offset += rows.size
    starts = list(accumulate((high - low for low, high in needed), initial=0))
    moved = []
    for row, tile in tiles:
        at = bisect_right(lows, tile.k0) - 1
        moved.append((row, tile.moved(0, starts[at] - lows[at])))
    return tuple(kept), moved


def step_of(keys: tuple[TokenRange, ...], tiles: list[tuple[int, Tile]]) -> Step:
    """The step that computes tiles, given as (batch row, tile), on a buffer of keys."""
    sums = any(deepest([(t.k0, t.k1) for r, t in tiles if r == row]) > 1 for row in {row for row, _ in tiles})
    return Step(keys, _group(tiles), sum(tile.cells for _, tile in tiles), sums)


def _group(tiles: list[tuple[int, Tile]]) -> tuple[KernelCall, ...]:
    """Put tiles that one kernel call can serve together: one window, rows and keys both increasing and disjoint."""
    open_calls: list[tuple[tuple[int, int], list[Segment]]] = []
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


def unions(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Overlapping or touching ranges joined, in order."""
    found: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if found and low <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], high))
        else:
            found.append((low, high))
    return found


def deepest(ranges: list[tuple[int, int]]) -> int:
    """The most ranges that overlap anywhere."""
    edges = sorted([(low, 1) for low, _ in ranges] + [(high, -1) for _, high in ranges])
    return max(accumulate(change for _, change in edges), default=0)
