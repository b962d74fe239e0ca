"""What is known to be wrong, as laws that do not hold yet. Whoever mends one removes its mark, or the run fails."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.distributed as dist
from test_transformers import SIZES, make_batch, make_model, worst
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from transformers import AutoModelForCausalLM, LlamaConfig

from dtensor_ring import (
    Contiguous,
    Documents,
    Zigzag,
    distribute_tensor,
    from_local,
    full_tensor,
    redistribute,
    ring_attention,
    ring_plan,
)


def line():
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))


def gathered_loss():
    mesh, batch = line(), make_batch(17)
    reference, model = make_model("llama"), make_model("llama")
    reference(**batch, use_cache=False).logits.square().mean().backward()
    plan = ring_plan(model, Zigzag(1))
    parallelize_module(model, mesh, plan)
    plan.gather(model(**batch).logits).square().mean().backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()
    assert worst(zip((p.grad for p in model.parameters()), (p.grad for p in reference.parameters()), strict=True)) < 1e-6


@pytest.mark.xfail(strict=True, reason="defect 7: plan.gather wants summed gradients, .loss averaged ones")
def test_averaged_gradients_of_gathered_outputs_are_those_of_one_process(pools):
    pools.run(2, gathered_loss)


def gathered_late():
    mesh, model, reference = line(), make_model("llama"), make_model("llama")
    plan = ring_plan(model, Zigzag(1, per_document=True))
    parallelize_module(model, mesh, plan)
    batches = []
    for lengths in ([9, 15], [3, 14, 7]):
        ids = make_batch(24, rows=1)["input_ids"]
        batches.append({"input_ids": ids, "position_ids": Documents.from_lengths(lengths).position_ids()})
    first, _second = (model(**batch).logits for batch in batches)
    mask = torch.block_diag(*(torch.ones(n, n).tril() for n in (9, 15))).bool()[None, None]
    wanted = reference(**batches[0], attention_mask=mask, use_cache=False).logits
    try:
        gathered = plan.gather(first)
    except (ValueError, RuntimeError):
        return
    torch.testing.assert_close(gathered, wanted, rtol=0, atol=1e-10)


@pytest.mark.xfail(strict=True, reason="defect 7: gather takes the documents of the last batch for those of its tensor")
def test_an_output_gathered_after_another_batch_is_right_or_raises(pools):
    pools.run(2, gathered_late)


def packed_calls(changes: str) -> float:
    """Python objects that stay for each call after a warm-up, with another number of documents, or length, in every call."""
    mesh, calls = line(), 60

    def call(i: int) -> None:
        length = 512 if changes == "documents" else 512 + 2 * i
        documents = [0, *range(2, 2 * (i + 1), 2), length] if changes == "documents" else [0, 7, length]
        share = torch.ones(1, length // 2, 1, 8)
        x = from_local(share, mesh, [Contiguous(1)], length=length, check=False)
        ring_attention(x, x, x, documents=documents)

    for i in range(20):
        call(i)
    gc.collect()
    before = len(gc.get_objects())
    for i in range(20, 20 + calls):
        call(i)
    gc.collect()
    return (len(gc.get_objects()) - before) / calls


@pytest.mark.xfail(strict=True, reason="defect 12: shapes of packed documents and lengths stay in PyTorch's dispatch caches")
@pytest.mark.parametrize("changes", ["documents", "lengths"])
def test_packed_calls_leave_no_objects_behind(pools, changes):
    assert max(pools.run(2, packed_calls, changes)) < 2


def kept_bytes() -> int:
    """Bytes of tensors that stay after moves of many lengths."""
    mesh = line()

    def held() -> int:
        gc.collect()
        return sum(x.nbytes for x in gc.get_objects() if type(x) is torch.Tensor and x.device.type == "cpu" and x._base is None)

    before = held()
    for i in range(60):
        x = distribute_tensor(torch.empty(200_000 + i), mesh, [Zigzag(0)], src_data_rank=None)
        full_tensor(redistribute(x, [Contiguous(0)]))
    return held() - before


@pytest.mark.xfail(strict=True, reason="defect 13: caches of index tensors are bounded by entries, not by bytes")
def test_what_moves_keep_is_bounded_in_bytes(pools):
    assert max(pools.run(2, kept_bytes)) < 64 << 20


def graphs_of_packed_batches() -> int:
    mesh, graphs = line(), []
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), attn_implementation="sdpa")
    parallelize_module(model, mesh, ring_plan(model))

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=count)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True), torch.no_grad():
        for documents in range(1, 13):
            positions = Documents.from_lengths([3] * documents + [64 - 3 * documents]).position_ids()
            compiled(input_ids=torch.zeros(1, 64, dtype=torch.int64), position_ids=positions)
    return len(graphs)


@pytest.mark.xfail(strict=True, reason="defect 14: a graph of the whole model for every number of documents")
def test_a_compiled_model_makes_no_graph_for_each_number_of_documents(pools):
    assert max(pools.run(2, graphs_of_packed_batches, timeout=250)) <= 8
