"""`sequence_sampler`: ranks of the sequence axis get the same samples, and the data axes share them out."""

from __future__ import annotations

import torch
import torch.distributed as dist
from helpers import refused
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader

from dtensor_ring import sequence_sampler


def everyone(samples: list[int]) -> list[list[int]]:
    every: list[list[int]] = [[]] * dist.get_world_size()
    dist.all_gather_object(every, samples)
    return every


def share_out() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    for length, drop_last in ((12, False), (13, False), (13, True), (1, False)):
        for shuffle in (False, True):
            sampler = sequence_sampler(range(length), mesh, shuffle=shuffle, seed=5, drop_last=drop_last)
            orders = []
            for epoch in (0, 1):
                sampler.set_epoch(epoch)
                every = everyone(list(sampler))
                assert every[0] == every[1], "ranks of one sequence axis"
                assert every[2] == every[3]
                assert len(every[0]) == len(every[2]) == len(sampler)
                dealt = [sample for pair in zip(every[0], every[2], strict=True) for sample in pair]
                kept = length // 2 * 2 if drop_last else length
                alone = torch.randperm(length, generator=torch.Generator().manual_seed(5 + epoch)).tolist()
                assert dealt[:kept] == (alone if shuffle else list(range(length)))[:kept], "the order of one process"
                assert set(dealt[kept:]) <= set(dealt[:kept]), "what fills up is there already"
                orders.append(dealt)
            assert (orders[0] != orders[1]) == (shuffle and length > 1), "every epoch has an order of its own"
    sampler = sequence_sampler(range(12), mesh, shuffle=False)
    batches = [batch.tolist() for batch in DataLoader(range(12), batch_size=3, sampler=sampler)]
    assert batches == ([[0, 2, 4], [6, 8, 10]] if dist.get_rank() < 2 else [[1, 3, 5], [7, 9, 11]])


def other_axes() -> None:
    deep = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("replicate", "shard", "cp"))
    assert everyone(list(sequence_sampler(range(4), deep, shuffle=False))) == [[0, 2], [0, 2], [1, 3], [1, 3]]
    assert everyone(list(sequence_sampler(range(4), deep, ("cp", "replicate"), shuffle=False))) == [[0, 1, 2, 3]] * 4
    first = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "dp"))
    assert everyone(list(sequence_sampler(range(4), first, shuffle=False))) == [[0, 2], [1, 3], [0, 2], [1, 3]]
    refused(lambda: sequence_sampler(range(4), deep, "sp"), ValueError, "no axis 'sp'", "replicate, shard, cp")
    refused(
        lambda: sequence_sampler(range(4), first["cp"]), ValueError, "of 2 ranks (cp)", "the program has 4", "pass the whole mesh"
    )
    # One rank alone has another seed or length: also the ranks that share no axis with it raise.
    one = dist.get_rank() == 0
    refused(lambda: sequence_sampler(range(4), first, seed=int(one)), ValueError, "every rank of the mesh passes the same")
    refused(lambda: sequence_sampler(range(4 + one), first), ValueError, "(length, seed, shuffle, drop_last)")


def test_sequence_ranks_get_the_same_samples_and_data_ranks_share_them_in_the_order_of_one_process(pools):
    pools.run(4, share_out)


def test_any_axes_may_share_samples_and_what_ranks_ask_otherwise_is_refused_on_all(pools):
    pools.run(4, other_axes)
