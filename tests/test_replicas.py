"""Gradients averaged over the sequence axis are those of one process; weights that drifted apart are found."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from helpers import grid, line
from models import make_batch, make_model, worst
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

from dtensor_ring import Zigzag, average_gradients, check_replicas, ring_plan
from dtensor_ring.comm import transport_along


def a_few_steps(averaged: bool, items: bool) -> float:
    """Three steps of a parallel model beside one process, as README's first lines do it: how far the weights are apart."""
    mesh, batch = line(), make_batch(17)
    reference, model = make_model("llama"), make_model("llama")
    parallelize_module(model, mesh, ring_plan(model, Zigzag(1)))
    count = (batch["labels"][:, 1:] != -100).sum()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, reference)]
    for _ in range(3):
        reference(**batch, use_cache=False).loss.backward()
        loss = model(**batch, **({"num_items_in_batch": count} if items else {})).loss
        (loss * mesh.size() if items else loss).backward()
        if averaged:
            average_gradients(model, mesh)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    if averaged:
        check_replicas(model, mesh)
    else:
        with pytest.raises(
            ValueError, match=r"\d+ of \d+ parameters differ between the ranks of mesh axis 'cp': model\.embed.*more"
        ):
            check_replicas(model, mesh)
    return worst(zip(model.parameters(), reference.parameters(), strict=True))


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("items", [False, True])
def test_averaged_gradients_train_as_one_process(pools, world, items):
    assert max(pools.run(world, a_few_steps, True, items)) < 1e-6


def test_forgotten_averages_are_found(pools):
    assert min(pools.run(2, a_few_steps, False, False)) > 1e-3


def kinds_of_gradients():
    mesh, rank, world = line(), dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    layers = nn.ModuleDict({"a": nn.Linear(3, 5), "unused": nn.Linear(2, 2), "expert": nn.Linear(3, 1).to(torch.bfloat16)})
    layers["a"].weight.grad = torch.full((5, 3), float(rank))
    layers["a"].bias.grad = torch.full((5,), 2.0 * rank)
    if rank == 1:  # one rank's tokens went to the expert, the others' did not
        layers["expert"].weight.grad = torch.full((1, 3), 3.0, dtype=torch.bfloat16)
    kept = layers["a"].weight.grad
    before = transport_along(mesh).traffic.copy()
    average_gradients(layers, mesh)
    sent = transport_along(mesh).traffic.since(before).bytes
    assert sent == sum(2 * 4 * n * (world - 1) // world for n in (6, 5 * 3 + 5, 3)), (
        "what has gradients, then float32 of each dtype"
    )
    assert layers["a"].weight.grad is kept, "in place"
    assert torch.equal(kept, torch.full((5, 3), (world - 1) / 2))
    assert torch.equal(layers["a"].bias.grad, torch.full((5,), world - 1.0))
    assert layers["unused"].weight.grad is None
    assert torch.equal(layers["expert"].weight.grad, torch.full((1, 3), 3.0 / world, dtype=torch.bfloat16))
    assert layers["expert"].bias.grad is None
    average_gradients(list(layers["a"].parameters()), mesh)
    assert torch.equal(kept, torch.full((5, 3), (world - 1) / 2))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_gradient_that_some_ranks_lack_counts_as_zeros_and_bytes_are_those_of_float32(pools, world):
    if world > 1:
        pools.run(world, kinds_of_gradients)
    else:
        pools.run(1, alone)


def alone():
    layer = nn.Linear(2, 2)
    layer.weight.grad = torch.ones(2, 2)
    average_gradients(layer, line())
    check_replicas(layer, line())
    assert torch.equal(layer.weight.grad, torch.ones(2, 2))


def what_is_refused():
    mesh, rank = line(), dist.get_rank()
    layer = nn.Linear(3, 4 + rank)
    for act in (average_gradients, check_replicas):
        with pytest.raises(ValueError, match=f"{act.__name__}: ranks . and . of mesh axis 'cp' hold 2 and 2 parameters of other"):
            act(layer, mesh)
    with pytest.raises(ValueError, match="one mesh axis, such as"):
        average_gradients(layer, init_device_mesh("cpu", (1, dist.get_world_size())))
    frozen = nn.Linear(3, 2)
    frozen.weight.requires_grad_(rank == 0)
    with pytest.raises(ValueError, match="or others are frozen"):
        average_gradients(frozen, mesh)
    embedding = nn.Embedding(4, 2, sparse=rank == 1)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(NotImplementedError, match=r"the gradient of weight is torch.sparse_coo, not dense"):
        average_gradients(embedding, mesh)
    sharded = nn.Sequential(nn.Linear(4, 4))
    fully_shard(sharded, mesh=mesh)
    sharded(torch.randn(2, 4)).sum().backward()
    with pytest.raises(ValueError, match="FSDP2 or tensor parallelism reduces gradients already"):
        average_gradients(sharded, mesh)
    check_replicas(sharded, mesh)


def values_that_a_weaker_sum_would_miss():
    mesh, rank = line(), dist.get_rank()
    values = torch.zeros(70_000)
    values[3 + 65521 * rank] = 1.0
    with pytest.raises(ValueError, match="1 of 1 parameters differ"):
        check_replicas([nn.Parameter(values)], mesh)
    turned = nn.Parameter(torch.tensor([1 + 1j * rank]))
    with pytest.raises(ValueError, match="1 of 1 parameters differ"):
        check_replicas([turned], mesh)
    turned.grad = torch.tensor([1 + 2j * rank])
    average_gradients([turned], mesh)
    assert turned.grad.item() == 1 + 1j
    check_replicas([], mesh)
    average_gradients([], mesh)


def test_moved_values_and_imaginary_parts_are_seen(pools):
    pools.run(2, values_that_a_weaker_sum_would_miss)


def test_what_cannot_be_averaged_is_refused_on_every_rank(pools):
    pools.run(2, what_is_refused)


def beside_fsdp():
    """Parameters sharded over dp alone: their shards' gradients are averaged over cp."""
    mesh = grid()
    batch = make_batch(17, rows=2)
    batch["labels"] = batch["input_ids"].clone()
    reference, model = make_model("llama"), make_model("llama")
    reference(**batch, use_cache=False).loss.backward()
    parallelize_module(model, mesh["cp"], ring_plan(model, Zigzag(1)))
    fully_shard(model, mesh=mesh["dp"])
    row = mesh.get_local_rank("dp")
    model(**{key: value[row : row + 1] for key, value in batch.items()}).loss.backward()
    average_gradients(model, mesh["cp"])
    pairs = zip((p.grad.full_tensor() for p in model.parameters()), (p.grad for p in reference.parameters()), strict=True)
    assert worst(pairs) < 1e-6
    check_replicas(model, mesh["cp"])


def test_shards_over_another_axis_are_averaged_over_the_sequence_axis(pools):
    pools.run(4, beside_fsdp)


def offloaded_gradients():
    """Gradients on the CPU over a group that moves what lies on GPUs."""
    mesh, parameter = line("cuda"), nn.Parameter(torch.zeros(3))
    parameter.grad = torch.full((3,), float(dist.get_rank()))
    average_gradients([parameter], mesh)
    assert torch.equal(parameter.grad, torch.full((3,), (mesh.size() - 1) / 2))


@pytest.mark.gpu
def test_gradients_on_the_cpu_are_averaged_over_ranks_on_gpus(pools):
    pools.run(2, offloaded_gradients, device="cuda")
