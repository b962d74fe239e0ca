"""Laws over three, four and eight GPUs, where each exchange is among several peers: `pytest -m gpu` where there are as many."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from helpers import PER_DOCUMENT, assert_like_kernel, make_case, over_ranks, single_device
from test_gpu import move_between_placements, note
from test_gpu_symmetric import SmallSlots, attention, random_exchanges
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

from dtensor_ring import Documents, Zigzag, distribute_tensor, full_tensor, ring_attention
from dtensor_ring.comm import SymmetricMemoryTransport

WORLDS = [pytest.param(world, marks=pytest.mark.gpu(devices=world)) for world in (3, 4, 8)]
HALF = [pytest.param(world, marks=pytest.mark.gpu(devices=world)) for world in (4, 8)]
PACKED = (400, 7, 1, 700, 940)
LONG = (1900, 148)

# Layout, strategy, stages, mask, documents: each layout with its first and its last number of stages, and as one collective.
COMBINATIONS = [
    *((layout, "ring", stages, "causal", None) for layout in ("contiguous", "zigzag", "stripe") for stages in (1, 2, None)),
    *((layout, "gather", None, "causal", None) for layout in ("contiguous", "zigzag", "stripe")),
    *((layout, "ring", 1, mask, None) for layout in ("contiguous", "zigzag") for mask in ("full", "window", "two-sided")),
    *((layout, "ring", stages, "causal", PACKED) for layout in ("contiguous", "zigzag", PER_DOCUMENT) for stages in (1, 2)),
    *((layout, "ring", 1, "window", PACKED) for layout in ("contiguous", "zigzag", PER_DOCUMENT)),
    (PER_DOCUMENT, "ring", None, "causal", LONG),
    ("zigzag", "gather", None, "causal", PACKED),
    ("zigzag", "ulysses", None, "causal", PACKED),
    ("contiguous", "ulysses", None, "window", None),
]


def attend(layout: str, strategy: str, stages: int | None, mask: str, lengths: tuple[int, ...] | None, device: str = "cuda"):
    kernel, documents = "torch_flash" if device == "cuda" else "torch_cpu", lengths and Documents.from_lengths(lengths)
    heads = (3 * dist.get_world_size(), dist.get_world_size()) if strategy == "ulysses" else (4, 2)
    case = make_case(2048, heads=heads, dim=128, dtype=torch.bfloat16, mask=mask, documents=documents, device=device, batch=1)
    results = over_ranks(case, layout, strategy=strategy, kernel=kernel, stages=stages)
    return assert_like_kernel(results, single_device(case, kernel), case.exact())


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("layout", "strategy", "stages", "mask", "lengths"), COMBINATIONS)
def test_several_gpus_are_as_exact_as_one(pools, world, layout, strategy, stages, mask, lengths):
    ratios = pools.run(world, attend, layout, strategy, stages, mask, lengths, device="cuda")[0]
    note(f"{world} GPUs {layout} {strategy} {stages} {mask} {lengths}", ratios)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("length", [1001, 33, 7, 1])
def test_odd_lengths_and_ranks_without_tokens(pools, world, length):
    pools.run(world, odd, length, device="cuda")


def odd(length: int, device: str = "cuda"):
    kernel = "torch_flash" if device == "cuda" else "torch_cpu"
    case = make_case(length, heads=(6, 2), dim=64, dtype=torch.bfloat16, device=device, batch=2)
    single, exact = single_device(case, kernel), case.exact()
    for layout in ("contiguous", "zigzag", "stripe"):
        assert_like_kernel(over_ranks(case, layout, strategy="ring", kernel=kernel, stages=1), single, exact)


def half_of_the_ranks_each(device: str = "cuda"):
    """Batch rows over one mesh axis and tokens over the other: groups of half of the ranks."""
    mesh = init_device_mesh(device, (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "cp"))
    kernel, documents = "torch_flash" if device == "cuda" else "torch_cpu", Documents.from_lengths(PACKED)
    case = make_case(2048, heads=(4, 2), dim=128, dtype=torch.bfloat16, documents=documents, device=device, batch=2)
    placed = [distribute_tensor(x, mesh, [Shard(0), Zigzag(1)]).requires_grad_() for x in case.inputs]
    dout = distribute_tensor(case.dout, mesh, [Shard(0), Zigzag(1)])
    out, lse = ring_attention(*placed, documents=documents, kernel=kernel, return_lse=True)
    grads = torch.autograd.grad(out, placed, dout)
    results = tuple(full_tensor(x) for x in (out, lse.detach(), *grads))
    return assert_like_kernel(results, single_device(case, kernel), case.exact())


@pytest.mark.parametrize("world", HALF)
def test_a_mesh_of_two_axes_is_as_exact_as_one_gpu(pools, world):
    note(f"{world} GPUs dp 2", pools.run(world, half_of_the_ranks_each, device="cuda")[0])


@pytest.mark.parametrize("world", WORLDS)
def test_redistribution_among_several_gpus_is_a_permutation(pools, world):
    pools.run(world, move_between_placements, device="cuda")


@pytest.mark.parametrize("transport", [SmallSlots, SymmetricMemoryTransport])
@pytest.mark.parametrize("world", HALF)
def test_copies_between_gpus_deliver_every_bit(pools, world, transport):
    pools.run(world, random_exchanges, 0, transport, 60, device="cuda")


@pytest.mark.parametrize("strategy", ["ring", "gather", "ulysses"])
@pytest.mark.parametrize("world", HALF)
def test_attention_by_copies_is_that_over_nccl(pools, world, strategy):
    pools.run(world, attention, "zigzag", strategy, 1, 2048, "torch_flash", torch.bfloat16, device="cuda")
