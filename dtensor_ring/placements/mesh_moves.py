"""Moving a tensor between placements on a mesh of any number of axes: one axis at a time, in an order that is right.

[Shard(0), Zigzag(1)] -> [Replicate(), Zigzag(1)]    axis 0 gathers; axis 1 is left as it is
[Shard(1), Zigzag(1)] -> anything                    axis 1 holds a part of axis 0's part: undone first, redone last
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Replicate
from torch.distributed.tensor.placement_types import Placement

from dtensor_ring.comm import Transport, collectives, transport_along
from dtensor_ring.placements.placement import dim_of, split_of
from dtensor_ring.planning.documents import Documents


def move(
    local: Tensor,
    mesh: DeviceMesh,
    shape: Sequence[int],
    sources: Sequence[Placement],
    targets: Sequence[Placement],
    documents: Documents | None = None,
) -> Tensor:
    """Moves a tensor of global `shape` between placements: takes the local tensor under `sources`, returns that under `targets`.

    Axes that have no dim in common are moved one after another, each as cheaply as its own two placements allow. Where two axes
    split one dim, what an inner axis holds depends on the outer one, and they go by way of the whole dim.
    """
    axes = range(mesh.ndim)
    changed = {i for i in axes if sources[i] != targets[i]}
    # an axis whose dim an outer changed axis also splits holds a part of that axis' part: it is undone and redone with it
    changed |= {j for j in axes for i in changed if i < j and _shares_dim(i, j, sources, targets)}
    if any(_shares_dim(i, j, sources, targets) for i in changed for j in axes if i != j):
        local, shared = _through_replicate(local, mesh, shape, sources, targets, sorted(changed), documents), True
    else:
        shared = False
        for i in sorted(changed):
            local = _step(local, mesh, i, sources[i], targets[i], lambda dim: shape[dim], documents)
    return local.contiguous() if shared or changed else local


def _through_replicate(
    local: Tensor,
    mesh: DeviceMesh,
    shape: Sequence[int],
    sources: Sequence[Placement],
    targets: Sequence[Placement],
    axes: list[int],
    documents: Documents | None,
) -> Tensor:
    """Moves several axes by way of `Replicate`: more is sent than must be, but each step is right whatever the others split."""

    def length_at(axis: int, placements: Sequence[Placement]) -> Callable[[int], int]:
        # No documents are needed here: how many tokens a rank holds follows from the layout and the length.
        def length(dim: int) -> int:
            size = shape[dim]
            for i in range(axis):
                if dim_of(placements[i]) == dim:
                    size = collectives.local_size(split_of(placements[i]), size, mesh.size(i), mesh.get_local_rank(i))
            return size

        return length

    # Inner axes hold parts of the parts of outer ones: they are gathered first and cut last.
    for i in reversed(axes):
        local = _step(local, mesh, i, sources[i], Replicate(), length_at(i, sources), documents)
    for i in axes:
        local = _step(local, mesh, i, Replicate(), targets[i], length_at(i, targets), documents)
    return local


def _shares_dim(i: int, j: int, sources: Sequence[Placement], targets: Sequence[Placement]) -> bool:
    mine, others = {dim_of(sources[i]), dim_of(targets[i])}, {dim_of(sources[j]), dim_of(targets[j])}
    return bool((mine & others) - {-1})


def _step(
    x: Tensor,
    mesh: DeviceMesh,
    axis: int,
    old: Placement,
    new: Placement,
    length: Callable[[int], int],
    documents: Documents | None,
) -> Tensor:
    """One mesh axis from one placement to another; `length` gives a dim's size over this axis and the axes inside it."""
    if old == new or mesh.size(axis) == 1:
        return x
    transport = transport_along(mesh, axis)
    with transport.during(f"redistribute from {old!r} to {new!r}"):
        return _moved(x, transport, (old, new), length, documents)


def _moved(
    x: Tensor,
    transport: Transport,
    placements: tuple[Placement, Placement],
    length: Callable[[int], int],
    documents: Documents | None,
) -> Tensor:
    old, new = placements
    old_split, new_split = split_of(old, documents), split_of(new, documents)
    if isinstance(new, Partial):
        raise ValueError(f"{transport.axis}: {old!r} cannot become {new!r}: nothing is left to reduce")
    if isinstance(old, Partial):
        if isinstance(new, Replicate):
            return transport.all_reduce(x, old.reduce_op)
        return collectives.reduce_shards(x, dim_of(new), new_split, old.reduce_op, transport)
    if isinstance(old, Replicate):
        return collectives.take_shard(x, dim_of(new), new_split, transport.world, transport.rank)  # every rank has it: none sends
    if isinstance(new, Replicate):
        return collectives.gather_shards(x, dim_of(old), old_split, length(dim_of(old)), transport)
    a, b = dim_of(old), dim_of(new)
    if a == b:
        return collectives.reshard(x, a, old_split, new_split, length(a), transport)
    return collectives.exchange_dims(x, (a, old_split, length(a)), (b, new_split, x.shape[b]), transport)
