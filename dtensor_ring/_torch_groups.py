"""The private PyTorch names of process groups, as `_torch` has the others: each with its reason, and what would let us drop it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

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
    group: dist.ProcessGroup, device: torch.device, sends: Iterable[tuple[Tensor, int]], receives: Iterable[tuple[Tensor, int]]
) -> dist.Work | None:
    """Start messages to and from ranks of a group that `coalesces`, all in one call of its backend; tensors are on the device.

    As `torch.distributed.batch_isend_irecv` does it, which takes the host several times as long: it makes an object of every
    message and checks and looks up its group twice. Gone once that is fast.
    """
    group._start_coalescing(device)
    for tensor, peer in sends:
        group.send([_real(tensor)], peer, 0)
    for tensor, peer in receives:
        group.recv([_real(tensor)], peer, 0)
    return group._end_coalescing(device)


def _real(x: Tensor) -> Tensor:
    """The same numbers as backends know them: none has complex ones."""
    return torch.view_as_real(x) if x.is_complex() else x
