"""What PyTorch's operators of cuDNN attention do on CPUs here: their own arguments, the same results and the same traps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from dtensor_ring.ops import operator, prepare
from dtensor_ring.ops.dtypes import accumulate_dtype
from dtensor_ring.ops.kernels import KERNELS, Block, Saved, SoftmaxParams
from dtensor_ring.ops.kernels.cudnn import CudnnKernel

FORWARD, BACKWARD = "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward"


class Ops:
    """Both, by matrix products; `calls` has the (B, H, Sq, D) and (B, Hk, Sk, D) of each call and whether it is causal."""

    def __init__(self) -> None:
        self.calls: dict[str, list[tuple[torch.Size, torch.Size, bool]]] = {FORWARD: [], BACKWARD: []}
        self.plans: dict[object, tuple[tuple[int, ...], ...]] = {}

    def forward(self, q, k, v, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale):
        assert (attn_bias, compute_log_sumexp, dropout_p, return_debug_mask) == (None, True, 0.0, False)
        block = self._noted(FORWARD, (q, k, v), is_causal, scale)
        out, lse = KERNELS["math"].forward(*(x.transpose(1, 2) for x in (q, k, v)), block)
        out, nothing, state = out.to(q.dtype).transpose(1, 2), torch.empty(0), torch.zeros((), dtype=torch.int64)
        return out, lse[..., None], nothing, nothing, q.shape[2], k.shape[2], state, state, nothing

    def backward(
        self, dout, q, k, v, out, lse, seed, offset, bias, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, *, scale
    ):  # fmt: skip
        assert (bias, cum_q, cum_k, dropout_p) == (None, None, None, 0.0)
        assert (max_q, max_k) == (q.shape[2], k.shape[2])
        assert seed.dtype == offset.dtype == torch.int64
        assert lse.shape == (*q.shape[:3], 1)
        assert lse.dtype == accumulate_dtype(q.dtype)
        block = self._noted(BACKWARD, (q, k, v), is_causal, scale)
        # A plan reads dout, out and lse by the strides that they had when it was made, and is not looked up by them.
        key = *((x.shape, x.stride()) for x in (q, k, v)), is_causal
        strides = self.plans.setdefault(key, (dout.stride(), out.stride(), lse.stride()))
        dout, out, lse = (
            x.as_strided(x.shape, as_planned) if fits(x, as_planned) else torch.full_like(x, torch.nan)
            for x, as_planned in zip((dout, out, lse), strides, strict=True)
        )
        saved = Saved(*(x.transpose(1, 2) for x in (q, k, v, out)), lse[..., 0])
        grads = KERNELS["math"].backward(saved, dout.transpose(1, 2), block)
        return tuple(grad.to(q.dtype).transpose(1, 2) for grad in grads)

    def _noted(self, op: str, inputs: tuple[Tensor, Tensor, Tensor], is_causal: bool, scale: float) -> Block:
        for x in inputs:
            assert not isinstance(x, FakeTensor)
            assert x.data_ptr() % 16 == 0
            assert x.stride(-1) == 1
            assert not any(stride % 8 for stride in x.stride()[:-1])
        q, k, v = inputs
        assert k.shape == v.shape
        self.calls[op].append((q.shape, k.shape, is_causal))
        queries, keys = q.shape[2], k.shape[2]
        # Top-left: what the kernel names bottom-right would be (-1, keys - queries).
        return Block((-1, queries - keys) if is_causal else (-1, -1), SoftmaxParams(scale))


def fits(x: Tensor, strides: tuple[int, ...]) -> bool:
    last = sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True))
    return x.storage_offset() + last < x.untyped_storage().nbytes() // x.itemsize


@contextmanager
def installed() -> Iterator[Ops]:
    """PyTorch's operators run on CPUs, and so does the kernel; what was chosen is forgotten before and after."""

    def forget() -> None:
        prepare._CALLS.clear()
        operator._resolved.cache_clear()

    ops, patch, library = Ops(), pytest.MonkeyPatch(), torch.library.Library("aten", "IMPL")
    library.impl(FORWARD, ops.forward, "CPU")
    library.impl(BACKWARD, ops.backward, "CPU")
    patch.setattr(CudnnKernel, "unavailable", lambda _kernel, _need: None)
    forget()
    try:
        yield ops
    finally:
        patch.undo()
        library._destroy()
        forget()
