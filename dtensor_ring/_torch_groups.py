"""The private PyTorch names of process groups, as `_torch` has the others: each with its reason, and what would let us drop it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import GroupName, _get_process_group_store, _resolve_process_group

# The collectives on flat tensors, under their names since 2.13 or, before, the ones that 2.13 deprecates.
all_gather_flat: Callable[..., dist.Work | None] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_flat: Callable[..., dist.Work | None] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def resolve_group(name: str) -> dist.ProcessGroup:
    """The process group of a `ProcessGroup.group_name`: ops take strings, not groups."""
    return _resolve_process_group(GroupName(name))


def store_of(group: dist.ProcessGroup) -> dist.Store:
    """The key-value store through which the ranks of a group met; it answers also where the group is broken."""
    return _get_process_group_store(group)


def coalesces(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether messages over a group, between tensors on a device, can be issued in one."""
    return type(group) is dist.ProcessGroup and bool(group._get_backend(device).supports_coalescing)


def exchange_in_one(
    group: dist.ProcessGroup, device: torch.device, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]
) -> dist.Work | None:
    """Start messages to and from ranks of a group that `coalesces`, all in one call of its backend; tensors are on the device.

    As `torch.distributed.batch_isend_irecv` does it, which takes the host several times as long: it makes an object of every
    message and checks and looks up its group twice. Gone once that is fast.
    """
    group._start_coalescing(device)
    if group.size() > _PAIR and _sends_pairwise(group, device):
        for out, into in _rounds(group, device, sends, receives):
            group.alltoall(into, out)
    else:
        for tensor, peer in sends:
            group.send([_real(tensor)], peer, 0)
        for tensor, peer in receives:
            group.recv([_real(tensor)], peer, 0)
    return group._end_coalescing(device)


def _sends_pairwise(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether an all-to-all over a group is nothing but messages between pairs, so that each rank issues the ones that it has.

    Elsewhere it is a collective in which every rank must take part: under TORCH_DISTRIBUTED_DEBUG=DETAIL all ranks are compared.
    """
    return type(group._get_backend(device)) is getattr(dist, "ProcessGroupNCCL", None)


_PAIR = 2  # between two ranks an all-to-all of keys and one of values take the host no less than four messages


def _rounds(
    group: dist.ProcessGroup, device: torch.device, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]
) -> list[tuple[list[Tensor], list[Tensor]]]:
    """The n-th messages to and from all ranks, for n = 0, 1, ...: for each rank one to send and one to receive, empty for none.

    Between two ranks the n-th message sent meets the n-th received, so both have it in the same round. An all-to-all is of one
    dtype, so rounds have parts; messages of one round between the same two ranks are in one part, whose order does not matter.
    """
    world = group.size()
    found: dict[tuple[int, str], tuple[list[Tensor], list[Tensor]]] = {}
    for direction, messages in enumerate((sends, receives)):
        counts = [0] * world
        for tensor, peer in messages:
            tensor = _real(tensor)
            key = counts[peer], str(tensor.dtype)
            counts[peer] += 1
            part = found.get(key)
            if part is None:
                nothing = torch.empty(0, dtype=tensor.dtype, device=device)
                part = found[key] = [nothing] * world, [nothing] * world
            part[direction][peer] = tensor
    return [found[key] for key in sorted(found)]


def _real(x: Tensor) -> Tensor:
    """The same numbers as backends know them: none has complex ones."""
    return torch.view_as_real(x) if x.is_complex() else x
