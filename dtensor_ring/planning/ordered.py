"""Steps whose keys travel in position order: just those that are needed, of one rank or of many at once.

    zigzag, causal, 4 ranks, 16 tokens, "ring" in one stage: the keys of rank 1, which holds 2 3 | 12 13
    held by the other ranks      0 1 | 4 .. 11 | 14 15
    needed of these              0 1 | 4 .. 11                     14 15 lie after the last query
    what rank 2 sends            4 5 | 10 11                       its part, in position order

In position order neighbours of two ranks are one run, so that keys of many ranks make few tiles. A document needs other ranks' keys
only where it lies in several runs, and such documents are few, however many a rank has (see `holders`). So a rank reads off the
table of holders what it sends to another, and whether that one sums gradients, in a few steps each: it plans for none of them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from dtensor_ring.planning.holders import Arc, Held, Range
from dtensor_ring.planning.kernel_calls import Step, TokenRange, are_summed, by_document, keep_needed, step_of, tiles_of_document
from dtensor_ring.planning.mask import Tile
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.runs import Piece, Run, unions


class _Meeting(NamedTuple):
    """A rank's queries in a document, and the positions of its keys that are there to be seen; `row` is that of the bounds."""

    row: int
    queries: list[Piece]
    keys: list[Range]


class OrderedSteps:
    """The steps of one problem that fetch keys in position order; each has the keys of some ranks, its owners."""

    def __init__(self, problem: AttentionProblem) -> None:
        self._problem, self._band = problem, problem.position_band
        self._queries, self._keys = problem.holders

    def step(self, rank: int, owners: Arc) -> Step:
        """The step of a rank that has the keys of some owners; with its own among them, of all its documents."""
        meetings = self._shared(rank, owners)
        if rank in owners:
            meetings += self._whole(rank)
        if not meetings:
            return Step()
        covered, tiles = self._tiles(meetings)
        keys: list[TokenRange] = []
        for low, high in covered:
            first = len(keys)
            for held in self._keys.between(low, high):
                _append(keys, held, follows=owners.size == 1 or len(keys) > first)
        return step_of(*keep_needed(keys, tiles))

    def sums(self, rank: int, owners: Arc) -> bool:
        """`Step.sums` of such a step, which is not made."""
        # A document in one run is a square of scores, which is one tile, and sums nothing.
        return are_summed(self._tiles(self._shared(rank, owners))[1])

    def needs(self, rank: int, owners: Arc, owner: int) -> tuple[TokenRange, ...]:
        """The keys of one of the owners that such a step has, as they stand there."""
        # Of a document a rank needs the prefix up to its own last token in it, or the window before each of its parts.
        needed: list[Range] = []
        for row, shared in enumerate(self._queries.shared):
            for document in self._queries.documents_of[row][rank]:
                of = self._keys.shared[row].get(document)
                if of is not None and owner in of.parts:
                    seen = (self._band.seen(q.start, q.stop, of.start, of.stop) for q in shared[document].parts[rank])
                    needed += [positions for positions in seen if positions is not None]
        ranges: list[TokenRange] = []
        stop = 0
        for low, high in unions(needed):
            for held in self._keys.of_rank_between(owner, low, high):
                _append(ranges, held, follows=owners.size == 1 or held.start == stop)
                stop = held.stop
        return tuple(ranges)

    def _shared(self, rank: int, owners: Arc) -> list[_Meeting]:
        """Meetings in documents that lie in several runs."""
        meetings = []
        for row, shared in enumerate(self._queries.shared):
            for document in self._queries.documents_of[row][rank]:
                of = self._keys.shared[row].get(document)
                if of is None:
                    continue
                parts = shared[document].parts[rank]
                # Nothing outside of what the first to the last query see is needed: it is not looked at.
                reach = self._band.seen(parts[0].start, parts[-1].stop, of.start, of.stop)
                if reach is None:
                    continue
                keys = [(max(low, reach[0]), min(high, reach[1])) for low, high in of.held_by(owners)]
                keys = [(low, high) for low, high in keys if low < high]
                if keys:
                    queries = [Piece(Run(q.start, q.stop - q.start), q.offset, document) for q in parts]
                    meetings.append(_Meeting(row, queries, keys))
        return meetings

    def _whole(self, rank: int) -> list[_Meeting]:
        """Meetings in a rank's documents that lie in one run, of all whose keys it holds itself."""
        meetings = []
        for row, shared in enumerate(self._queries.shared):
            for document, queries in by_document(self._problem.q_pieces(rank, row)).items():
                if document not in shared:
                    (whole,) = queries
                    meetings.append(_Meeting(row, queries, [(whole.run.start, whole.run.start + whole.run.count)]))
        return meetings

    def _tiles(self, meetings: Sequence[_Meeting]) -> tuple[list[Range], list[tuple[int, Tile]]]:
        """The positions that a buffer of keys is made of, and the tiles on it, each with its row of bounds."""
        covered = unions(keys for meeting in meetings for keys in meeting.keys)
        lows = [low for low, _ in covered]
        firsts = list(accumulate((high - low for low, high in covered), initial=0))
        tiles: list[tuple[int, Tile]] = []
        for row, queries, ranges in meetings:
            keys = []
            for low, high in ranges:
                at = bisect_right(lows, low) - 1
                keys.append(Piece(Run(low, high - low), firsts[at] + low - lows[at], queries[0].document))
            tiles += [(row, tile) for tile in tiles_of_document(queries, keys, self._band)]
        return covered, tiles


def _append(ranges: list[TokenRange], held: Held, *, follows: bool) -> None:
    """Add keys to the ranges of a buffer, as one with the last where they follow it in the buffer and in their owner's shard."""
    added = TokenRange.of_owner(held.rank, held.offset, held.offset + held.stop - held.start)
    last = ranges[-1] if ranges else None
    if follows and last is not None and (last.owner, last.stop) == (added.owner, added.start):
        ranges[-1] = TokenRange.of_owner(last.owner, last.start, added.stop)
    else:
        ranges.append(added)
