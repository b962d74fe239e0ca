"""What ranks compare before tensors move: a few integers of each, for which the host waits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dtensor_ring.comm import Transport, axis_name, transport_along
from dtensor_ring.comm.rank_checks import is_agreed, meet, meet_on_axes, remember
from dtensor_ring.documents import Documents
from dtensor_ring.placements import moves
from dtensor_ring.placements.placement import SequencePlacement


def check_documents(wire: Transport, documents: Documents) -> None:
    """Raises ValueError on every rank that passes other documents than this one; asked the first time that ranks meet them."""
    if is_agreed(wire, documents.digest):
        return
    number = int(documents.digest[:15], 16)
    for rank, (theirs,) in enumerate(meet(wire, "a move of documents cut one by one", [number])):
        if theirs != number:
            raise ValueError(f"ranks {wire.rank} and {rank} pass different documents, rank {wire.rank} {documents}: pass the same")
    remember(wire, documents.digest)


def check_shares(local: Tensor, mesh: DeviceMesh, axis: int, placement: SequencePlacement, length: int) -> None:
    """Raises ValueError on every rank unless each passes the share that its layout gives it, of one tensor."""
    wire = transport_along(mesh, axis)
    call = f"from_local over {wire.axis}"
    others = [size for dim, size in enumerate(local.shape) if dim != placement.dim][:8]  # as many as a record has room for
    mine = [local.ndim, length, local.shape[placement.dim], _dtype_number(local.dtype), *others]
    every = meet(wire, call, (mine + [-1] * 12)[:12])
    for rank, (ndim, its_length, tokens, dtype, *its_others) in enumerate(every):
        agree = (ndim, its_length, dtype, its_others[: len(others)]) == (local.ndim, length, _dtype_number(local.dtype), others)
        if not agree:
            raise ValueError(
                f"{call}: rank {wire.rank} has length={length}, {local.dtype} and other "
                f"dims {others}, rank {rank} has length={its_length}, {_DTYPES[dtype]} and other dims {its_others[: ndim - 1]}: "
                "every rank passes its share of one tensor"
            )
        needed = moves.local_size(placement.layout, length, wire.world, rank)
        if tokens != needed:
            raise ValueError(
                f"{call}: rank {rank} passes {tokens} tokens in dim {placement.dim}, "
                f"but of length={length} {placement!r} gives it {needed}: cut shares with "
                "distribute_tensor or shard_batch, or correct length="
            )


def check_whole(tensor: Tensor, mesh: DeviceMesh, source: int) -> None:
    """Raises ValueError on every rank unless what is about to be sent fits where it is received, on every axis."""
    numbers = [source, *([tensor.ndim, _dtype_number(tensor.dtype), *tensor.shape] + [-1] * 12)[:12]]
    tables = meet_on_axes([transport_along(mesh, i) for i in range(mesh.ndim)], "distribute_tensor", numbers)
    for i, table in enumerate(tables):
        for rank, (its_source, ndim, dtype, *shape) in enumerate(table):
            if its_source != source:
                raise ValueError(
                    f"distribute_tensor over mesh axis {axis_name(mesh, i)}: src_data_rank is {source} on rank "
                    f"{mesh.get_local_rank(i)}, {its_source} on rank {rank}: every rank names the same source"
                )
            if (ndim, dtype, shape[:ndim]) != (tensor.ndim, _dtype_number(tensor.dtype), list(tensor.shape)[:10]):
                raise ValueError(
                    f"distribute_tensor over mesh axis {axis_name(mesh, i)}: rank {mesh.get_local_rank(i)} has {tensor.dtype} "
                    f"{tuple(tensor.shape)}, rank {rank} has {_DTYPES[dtype]} {tuple(shape[:ndim])}: every rank passes a tensor of "
                    "the same shape and dtype"
                )


_DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)


def _dtype_number(dtype: torch.dtype) -> int:
    return _DTYPES.index(dtype)
