"""`flash_attn_3`: FlashAttention-3 for Hopper, the module `flash_attn_interface`.

Builds differ: some have no backward and are refused for training. Functions are called by keyword, and results are told apart by
shape, since builds return different numbers of them.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from dtensor_ring.ops.kernels.base import KernelRequirements, has_no
from dtensor_ring.ops.kernels.block import Block, Gradients, Result, Saved, SoftmaxParams
from dtensor_ring.ops.kernels.flash import (
    FlashKernel,
    empty_gradients,
    lacks_hopper,
    lacks_tensors,
    load,
    varlen_keywords,
    window_keywords,
)


class FlashAttn3Kernel(FlashKernel):
    """`flash_attn_interface._flash_attn_forward` and `_flash_attn_backward`."""

    name: ClassVar[str] = "flash_attn_3"

    @override
    def unavailable(self, need: KernelRequirements) -> str | None:
        """It needs the package and a Hopper GPU, and a build with a backward where gradients are needed."""
        reason = lacks_hopper(need)
        if reason is not None:
            return reason
        module = _module()
        if isinstance(module, str):
            return module
        if need.training and not _has_backward(need.device):
            return "this build is forward-only: use another kernel for training"
        return None

    @override
    def lacks(self, need: KernelRequirements) -> str | None:
        """It needs 16-bit tensors and one head dim, has no dropout and no ALiBi, and has softcap in forward only."""
        reason = lacks_tensors(need) or has_no(need, "dropout", "ALiBi")
        if reason is not None:
            return reason
        return "has no softcap in backward" if need.softcap and need.training else None

    @override
    def call_forward(self, q: Tensor, k: Tensor, v: Tensor, block: Block) -> Result:
        """Call the package's forward. Out is the result shaped as q, lse the float32 result without a head dim."""
        module = _module()
        assert isinstance(module, ModuleType), "refused otherwise"
        softmax = {"softmax_scale": block.softmax.scale, "softcap": block.softmax.softcap}
        results = module._flash_attn_forward(q, k, v, **softmax, **window_keywords(block.window), **varlen_keywords(block))
        # By shape and not by place, since builds return different numbers of results. The lse is (B, H, S) or (H, T): heads stand
        # before tokens there.
        *batch, tokens, heads, _ = q.shape
        out = next(x for x in results if isinstance(x, Tensor) and x.shape == (*q.shape[:-1], v.shape[-1]))
        lse = next(x for x in results if isinstance(x, Tensor) and x.shape == (*batch, heads, tokens) and x.dtype == torch.float32)
        return Result(out, lse)

    @override
    def call_backward(self, saved: Saved, dout: Tensor, block: Block) -> Gradients:
        """Call the package's backward, which writes dq, dk and dv into tensors given to it."""
        module = _module()
        assert isinstance(module, ModuleType), "refused otherwise"
        dq, dk, dv = empty_gradients(saved)
        scale, softcap, deterministic = block.softmax.scale, block.softmax.softcap, block.softmax.deterministic
        softmax = {"softmax_scale": scale, "softcap": softcap, "deterministic": deterministic}
        window = window_keywords(block.window)
        window["is_causal"] = window.pop("causal")  # the two functions of the package name the same argument differently
        module._flash_attn_backward(dout, *saved, dq=dq, dk=dk, dv=dv, **softmax, **window, **varlen_keywords(block))
        return dq, dk, dv


def _module() -> ModuleType | str:
    return load("flash_attn_interface", "flash-attn-3", ("_flash_attn_forward",))


@cache
def _has_backward(device: str) -> bool:
    """Whether this build computes gradients, asked by a tiny call: some builds have the function, which then raises."""
    module = _module()
    if isinstance(module, str) or not hasattr(module, "_flash_attn_backward"):
        return False
    # Asked once: a build without a backward shows only when it is called, and the first step of a training would be late to learn
    # it.
    kernel, block = FlashAttn3Kernel(), Block((-1, -1), SoftmaxParams(1.0))
    x = torch.zeros((1, 8, 1, 64), dtype=torch.bfloat16, device=device)
    try:
        kernel.call_backward(Saved(x, x, x, *kernel.call_forward(x, x, x, block)), x, block)
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    return True
