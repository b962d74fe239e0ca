"""What is known to be wrong, as laws that do not hold yet. Whoever mends one removes its mark, or the run fails."""

from __future__ import annotations

import gc

import pytest
import torch
from helpers import line
from test_transformers import SIZES
from torch.distributed.tensor.parallel import parallelize_module
from transformers import AutoModelForCausalLM, LlamaConfig

from dtensor_ring import Contiguous, Documents, from_local, ring_attention, ring_plan


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


@pytest.mark.xfail(
    strict=True, raises=AssertionError, reason="defect 12: shapes of packed documents and lengths stay in PyTorch's dispatch caches"
)
@pytest.mark.parametrize("changes", ["documents", "lengths"])
def test_packed_calls_leave_no_objects_behind(pools, changes):
    assert max(pools.run(2, packed_calls, changes)) < 2


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


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="defect 14: a graph of the whole model for every number of documents")
def test_a_compiled_model_makes_no_graph_for_each_number_of_documents(pools):
    assert max(pools.run(2, graphs_of_packed_batches, timeout=250)) <= 8
