"""Tokens that a rank stores one after another, as arithmetic runs, and runs cut where documents begin."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

Bounds = tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Run:
    """`count` tokens, stored one after the other: `block` neighbours from `start`, then `block` more every `stride` tokens.

    With `block=1`, the usual case, token i of the run is `start + i * stride`. With `block > 1` the count is a whole number
    of blocks.
    """

    # Plans, masks and totals work on runs instead of tokens: their cost must not grow with the length of the sequence.
    start: int
    count: int
    stride: int = 1
    block: int = 1

    def token(self, i: int) -> int:
        """The global index of the run's i-th stored token."""
        return self.start + i // self.block * self.stride + i % self.block

    def tokens(self) -> list[int]:
        """All tokens of the run in storage order."""
        return [self.token(i) for i in range(self.count)]

    def blocks(self) -> Iterator[tuple[int, Run]]:
        """The run cut into contiguous blocks, each with the storage index of its first token."""
        for i in range(0, self.count, self.block):
            yield i, Run(self.token(i), self.block)

    def first_at_or_after(self, position: int) -> int:
        """Storage index of the first token >= `position` (`count` if there is none)."""
        past = position - self.start
        # Where the position lies in the gap after a block, the answer is the next block's first token.
        if past <= 0:
            return 0
        index = past // self.stride * self.block + min(past % self.stride, self.block)
        return min(index, self.count)

    def rounds(self) -> tuple[int, int]:
        """How many blocks of neighbouring tokens the run has, and of how many tokens."""
        return (1, self.count) if self.stride == 1 else (self.count // self.block, self.block)

    def excess(self, shift: int) -> int:
        """Sum of max(p + shift, 0) over the tokens p: what scores of a band are counted with, whatever the length."""
        # A block's sum is a difference of two triangular numbers, and blocks lie a stride apart: what is left are two sums of
        # triangular numbers in arithmetic progression, which have a closed form.
        blocks, block = self.rounds()
        first = self.start + shift
        return _triangles(first + block - 1, self.stride, blocks) - _triangles(first - 1, self.stride, blocks)


@dataclass(frozen=True, slots=True)
class Piece:
    """A run inside one document: `offset` is the storage index, on the rank, of its first token."""

    run: Run
    offset: int
    document: int


def document_at(bounds: tuple[int, ...], token: int) -> int:
    """The index of the document in which `token` lies; one without tokens is never it."""
    return bisect_right(bounds, token) - 1


def unions(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Joins ranges that overlap or touch, and returns them in order."""
    joint: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if joint and low <= joint[-1][1]:
            joint[-1] = (joint[-1][0], max(joint[-1][1], high))
        else:
            joint.append((low, high))
    return joint


def cut(runs: tuple[Run, ...], bounds: Bounds) -> tuple[Piece, ...]:
    """Cut runs, given in storage order, where documents begin; without `bounds` everything is document 0."""
    pieces: list[Piece] = []
    offset = 0
    for run in runs:
        if bounds is None:
            pieces.append(Piece(run, offset, 0))
        else:
            pieces.extend(_cut_run(run, offset, bounds))
        offset += run.count
    return tuple(pieces)


def _cut_run(run: Run, offset: int, bounds: tuple[int, ...]) -> Iterator[Piece]:
    last = run.token(run.count - 1)
    document = document_at(bounds, run.start)
    # Most runs of a layout that cuts documents are whole documents.
    if run.block == 1 and last < bounds[document + 1]:
        yield Piece(run, offset, document)
        return
    begin = 0
    while begin < run.count:
        # A run with a stride may step over a short document: then `end` is `begin`, and the document has no piece.
        end = run.first_at_or_after(bounds[document + 1]) if bounds[document + 1] <= last else run.count
        for low, part in _whole_blocks(run, begin, end):
            yield Piece(part, offset + low, document)
        begin = end
        document += 1


def _whole_blocks(run: Run, begin: int, end: int) -> Iterator[tuple[int, Run]]:
    """Storage range [begin, end) of a run as runs again: a blocked run may give a part of a block at either end."""
    if run.block == 1:
        if end > begin:
            yield begin, Run(run.token(begin), end - begin, run.stride)
        return
    # Only whole blocks have the run's stride; the parts at either end, of neighbouring tokens, are runs of their own.
    head = min(end, -(-begin // run.block) * run.block)
    tail = max(head, end // run.block * run.block)
    for low, high in ((begin, head), (head, tail), (tail, end)):
        if high > low:
            # A single block is a run of neighbours, and must look like one, for its tiles to join with others.
            whole = low == head and high == tail and high - low > run.block
            yield low, Run(run.token(low), high - low, run.stride, run.block) if whole else Run(run.token(low), high - low)


def _triangles(first: int, stride: int, count: int) -> int:
    """Sum of 1 + 2 + ... + x over x = first, first + stride, ..., `count` of them; nothing where x is negative."""
    skipped = 0 if first > 0 else min(-first // stride + 1, count)
    n, x = count - skipped, first + skipped * stride
    steps, squares = n * (n - 1) // 2, n * (n - 1) * (2 * n - 1) // 6
    return (n * x * (x + 1) + stride * (2 * x + 1) * steps + stride * stride * squares) // 2
