"""The one step of a window that is narrow enough: the keys just around each run of a rank's queries.

    zigzag, window (1, 0), 4 ranks, 16 tokens, rank 1, which holds 2 3 | 12 13
    keys      1 2 3 | 11 12 13       1 and 11 from the ranks that hold them
    sends     3 to the rank that holds 4, and 13 to the one that holds 14

The keys of a run lie in the buffer just as its queries lie in the shard, ahead of and behind it as far as the window reaches. So
the tile of every run has the same window, and one kernel call serves all runs and documents. The price are keys that two runs see:
they are fetched once for each.
"""

from __future__ import annotations

from collections.abc import Iterator

from dtensor_ring.planning.holders import Held, Range
from dtensor_ring.planning.kernel_calls import Step, TokenRange, are_summed, document_tiles, keep_needed, step_of, tiles_of_document
from dtensor_ring.planning.mask import Tile
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.runs import Bounds, Piece, Run, cut, document_at, unions


class HaloSteps:
    """The halo of one problem."""

    def __init__(self, problem: AttentionProblem) -> None:
        self._problem, self._band = problem, problem.position_band
        self._queries, self._keys = problem.holders
        self._bounds = problem.bounds
        self._far = problem.q_length + problem.k_length

    def step(self, rank: int) -> Step:
        """The step of a rank."""
        keys: list[TokenRange] = []
        offset = 0  # of this run's keys in the buffer
        tiles: list[tuple[int, Tile]] = []
        # Runs are not cut at documents here: a call of one window needs each run's keys in one piece. Documents cut the tiles.
        for queries in self._stored(rank):
            reach = self._reach(queries)
            if reach is None:
                continue
            low, high = reach
            for row, bounds in enumerate(self._bounds):
                own = cut((_run(queries),), bounds)
                pieces = [Piece(piece.run, piece.offset + queries.offset, piece.document) for piece in own]
                # A run of whole documents sees just itself.
                near = own if (low, high) == (queries.start, queries.stop) else cut((Run(low, high - low),), bounds)
                tiles += [(row, tile.moved(0, offset)) for tile in document_tiles(pieces, near, self._band)]
            keys += [_range_of(held) for held in self._keys.between(low, high)]
            offset += high - low
        # Where bounds differ from row to row, or a document is only looked into, keys were put into the buffer that no tile needs.
        return step_of(*keep_needed(keys, tiles))

    def sums(self, rank: int) -> bool:
        """`Step.sums` of a rank's step, which is not made."""
        # The keys of two runs, and those of two documents, are apart. A document that is whole in a run is a square of scores,
        # which is one tile, and sums nothing: only the first and the last of a run may not be whole.
        for queries in self._stored(rank):
            reach = self._reach(queries)
            if reach is None:
                continue
            for bounds in self._bounds:
                for low, high in self._cut_documents(queries, bounds):
                    q, k = _piece(max(queries.start, low), min(queries.stop, high)), _piece(max(reach[0], low), min(reach[1], high))
                    if k.run.count > 0 and are_summed([(0, tile) for tile in tiles_of_document([q], [k], self._band)]):
                        return True
        return False

    def sends(self, rank: int) -> dict[int, tuple[TokenRange, ...]]:
        """What the steps of other ranks have of a rank's keys, as it stands there."""
        pairs: dict[int, list[tuple[int, Held, Held]]] = {}
        band = self._band
        assert band.lo is not None and band.hi is not None, "a halo needs a window"
        for mine in self._keys.of_rank[rank]:
            # Queries that see some of these keys lie as far around them as the band says, and in the same documents.
            first, end = self._documents(mine)
            for theirs in self._queries.around(max(mine.start + band.lo, first), min(mine.stop + band.hi, end)):
                if theirs.rank != rank:
                    pairs.setdefault(theirs.rank, []).append((theirs.offset, theirs, mine))
        needed = {other: tuple(self._needed(of_other)) for other, of_other in pairs.items()}
        return {other: ranges for other, ranges in needed.items() if ranges}

    def _needed(self, pairs: list[tuple[int, Held, Held]]) -> Iterator[TokenRange]:
        """Keys of one rank that runs of another see, in the order of its buffer: run by run as it stores them, then by position."""
        for _, queries, keys in sorted(pairs):
            seen = (positions for bounds in self._bounds for positions in self._seen(queries, keys, bounds))
            for low, high in unions(seen):
                yield _range_of(keys.within(low, high))

    def _seen(self, queries: Held, keys: Held, bounds: Bounds) -> Iterator[Range]:
        """Positions of a run of keys that a run of queries sees, document by document."""
        if bounds is None:
            documents = [(queries.start, queries.stop, keys.start, keys.stop)]
        else:
            first = document_at(bounds, max(queries.start, keys.start))
            last = document_at(bounds, min(queries.stop, keys.stop) - 1)
            documents = [
                (max(queries.start, low), min(queries.stop, high), max(keys.start, low), min(keys.stop, high))
                for low, high in (bounds[document : document + 2] for document in range(first, last + 1))
            ]
        for q_low, q_high, low, high in documents:
            seen = self._band.seen(q_low, q_high, low, high) if q_low < q_high else None
            if seen is not None:
                yield seen

    def _stored(self, rank: int) -> list[Held]:
        """A rank's runs of queries in storage order."""
        return sorted(self._queries.of_rank[rank], key=lambda held: held.offset)

    def _reach(self, queries: Held) -> Range | None:
        """The positions around a run of queries that its window reaches, not beyond the documents that it lies in."""
        first, end = self._documents(queries)
        return self._band.seen(queries.start, queries.stop, max(first, 0), min(end, self._problem.k_length))

    def _documents(self, run: Held) -> Range:
        """From the first token of the document in which a run begins to the last of that in which it ends, in any row of bounds."""
        whole = [
            (-self._far, self._far)
            if bounds is None
            else (bounds[document_at(bounds, run.start)], bounds[document_at(bounds, run.stop - 1) + 1])
            for bounds in self._bounds
        ]
        return min(first for first, _ in whole), max(end for _, end in whole)

    def _cut_documents(self, queries: Held, bounds: Bounds) -> list[Range]:
        """The documents of which a run has a part."""
        if bounds is None:
            return [(0, max(self._problem.q_length, self._problem.k_length))]
        ends = {document_at(bounds, queries.start), document_at(bounds, queries.stop - 1)}
        documents = [(bounds[document], bounds[document + 1]) for document in ends]
        return [(low, high) for low, high in documents if low < queries.start or queries.stop < high]


def _piece(start: int, stop: int) -> Piece:
    return Piece(Run(start, stop - start), start, 0)


def _run(held: Held) -> Run:
    return Run(held.start, held.stop - held.start)


def _range_of(held: Held) -> TokenRange:
    return TokenRange.of_owner(held.rank, held.offset, held.offset + held.stop - held.start)
