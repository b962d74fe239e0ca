"""Hundreds of batches, each packed in another way, leave nothing behind: no objects, and no compiled graphs."""

from __future__ import annotations

import gc

import pytest
import torch
from helpers import line, short_caches, slow
from models import SIZES
from torch.distributed.tensor.parallel import parallelize_module
from transformers import AutoModelForCausalLM, LlamaConfig

from dtensor_ring import Contiguous, Documents, from_local, ring_attention, ring_plan

CALLS = 30


def packed_calls(changes: str, most: int) -> float:
    """Python objects that stay for each call, forward and backward, with another number of documents, or length, in every call."""
    mesh = line()

    def call(i: int) -> None:
        length = 512 if changes == "documents" else 512 + 2 * i
        count = 2 if changes == "lengths" else 1 + 37 * i % 100
        documents = Documents.from_lengths([1 + i % 3] * count + [length - count * (1 + i % 3)])
        shares = [torch.ones(1, length // 2, 1, 8, requires_grad=True) for _ in range(3)]
        q, k, v = (from_local(x, mesh, [Contiguous(1)], length=length, run_check=False) for x in shares)
        ring_attention(q, k, v, documents=documents).to_local().sum().backward()

    warm_up = most + 12
    call(0)
    with short_caches(most):
        for i in range(warm_up):
            call(i)
        gc.collect()
        before = len(gc.get_objects())
        for i in range(warm_up, warm_up + CALLS):
            call(i)
        gc.collect()
        return (len(gc.get_objects()) - before) / CALLS


# The longest cache has 128 entries: that many fill only in slow tests.
@pytest.mark.parametrize(("changes", "most"), [("both", 20), slow("both", 128), slow("documents", 128), slow("lengths", 128)])
def test_packed_calls_leave_no_objects_behind(pools, changes, most):
    assert max(pools.run(2, packed_calls, changes, most, timeout=250)) < 2


def graphs_of_packed_batches() -> int:
    mesh, graphs = line(), []
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES | {"num_hidden_layers": 1}), attn_implementation="sdpa")
    parallelize_module(model, mesh, ring_plan(model))

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=count)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True), torch.no_grad():
        for documents in range(1, 21):
            positions = Documents.from_lengths([3] * documents + [64 - 3 * documents]).position_ids()
            compiled(input_ids=torch.zeros(1, 64, dtype=torch.int64), position_ids=positions)
    return len(graphs)


def test_a_compiled_model_makes_no_graph_for_each_number_of_documents(pools):
    assert max(pools.run(2, graphs_of_packed_batches, timeout=250)) <= 4
