"""What ranks compare before tensors move: a few integers of each, for which the host waits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.placement_types import Placement

from dtensor_ring.comm import Transport, axis_name, collectives, transport_along, transports_of
from dtensor_ring.comm.rank_checks import is_agreed, meet, meet_on_axes, number_of, remember
from dtensor_ring.placements.placement import SequencePlacement
from dtensor_ring.planning.documents import Documents


def check_documents(transports: Sequence[Transport], documents: Documents) -> None:
    """Raises ValueError on every rank of a mesh unless all pass these documents; asked the first time that its axes meet them."""
    # Documents stay the same for a batch with many moves, so ranks compare them once. Every rank of a group remembers the same.
    new = [transport for transport in transports if not is_agreed(transport, documents.digest)]
    number = number_of(documents.digest)  # the host knows documents already, so a text stands for the bounds of thousands

    def judge(i: int, table: list[list[int]]) -> None:
        mine = new[i].rank
        for rank, (theirs,) in enumerate(table):
            if theirs != number:
                raise ValueError(
                    f"ranks {mine} and {rank} of {new[i].axis} pass different documents, rank {mine} {documents}: pass the same"
                )

    meet_on_axes(new, "a move of documents cut one by one", [number], judge)
    for transport in new:
        remember(transport, documents.digest)


def check_shares(local: Tensor, mesh: DeviceMesh, axis: int, placement: SequencePlacement, length: int) -> None:
    """Raises ValueError on every rank unless each passes the share that its layout gives it, of one tensor."""
    transport = transport_along(mesh, axis)
    call = f"from_local over {transport.axis}"  # for errors: what ranks compare has no axis, since they may have named it otherwise
    # Sizes of the other dims must agree, since keys of one rank are received in buffers shaped like another's.
    others = [size for dim, size in enumerate(local.shape) if dim != placement.dim][:8]  # as many as a record has room for
    mine = [local.ndim, length, local.shape[placement.dim], _dtype_number(local.dtype), *others]
    every = meet(transport, "from_local", (mine + [-1] * 12)[:12])
    for rank, (ndim, its_length, tokens, dtype, *its_others) in enumerate(every):
        agree = (ndim, its_length, dtype, its_others[: len(others)]) == (local.ndim, length, _dtype_number(local.dtype), others)
        if not agree:
            raise ValueError(
                f"{call}: rank {transport.rank} has length={length}, {local.dtype} and other "
                f"dims {others}, rank {rank} has length={its_length}, {_DTYPES[dtype]} and other dims {its_others[: ndim - 1]}: "
                "every rank passes its share of one tensor"
            )
        needed = collectives.local_size(placement.layout, length, transport.world, rank)
        if tokens != needed:
            raise ValueError(
                f"{call}: rank {rank} passes {tokens} tokens in dim {placement.dim}, "
                f"but of length={length} {placement!r} gives it {needed}: cut shares with "
                "distribute_tensor or shard_batch, or correct length="
            )


def check_whole(tensor: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], source: int) -> None:
    """Raises ValueError on every rank unless what is about to be sent fits where it is received, on every axis."""
    # A rank with other placements would be in another transfer, and all would wait for ever. As a number they fit a record.
    layout = number_of(repr(placements))
    numbers = [source, layout, *([tensor.ndim, _dtype_number(tensor.dtype), *tensor.shape] + [-1] * 12)[:12]]

    def judge(i: int, table: list[list[int]]) -> None:
        mine = f"rank {mesh.get_local_rank(i)}"
        for rank, (its_source, its_layout, ndim, dtype, *shape) in enumerate(table):
            where = f"distribute_tensor over mesh axis {axis_name(mesh, i)}"
            if its_layout != layout:
                raise ValueError(
                    f"{where}: rank {rank} passes other placements than {mine}, which has {list(placements)}: pass the same"
                )
            if its_source != source:
                raise ValueError(
                    f"{where}: src_data_rank is {source} on {mine}, {its_source} on rank {rank}: every rank names the same"
                )
            if (ndim, dtype, shape[:ndim]) != (tensor.ndim, _dtype_number(tensor.dtype), list(tensor.shape)[:10]):
                raise ValueError(
                    f"{where}: {mine} has {tensor.dtype} {tuple(tensor.shape)}, rank {rank} has {_DTYPES[dtype]} "
                    f"{tuple(shape[:ndim])}: every rank passes a tensor of the same shape and dtype"
                )

    meet_on_axes(transports_of(mesh), "distribute_tensor", numbers, judge)


# A dtype's place in this list travels: sorted by name it is the same in every process.
_DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)


def _dtype_number(dtype: torch.dtype) -> int:
    return _DTYPES.index(dtype)
