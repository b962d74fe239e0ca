"""Whole models compiled in one graph, packed batches too: graphs are few however many documents come, and compute the same."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
from helpers import line, slow
from models import SIZES, build, make_batch, worst
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from transformers import LlamaConfig

from dtensor_ring import Documents, Zigzag, debug, ring_plan, save_attention


def parallel(layers: int = 1):
    """A model in training, and its plan."""
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")  # dynamo looks at it
    torch._dynamo.reset()
    model = build(LlamaConfig(**SIZES | {"num_hidden_layers": layers})).train()
    plan = ring_plan(model, Zigzag(1))
    parallelize_module(model, line(), plan)
    return model, plan


def packed(length: int, documents: int) -> dict[str, object]:
    return make_batch(length) | {"documents": Documents.from_lengths([1] * (documents - 1) + [length - documents + 1])}


def compiled(model, how: str, backend):
    """The model as it is called after a user's line."""
    if how == "model.compile":
        model.compile(fullgraph=True, backend=backend)
        return model
    if how == "torch.compile":
        return torch.compile(model, fullgraph=True, backend=backend)
    model.forward = torch.compile(model.forward, fullgraph=True, backend=backend)
    return model


def step(called, batch) -> tuple[list[torch.Tensor], int, int]:
    """Loss and gradients of this rank, and the bytes that forward and backward sent."""
    called.zero_grad()
    start = debug.traffic(line()).bytes
    loss = called(**batch).loss
    middle = debug.traffic(line()).bytes
    loss.backward()
    sent = middle - start, debug.traffic(line()).bytes - middle
    return [loss.detach(), *(p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in called.parameters())], *sent


def assert_same(called, eager, batch) -> None:
    """Loss, gradients and traffic of a compiled model and of one that is not."""
    (found, *sent), (wanted, *theirs) = step(called, batch), step(eager, batch)
    assert worst(zip(found, wanted, strict=True)) < 1e-6  # transformers computes losses in float32
    assert sent == theirs


def few_graphs(how: str, backend: str):
    (model, _), (eager, _) = parallel(), parallel()
    counter = CompileCounterWithBackend(backend)
    called = compiled(model, how, counter)
    for length, documents in ((16, 2), (20, 1), (33, 3), (24, 5), (17, 9), (40, 12), (24, 16), (64, 31)):
        assert_same(called, eager, packed(length, documents))
    # The first for its own length, the second for every length and any number of documents up to 63.
    assert counter.frame_count == 2


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("how", "backend"),
    [
        ("model.compile", "eager"),
        slow("torch.compile", "aot_eager"),
        slow("model.forward", "aot_eager"),
        slow("model.compile", "inductor"),
    ],
)
def test_a_whole_model_is_one_graph_for_all_lengths_and_numbers_of_documents(pools, how, backend):
    pools.run(2, few_graphs, how, backend, timeout=800)


def every_kind():
    """Each kind of batch has a graph of its own, and no more: without documents, with many, of each row, positions, evaluation."""
    (model, plan), (eager, _) = parallel(), parallel()
    counter = CompileCounterWithBackend("eager")
    called = compiled(model, "model.compile", counter)
    two_rows = [Documents(((0, n, 24), (0, 5, 24))) for n in (1, 2, 3)]
    kinds = [
        [make_batch(length) for length in (16, 20, 24, 17, 33)],
        [packed(24, n) for n in (1, 2, 5, 8, 12)],
        [packed(140, n) for n in (70, 90, 130, 60)],
        [make_batch(24) | {"documents": documents} for documents in two_rows],
        [make_batch(24) | {"position_ids": packed(24, n)["documents"].position_ids().expand(2, -1)} for n in (2, 3, 4)],
    ]
    graphs = []
    for batches in kinds:
        for batch in batches:
            assert_same(called, eager, batch)
        graphs.append(counter.frame_count)
    assert graphs[0] == 2
    assert graphs[-1] <= 7  # of the 8 that PyTorch makes of a function
    batch, reference = make_batch(24), build(LlamaConfig(**SIZES | {"num_hidden_layers": 1}))
    torch._dynamo.reset()
    before = called(**batch).loss
    with plan.paused(), torch.no_grad():
        torch.testing.assert_close(called(**batch).logits, reference(**batch).logits, rtol=0, atol=1e-12)
    assert torch.equal(called(**batch).loss, before)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_graphs_are_bounded_by_the_kinds_of_batches(pools):
    pools.run(2, every_kind, timeout=800)


def checkpointed(backend: str, whole: bool):
    """Selective checkpointing in compiled code repeats no communication either."""
    (model, _), (eager, _) = parallel(2), parallel(2)
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": save_attention})
    for module in (model,) if whole else model.model.layers:
        module.compile(fullgraph=True, backend=backend)
    for length, documents in ((16, 2), (20, 3), (24, 5)):
        assert_same(model, eager, packed(length, documents))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("backend", "whole"), [("aot_eager", True), ("aot_eager", False), ("inductor", True)])
def test_selective_checkpointing_compiles(pools, backend, whole):
    pools.run(2, checkpointed, backend, whole, timeout=800)


def sharded_layers():
    """Layers compiled, then sharded: the order of PyTorch's own recipes."""
    (model, _), (eager, _) = parallel(2), parallel(2)
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
        fully_shard(layer, mesh=line())
    fully_shard(model, mesh=line())
    for length, documents in ((16, 2), (20, 3), (24, 5)):
        batch = packed(length, documents)
        (found, *_), (wanted, *_) = step(model, batch), step(eager, batch)
        for grad in wanted:
            dist.all_reduce(grad)
            grad /= dist.get_world_size()
        assert worst(zip(found, wanted, strict=True)) < 1e-6


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_layers_under_fsdp_compute_the_same(pools):
    pools.run(2, sharded_layers, timeout=800)
