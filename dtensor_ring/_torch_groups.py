"""The private PyTorch names of process groups, as `_torch` has the others: each with its reason, and what would let us drop it."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
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
