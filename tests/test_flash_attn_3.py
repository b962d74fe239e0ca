"""The adapter of flash-attn 3 on stand-ins for its builds: with a backward, without one, with one that raises."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from helpers import make_case

from dtensor_ring import ring_attention
from dtensor_ring.ops.kernels import KERNELS, Block, Saved, SoftmaxParams, flash_attn_3

MATH = KERNELS["math"]


def block_of(is_causal: bool, window: tuple[int, int], softmax: SoftmaxParams) -> Block:
    return Block((-1, 0) if is_causal else window, softmax)


def forward(q, k, v, *, softmax_scale, softcap, causal, window_size_left, window_size_right):
    window, softmax = (window_size_left, window_size_right), SoftmaxParams(softmax_scale, softcap)
    out, lse = MATH.forward(q, k, v, block_of(causal, window, softmax))
    return out.to(q.dtype), lse, None, None


def backward(
    dout, q, k, v, out, lse, *, dq, dk, dv, softmax_scale, softcap, deterministic, is_causal, window_size_left, window_size_right
):
    window, softmax = (window_size_left, window_size_right), SoftmaxParams(softmax_scale, softcap)
    grads = MATH.backward(Saved(q, k, v, out, lse), dout, block_of(is_causal, window, softmax))
    for given, grad in zip((dq, dk, dv), grads, strict=True):
        given.copy_(grad)


def raising(*_tensors, **_options):
    raise NotImplementedError("built without a backward")


@pytest.fixture
def install(monkeypatch):
    """Puts a build in the place of the package, and a Hopper GPU in the place of the CPU."""

    def put(**functions):
        module = ModuleType("flash_attn_interface")
        vars(module).update(functions)
        monkeypatch.setattr(flash_attn_3, "_module", lambda: module)
        flash_attn_3._has_backward.cache_clear()

    monkeypatch.setattr(flash_attn_3, "lacks_hopper", lambda _: None)
    yield put
    flash_attn_3._has_backward.cache_clear()


@pytest.mark.parametrize("functions", [{}, {"_flash_attn_backward": raising}], ids=["none", "raises"])
def test_builds_without_a_backward_are_refused_for_training_and_serve_otherwise(install, functions):
    install(_flash_attn_forward=forward, **functions)
    case = make_case(64, dim=64, dtype=torch.bfloat16)
    leaves = [x.requires_grad_() for x in case.inputs]
    with pytest.raises(NotImplementedError, match="this build is forward-only: use another kernel for training"):
        ring_attention(*leaves, kernel="flash_attn_3")
    with torch.no_grad():
        out = ring_attention(*leaves, kernel="flash_attn_3")
    torch.testing.assert_close(out.float(), case.exact()[0], rtol=0, atol=2e-2)


@pytest.mark.parametrize("mask", ["causal", "full", "window", "two-sided"])
def test_a_whole_build_is_called_as_it_wants_to_be(install, mask):
    install(_flash_attn_forward=forward, _flash_attn_backward=backward)
    case = make_case(96, dim=64, dtype=torch.bfloat16, mask=mask)
    leaves = [x.clone().requires_grad_() for x in case.inputs]
    options = {"is_causal": case.is_causal, "window": case.window}
    out, lse = ring_attention(*leaves, kernel="flash_attn_3", return_lse=True, **options)
    for found, wanted in zip((out, lse, *torch.autograd.grad(out, leaves, case.dout)), case.exact(), strict=True):
        assert (found.float() - wanted).norm() < 1e-2 * wanted.norm()
