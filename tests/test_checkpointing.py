"""Selective checkpointing: what attention gave is saved, so that nothing travels twice, and gradients are the same bit by bit."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import line
from models import make_batch, make_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint

from dtensor_ring import Documents, Zigzag, debug, from_local, ring_attention, ring_plan, save_attention


def step(arrange, batch) -> tuple[list[torch.Tensor], int, int]:
    """Gradients of a model whose layers `arrange` wraps, and the bytes that forward and backward sent."""
    mesh, model = line(), make_model("llama").train()
    parallelize_module(model, mesh, ring_plan(model))
    arrange(model)
    model(**batch).loss.backward()  # ranks compare calls that are new, once
    model.zero_grad()
    start = debug.traffic(mesh).bytes
    loss = model(**batch).loss
    middle = debug.traffic(mesh).bytes
    loss.backward()
    return [parameter.grad for parameter in model.parameters()], middle - start, debug.traffic(mesh).bytes - middle


def as_transformers_does(model, **options):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, **options})


def as_pytorch_does(model, **options):
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = checkpoint_wrapper(layer, **options)


def selective():
    batch = make_batch(16) | {"documents": Documents.from_lengths([5, 11])}
    for wrap in (as_transformers_does, as_pytorch_does):
        kept, forward, backward = step(lambda _: None, batch)
        again, *plain = step(wrap, batch)
        saved, *ours = step(partial(wrap, context_fn=save_attention), batch)
        more, *_ = step(partial(wrap, context_fn=partial(save_attention, [torch.ops.aten.mm.default])), batch)
        # The last sum over ranks in forward is that of the loss, which no layer repeats: keys and values do.
        keys = plain[1] - backward
        assert 0 < keys <= forward
        assert plain[0] == forward
        assert ours == [forward, backward]
        for grads in (again, saved, more):
            assert all(torch.equal(a, b) for a, b in zip(grads, kept, strict=True))


def test_attention_that_is_saved_sends_nothing_again_and_gives_the_same_gradients_bitwise(pools):
    pools.run(2, selective)


def on_dtensors():
    """`ring_attention` with dropout, whose masks a second run would draw anew."""
    mesh, sent = line(), {}
    shares = [torch.randn(1, 8, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]

    def attend(*tensors):
        placed = [from_local(x, mesh, [Zigzag(1)], length=16) for x in tensors]
        return ring_attention(*placed, dropout_p=0.25, kernel="math").to_local().sin()

    grads = []
    for name, options in (("plain", {}), ("saved", {"context_fn": save_attention})):
        for _ in range(2):
            torch.manual_seed(3)
            start = debug.traffic(mesh).bytes
            out = checkpoint(attend, *shares, use_reentrant=False, **options)
            grads.append(torch.autograd.grad(out.sum(), shares))
            sent[name] = debug.traffic(mesh).bytes - start
    assert sent["saved"] < sent["plain"]
    assert all(torch.equal(a, b) for other in grads[1:] for a, b in zip(other, grads[0], strict=True))


def test_dropout_under_selective_checkpointing_drops_the_same_weights(pools):
    pools.run(2, on_dtensors)


def test_what_is_no_operator_is_refused():
    with pytest.raises(TypeError, match=r"operators such as torch.ops.aten.mm.default, found <built-in .*matmul"):
        save_attention([torch.matmul])
