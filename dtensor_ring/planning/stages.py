"""How "ring" cuts its transfers into stages: how many other ranks' keys each one fetches.

    8 ranks      7 stages    1 1 1 1 1 1 1     least memory, most merges
                 4 stages    1 2 2 2
                 3 stages    1 2 4             each transfer hides behind what the one before it brought
                 1 stage     7                 fewest merges, hidden behind the rank's own keys alone

Computing on a rank's keys takes longer than fetching them, two to twenty times as long by kernel and link. So while a rank computes
on n ranks' keys, those of at least 2n can travel: stages that double keep a slow link hidden with few of them, where even ones
would wait for the first transfer.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise

# Tokens whose keys and values may lie in the buffers of stages by default: with 8 key heads of 128 in bfloat16, 2 GiB.
BUFFERED_TOKENS = 512 * 1024


def asked_stages(stages: int | None, strategy: str) -> int:
    """The number of stages that somebody asked for, 0 where it is left open.

    Raises:
        ValueError: less than one, or of a strategy that has none.
    """
    if stages is not None and (stages < 1 or strategy != "ring"):
        raise ValueError(f"stages are from 1 up and of strategy 'ring', found stages={stages} and strategy={strategy!r}")
    return stages or 0


def stage_sizes(others: int, stages: int) -> tuple[int, ...]:
    """Ranks fetched in each stage, from the first: `stages` of them, never falling, none empty, `others` in all.

    Args:
        others: ranks but this one.
        stages: from 1 to `others`.
    """
    assert 1 <= stages <= others, f"{others} other ranks cannot be fetched in {stages} stages"
    total = 2**stages - 1
    if total <= others:  # doubling from one rank does not reach all of them: it starts from more
        edges = [(2 * others * (2**i - 1) + total) // (2 * total) for i in range(stages + 1)]
        return tuple(b - a for a, b in pairwise(edges))
    most = bisect_left(range(1, others), -stages, key=lambda most: -len(_doubling(others, most))) + 1
    sizes = list(_doubling(others, most))
    while len(sizes) < stages:
        # More stages than doubling needs, and not enough for a smaller peak: the halves of the largest still double at most.
        largest = sizes.pop()
        sizes = sorted([*sizes, largest // 2, largest - largest // 2])
    return tuple(sizes)


def _doubling(others: int, most: int) -> tuple[int, ...]:
    """1, 2, 4, ... but none above `most`, until all ranks are fetched."""
    sizes: list[int] = []
    size = 1
    while others:
        sizes.append(min(size, most, others))
        others -= sizes[-1]
        size *= 2
    return tuple(sorted(sizes))


def buffered_shards(others: int, stages: int) -> int:
    """What stages hold at most, in keys and values of one rank in their own dtype of two bytes a number, in backward.

    The keys of a stage and of the next one, which travel while it computes, and the copies that other ranks are sent of this
    rank's; the gradients that it computes, those of the stage before on their way back, and those that come in, in float32.
    """
    sizes = (*stage_sizes(others, stages), 0)
    at_once = max(a + b for a, b in pairwise(sizes))
    return 2 * at_once + 6 * max(sizes)


def fewest_stages(others: int, local_tokens: int, most_tokens: int = BUFFERED_TOKENS) -> int:
    """The fewest stages whose buffers stay within the keys and values of `most_tokens`; one for each rank where none does.

    Few stages mean few merges and large kernel calls. For a short sequence that is most of what a ring loses, and its keys are
    small; for a long one it is little, and its keys are large: so the bound is in tokens of all buffers, not in shards.

    Args:
        others: ranks but this one.
        local_tokens: keys on the rank with the most.
        most_tokens: the bound.
    """
    # More stages never hold more, so that the fewest are found in a few halvings, for a thousand ranks too.
    return bisect_left(range(1, others), -most_tokens, key=lambda stages: -buffered_shards(others, stages) * local_tokens) + 1
