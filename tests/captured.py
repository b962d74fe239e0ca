"""Calls of attention, and layers of models, captured in CUDA graphs: what tests on one GPU and on two have in common."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from dtensor_ring import Documents, debug, from_local, ring_attention
from dtensor_ring.captures import RingCaptureError

TOKENS = 512
Act = Callable[..., Sequence[Tensor]]


@contextmanager
def bitwise() -> Iterator[None]:
    """Gradients of flash kernels have the same bits in every run only so; and memory that nothing has written is NaN."""
    with patch.dict(os.environ, CUBLAS_WORKSPACE_CONFIG=":4096:8"):
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)
            debug.forget_captured()


class Captured:
    """What `act` launches for some tensors, as a graph; called with others it copies them in, and gives copies of the results.

    Before the capture `act` is called once, and with `aside` once more on a stream of its own, as PyTorch's documents have it.
    """

    def __init__(self, act: Act, inputs: Sequence[Tensor], aside: bool = True) -> None:
        self.inputs = [x.clone() for x in inputs]
        # Not on the side stream first: what caches let go of would wait there for a later tensor of that stream, as it was.
        act(*self.inputs)
        if aside:
            self._call_aside(act)
        self.graph = torch.cuda.CUDAGraph()
        gc.collect()  # an older graph that were freed within the capture would end it
        with torch.cuda.graph(self.graph):
            self.results = act(*self.inputs)

    def _call_aside(self, act: Act) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            act(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        self.graph.replay()
        return [x.clone() for x in self.results]


def make_inputs(heads: tuple[int, int] = (4, 2), rows: int = 1, tokens: int = TOKENS, sinks: bool = False) -> list[Tensor]:
    """q, k, v, the gradient of out, and with `sinks` also those."""
    shapes = [(rows, tokens, count, 64) for count in (heads[0], heads[1], heads[1], heads[0])]
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    return [*inputs, torch.randn(heads[0], device="cuda")] if sinks else inputs


def attention(mesh, placement, length: int = TOKENS, **options) -> Act:
    """Out, lse and every gradient of an attention on local tensors."""

    def act(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, *sinks: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v, *sinks)]
        placed = [from_local(x, mesh, [placement], length=length, run_check=False) for x in leaves[:3]]
        out, lse = ring_attention(*placed, return_lse=True, **options, **dict(zip(("sinks",), leaves[3:], strict=False)))
        grads = torch.autograd.grad(out.to_local(), leaves, dout)
        return [out.detach().to_local(), lse.detach().to_local(), *grads]

    return act


def doubled(documents: Documents) -> Documents:
    (bounds,) = documents.bounds
    return Documents.from_cu_seqlens([2 * bound for bound in bounds])


def refused_in_a_graph(act: Callable[[], object], error: type[Exception], *texts: str) -> None:
    """`act` raises while a graph is captured; the capture is over then, and the GPU goes on."""
    x = torch.zeros(1, device="cuda")

    def capture() -> None:
        gc.collect()
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            x.add_(1)  # PyTorch warns of a graph without kernels
            act()

    with pytest.raises(error) as failure:
        capture()
    for text in texts:
        assert text in str(failure.value)
    torch.cuda.synchronize()


def gradients(module: nn.Module, *inputs: Tensor, dout: Tensor) -> list[Tensor]:
    leaf = inputs[0].clone().requires_grad_()
    out = module(leaf, *inputs[1:])
    return [out.detach().clone(), *(x.clone() for x in torch.autograd.grad(out, [leaf, *module.parameters()], dout))]


class Layer(nn.Module):
    """A decoder layer as a function of tensors alone, which is what can be captured; the rest is that of one batch."""

    def __init__(self, layer: nn.Module, keywords: dict[str, object]) -> None:
        super().__init__()
        self.layer, self.keywords = layer, keywords

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.layer(hidden, position_embeddings=(cos, sin), **self.keywords)


class Replaying(nn.Module):
    """What stands in a model for a captured layer."""

    def __init__(self, graphed: nn.Module) -> None:
        super().__init__()
        self.graphed = graphed

    def forward(self, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], **_batch: object) -> Tensor:
        return self.graphed(hidden, *position_embeddings)


def small_llama(length: int) -> nn.Module:
    """A Llama of two layers and head dim 64, in bfloat16, with the same weights on every rank."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=length,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).to("cuda", torch.bfloat16)


def check_captured_layers(model: nn.Module, length: int, documents: Documents, others: Documents) -> None:
    """A model under its plan trains with captured layers as without, bit for bit; another packing is found out."""
    calls: list[tuple[tuple[Tensor, ...], dict]] = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda _, args, named: calls.append((args, named)), with_kwargs=True)

    def train(ids: Tensor, packing: Documents) -> list[Tensor]:
        loss = model(input_ids=ids, labels=ids, documents=packing).loss
        return [loss.detach().clone(), *(x.clone() for x in torch.autograd.grad(loss, list(model.parameters())))]

    generator = torch.Generator().manual_seed(1)  # every rank has the whole batch
    batches = [torch.randint(0, 64, (1, length), generator=generator).cuda() for _ in range(3)]
    wanted = [train(ids, documents) for ids in batches]
    hook.remove()
    refused_in_a_graph(lambda: train(batches[0], documents), RingCaptureError, "reads its batch on the host", "capture its layers")
    hidden, named = calls[0][0][0], calls[0][1]
    cos, sin = named.pop("position_embeddings")
    samples = tuple((hidden.detach().clone().requires_grad_(), cos.clone(), sin.clone()) for _ in model.model.layers)
    gc.collect()
    graphed = torch.cuda.make_graphed_callables(tuple(Layer(layer, named) for layer in model.model.layers), samples)
    for i, layer in enumerate(graphed):
        model.model.layers[i] = Replaying(layer)
    for ids, expected in zip(batches, wanted, strict=True):
        for number, (a, b) in enumerate(zip(train(ids, documents), expected, strict=True)):
            assert torch.equal(a, b), f"result {number}: {(a.float() - b.float()).abs().max().item():.1e} apart"
    with pytest.raises(RingCaptureError, match="of layer 0 was replayed from a CUDA graph"):
        train(batches[0], others)
