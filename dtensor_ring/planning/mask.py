"""What may attend to what, as a band, and its share in a block of scores, as a tile.

    causal, q and k of length 4     window (1, 0)        a tile: queries 2..4 x keys 0..4 of the causal band
    q0: x . . .                     x . . .              q2: x x x .
    q1: x x . .                     x x . .              q3: x x x x
    q2: x x x .                     . x x .
    q3: x x x x                     . . x x

A query at position p may see a key at position t when `lo <= p - t <= hi`. Where queries and keys are stored in arithmetic
runs of one stride, that is again a band in storage indices, and a box of scores under a band is all a flash kernel needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from dtensor_ring.planning.runs import Piece


@dataclass(frozen=True, slots=True)
class Band:
    """The keys that a query may see: those with `lo <= p - t <= hi`. None leaves a side open."""

    # Bounds are distances, not positions: one band serves every query, every rank and every length.
    lo: int | None = None
    hi: int | None = None

    @classmethod
    @lru_cache(maxsize=256)
    def parse(cls, text: str) -> Band:
        """Reads a band from `full`, `causal` or `window:L,R` (flash-attn's window: p-L <= t <= p+R, -1 is unbounded)."""
        # Operators get the mask as text: an argument that is an object of ours fails in DTensor's dispatch, which hashes it.
        if text == "full":
            return cls()
        if text == "causal":
            return cls(0, None)
        left, right = (int(side) for side in text.removeprefix("window:").split(","))
        # flash-attn counts both sides away from the query; a band counts p - t, so that what lies ahead is negative.
        return cls(None if right < 0 else -right, None if left < 0 else left)

    def __str__(self) -> str:
        """`causal`, `full`, or `window 5 back, 0 ahead`."""
        if self.hi is None and self.lo in (None, 0):
            return "full" if self.lo is None else "causal"
        back, ahead = ("unbounded" if side is None else side for side in (self.hi, None if self.lo is None else -self.lo))
        return f"window {back} back, {ahead} ahead"

    @property
    def text(self) -> str:
        """The band as the text that `parse` reads."""
        if self.hi is None and self.lo in (None, 0):
            return "full" if self.lo is None else "causal"
        return f"window:{-1 if self.hi is None else self.hi},{-1 if self.lo is None else -self.lo}"

    @property
    def bounded(self) -> bool:
        """Whether a query sees a number of keys that does not grow with the length."""
        return self.lo is not None and self.hi is not None

    def seen(self, start: int, stop: int, first: int, end: int) -> tuple[int, int] | None:
        """The keys of positions [first, end) that queries at positions [start, stop) see, which are neighbours; None for none."""
        if self.lo is not None and self.hi is not None and self.lo > self.hi:
            return None
        low = first if self.hi is None else max(first, start - self.hi)
        high = end if self.lo is None else min(end, stop - self.lo)
        return (low, high) if low < high else None

    def shifted(self, offset: int) -> Band:
        """The band for queries that are numbered from 0 and whose positions begin at `offset`.

        With the offset `k_length - q_length` the mask is aligned bottom-right, as in flash-attn.
        """
        return Band(None if self.lo is None else self.lo - offset, None if self.hi is None else self.hi - offset)


def mask_text(is_causal: bool, window: tuple[int, int]) -> str:
    """Writes a mask as the text that `Band.parse` reads. A causal window ends at its query, so R counts as 0.

    Raises:
        TypeError: a side that is no integer, or a bool.
        ValueError: not two sides, causal with a window that looks ahead, or a side below -1.
    """
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ValueError(f"window={window!r}: needs two numbers of tokens, (back, ahead), such as (1023, 0); -1 is unbounded")
    left, right = window
    if any(not isinstance(side, int) or isinstance(side, bool) for side in window):
        raise TypeError(
            f"window={window!r}: a side is a whole number of tokens, found {type(left).__name__}, {type(right).__name__}"
        )
    if left < -1 or right < -1:
        raise ValueError(f"window=({left}, {right}): a side is a number of tokens, or -1 for unbounded")
    if is_causal and right > 0:
        raise ValueError(
            f"window=({left}, {right}) looks {right} tokens ahead but is_causal=True: pass is_causal=False or window=({left}, 0)"
        )
    if is_causal:
        return "causal" if left == -1 else f"window:{left},0"
    return "full" if (left, right) == (-1, -1) else f"window:{left},{right}"


@dataclass(frozen=True, slots=True, order=True)
class Tile:
    """A box of scores under a band: queries i in [q0, q1), keys j in [k0, k1), `lo <= i - j <= hi`; None does not cut the box.

    Tiles made by `Tile.trimmed` are tight: every query sees a key, every key is seen, and a bound that cuts nothing is None.
    """

    # Planning sorts tiles, and a None cannot be compared. It never comes to that: tight tiles of one box all hold its first score,
    # and the tiles of a plan are disjoint, so boxes differ before bounds are looked at.
    q0: int
    q1: int
    k0: int
    k1: int
    lo: int | None = None
    hi: int | None = None

    @classmethod
    def trimmed(cls, q0: int, q1: int, k0: int, k1: int, lo: int | None, hi: int | None) -> Tile | None:
        """The tight tile of a box and a band, None if nothing is left."""
        # Kernels count a window from the box's bottom right corner. In a box that is not tight a side can come out negative, which
        # flash-attn reads as unbounded; and keys that no query sees would be fetched for nothing.
        if lo is not None and hi is not None and lo > hi:
            return None
        # First the queries that see no key at all are cut off, then the keys that no query left sees: in this order each side of
        # the box is cut once, since what the second pair drops was seen by none of the queries that the first pair kept.
        if lo is not None:
            q0 = max(q0, k0 + lo)
        if hi is not None:
            q1 = min(q1, k1 + hi)
        if lo is not None:
            k1 = min(k1, q1 - lo)
        if hi is not None:
            k0 = max(k0, q0 - hi)
        if q0 >= q1 or k0 >= k1:
            return None
        # A bound outside the box is dropped, so that equal scores make equal tiles, and neighbours can join.
        cuts_low = lo is not None and q0 - (k1 - 1) < lo
        cuts_high = hi is not None and (q1 - 1) - k0 > hi
        return cls(q0, q1, k0, k1, lo if cuts_low else None, hi if cuts_high else None)

    @property
    def q_count(self) -> int:
        """How many queries the box has."""
        return self.q1 - self.q0

    @property
    def k_count(self) -> int:
        """How many keys the box has."""
        return self.k1 - self.k0

    @property
    def cells(self) -> int:
        """The number of scores inside the band."""
        # Below and above the band two corners of the box are cut off. They never overlap, since lo <= hi.
        below = 0 if self.lo is None else self._corner(self.lo - 1 - (self.q0 - self.k1 + 1))
        above = 0 if self.hi is None else self._corner(self.q1 - 1 - self.k0 - (self.hi + 1))
        return self.q_count * self.k_count - below - above

    def _corner(self, m: int) -> int:
        """Counts the cells of the box on diagonals 0 to `m`, counted from one corner."""
        # A triangle, less what of it sticks out of the box past its last query and past its last key, plus what sticks out of both
        # and was taken off twice. A closed form, since a tile of a long sequence has billions of scores.
        sides = (m + 1, m + 1 - self.q_count, m + 1 - self.k_count, m + 1 - self.q_count - self.k_count)
        a, b, c, d = (x * (x + 1) // 2 if x > 0 else 0 for x in sides)
        return a - b - c + d

    @property
    def window(self) -> tuple[int, int]:
        """The band as flash-attn's (left, right), aligned bottom-right in the box; -1 where the band does not cut."""
        shift = self.q1 - self.k1
        return (-1 if self.hi is None else self.hi - shift), (-1 if self.lo is None else shift - self.lo)

    def fits(self, window: tuple[int, int]) -> bool:
        """Whether a kernel called on this box with `window` computes exactly this tile, alone or beside boxes of more keys."""
        left, right = window
        shift = self.q1 - self.k1
        lo, hi = (None if right < 0 else shift - right), (None if left < 0 else shift + left)
        # see `split_misread`: for FlashAttention-2 the right side is the key count of the call's longest segment
        misread = right < 0 <= left and self.q_count > max(self.k_count, left + 1) + 1
        return not misread and Tile.trimmed(self.q0, self.q1, self.k0, self.k1, lo, hi) == self

    def moved(self, q: int, k: int) -> Tile:
        """The tile with its queries moved by `q` and its keys by `k`."""
        d = q - k
        lo, hi = (None if self.lo is None else self.lo + d), (None if self.hi is None else self.hi + d)
        return Tile(self.q0 + q, self.q1 + q, self.k0 + k, self.k1 + k, lo, hi)

    def split_misread(self) -> tuple[Tile, ...]:
        """Cuts the tile where FlashAttention-2 would misread its window; most tiles stay whole.

        That kernel reads a right side of as many tokens as there are keys, or more, as unbounded; and where the left side is
        bounded, an unbounded right side as the number of keys, which hides the last keys from the first queries of a box
        of many more queries than keys.
        """
        # It does so without an error, and numbers would be wrong. Plans are cut for all kernels alike: they know no kernel.
        right = self.window[1]
        if self.lo is not None and right >= self.k_count:
            first = self.lo + self.k1  # one past the first query that sees the last key: up to there the right side becomes 0
        elif self.hi is not None and right < 0 and self.q_count > self.k_count + 1:
            first = self.hi + self.k0 + 1  # one past the last query that sees the first key
        else:
            return (self,)
        boxes = (self.q0, first), (first, self.q1)
        # Each half is made tight again, and may still be misread for the other of the two reasons.
        halves = (Tile.trimmed(q0, q1, self.k0, self.k1, self.lo, self.hi) for q0, q1 in boxes)
        return tuple(part for half in halves if half is not None for part in half.split_misread())


def joined(a: Tile, b: Tile) -> Tile | None:
    """The one tile that covers exactly the scores of two disjoint tiles, or None."""
    box = min(a.q0, b.q0), max(a.q1, b.q1), min(a.k0, b.k0), max(a.k1, b.k1)
    # The bounding box covers both tiles; it is their union if, under a band that one of them has, it has as many scores as both.
    cells = a.cells + b.cells
    if cells > (box[1] - box[0]) * (box[3] - box[2]):
        return None
    # The counts alone do not prove it: a band may leave out scores of a part and have as many others instead.
    for lo in {a.lo, b.lo, None}:
        for hi in {a.hi, b.hi, None}:
            whole = Tile.trimmed(*box, lo, hi)
            if whole is not None and whole.cells == cells and _inside(a, whole) and _inside(b, whole):
                return whole
    return None


def _inside(part: Tile, whole: Tile) -> bool:
    """Whether every score of the tight tile `part` belongs to `whole`."""
    least = part.lo if part.lo is not None else part.q0 - part.k1 + 1
    most = part.hi if part.hi is not None else part.q1 - 1 - part.k0
    in_box = whole.q0 <= part.q0 and part.q1 <= whole.q1 and whole.k0 <= part.k0 and part.k1 <= whole.k1
    return in_box and (whole.lo is None or whole.lo <= least) and (whole.hi is None or most <= whole.hi)


def coalesce(tiles: list[Tile], near: int = 4) -> list[Tile]:
    """Joins tiles that are neighbours in storage until no two make one tile any more.

    `near` is how many tiles back, in sorted order, a neighbour is looked for.
    """
    # Each tile is a segment of a kernel call, and each call is merged: joined, the own keys of any layout are one causal call.
    if len(tiles) < 2:
        return tiles
    joint: list[Tile] = []
    # Comparing all pairs would make planning quadratic in documents. Sorted, tiles that can join stand close together.
    for tile in sorted(tiles):
        whole = tile
        for other in joint[: -near - 1 : -1]:
            union = joined(other, whole)
            if union is not None:
                joint.remove(other)
                whole = union
        joint.append(whole)
    return joint if len(joint) == len(tiles) else coalesce(joint)


def tiles_between(q: Piece, k: Piece, band: Band) -> list[Tile]:
    """The tiles, in storage indices, of the queries of one piece and the keys of another under a band of positions."""
    # Kernels know storage indices only. A band of positions is one of indices too where both sides step through positions alike.
    if q.run.block == 1 and k.run.block == 1:
        return _line_tiles(q, k, band)
    if (q.run.stride, q.run.block) == (k.run.stride, k.run.block):
        return _block_tiles(q, k, band)
    # Runs of two strides (the last, partial round of a stripe against the whole ones) have no common band but block by block.
    return [
        tile
        for i, q_block in q.run.blocks()
        for j, k_block in k.run.blocks()
        for tile in _line_tiles(Piece(q_block, q.offset + i, q.document), Piece(k_block, k.offset + j, k.document), band)
    ]


def _line_tiles(q: Piece, k: Piece, band: Band) -> list[Tile]:
    """The tile of two runs of single tokens: p - t = d + s * (i - j), so the band of indices is that of positions over s."""
    # A run of one token has no stride of its own, and takes that of the other.
    s = q.run.stride if k.run.count == 1 else k.run.stride
    assert q.run.count == 1 or k.run.count == 1 or q.run.stride == k.run.stride, "runs of two strides have no common band"
    d = q.run.start - k.run.start - s * (q.offset - k.offset)
    # Both bounds are rounded into the band: between two multiples of the stride there is no pair of a query and a key.
    lo = None if band.lo is None else -((d - band.lo) // s)
    hi = None if band.hi is None else (band.hi - d) // s
    tile = Tile.trimmed(q.offset, q.offset + q.run.count, k.offset, k.offset + k.run.count, lo, hi)
    return [] if tile is None else [tile]


def _block_tiles(q: Piece, k: Piece, band: Band) -> list[Tile]:
    """Tiles of two blocked runs: one band of storage indices, and for each side of it a diagonal of corners inside blocks.

    With I, J the blocks and i', j' the places inside them, p - t = d + (I - J) * s + (i' - j'). A bound holds for all of a
    block pair when I - J is far enough from it, for none when it is far on the other side, and for part of the pair on at
    most one diagonal in between, since s >= 2 * block. Storage indices have i - j = (I - J) * block + (i' - j').
    """
    d = q.run.start - k.run.start
    low = None if band.lo is None else _lower_side(band.lo - d, q.run.stride, q.run.block)
    high = None if band.hi is None else _lower_side(d - band.hi, q.run.stride, q.run.block).mirrored()
    base = q.offset - k.offset
    lo = None if low is None else low.edge + base
    hi = None if high is None else high.edge + base
    main = Tile.trimmed(q.offset, q.offset + q.run.count, k.offset, k.offset + k.run.count, lo, hi)
    tiles = [] if main is None else [main]
    # Positions jump from block to block and storage indices do not, so no single bound on i - j cuts a block pair and its neighbour
    # right. The main tile stops where it is exact, and what it leaves out lies on one diagonal of block pairs, as corners.
    if low is not None:
        # A corner at one side must keep to the other side of the band too.
        ceiling = None if band.hi is None else band.hi - d - low.diagonal * q.run.stride
        tiles += _corner_tiles(q, k, low, None, ceiling)
    if high is not None:
        # Scores below the low edge are in that side's corners already, and must not be counted twice.
        floor = None if low is None else low.edge - high.diagonal * q.run.block
        tiles += _corner_tiles(q, k, high, floor, None)
    return tiles


@dataclass(frozen=True, slots=True)
class _Side:
    """One side of a blocked band: storage indices from `edge` on, and corners least <= i' - j' <= most where I - J = diagonal.

    The high side of a band is worked out as the low side of the band whose distances have the other sign, and mirrored.
    """

    edge: int
    diagonal: int
    least: int
    most: int

    def mirrored(self) -> _Side:
        return _Side(-self.edge, -self.diagonal, -self.most, -self.least)


def _lower_side(lo: int, stride: int, block: int) -> _Side:
    """The side of the band `(I - J) * stride + (i' - j') >= lo`."""
    whole = -((1 - block - lo) // stride)  # the first diagonal that satisfies it everywhere
    partial = whole - 1
    inside = min(lo - partial * stride, block)  # on `partial`, i' - j' >= inside
    # The edge runs through the partial diagonal where it can. Were `inside` negative, that edge would also take block pairs of the
    # diagonal before, which see nothing; it stops at whole blocks then, and the rest of the partial diagonal is the corners.
    if inside >= 0:
        return _Side(partial * block + inside, whole, 1 - block, inside - block - 1)
    return _Side(partial * block, partial, inside, -1)


def _corner_tiles(q: Piece, k: Piece, side: _Side, floor: int | None, ceiling: int | None) -> list[Tile]:
    """The corners of one side, one tile for each pair of blocks on the side's diagonal."""
    least = side.least if floor is None else max(side.least, floor)
    most = side.most if ceiling is None else min(side.most, ceiling)
    if least > most:
        return []
    block = q.run.block
    tiles: list[Tile] = []
    for q_block in range(q.run.count // block):
        k_block = q_block - side.diagonal
        if 0 <= k_block < k.run.count // block:
            i, j = q.offset + q_block * block, k.offset + k_block * block
            tile = Tile.trimmed(i, i + block, j, j + block, i - j + least, i - j + most)
            tiles += [] if tile is None else [tile]
    return tiles
