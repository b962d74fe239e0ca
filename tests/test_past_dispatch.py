"""Attention past PyTorch's dispatcher: only where nobody would see the operator there, and with the same results."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from unittest.mock import patch

import pytest
import torch
from helpers import MASKS, make_case
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from dtensor_ring import Documents, ring_attention
from dtensor_ring._torch_dispatch import is_unobserved
from dtensor_ring.ops import operator

OPS = ["dtensor_ring.attention.default", "dtensor_ring.attention_backward.default"]


class Seen(TorchDispatchMode):
    """The operators of ours that ran inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "dtensor_ring" in str(func):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def both(inputs: tuple[Tensor, ...], dout: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = ring_attention(*leaves)
    return out, *torch.autograd.grad(out, leaves, dout)


def test_a_mode_sees_the_operators_of_both_passes():
    """So do checkpointing that saves attention, and whoever counts FLOPs."""
    case = make_case(16)
    with Seen() as seen:
        both(case.inputs, case.dout)
    assert seen.names == OPS


def test_a_profile_names_them():
    case = make_case(16)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        both(case.inputs, case.dout)
    names = {event.key for event in found.key_averages()}
    assert {"dtensor_ring::attention", "dtensor_ring::attention_backward"} <= names


def test_a_tensor_of_a_class_of_its_own_is_asked():
    """Here one of two tensors, which computes with both."""
    first, second = make_case(16), make_case(16, seed=1)
    leaves = [TwoTensor(a, b).requires_grad_() for a, b in zip(first.inputs, second.inputs, strict=True)]
    out = ring_attention(*leaves)
    grads = torch.autograd.grad(out, leaves, TwoTensor(first.dout, second.dout))
    for case, name in ((first, "a"), (second, "b")):
        wanted = both(case.inputs, case.dout)
        assert all(torch.equal(getattr(x, name), y) for x, y in zip((out, *grads), wanted, strict=True))


def test_a_gradient_of_a_class_of_its_own_is_asked():
    """Of plain inputs: autograd gives backward whatever comes."""
    case = make_case(16)
    leaves = [x.detach().clone().requires_grad_() for x in case.inputs]
    grads = torch.autograd.grad(ring_attention(*leaves), leaves, TwoTensor(case.dout, 2 * case.dout))
    (_, *wanted), (_, *twice) = both(case.inputs, case.dout), both(case.inputs, 2 * case.dout)
    assert all(torch.equal(x.a, y) for x, y in zip(grads, wanted, strict=True))
    assert all(torch.equal(x.b, y) for x, y in zip(grads, twice, strict=True))


@pytest.mark.parametrize("documents", [None, Documents.from_lengths([10, 6])])
def test_batched_gradients_are_those_of_each(documents):
    """PyTorch's older batched tensors are of its own class, and are no mode or transform."""
    case = make_case(16)
    leaves = [x.detach().clone().requires_grad_() for x in case.inputs]
    out = ring_attention(*leaves, documents=documents)
    douts = torch.stack([case.dout, -2 * case.dout, case.dout.flip(0)])
    batched = torch.autograd.grad(out, leaves, douts, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(out, leaves, dout, retain_graph=True) for dout in douts]
    for found, wanted in zip(batched, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(wanted), rtol=0, atol=1e-12)


@pytest.mark.parametrize("documents", [None, Documents.from_lengths([10, 6])])
def test_on_the_meta_device_there_are_shapes(documents):
    case = make_case(16)
    leaves = [x.detach().to("meta").requires_grad_() for x in case.inputs]
    out = ring_attention(*leaves, documents=documents)
    grads = torch.autograd.grad(out, leaves, torch.empty_like(out))
    assert [(x.shape, x.device.type) for x in (out, *grads)] == [(x.shape, "meta") for x in (case.q, *case.inputs)]


def test_fake_tensors_are_not_computed_with():
    with FakeTensorMode():
        q, k, v = (torch.empty(2, 16, heads, 8, requires_grad=True) for heads in (4, 2, 2))
        out = ring_attention(q, k, v)
        grads = torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    assert [x.shape for x in (out, *grads)] == [x.shape for x in (q, q, k, v)]


@pytest.mark.parametrize("mask", MASKS)
def test_the_way_changes_no_bit(mask):
    case = make_case(24, mask=mask)
    ways = {"_attention": 0, "_attention_backward": 0}

    def counted(name: str):
        function = getattr(operator, name)

        def call(*arguments):
            ways[name] += 1
            return function(*arguments)

        return call

    with patch.multiple(operator, **{name: counted(name) for name in ways}):
        past = both(case.inputs, case.dout)
    assert ways == {"_attention": 1, "_attention_backward": 1}
    with patch.object(operator, "is_unobserved", lambda tensors: False):
        through = both(case.inputs, case.dout)
    assert all(torch.equal(a, b) for a, b in zip(past, through, strict=True))


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("around", "alone"),
    [
        (nullcontext, True),
        (torch.inference_mode, True),
        (Seen, False),
        (Functions, False),
        (lambda: profile(activities=[ProfilerActivity.CPU]), False),
    ],
)
def test_who_looks_on(around: Callable[[], AbstractContextManager], alone: bool):
    with around():
        assert is_unobserved([torch.zeros(1), torch.nn.Parameter(torch.zeros(1)), None]) is alone
    seen = []
    make_fx(lambda x: x.add(seen.append(is_unobserved([torch.zeros(1)])) or 1), pre_dispatch=True)(torch.zeros(1))
    assert seen == [False]
    assert not is_unobserved([torch.zeros(1, dtype=torch.complex64).conj()])
    assert not is_unobserved([TwoTensor(torch.zeros(1), torch.zeros(1))])
    assert not torch.func.vmap(lambda x: torch.tensor(is_unobserved([torch.zeros(1)])))(torch.zeros(2)).any()
