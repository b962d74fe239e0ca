"""Which tokens of a sequence a rank holds, and in what order it stores them.

    contiguous, 4 ranks, 16 tokens       zigzag                  stripe                stripe, block=2
    rank 0:  0  1  2  3                  0  1 | 14 15            0  4  8 12             0  1 |  8  9
    rank 1:  4  5  6  7                  2  3 | 12 13            1  5  9 13             2  3 | 10 11
    rank 2:  8  9 10 11                  4  5 | 10 11            2  6 10 14             4  5 | 12 13
    rank 3: 12 13 14 15                  6  7 |  8  9            3  7 11 15             6  7 | 14 15

    zigzag of each document: see `dtensor_ring.planning.document_sharding`

A layout is a pure map from integers to integers: `Layout.runs(length, world, rank)` lists a rank's tokens in storage order
as arithmetic runs. It is defined for every length from 0 up and every world size; rank totals differ by at most one token,
so with fewer tokens than ranks some ranks hold none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal, NamedTuple

from dtensor_ring.planning.blocks import half_blocks
from dtensor_ring.planning.document_sharding import balance_of, share_documents
from dtensor_ring.planning.documents import Documents
from dtensor_ring.planning.runs import Bounds, Run, cut
from dtensor_ring.planning.segmentation import Segmentation

Kind = Literal["contiguous", "zigzag", "stripe"]
Cut = Literal["", "even", "documents"]


@dataclass(frozen=True, slots=True)
class Layout:
    """How a sequence is spread over the ranks of one mesh axis.

    Args:
        kind: "contiguous" (one chunk a rank), "zigzag" (chunks r and 2W-1-r of 2W) or "stripe" (blocks dealt out in turn).
        block: tokens dealt at a time; only stripes have more than 1.
        cut: what is spread. "": the whole row. "even": every document by itself, in equal parts, which its length must allow.
            "documents": documents are dealt out, short ones whole, so that tokens are even and work, in blocks, nearly so.
    """

    kind: Kind
    block: int = 1
    cut: Cut = ""

    def __str__(self) -> str:
        """`contiguous`, `zigzag`, `stripe:1`, `zigzag/even`, `zigzag/documents`: what `Layout.parse` reads."""
        name = self.kind if self.in_order else f"{self.kind}:{self.block}"
        return f"{name}/{self.cut}" if self.cut else name

    @property
    def chunks(self) -> int:
        """Chunks of neighbouring tokens that a rank holds of each thing that is spread; 0 where blocks are dealt out in turn."""
        return _KINDS[self.kind].chunks

    @property
    def in_order(self) -> bool:
        """Whether a rank's tokens are chunks of neighbours, so that the keys of all ranks can be put into position order."""
        return self.chunks > 0

    @classmethod
    @lru_cache(maxsize=64)
    def parse(cls, text: str) -> Layout:
        """The layout that `str(layout)` names; `stripe` alone means `stripe:1`.

        Raises:
            ValueError: the text names no layout.
        """
        if text in _NAMED:
            return _NAMED[text]
        kind, _, block = text.partition(":")
        if kind == "stripe" and (not block or (block.isdecimal() and int(block) > 0)):
            return cls("stripe", int(block or 1))
        raise ValueError(f"unknown layout {text!r}: use {', '.join(map(repr, _NAMED))}, 'stripe' or 'stripe:BLOCK'")

    def runs(self, length: int, world: int, rank: int, bounds: Bounds = None) -> tuple[Run, ...]:
        """The tokens of `rank` in storage order; empty runs are left out.

        `bounds` are the cumulative document bounds; only layouts that cut documents depend on them.

        Raises:
            ValueError: a layout that cuts documents is not given any, or cuts evenly what does not divide.
        """
        if self.cut == "documents" and world > 1:
            runs = self._shares(world, bounds)[rank]
        else:
            runs = self._runs(length, world, rank, bounds)
        return tuple(run for run in runs if run.count)

    def deal(self, length: int, world: int, bounds: Bounds = None) -> tuple[tuple[Run, ...], ...]:
        """The tokens of every rank, as `runs` gives those of one.

        Raises:
            ValueError: as `runs`.
        """
        # Asked for one rank after another, documents that were shared out would be looked up as often as there are ranks.
        if self.cut == "documents" and world > 1:
            shares = self._shares(world, bounds)
        else:
            shares = tuple(self._runs(length, world, rank, bounds) for rank in range(world))
        return tuple(tuple(run for run in runs if run.count) for runs in shares)

    def _runs(self, length: int, world: int, rank: int, bounds: Bounds) -> tuple[Run, ...]:
        # One rank holds everything in order, whatever the layout, and needs no documents to be cut by.
        if world == 1:
            return (Run(0, length),)
        if not self.cut:
            return _KINDS[self.kind].deal(length, world, rank, self.block)
        # Where all parts are equal, ranks hold the same bounds for their own tokens: the drop-in varlen functions are called so.
        whole, chunks, bounds = Layout(self.kind), world * self.chunks, bounds or (0, length)
        for start, stop in pairwise(bounds):
            if (stop - start) % chunks:
                raise ValueError(
                    f"{self} over {world} ranks needs documents that {chunks} divides, found one of {stop - start} tokens"
                )
        return tuple(
            Run(start + run.start, run.count) for start, stop in pairwise(bounds) for run in whole.runs(stop - start, world, rank)
        )

    def _shares(self, world: int, bounds: Bounds) -> Sequence[Iterator[Run]]:
        """The runs of every rank where documents are balanced."""
        if bounds is None:
            raise ValueError(
                "zigzag of each document needs the documents: use dtensor_ring.full_tensor, redistribute, ... with documents="
            )
        # Totals follow from the length alone, not from the documents, so that a shard's shape is known without them.
        totals = tuple(_share(bounds[-1], world, rank) for rank in range(world))
        return [(Run(start, count) for start, count in chunks) for chunks in share_documents(bounds, totals)]

    def local_length(self, length: int, world: int, rank: int) -> int:
        """How many tokens `rank` holds; the documents do not matter."""
        if self.cut:
            return _share(length, world, rank)
        return sum(run.count for run in self.runs(length, world, rank))

    def tokens(self, length: int, world: int, rank: int, bounds: Bounds = None) -> list[int]:
        """The global indices of the rank's tokens in storage order."""
        return [token for run in self.runs(length, world, rank, bounds) for token in run.tokens()]


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """A layout that cuts documents, together with those documents: a pure map from integers to integers again.

    Raises:
        ValueError: documents differ from batch row to batch row, and tokens would lie on other ranks in each.
    """

    layout: Layout
    documents: Segmentation

    def __post_init__(self) -> None:
        if self.documents.rows != 1:
            raise ValueError(
                f"{self.layout} needs one row of documents for the whole batch, found {self.documents.rows}: pack the rows into one"
            )

    def runs(self, length: int, world: int, rank: int) -> tuple[Run, ...]:
        """As `Layout.runs`."""
        return self.layout.runs(length, world, rank, self.documents.row_bounds[0])

    def tokens(self, length: int, world: int, rank: int) -> list[int]:
        """As `Layout.tokens`."""
        return self.layout.tokens(length, world, rank, self.documents.row_bounds[0])

    def local_length(self, length: int, world: int, rank: int) -> int:
        """As `Layout.local_length`."""
        return self.layout.local_length(length, world, rank)


def work_balance(layout: Layout, documents: Documents, world: int, reach: int | None = None) -> float:
    """Mean causal work of the ranks over the most loaded rank's, as near to time as integers tell: 1 is perfect.

    Work is blocks of 128 x 128 scores where ranks hold chunks, as kernels spend it: texts shorter than a block cost a whole one.
    Of stripes, whose blocks hold tokens that lie far apart, it is scores.

    Args:
        layout: how the rows are spread.
        documents: their bounds.
        world: ranks.
        reach: keys that a query sees at most, itself counted; None is all before it in its document.
    """
    work = [0] * world
    for bounds in documents.bounds:
        for rank, runs in enumerate(layout.deal(documents.length, world, bounds)):
            for piece in cut(runs, bounds):
                run, start = piece.run, bounds[piece.document]
                if layout.in_order:
                    work[rank] += half_blocks(run.start - start, run.count, reach)
                else:
                    work[rank] += run.excess(1 - start) - (0 if reach is None else run.excess(1 - start - reach))
    return balance_of(work)


def _share(length: int, world: int, rank: int) -> int:
    """Tokens of `rank` when `length` is dealt as evenly as possible, the first ranks taking the remainder."""
    # Every layout gives every rank just this many. Collectives rely on it where they pad shares to the first rank's size, and
    # moving a tensor to another layout leaves its local shape as it was.
    return length // world + (rank < length % world)


def _before(length: int, world: int, rank: int) -> int:
    """Tokens held by the ranks before `rank` under `_share`."""
    return length // world * rank + min(rank, length % world)


def _contiguous(length: int, world: int, rank: int, _block: int) -> tuple[Run, ...]:
    """One chunk a rank."""
    return (Run(_before(length, world, rank), _share(length, world, rank)),)


def _zigzag(length: int, world: int, rank: int, _block: int) -> tuple[Run, ...]:
    """Chunk r and its mirror image; an odd total gives its extra token to the early chunk on even ranks, else to the late one."""
    total, before = _share(length, world, rank), _before(length, world, rank)
    # Extra tokens alternate so that chunks stay near an even cut into 2W. If all went to early chunks, they would add up, and the
    # chunks in the middle of the sequence would lie W/2 tokens off. A closed form, since totals ask it of a thousand ranks.
    # Ranks with an odd total: those with the remainder, or those without it, as the even share is even or odd.
    share, rest = divmod(length, world)
    odd = range(rest, world) if share % 2 else range(rest)
    odd_even = len(range(odd.start + odd.start % 2, min(odd.stop, rank), 2))  # of these, before this one, with an even number
    odd_all = len(range(odd.start, min(odd.stop, rank)))
    early = (before - odd_all) // 2 + odd_even
    first = (total + (rank % 2 == 0)) // 2
    return Run(early, first), Run(length - (before - early) - (total - first), total - first)


def _stripe(length: int, world: int, rank: int, block: int) -> tuple[Run, ...]:
    """Whole rounds of `block` tokens a rank; the last, partial round is dealt as evenly as possible."""
    rounds, rest = divmod(length, world * block)
    # Dealt one by one, the tokens of a partial round lie a stride after those before them: they go on in the same run.
    if block == 1:
        return (Run(rank, rounds + (rank < rest), world),)
    # A single round is a run of neighbours: it must look like one, for its tiles to join with others.
    dealt = Run(rank * block, rounds * block, world * block, block) if rounds > 1 else Run(rank * block, rounds * block)
    return dealt, Run(rounds * world * block + _before(rest, world, rank), _share(rest, world, rank))


class _Kind(NamedTuple):
    """How one kind of layout deals tokens out: all that tells kinds apart.

    Attributes:
        deal: the runs of a rank in storage order, some perhaps empty, from (length, world, rank, block).
        chunks: as `Layout.chunks`.
    """

    deal: Callable[[int, int, int, int], tuple[Run, ...]]
    chunks: int


_KINDS: dict[Kind, _Kind] = {"contiguous": _Kind(_contiguous, 1), "zigzag": _Kind(_zigzag, 2), "stripe": _Kind(_stripe, 0)}

_NAMED = {
    str(layout): layout
    for layout in (
        *(Layout(kind) for kind, dealt in _KINDS.items() if dealt.chunks),
        Layout("zigzag", cut="documents"),
        Layout("contiguous", cut="even"),
        Layout("zigzag", cut="even"),
    )
}
