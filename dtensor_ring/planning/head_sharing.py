"""Sharing heads out over ranks, for strategy "ulysses".

4 ranks, 8 query heads, 2 key heads       rank r: query heads 2r and 2r+1, and a copy of key head r // 2
"""

from __future__ import annotations


def refuses(ranks: int, heads: int, kv_heads: int) -> str | None:
    """Why heads cannot be shared out over ranks, with the numbers of ranks that could; None if they can."""
    if _fits(ranks, heads, kv_heads):
        return None
    fitting = ", ".join(str(n) for n in range(1, heads + 1) if _fits(n, heads, kv_heads))
    return (
        f"strategy='ulysses' shares heads out, and {heads} query and {kv_heads} key heads cannot be shared by {ranks} ranks: "
        f"{fitting} ranks could, or use strategy='ring' or 'gather'"
    )


def copies_of_key_heads(ranks: int, kv_heads: int) -> int:
    """How many ranks get each key head: more than one where there are fewer key heads than ranks."""
    return max(1, ranks // kv_heads)


# Ranks have equal numbers of query heads, each beside the key head that it reads: so one of ranks and key heads divides the other.
def _fits(ranks: int, heads: int, kv_heads: int) -> bool:
    return heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)
