"""Whether all ranks of a sequence axis make the same call, asked once for each new call signature."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

from torch.distributed.device_mesh import DeviceMesh

from dtensor_ring.comm import transport_of
from dtensor_ring.layout import Layout
from dtensor_ring.placements.redistribute import axis_name

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@lru_cache(maxsize=512)
def check_agreement(mesh: DeviceMesh, axis: int, layout: Layout, shapes: Shapes, shares: Shapes, words: tuple[str, ...]) -> None:
    """Compare a call over a mesh axis; the host waits for a few integers of each rank. Agreement is remembered.

    Ranks meet here when the signature is new to them, which it is to all of them or to none as long as they make the same calls.

    Args:
        mesh: the mesh.
        axis: its axis that holds the sequence.
        layout: how tokens are spread over it.
        shapes: global shapes of q, k, v.
        shares: local shapes of q, k, v.
        words: everything else that must be the same: dtype, mask, strategy, kernel, documents.

    Raises:
        ValueError: ranks differ, or a share does not hold the tokens that the layout gives its rank; on every rank.
    """
    wire = transport_of(mesh.get_group(axis))
    number = int.from_bytes(hashlib.blake2b("|".join(words).encode(), digest_size=7).digest(), "big")
    every = wire.gather_values([*shapes[0], *shapes[1], *shapes[2], shares[0][1], shares[1][1], number])
    mine = every[wire.rank]
    named = f"ring_attention over mesh axis {axis_name(mesh, axis)}"
    for rank, (*its_shapes, q_rows, k_rows, its_number) in enumerate(every):
        if its_shapes != mine[:-3]:
            raise ValueError(
                f"{named}: rank {wire.rank} has q, k, v of global shapes {_three(mine)}, rank {rank} has {_three(its_shapes)}: "
                "every rank must hold its share of the same tensors"
            )
        if its_number != number:
            raise ValueError(
                f"{named}: rank {rank} calls with another dtype, mask, strategy, kernel or documents than rank {wire.rank}, which "
                f"has {words}: every rank must make the same call"
            )
        for name, length, rows in (("q", shapes[0][1], q_rows), ("k", shapes[1][1], k_rows)):
            needed = layout.local_length(length, wire.world, rank)
            if rows != needed:
                raise ValueError(
                    f"{named}: rank {rank} holds {rows} tokens of {name}, but {layout} of length {length} gives it "
                    f"{needed}: make DTensors with dtensor_ring.from_local(..., length=), not DTensor.from_local"
                )


def _three(values: Sequence[int]) -> str:
    return ", ".join(str(tuple(values[i : i + 4])) for i in (0, 4, 8))
