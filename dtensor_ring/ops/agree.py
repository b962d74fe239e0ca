"""Whether all ranks that share a sequence make the same call, asked once for each new call signature."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

from dtensor_ring._torch import resolve_group
from dtensor_ring.comm import transport_of
from dtensor_ring.layout import Layout


@lru_cache(maxsize=512)
def check_agreement(
    group: str, name: str, layout: Layout, shapes: tuple[int, ...], rows: tuple[int, int], words: tuple[str, ...]
) -> None:
    """Compare a call over a process group; the host waits for a few integers of each rank. Agreement is remembered.

    Ranks meet here when the signature is new to them, which it is to all of them or to none as long as they make the same calls:
    ranks that part after their first calls are not found out here.

    Args:
        group: name of the process group.
        name: the call, for the error.
        layout: how tokens are spread over the ranks.
        shapes: global shapes (B, S, H, D) of q, k and v, one after the other.
        rows: this rank's tokens of q and of k.
        words: everything else that must be the same: dtype, mask, strategy, kernel, numbers, documents.

    Raises:
        ValueError: ranks differ, or a share does not hold the tokens that the layout gives its rank; on every rank.
    """
    wire = transport_of(resolve_group(group))
    everything = "|".join((str(layout), *words))
    number = int.from_bytes(hashlib.blake2b(everything.encode(), digest_size=7).digest(), "big")
    every = wire.gather_values([*shapes, *rows, number])
    mine = every[wire.rank]
    for rank, (*its_shapes, q_rows, k_rows, its_number) in enumerate(every):
        if its_shapes != mine[:-3]:
            raise ValueError(
                f"{name}: rank {wire.rank} has q, k, v of global shapes {_three(mine)}, rank {rank} has {_three(its_shapes)}: "
                "every rank must hold its share of the same tensors"
            )
        if its_number != number:
            raise ValueError(
                f"{name}: rank {rank} calls with another layout, dtype, mask, strategy, kernel, number or documents than rank "
                f"{wire.rank}, which has {layout}, {', '.join(words)}: every rank must make the same call"
            )
        for tensor, length, held in (("q", shapes[1], q_rows), ("k", shapes[5], k_rows)):
            needed = layout.local_length(length, wire.world, rank)
            if held != needed:
                raise ValueError(
                    f"{name}: rank {rank} holds {held} tokens of {tensor}, but {layout} of length {length} gives it "
                    f"{needed}: make DTensors with dtensor_ring.from_local(..., length=), not DTensor.from_local"
                )


def _three(values: Sequence[int]) -> str:
    return ", ".join(str(tuple(values[i : i + 4])) for i in (0, 4, 8))
