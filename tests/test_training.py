"""What training programs do around a step: meta-device start, checkpoints to other meshes, scaled 16-bit gradients, offloading."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import line, refused
from models import CONFIGS, build, make_batch, make_model, worst
from test_families import FAMILIES
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module
from transformers import AutoModelForCausalLM

from dtensor_ring import Documents, Zigzag, average_gradients, check_replicas, clip_gradients, ring_plan
from dtensor_ring.integrations.transformers import materialize


def on_meta(config, dtype: torch.dtype = torch.float64):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def shard(model, mesh, **options):
    """The plan over cp, and FSDP2 over all ranks of the mesh."""
    flat = mesh["dp", "cp"]._flatten("dp_cp")
    parallelize_module(model, mesh["cp"], ring_plan(model, Zigzag(1)))
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=flat, **options)
    return model


def step(model, mesh, optimizer=None) -> float:
    """The loss of four rows, of which a dp rank has its share; and a step where there is an optimizer."""
    rows = make_batch(16, rows=4)["input_ids"][mesh.get_local_rank("dp") :: mesh["dp"].size()]
    loss = model(input_ids=rows, labels=rows).loss
    if optimizer is not None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    total = loss.detach().clone()
    dist.all_reduce(total)
    return (total / dist.get_world_size()).item()


def mesh_of(dp: int, cp: int):
    return init_device_mesh("cpu", (dp, cp), mesh_dim_names=("dp", "cp"))


def save(folder: str) -> list[float]:
    """Two steps from the meta device, a checkpoint, and the losses of two steps more."""
    mesh, weights = mesh_of(2, 2), make_model("llama").state_dict() if dist.get_rank() == 0 else {}
    model = shard(on_meta(CONFIGS["llama"]()), mesh)
    materialize(model, "cpu", weights)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = [step(model, mesh, optimizer) for _ in range(2)]
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    return losses + [step(model, mesh, optimizer) for _ in range(2)]


def load(folder: str, dp: int, cp: int) -> list[float]:
    """The two steps after the checkpoint, on another mesh."""
    mesh = mesh_of(dp, cp)
    model = shard(on_meta(CONFIGS["llama"]()), mesh)
    materialize(model, "cpu", "later")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return [step(model, mesh, optimizer) for _ in range(2)]


SPLITS = [(4, 1, 4), (4, 4, 1), (2, 1, 2), (2, 2, 1)]  # ranks, dp, cp


def test_a_checkpoint_goes_on_over_any_other_mesh(pools, tmp_path):
    """Saved from (dp, cp) = (2, 2), model and optimizer: the next steps have the losses of there, and of one process."""
    model = make_model("llama")
    rows, optimizer, alone = make_batch(16, rows=4)["input_ids"], torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(4):
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        alone.append(loss.item())
    losses = pools.run(4, save, str(tmp_path))[0]
    assert losses == pytest.approx(alone, rel=1e-6)
    assert alone[3] < alone[0] - 0.1, "it learns"
    for ranks, dp, cp in SPLITS:
        for found in pools.run(ranks, load, str(tmp_path), dp, cp):
            assert found == pytest.approx(losses[2:], rel=1e-6)


def test_buffers_of_a_model_from_the_meta_device_are_those_of_one_built_on_its_device():
    for family, config in FAMILIES.items():
        model = on_meta(config(), torch.float32)
        materialize(model, "cpu", "later")
        wanted = dict(AutoModelForCausalLM.from_config(config(), dtype=torch.float32).named_buffers())
        assert all(torch.equal(buffer, wanted[name]) for name, buffer in model.named_buffers()), family
        assert all(parameter.isnan().all() for parameter in model.parameters())
    weights = build(config(), "eager").state_dict()
    again = on_meta(config())
    refused(lambda: materialize(again, "cpu", "zeros"), ValueError, "a state dict, 'random' or 'later', found 'zeros'")
    materialize(again, "cpu")
    assert not any(parameter.isnan().any() for parameter in again.parameters())
    refused(lambda: materialize(again, "cpu"), ValueError, "have values, such as model.embed_tokens.weight, which would be lost")
    assert weights.keys() == again.state_dict().keys()
    strange = on_meta(config())
    strange.register_buffer("table", torch.empty(3, device="meta"), persistent=False)
    refused(
        lambda: materialize(strange, "cpu"),
        NotImplementedError,
        "does not compute its buffers table in init_weights: build it on cpu",
    )


def random_shards():
    model = shard(on_meta(CONFIGS["llama"]()), mesh_of(1, 2))
    refused(lambda: materialize(model, "cpu"), NotImplementedError, "would draw the same numbers for the shard of every rank")


def test_random_weights_that_would_be_the_same_on_every_rank_are_refused(pools):
    pools.run(2, random_shards)


def scaled_gradients(sharded: bool):
    """float16 gradients: where one rank's overflow, every rank leaves the step out and halves the scale; then they go on."""
    warnings.filterwarnings("ignore", message="Converting a tensor with requires_grad=True to a scalar")
    mesh, model = line(), make_model("llama").float()
    parallelize_module(model, mesh, ring_plan(model))
    if sharded:
        fully_shard(model, mesh=mesh)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=1024.0)
    scales, moved = [], []
    for overflows in (False, True, False):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(**make_batch(16)).loss
        scaler.scale(loss).backward()
        local = [p.grad.to_local() if sharded else p.grad for p in model.parameters()]
        if overflows and dist.get_rank() == 1:
            local[0].view(-1)[0] = torch.inf
        if not sharded:
            average_gradients(model, mesh)  # before unscale_: what overflows on one rank must be seen on all
        scaler.unscale_(optimizer)
        norm = clip_gradients(model, 1.0)
        assert torch.isfinite(norm) == (not overflows)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)))
    check_replicas(model, mesh)
    return scales, moved


@pytest.mark.parametrize("sharded", [False, True])
def test_an_overflow_on_one_rank_skips_the_step_on_all(pools, sharded):
    for scales, moved in pools.run(2, scaled_gradients, sharded):
        assert scales == [1024.0, 512.0, 512.0]
        assert moved == [True, False, True]


def offloaded():
    """Parameters, gradients and optimizer on the CPU, as far as a CPU shows."""
    mesh, batch, reference = mesh_of(1, 2), make_batch(16), make_model("llama")
    reference(**batch, use_cache=False).loss.backward()
    model = shard(make_model("llama"), mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    model(**batch).loss.backward()
    assert (
        worst(zip((p.grad.full_tensor() for p in model.parameters()), (p.grad for p in reference.parameters()), strict=True)) < 1e-6
    )


def test_offloaded_parameters_have_the_gradients_of_one_process(pools):
    pools.run(2, offloaded)


PAGE = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
NAMES = {
    **{x.__name__: x for x in (AutoModelForCausalLM, ColwiseParallel, Documents, RowwiseParallel, Shard, average_gradients)},
    **{x.__name__: x for x in (clip_gradients, fully_shard, init_device_mesh, loss_parallel, parallelize_module, ring_plan)},
    "torch": torch,
    "dist": dist,
}


def blocks_of_the_page(folder: str) -> int:
    """Each block of docs/training.md on CPUs, with a fresh model; all ranks of the mesh share the batch."""
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")  # dynamo looks at it
    blocks = [part.split("```")[0] for part in PAGE.split("```python\n")[1:]]
    for i, code in enumerate(blocks):
        torch._dynamo.reset()
        model = build(CONFIGS["llama"]()).float()
        given = {"config": CONFIGS["llama"](), "weights": make_model("llama").float().state_dict(), "folder": f"{folder}/{i}"}
        names = NAMES | given | {"model": model, "mesh": mesh_of(2, 2), "ids": make_batch(17, rows=2)["input_ids"]}
        exec(code.replace('"cuda"', '"cpu"').replace("fullgraph=True", 'fullgraph=True, backend="eager"'), names)
        loss = names["model"](input_ids=names["ids"], labels=names["ids"]).loss if "loss" not in code else None
        assert loss is None or torch.isfinite(loss), code
    return len(blocks)


@pytest.mark.slow
def test_every_block_of_the_training_page_runs(pools, tmp_path):
    assert set(pools.run(4, blocks_of_the_page, str(tmp_path), timeout=280)) == {PAGE.count("```python")}
