"""Who holds which tokens: the runs of all ranks as one table in position order, and the documents that several runs share.

    zigzag, 2 ranks, 16 tokens, documents of 3, 8 and 5 tokens
    position     0  1  2 | 3  4  5  6  7  8  9 10 | 11 12 13 14 15
    rank         0  0  0   0  1  1  1  1  1  1  1    1  0  0  0  0
    runs         [0, 4) of rank 0, [4, 8) and [8, 12) of rank 1, [12, 16) of rank 0
    shared       the second document, by the first three runs; the third one, by the last two

Of a document that lies in one run nothing travels. What does travel is of shared documents, and every border between two runs makes
at most one of those. So whatever a rank must know of all others is read off a table of as many parts as there are runs, or a few
more: no rank plans for another.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dtensor_ring.cache import cached
from dtensor_ring.planning.layout import Layout
from dtensor_ring.planning.runs import document_at, unions
from dtensor_ring.planning.segmentation import WHOLE, Segmentation

Range = tuple[int, int]  # positions [low, high)


class Held(NamedTuple):
    """Neighbouring tokens [start, stop), which `rank` stores from place `offset` of its shard on."""

    start: int
    stop: int
    rank: int
    offset: int

    def within(self, low: int, high: int) -> Held:
        """The part in [low, high), which must not be empty."""
        start = max(self.start, low)
        return Held(start, min(self.stop, high), self.rank, self.offset + start - self.start)


@dataclass(frozen=True, slots=True)
class Arc:
    """Neighbouring ranks on a circle of `world`: `size` of them from `first` on, which may go on from rank 0."""

    first: int
    size: int
    world: int

    @property
    def ranges(self) -> tuple[range, ...]:
        """The ranks in rising order, as one or two ranges."""
        over = self.first + self.size - self.world
        if over <= 0:
            return (range(self.first, self.first + self.size),)
        return range(over), range(self.first, self.world)

    def __iter__(self) -> Iterator[int]:
        return ((self.first + i) % self.world for i in range(self.size))

    def __contains__(self, rank: int) -> bool:
        return (rank - self.first) % self.world < self.size


class _Stair(NamedTuple):
    """Neighbouring parts of a document whose ranks only rise, or only fall: those of some range of ranks are neighbours too."""

    # A document that all ranks share would otherwise cost each rank of each stage as much as there are ranks.
    ranks: list[int]  # in rising order
    parts: list[Held]  # in the order of the ranks

    def held_by(self, ranks: range) -> Range | None:
        """The positions that some neighbouring ranks hold."""
        first, end = bisect_left(self.ranks, ranks.start), bisect_left(self.ranks, ranks.stop)
        if first == end:
            return None
        low, high = self.parts[first], self.parts[end - 1]
        return (low.start, high.stop) if low.start <= high.start else (high.start, low.stop)


@dataclass(frozen=True, slots=True, eq=False)
class SharedDocument:
    """A document whose tokens lie in several runs.

    Attributes:
        start: its first position.
        stop: one past its last.
        parts: the parts of each rank that has one, in position order.
        stairs: all parts, as few stairs.
    """

    start: int
    stop: int
    parts: dict[int, list[Held]]
    stairs: tuple[_Stair, ...]

    @classmethod
    def of(cls, start: int, stop: int, parts: list[Held]) -> SharedDocument:
        """The document of all its parts in position order."""
        by_rank: dict[int, list[Held]] = {}
        for part in parts:
            by_rank.setdefault(part.rank, []).append(part)
        return cls(start, stop, by_rank, tuple(_stairs(parts)))

    def held_by(self, ranks: Arc) -> list[Range]:
        """The positions that some ranks hold, in order, neighbours joined."""
        return unions(held for some in ranks.ranges for stair in self.stairs if (held := stair.held_by(some)) is not None)


def _stairs(parts: Sequence[Held]) -> Iterator[_Stair]:
    stair: list[Held] = []
    direction = 0
    for part in parts:
        turn = (part.rank > stair[-1].rank) - (part.rank < stair[-1].rank) if stair else 0
        if stair and turn in (0, -direction):
            yield _stair(stair)
            stair.clear()
            turn = 0
        stair.append(part)
        direction = turn
    if stair:
        yield _stair(stair)


def _stair(parts: list[Held]) -> _Stair:
    rising = parts[:] if parts[0].rank <= parts[-1].rank else parts[::-1]
    return _Stair([part.rank for part in rising], rising)


@dataclass(frozen=True, slots=True, eq=False)
class Holders:
    """All runs of all ranks, for a layout whose runs are neighbours.

    Attributes:
        runs: in position order.
        of_rank: each rank's, in position order.
        shared: of each row of bounds, the documents in several runs, by their number; the sequence itself where there are none.
        documents_of: of each row of bounds, the shared documents of each rank.
    """

    runs: tuple[Held, ...]
    of_rank: tuple[tuple[Held, ...], ...]
    shared: tuple[dict[int, SharedDocument], ...]
    documents_of: tuple[tuple[tuple[int, ...], ...], ...]

    def around(self, low: int, high: int) -> Iterator[Held]:
        """The runs that have some of the positions [low, high), whole."""
        return _around(self.runs, low, high)

    def between(self, low: int, high: int) -> Iterator[Held]:
        """Who holds the positions [low, high), in order."""
        return (held.within(low, high) for held in _around(self.runs, low, high))

    def of_rank_between(self, rank: int, low: int, high: int) -> Iterator[Held]:
        """What one rank holds of the positions [low, high), in order."""
        return (held.within(low, high) for held in _around(self.of_rank[rank], low, high))


def _around(runs: Sequence[Held], low: int, high: int) -> Iterator[Held]:
    at = bisect_right(runs, low, key=_stop)
    while at < len(runs) and runs[at].start < high:
        yield runs[at]
        at += 1


def _stop(held: Held) -> int:
    return held.stop


def _holders_bytes(kept: Holders, _layout: Layout, _length: int, _world: int, documents: Segmentation | None) -> int:
    parts = sum(len(of.parts) + len(stair.parts) for row in kept.shared for of in row.values() for stair in of.stairs)
    ranks = sum(len(of_rank) for of_rank in kept.documents_of)
    return 1000 + (documents or WHOLE).nbytes + 232 * (len(kept.runs) + parts) + 100 * ranks


# Plans of several masks and of all ranks read one table, of which a batch has one; cross-attention has two.
@cached("holders of tokens", most_bytes=8 << 20, most_entries=16, size=_holders_bytes)
def holders(layout: Layout, length: int, world: int, documents: Segmentation | None) -> Holders:
    """The table of a sequence; documents must be known by position."""
    rows = (documents or WHOLE).row_bounds
    stored = [
        (run.start, run.start + run.count, rank, offset)
        for rank, runs in enumerate(layout.deal(length, world, rows[0]))
        for run, offset in zip(runs, _offsets(run.count for run in runs), strict=False)
    ]
    runs = tuple(map(Held._make, sorted(stored)))
    of_rank: list[list[Held]] = [[] for _ in range(world)]
    for held in runs:
        of_rank[held.rank].append(held)
    shared = tuple(_shared(runs, (0, length) if bounds is None else bounds, bounds is None) for bounds in rows)
    return Holders(runs, tuple(map(tuple, of_rank)), shared, tuple(_documents_of(row, world) for row in shared))


def _offsets(counts: Iterable[int]) -> Iterator[int]:
    offset = 0
    for count in counts:
        yield offset
        offset += count


def _shared(runs: Sequence[Held], bounds: tuple[int, ...], is_whole: bool) -> dict[int, SharedDocument]:
    """The documents that lie in several runs, and the whole sequence in any case, since its queries may have other runs."""
    begins = set(bounds)
    # A run that begins inside a document has the rest of it before: every other document is in one run.
    inside = sorted({document_at(bounds, held.start) for held in runs if held.start not in begins})
    if is_whole and runs:
        inside = [0]
    shared = {}
    for document in inside:
        start, stop = bounds[document], bounds[document + 1]
        shared[document] = SharedDocument.of(start, stop, [held.within(start, stop) for held in _around(runs, start, stop)])
    return shared


def _documents_of(shared: dict[int, SharedDocument], world: int) -> tuple[tuple[int, ...], ...]:
    of_rank: list[list[int]] = [[] for _ in range(world)]
    for document, of in shared.items():
        for rank in of.parts:
            of_rank[rank].append(document)
    return tuple(map(tuple, of_rank))
