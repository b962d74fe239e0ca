"""Sharing out packed documents: the same tokens and the same work for every rank, with as few cuts as that takes.

    three ranks, documents a, b, c and d          holds                               half blocks
    of 12, 3, 2 and 1 blocks of 128 tokens        rank 0: a0 | a10 a11 | c0 c1 | d0   54
                                                  rank 1: a1 a2 a3 a4 a5 | a9         56
                                                  rank 2: a6 a7 a8 | b0 b1 b2         56    an even share of the whole: 54

Causal work grows with the square of a document's length: a token of a long document is dear, one of a short document is cheap. So
documents are sorted by what a token costs and dealt from both ends, as from a deck of cards (`dtensor_ring.planning.deck`). Of a
rank's S tokens t come from the cheap end and S - t from the dear end. With t = 0 its work is above the mean of what is left, with
t = S below, and it falls in between: so some t gives just the mean, what is left has the same mean again, and so has every rank in
turn. A rank cuts at most the two documents where its tokens end. So there are at most four pieces a rank more than documents, short
documents stay whole, and the ranks that share a long one are neighbours.

Work is counted in blocks, as kernels spend it (`dtensor_ring.planning.blocks`), and cuts fall on whole blocks from the document's
start: others add a row of blocks that is not full. S tokens of documents of any lengths cannot do without such odd cuts, but with
one a rank. A row of the longest document's blocks is then the least that work can be moved by, so that the most loaded rank may be
half a row over the even share, beside a few per cent that the cuts add.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from dtensor_ring.cache import cached
from dtensor_ring.planning.blocks import BLOCK, half_blocks
from dtensor_ring.planning.deck import Cut, Deck, Look

Chunks = tuple[tuple[int, int], ...]  # (start, count) of neighbouring tokens, in the order a rank stores them

# Documents of up to this part (1 / 2) of a rank's tokens are cut once, since the next rank takes the rest; longer ones in pairs.
_CUT_ONCE = 2
# Half blocks that a piece more counts for, beside what it computes: its keys may travel, and kernels are slower on short segments.
_PIECE = 2
# Work may be off its goal by this part (1 / 250) before that is worth a cut: what blocks tell of time is no more exact.
_TOLERANCE = 250
# What a cut adds counts 3 : 10 beside what the rank's work is off its goal, as later goals share it among all ranks.
_OVERHEAD, _OFF = 3, 10
# Where cuts are tried: at these whole numbers of blocks around the place that gives just the right work.
_TRIED = range(-2, 4)
# Blocks more that are tried off the back of a long document than leave the middle its middle. Its rows have many blocks, and a rank
# whose even share is ten such rows comes nearer to it by one at the back for one at the front, or the other way round.
_SHIFTS = (0, 1, -1)
# Dealt again is what leaves the most loaded rank over the even share by more than this part (1 / 100) of it.
_GOOD = 100


class _Score(NamedTuple):
    """Smaller is better: at most one odd cut; then work that is not `off` its goal by much, and cuts that cost little."""

    many_odd: bool
    total: int
    off: int


class _Hand(NamedTuple):
    """What a rank may take: two looks, and the parts that are cut, for the looks and a shift."""

    cheap: Look
    dear: Look
    cuts: tuple[Cut, ...]

    @property
    def work(self) -> int:
        """Half blocks."""
        return self.cheap.work + self.dear.work + sum(cut.work for cut in self.cuts)

    def score(self, goal: int) -> _Score:
        """How good it is for a goal of half blocks."""
        off = abs(self.work - goal)
        cost = sum(cut.overhead + _PIECE * len(cut.pieces) for cut in self.cuts)
        return _Score(sum(cut.odd for cut in self.cuts) > 1, _OFF * max(off, goal // _TOLERANCE) + _OVERHEAD * cost, off)


def _held(shared: tuple[Chunks, ...], bounds: tuple[int, ...], totals: tuple[int, ...]) -> int:
    """Bytes of chunks, two integers in a tuple each, and of the bounds they were made for."""
    return 144 * sum(map(len, shared)) + 40 * len(bounds) + 200 * len(totals)


@cached("documents shared out", most_bytes=8 << 20, most_entries=32, size=_held)
def share_documents(bounds: tuple[int, ...], totals: tuple[int, ...]) -> tuple[Chunks, ...]:
    """The chunks of each rank, in the order of their tokens; neighbours are one chunk, also where a document ends.

    It takes time in proportion to ranks and documents, but for logarithms. Only integers are compared, so that all ranks, each for
    itself, find the same.

    Args:
        bounds: cumulative document bounds.
        totals: tokens that each rank gets; they add up to the last bound.
    """
    lengths = [b - a for a, b in pairwise(bounds)]
    whole = sum(half_blocks(0, length) for length in lengths)
    best, work = _deal(lengths, totals, 0)
    # What a rank's goal is cannot know what later ranks' cuts will add. The first deal tells, and the second has it in its goals.
    if (max(work) * len(totals) - whole) * _GOOD > whole:
        again, work_again = _deal(lengths, totals, (sum(work) - whole) // len(totals))
        best = min((max(work), best), (max(work_again), again), key=lambda dealt: dealt[0])[1]
    return tuple(_chunks(bounds, pieces) for pieces in best)


_Pieces = list[tuple[int, int, int]]  # document, first token in it, tokens


def _deal(lengths: Sequence[int], totals: Sequence[int], extra: int) -> tuple[list[_Pieces], list[int]]:
    """Pieces and work of each rank, where goals are `extra` half blocks above the mean of what is left."""
    deck = Deck(lengths, max(totals) // _CUT_ONCE)
    dealt: list[_Pieces] = []
    work: list[int] = []
    for rank, total in enumerate(totals):
        if not total:  # fewer tokens than ranks
            dealt.append([])
            work.append(0)
            continue
        hand = _choose(deck, total, deck.work // (len(totals) - rank) + extra)
        dealt.append(list(deck.take(*hand)))
        work.append(hand.work)
    return dealt, work


def _choose(deck: Deck, total: int, goal: int) -> _Hand:
    """The best `total` tokens for a goal of half blocks."""
    if total == deck.tokens:
        return _hand(deck, *_look(deck, total, 0))
    looks = _looks_near(deck, total, goal)
    best: tuple[_Score, _Hand] | None = None
    for shift in _SHIFTS:
        for look in looks:
            hand = _hand(deck, *look, shift)
            # Where its work alone is too far off, what its cuts cost need not be counted.
            if best is not None and best[0] <= (False, _OFF * abs(hand.work - goal)):
                continue
            score = hand.score(goal)
            if best is None or score < best[0]:
                best = score, hand
        assert best is not None, "there are looks"
        # Shifts leave the middle a little to one side, which is dearer or cheaper than pairs are: so only where they are needed.
        if not best[0].many_odd and best[0].off <= goal // _TOLERANCE:
            break
    assert best is not None, "there are shifts"
    return best[1]


def _looks_near(deck: Deck, total: int, goal: int) -> list[tuple[Look, Look]]:
    """What `total` tokens from both ends may be, near what gives just the goal: places for good cuts."""
    least, most = few, many = deck.span(total)
    while many - few > 1:
        middle = (few + many) // 2
        if _hand(deck, *_look(deck, middle, total - middle)).work > goal:
            few = middle
        else:
            many = middle
    cheap = {few, many, *_places(deck, deck.look_from_cheap_end(few))}
    cheap |= {total - dear for dear in _places(deck, deck.look_from_dear_end(total - few))}
    return [_look(deck, tokens, total - tokens) for tokens in sorted(cheap) if least <= tokens <= most]


def _places(deck: Deck, look: Look) -> Iterator[int]:
    """Tokens from an end, near those of a look, with which it cuts nothing, or leaves a whole number of blocks."""
    size, before = deck.parts[look.index].size, look.tokens - look.count
    odd = (look.count - size) % BLOCK
    within = (look.count - odd + blocks * BLOCK for blocks in _TRIED)
    for count in (0, *(count for count in within if 0 < count < size), size):
        yield before + count


def _look(deck: Deck, cheap: int, dear: int) -> tuple[Look, Look]:
    return deck.look_from_cheap_end(cheap), deck.look_from_dear_end(dear)


def _hand(deck: Deck, cheap: Look, dear: Look, shift: int = 0) -> _Hand:
    if cheap.index == dear.index:  # the same document from both ends: all that is taken of it is one cut
        return _Hand(cheap, dear, (deck.cut(cheap.index, cheap.count + dear.count, shift),))
    return _Hand(cheap, dear, (deck.cut(cheap.index, cheap.count, 0), deck.cut(dear.index, dear.count, shift)))


def _chunks(bounds: tuple[int, ...], pieces: _Pieces) -> Chunks:
    """Pieces in the order of their tokens, as chunks."""
    chunks: list[tuple[int, int]] = []
    for start, count in sorted((bounds[document] + first, count) for document, first, count in pieces):
        if chunks and sum(chunks[-1]) == start:
            start, count = chunks[-1][0], chunks.pop()[1] + count
        chunks.append((start, count))
    return tuple(chunks)


def balance_of(work: Sequence[int]) -> float:
    """Mean work over the most loaded rank's: 1 is perfect."""
    most = max(work, default=0)
    return sum(work) / len(work) / most if most else 1.0
