"""The sequence axis beside data, parameter and tensor parallelism: loss, every gradient and clipping as in one process."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
import torch.distributed as dist
from helpers import grid, line, once, refused, slow
from models import make_batch, make_model, worst
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from dtensor_ring import Zigzag, average_gradients, check_replicas, clip_gradients, ring_plan

ATTENTION = {name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")} | {"o_proj": RowwiseParallel()}
MLP = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
TENSOR_PARALLEL = {f"model.layers.*.self_attn.{name}": style for name, style in ATTENTION.items()} | {
    f"model.layers.*.mlp.{name}": style for name, style in MLP.items()
}
MAX_NORM = 0.1


@cache
def batch_of(rows: int) -> dict[str, torch.Tensor]:
    """Rows with equally many labels, so that data-parallel means of means are the mean."""
    return {"input_ids": (ids := make_batch(17, rows)["input_ids"]), "labels": ids.clone()}


def alone(rows: int):
    """Loss, gradients, their norm, and gradients clipped by it, of one process."""
    model = make_model("llama")
    loss = model(**batch_of(rows), use_cache=False).loss
    loss.backward()
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    return loss.detach(), grads, norm, [parameter.grad for parameter in model.parameters()]


def whole(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def assert_as_alone(model, loss, rows: int, over=None) -> None:
    """Loss, gradients and clipped gradients; the loss is averaged over mesh axis `over`."""
    wanted, grads, norm, clipped = once(lambda: alone(rows))
    loss = loss.detach().clone()
    if over is not None:
        dist.all_reduce(loss, group=over.get_group())
        loss /= over.size()
    torch.testing.assert_close(loss, wanted, rtol=0, atol=2e-6)  # transformers computes losses in float32
    assert worst(zip((whole(p.grad) for p in model.parameters()), grads, strict=True)) < 1e-6
    found = clip_gradients(model, MAX_NORM)
    assert not isinstance(found, DTensor)
    torch.testing.assert_close(found, norm, rtol=1e-6, atol=0)
    assert worst(zip((whole(p.grad) for p in model.parameters()), clipped, strict=True)) < 1e-6


def step(model, mesh, rows: int = 2):
    """A step on this rank's rows of the batch."""
    axis = mesh["dp"] if "dp" in mesh.mesh_dim_names else None
    mine = slice(None) if axis is None else slice(axis.get_local_rank(), rows, axis.size())
    loss = model(**{key: value[mine] for key, value in batch_of(rows).items()}).loss
    loss.backward()
    return loss


def sequence_and_tensor():
    mesh, model = grid("cp", "tp"), make_model("llama")
    embedding = {"model.embed_tokens": RowwiseParallel(input_layouts=Replicate())}
    parallelize_module(model, mesh["tp"], TENSOR_PARALLEL | embedding)
    parallelize_module(model, mesh["cp"], ring_plan(model, Zigzag(1)))
    loss = step(model, mesh)
    average_gradients(model, mesh["cp"])
    # What `clip_gradients` is for. Once PyTorch takes it, the two must agree.
    refused(lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM), RuntimeError, "mixed torch.Tensor and DTensor")
    assert_as_alone(model, loss, 2)
    check_replicas(model, mesh["cp"])


def test_sequence_and_tensor_parallelism_are_one_process(pools):
    pools.run(4, sequence_and_tensor)


def parallel_loss():
    mesh, model = grid("cp", "tp"), make_model("llama")
    head = {"lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)}
    parallelize_module(model, mesh["tp"], TENSOR_PARALLEL | head)
    plan = ring_plan(model, Zigzag(1))
    parallelize_module(model, mesh["cp"], plan)
    with loss_parallel():
        out = model(**batch_of(2))
        assert not isinstance(out.loss, DTensor)
        out.loss.backward()
    for act in (plan.gather, plan.sum_over_tokens):
        refused(
            lambda act=act: act(out.logits), TypeError, "a DTensor, placed as (Shard(dim=2),) on mesh ('tp',)", ".full_tensor()"
        )
    average_gradients(model, mesh["cp"])
    assert_as_alone(model, out.loss, 2)
    torch.testing.assert_close(plan.gather(out.logits.full_tensor()), make_model("llama")(**batch_of(2)).logits, rtol=0, atol=1e-12)


def test_a_loss_over_sharded_logits_is_that_of_one_process(pools):
    pools.run(4, parallel_loss)


def of_transformers(folder: str):
    """The tensor parallelism that transformers makes itself, from a checkpoint."""
    mesh, asked = grid("cp", "tp"), {"distributed_config": DistributedConfig(tp_plan="auto")}
    model = AutoModelForCausalLM.from_pretrained(folder, device_mesh=mesh["tp"], dtype=torch.float64, **asked)
    assert any(isinstance(parameter, DTensor) for parameter in model.parameters())
    parallelize_module(model, mesh["cp"], ring_plan(model, Zigzag(1)))
    loss = step(model, mesh)
    average_gradients(model, mesh["cp"])
    assert_as_alone(model, loss, 2)


@pytest.mark.slow
def test_the_tensor_parallelism_of_transformers_beside_the_sequence_axis_is_one_process(pools, tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    pools.run(4, of_transformers, str(tmp_path))


def sharded(axes: tuple[str, ...], sizes: tuple[int, ...], over: str):
    """FSDP2 over the mesh or a part of it, with tensor parallelism where there is an axis for it."""
    mesh, model, rows = init_device_mesh("cpu", sizes, mesh_dim_names=axes), make_model("llama"), 2
    if "tp" in axes:
        parallelize_module(model, mesh["tp"], TENSOR_PARALLEL)
    parallelize_module(model, mesh["cp"], ring_plan(model, Zigzag(1)))
    if over == "flat":
        part = mesh["dp", "cp"]._flatten("dp_cp")
    elif over == "hybrid":  # whole in each dp group, sharded within it
        part = mesh["dp", "cp"]
    else:  # replicate x (shard x cp): the last two flattened
        part = init_device_mesh("cpu", (sizes[0], math.prod(sizes[1:])), mesh_dim_names=("replicate", "shard_cp"))
        rows = 4
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=part)
    if over == "hsdp":
        row = mesh["replicate"].get_local_rank() * mesh["shard"].size() + mesh["shard"].get_local_rank()
        loss = model(**{key: value[row : row + 1] for key, value in batch_of(rows).items()}).loss
        loss.backward()
        data = mesh["replicate", "shard"]._flatten("data")
    else:
        loss, data = step(model, mesh), mesh["dp"]
    assert_as_alone(model, loss, rows, data)


@pytest.mark.parametrize(
    ("axes", "sizes", "over"),
    [
        (("dp", "cp"), (2, 2), "flat"),
        (("dp", "cp"), (2, 2), "hybrid"),
        slow(("dp", "cp", "tp"), (2, 2, 2), "flat"),
        slow(("dp", "cp", "tp"), (2, 2, 2), "hybrid"),
        slow(("replicate", "shard", "cp"), (2, 2, 2), "hsdp"),
        slow(("dp", "cp"), (2, 4), "flat"),
    ],
)
def test_sharded_parameters_over_every_mesh_are_one_process(pools, axes, sizes, over):
    pools.run(math.prod(sizes), sharded, axes, sizes, over)


def under_wrappers(wrapper: str):
    """Losses of three kinds under DDP and FSDP2 themselves, which average over the sequence axis; and drift where nothing does."""
    mesh, batch, reference = line(), batch_of(2), make_model("llama")

    def losses(logits, ids, plan):
        whole_logits = logits if plan is None else plan.gather(logits)
        each = logits.log_softmax(-1).gather(2, ids[..., None])[..., 0]
        sums = each.sum(1) if plan is None else plan.sum_over_tokens(each)
        return (whole_logits * torch.linspace(0, 1, 17)[:, None]).square().mean() + nn.functional.softplus(sums / 100).sum()

    out = reference(**batch, use_cache=False)
    wanted = out.loss + losses(out.logits, batch["input_ids"], None)
    wanted.backward()
    model = make_model("llama")
    plan = ring_plan(model, Zigzag(1))
    parallelize_module(model, mesh, plan)
    called = DistributedDataParallel(model, process_group=mesh.get_group()) if wrapper == "DDP" else fully_shard(model, mesh=mesh)
    out = called(**batch)
    mine = batch["input_ids"][:, Zigzag(1).layout.tokens(17, mesh.size(), dist.get_rank())]
    loss = out.loss + losses(out.logits, mine, plan)
    loss.backward()
    torch.testing.assert_close(loss, wanted, rtol=0, atol=4e-6)
    assert worst(zip((whole(p.grad) for p in model.parameters()), (p.grad for p in reference.parameters()), strict=True)) < 1e-6
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    check_replicas(model, mesh)


@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
def test_losses_of_every_kind_average_right_under(pools, wrapper):
    pools.run(2, under_wrappers, wrapper)


def norms():
    """Of gradients on two meshes, on none, sharded, whole and missing: that of the whole tensors."""
    mesh, wholes = grid("cp", "tp"), [torch.randn(4, 6, dtype=torch.float64) for _ in range(6)]
    places = [(mesh["tp"], [Shard(0)]), (mesh["tp"], [Shard(1)]), (mesh["tp"], [Replicate()]), (mesh, [Replicate(), Shard(0)])]
    for order in (2.0, 1.0, math.inf):
        parameters = [nn.Parameter(torch.zeros(4, 6, dtype=torch.float64)) for _ in range(2)]
        parameters += [nn.Parameter(distribute_tensor(torch.zeros(4, 6, dtype=torch.float64), *place)) for place in places]
        for parameter, grad, place in zip(parameters, wholes, (None, None, *places), strict=True):
            parameter.grad = grad.clone() if place is None else distribute_tensor(grad.clone(), *place)
        norm = torch.linalg.vector_norm(torch.stack(wholes), order)
        everything = [*parameters, nn.Parameter(torch.zeros(2))]
        torch.testing.assert_close(clip_gradients(everything, math.inf, order), norm)
        assert all(torch.equal(whole(p.grad), grad) for p, grad in zip(parameters, wholes, strict=True)), "below the largest norm"
        torch.testing.assert_close(clip_gradients(everything, 0.5, order), norm)
        for parameter, grad in zip(parameters, wholes, strict=True):
            torch.testing.assert_close(whole(parameter.grad), grad * (0.5 / (norm + 1e-6)))
    parameters[0].grad[0, 0] = math.inf
    before = [whole(parameter.grad).clone() for parameter in parameters]
    refused(lambda: clip_gradients(parameters, 1.0, error_if_nonfinite=True), RuntimeError, "of order 2.0 of the gradients is inf")
    assert all(torch.equal(whole(p.grad), grad) for p, grad in zip(parameters, before, strict=True))
    refused(lambda: clip_gradients(parameters, -1.0), ValueError, "at least 0, found -1.0")
    refused(lambda: clip_gradients(parameters, math.nan), ValueError, "at least 0, found nan")
    assert clip_gradients([nn.Parameter(torch.zeros(2))], 1.0) == 0


def test_the_norm_of_gradients_on_several_meshes_is_that_of_the_whole_tensors(pools):
    pools.run(4, norms)
