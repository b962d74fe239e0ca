"""A sampler for meshes with a sequence axis: its ranks get the same samples, and the data axes share them out.

mesh (dp 2, cp 2)     6 samples, not shuffled
ranks 0 and 1         0 2 4
ranks 2 and 3         1 3 5         one process with batches twice as large: 0 1 | 2 3 | 4 5
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any, cast

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import Dataset, DistributedSampler

from dtensor_ring.comm import transports_of
from dtensor_ring.comm.rank_checks import meet_on_axes


def sequence_sampler(
    dataset: Sized,
    device_mesh: DeviceMesh,
    cp: str | Sequence[str] = "cp",
    *,
    shuffle: bool = True,
    seed: int = 0,
    drop_last: bool = False,
    run_check: bool = True,
) -> DistributedSampler[Any]:
    """A sampler over the data axes of a mesh, for a `DataLoader` on every rank.

        sampler = sequence_sampler(dataset, mesh)                  # mesh (dp, cp): all axes of the program
        loader = DataLoader(dataset, batch_size=1, sampler=sampler)
        for epoch in range(epochs):
            sampler.set_epoch(epoch)                               # another order in every epoch, the same on all ranks
            for batch in loader: ...

    Ranks that differ along `cp` alone get the same samples in the same order. Batch i of all data ranks together is batch i of one
    process whose batches are so many times larger, in the order of a `DistributedSampler`, which this is. Where the data ranks do
    not divide the samples, the first ones come again for some, or the last ones are dropped: all ranks make as many steps.

    Args:
        dataset: what has a length.
        device_mesh: the mesh with all of its axes, named; not `mesh["cp"]`, which says nothing of the others.
        cp: the axis, or axes, whose ranks work on the same samples: also a tensor-parallel one.
        shuffle: in an order that depends on `seed` and the epoch alone.
        seed: of the order, the same on all ranks.
        drop_last: leave out samples that the data ranks cannot share evenly, rather than repeat some.
        run_check: compare length, seed and options over the axes of the mesh, for which the host waits once for each.

    Raises:
        ValueError: the mesh has no such axis or no other axis in a larger program, or ranks were given different arguments.
    """
    names = device_mesh.mesh_dim_names or ()
    same = (cp,) if isinstance(cp, str) else tuple(cp)
    if missing := [name for name in same if name not in names]:
        raise ValueError(f"sequence_sampler: the mesh has no axis {missing[0]!r}; its axes are {', '.join(names) or 'not named'}")
    data = [i for i, name in enumerate(names) if name not in same]
    if not data and device_mesh.size() < dist.get_world_size():
        raise ValueError(
            f"sequence_sampler: all axes of this mesh of {device_mesh.size()} ranks ({', '.join(names)}) work on the same samples, "
            f"and the program has {dist.get_world_size()}: pass the whole mesh, or the other ranks would train on these samples too"
        )
    if run_check:
        transports = transports_of(device_mesh)
        mine = [len(dataset), seed, int(shuffle), int(drop_last)]

        def judge(axis: int, values: list[list[int]]) -> None:
            for rank, theirs in enumerate(values):
                if theirs != mine:
                    raise ValueError(
                        f"sequence_sampler: (length, seed, shuffle, drop_last) are {mine} here and {theirs} on rank {rank} of "
                        f"{transports[axis].axis}: every rank of the mesh passes the same"
                    )

        meet_on_axes(transports, "sequence_sampler", mine, judge)
    count, index = 1, 0
    for axis in data:
        count, index = count * device_mesh.size(axis), index * device_mesh.size(axis) + device_mesh.get_local_rank(axis)
    whole = cast("Dataset[Any]", dataset)
    return DistributedSampler(whole, num_replicas=count, rank=index, shuffle=shuffle, seed=seed, drop_last=drop_last)
