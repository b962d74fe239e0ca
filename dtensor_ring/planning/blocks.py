"""Work as kernels spend it: blocks of 128 queries and 128 keys, each computed whole where a single one of its scores is needed.

    queries 2 .. 6 of a document, in blocks of 2 x 2         keys    0 1   2 3   4 5   6 7
                                                 queries     2 3     [ ]   [/]                 2 blocks, one of them half
                                                             4 5     [ ]   [ ]   [/]           3
                                                             6       [ ]   [ ]   [ ]   [/]     4

Scores say what must be computed, blocks what it takes: a document of 10 tokens takes as long as one of 128, a piece of 129 tokens
as long as one of 256. The last block of a row lies on the diagonal and counts half, since kernels skip what they can of it. Every
segment of queries counts half a block for being started. So the five queries above take (4 + 6 + 8) - 3 + 1 = 16 half blocks, the
unit here, which keeps all numbers integers.
"""

from __future__ import annotations

# Queries and keys of a block. Flash kernels compute tiles of 64 to 256 rows and columns, most of them 128 x 128.
BLOCK = 128


def half_blocks(first: int, count: int, reach: int | None = None) -> int:
    """Half blocks that queries `first` to `first + count` of a document take, causal, against the keys before and at them.

    Args:
        first: tokens of the document before the first query.
        count: queries, one segment of a kernel call.
        reach: keys that a query sees at most, itself counted, where there is a window; None is all before it.
    """
    if not count:
        return 0
    rows = -(-count // BLOCK)
    # Whole rows end a block further along one after the other; the last may be cut short, and ends with the queries.
    until_last = (rows - 1) * -(-first // BLOCK) + rows * (rows - 1) // 2
    ended = until_last + -(-(first + count) // BLOCK)
    # Where a window has left the start of the document behind, every row leaves out a block more than the one before.
    skipped = 0 if reach is None else _sum_of_positive((first - reach + 1) // BLOCK, rows)
    return 2 * (ended - skipped) - rows + 1


def _sum_of_positive(start: int, terms: int) -> int:
    """Sum of max(start + i, 0) for i from 0 to `terms`."""
    low, high = max(start, 0), max(start + terms, 0)
    return (high * (high - 1) - low * (low - 1)) // 2
