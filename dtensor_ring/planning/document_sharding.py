"""Sharing out packed documents: every document zigzag on its own where it is long, whole on one rank where it is short.

    two ranks, documents a (12 tokens), b (3), c (1)      rank 0:  a0 a1 a2 a9 a10 a11 | c0 ...
                                                          rank 1:  a3 .. a8 | b0 b1 b2 ...

Causal work grows with the square of a document's length, so long documents must be cut for balance; short ones must not be, since
small blocks waste a kernel and cutting makes keys travel. Every rank gets exactly the tokens that an even split of the whole
sequence gives it: what whole documents leave over is filled with larger or smaller parts of the cut ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from dtensor_ring.cache import cached

Chunks = tuple[tuple[int, int], ...]  # (start, count) of neighbouring tokens, in the order a rank stores them

_GOOD_WORK = 0.985


def _held(shared: tuple[Chunks, ...], bounds: tuple[int, ...], totals: tuple[int, ...]) -> int:
    """Bytes of chunks, two integers in a tuple each, and of the bounds they were made for."""
    return 144 * sum(map(len, shared)) + 40 * len(bounds) + 200 * len(totals)


@cached("documents shared out", most_bytes=8 << 20, most_entries=32, size=_held)
def share_documents(bounds: tuple[int, ...], totals: tuple[int, ...]) -> tuple[Chunks, ...]:
    """The chunks of each rank.

    The longest documents that may stay whole are tried from a rank's tokens downwards, until the mean work is at least
    0.985 of the largest; with all documents cut that have two tokens for each rank, it always is, but for rounding.

    Args:
        bounds: cumulative document bounds.
        totals: tokens that each rank gets; they add up to the last bound.
    """
    bounds = tuple(dict.fromkeys(bounds))  # documents without tokens change nothing
    world = len(totals)
    limit, best = max(totals), None
    while True:
        chunks = _shared(bounds, totals, limit)
        quality = _quality(bounds, chunks)
        if best is None or quality > best[0]:
            best = quality, chunks
        if quality >= _GOOD_WORK or limit < 2 * world:
            return best[1]
        limit = limit // 2


def _shared(bounds: tuple[int, ...], totals: tuple[int, ...], limit: int) -> tuple[Chunks, ...]:
    """Documents up to `limit` tokens whole, where they fit; the others cut."""
    world = len(totals)
    lengths = {d: b - a for d, (a, b) in enumerate(pairwise(bounds)) if b > a}
    order = sorted(lengths, key=lambda d: (-lengths[d], d))
    left, held = list(totals), [0] * world
    parts: dict[int, list[tuple[int, int]]] = {}
    cut = []
    for document in order:
        length = lengths[document]
        rank = min(range(world), key=lambda r: (held[r], r))
        # The rank with the fewest whole tokens gets the next longest document, as in any greedy bin packing; one that does not fit
        # there is cut, rather than put where it unbalances.
        if length > limit or left[rank] < length:
            cut.append(document)
            continue
        left[rank] -= length
        held[rank] += length
        parts[document] = [(rank, length)]
    for document in cut:
        sizes = _proportional(lengths[document], left)
        left = [rest - size for rest, size in zip(left, sizes, strict=True)]
        parts[document] = list(enumerate(sizes))
    return tuple(_chunks(bounds, parts, rank, world) for rank in range(world))


def _proportional(length: int, left: Sequence[int]) -> list[int]:
    """`length` split as `left` is, each part at most what is left."""
    total = sum(left)
    sizes = [length * rest // total for rest in left]
    remainders = sorted(range(len(left)), key=lambda r: (-(length * left[r] % total), r))
    missing = length - sum(sizes)
    for rank in remainders:
        if missing and sizes[rank] < left[rank]:
            sizes[rank] += 1
            missing -= 1
    return sizes


def _chunks(bounds: tuple[int, ...], parts: dict[int, list[tuple[int, int]]], rank: int, world: int) -> Chunks:
    """The rank's chunks: of a cut document an early one, in rank order from its start, and a late one from its end."""
    chunks: list[tuple[int, int]] = []
    for document in sorted(parts):
        start, stop, sizes = bounds[document], bounds[document + 1], dict(parts[document])
        if rank not in sizes:
            continue
        if len(sizes) == 1:
            chunks.append((start, stop - start))
            continue
        early = late = 0
        for r in range(rank + 1):
            first = (sizes[r] + (r + document) % 2) // 2  # odd tokens alternate between the two chunks
            early, late = early + first, late + sizes[r] - first
        first = (sizes[rank] + (rank + document) % 2) // 2
        chunks += [(start + early - first, first), (stop - late, sizes[rank] - first)]
    return tuple(chunk for chunk in chunks if chunk[1])


def _quality(bounds: tuple[int, ...], shared: Sequence[Chunks]) -> float:
    """Mean causal work over the most loaded rank's."""
    work = []
    for chunks in shared:
        total, document = 0, 0
        for start, count in sorted(chunks):
            while bounds[document + 1] <= start:
                document += 1
            first = start - bounds[document] + 1
            total += count * first + count * (count - 1) // 2
        work.append(total)
    return balance_of(work)


def balance_of(work: Sequence[int]) -> float:
    """Mean work over the most loaded rank's: 1 is perfect."""
    most = max(work, default=0)
    return sum(work) / len(work) / most if most else 1.0
