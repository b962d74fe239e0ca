"""A deck of packed documents, cheap ones at one end and dear ones at the other, from which ranks take tokens at both ends.

    cheap end                                              dear end
    |  100  |  250  |  400  |  700  |  1500  |  5000  |  20000  |       lengths, sorted by price: half blocks a token
    >>>>>>>>>>>>>>>>>>>>>                                 <<<<<<<       one rank: whole documents, and a part of one, from each end

    |  rank 0  |  rank 1  |     what is left      |  rank 1  |  rank 0  |       the longest document after two ranks
    0                   first                   last                20000

A long document goes to several ranks, one after the other, and each takes a piece off its front and one off its back. Token i of n
sees i + 1 keys, token n - 1 - i sees n - i: the two together always n + 1. So after such nested pairs, what is left costs as much a
token as the whole document did, and the deck stays sorted.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from dtensor_ring.planning.blocks import BLOCK, half_blocks

# A pair of pieces is two blocks at least: fewer tokens than this are taken in one piece.
_SMALLEST_PAIR = 2 * BLOCK
# A piece that would fill less than half a block is left to the other piece of its pair.
_SMALLEST_PIECE = BLOCK // 2


class Part(NamedTuple):
    """Tokens `first` to `last` of a document of `length` tokens: what earlier ranks have left of it."""

    document: int
    length: int
    first: int
    last: int

    @property
    def size(self) -> int:
        """Tokens that are left."""
        return self.last - self.first

    @property
    def work(self) -> int:
        """Half blocks of what is left, as one piece."""
        return half_blocks(self.first, self.size)


class Cut(NamedTuple):
    """A part of which a rank takes `front` tokens off the front and `back` off the back."""

    part: Part
    front: int
    back: int

    @property
    def rest(self) -> Part:
        """What the next rank finds."""
        document, length, first, last = self.part
        return Part(document, length, first + self.front, last - self.back)

    @property
    def pieces(self) -> tuple[tuple[int, int], ...]:
        """Where the pieces that are taken start in the document, and their tokens."""
        both = (self.part.first, self.front), (self.part.last - self.back, self.back)
        return tuple(piece for piece in both if piece[1])

    @property
    def work(self) -> int:
        """Half blocks of the pieces that are taken."""
        return half_blocks(self.part.first, self.front) + half_blocks(self.part.last - self.back, self.back)

    @property
    def overhead(self) -> int:
        """Half blocks that there are more than if the part had not been cut: of rows of blocks that are not full, and segments."""
        return self.work + self.rest.work - self.part.work

    @property
    def odd(self) -> int:
        """How many of its cuts, at most two, are not a whole number of blocks from the document's start."""
        rest = self.rest
        cuts = [token for token, taken in ((rest.first, self.front), (rest.last, self.back)) if taken and rest.size]
        return sum(token % BLOCK > 0 for token in cuts)


class Look(NamedTuple):
    """What `tokens` from one end of the deck are: whole documents, and `count` tokens, perhaps none, of the document at `index`.

    `work` is that of the whole ones, in half blocks.
    """

    tokens: int
    work: int
    index: int
    count: int


class Deck:
    """Documents of which ranks take tokens, in turn, from the cheap end and from the dear end.

    Only the documents at the two ends can be cut; all between them are whole. So prefix sums of tokens and half blocks over whole
    documents tell what any number of tokens from an end costs, by bisection.
    """

    def __init__(self, lengths: Sequence[int], pair_above: int) -> None:
        """Sort documents of `lengths` tokens each; those of more than `pair_above` are cut in nested pairs, the others once."""
        # Every rank deals for itself, and none may round otherwise: prices are integers, of half blocks a token, in 2 ** 20ths.
        prices = {d: (half_blocks(0, length) << 20) // length for d, length in enumerate(lengths) if length}
        order = sorted(prices, key=lambda d: (prices[d], lengths[d], d))
        self.parts = [Part(d, lengths[d], 0, lengths[d]) for d in order]
        self.low, self.high = 0, len(self.parts)  # the documents that are not gone
        self._tokens = list(accumulate((part.length for part in self.parts), initial=0))
        self._work = list(accumulate((part.work for part in self.parts), initial=0))
        self._pair_above = pair_above

    @property
    def tokens(self) -> int:
        """Tokens that are left."""
        return self._tokens[self.high] - self._tokens[self.low] - sum(self._gone(i) for i in self._ends())

    @property
    def work(self) -> int:
        """Half blocks that are left, if nothing more is cut."""
        return self._work[self.high] - self._work[self.low] + sum(self._change(i) for i in self._ends())

    def look_from_cheap_end(self, tokens: int) -> Look:
        """The first `tokens` of the cheap end."""
        low, high = self.low, self.high
        # Where the tokens end if nothing were gone of the first document.
        end = self._tokens[low] + self._gone(low) + tokens
        index = bisect_right(self._tokens, end, low + 1, high) - 1
        if index == low:
            return Look(tokens, 0, low, tokens)
        whole = self._work[index] - self._work[low] + self._change(low)
        return Look(tokens, whole, index, end - self._tokens[index])

    def look_from_dear_end(self, tokens: int) -> Look:
        """The last `tokens` of the dear end."""
        low, high = self.low, self.high
        end = self._tokens[high] - self._gone(high - 1) - tokens
        first = bisect_left(self._tokens, end, low + 1, high)
        if first == high:
            return Look(tokens, 0, high - 1, tokens)
        whole = self._work[high] - self._work[first] + self._change(high - 1)
        return Look(tokens, whole, first - 1, self._tokens[first] - end)

    def span(self, total: int) -> tuple[int, int]:
        """The fewest and the most of `total` tokens that may come from the cheap end.

        A document that is cut already must not wait for later ranks, so that the ranks that share a document are neighbours.
        """
        ends = self._ends()
        least, most = int(self._gone(ends[0]) > 0), total - int(self._gone(ends[-1]) > 0)
        return (least, most) if len(ends) > 1 and least <= most else (0, total)

    def cut(self, index: int, count: int, shift: int) -> Cut:
        """`count` tokens off the document at `index`.

        Of a document that is cut in pairs, as much is gone from the front as from the back, with `shift` 0, and otherwise `shift`
        blocks more from the back. One that is cut once gives its back with 0, its front with less, and a pair with more.
        """
        part = self.parts[index]
        if count == part.size:
            return Cut(part, count, 0)
        once = part.length <= self._pair_above
        if count < _SMALLEST_PAIR or (once and shift <= 0):
            return Cut(part, count, 0) if shift < 0 else Cut(part, 0, count)
        even = (count + part.first - (part.length - part.last)) // 2
        wanted = part.last - even - (0 if once else shift * BLOCK)
        # The nearest end of a block, of those within what `count` tokens off the back would take.
        lowest, highest = -(-(part.last - count) // BLOCK), part.last // BLOCK
        back = part.last - BLOCK * min(max((wanted + BLOCK // 2) // BLOCK, lowest), highest)
        if back < _SMALLEST_PIECE:
            back = 0
        elif count - back < _SMALLEST_PIECE:
            back = count
        return Cut(part, count - back, back)

    def take(self, cheap: Look, dear: Look, cuts: Sequence[Cut]) -> Iterator[tuple[int, int, int]]:
        """Take what two looks have seen; yields document, first token in it, and tokens, of every piece."""
        whole = [*self.parts[self.low : cheap.index], *self.parts[dear.index + 1 : self.high]]
        self.low, self.high = cheap.index, dear.index + 1
        for index, cut in zip(dict.fromkeys((cheap.index, dear.index)), cuts, strict=True):
            self.parts[index] = cut.rest
        if not self.parts[self.low].size:  # all of the deck is taken
            self.low = self.high
        for part in whole:
            yield part.document, part.first, part.size
        for cut in cuts:
            for start, count in cut.pieces:
                yield cut.part.document, start, count

    def _ends(self) -> tuple[int, ...]:
        """Indices of the documents that may have been cut."""
        return tuple(dict.fromkeys((self.low, self.high - 1))) if self.low < self.high else ()

    def _gone(self, index: int) -> int:
        return self.parts[index].length - self.parts[index].size

    def _change(self, index: int) -> int:
        """Half blocks of what is left of a document, less those of the whole of it."""
        return self.parts[index].work - (self._work[index + 1] - self._work[index])
