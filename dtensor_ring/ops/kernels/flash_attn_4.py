"""`flash_attn_4`: the package `flash-attn-4`, FlashAttention-4 in the CuTe DSL, compiled at first use, for Hopper and Blackwell."""

from __future__ import annotations

from threading import Lock
from types import ModuleType
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from dtensor_ring.ops.kernels.base import KernelRequirements, has_no
from dtensor_ring.ops.kernels.block import Block, Gradients, Result, Saved
from dtensor_ring.ops.kernels.flash import FlashKernel, is_causal, lacks_gpu, lacks_tensors, load, varlen_keywords

# A call compiles what no call before needed, and the compiler has one state for all threads: two that compile end the process.
_ONE_THREAD = Lock()


class FlashAttn4Kernel(FlashKernel):
    """`flash_attn.cute.interface._flash_attn_fwd` and `_flash_attn_bwd`."""

    name: ClassVar[str] = "flash_attn_4"

    @override
    def unavailable(self, need: KernelRequirements) -> str | None:
        """It needs the package and compute capability 9.0 or more."""
        reason = lacks_gpu(need, (9, 0))
        if reason is not None:
            return reason
        module = _module()
        return module if isinstance(module, str) else None

    @override
    def lacks(self, need: KernelRequirements) -> str | None:
        """It needs 16-bit tensors and one head dim up to 128, and has no dropout and no ALiBi."""
        return lacks_tensors(need, largest_head_dim=128) or has_no(need, "dropout", "ALiBi")

    @override
    def call_forward(self, q: Tensor, k: Tensor, v: Tensor, block: Block) -> Result:
        """Call the package's forward by keyword; it takes None, not 0, for no softcap."""
        module = _module()
        assert isinstance(module, ModuleType), "refused otherwise"
        softcap = block.softmax.softcap or None
        with _ONE_THREAD:
            out, lse, *_ = module._flash_attn_fwd(q, k, v, softcap=softcap, return_lse=True, **_keywords(block))
        return Result(out, lse)

    @override
    def call_backward(self, saved: Saved, dout: Tensor, block: Block) -> Gradients:
        """Call the package's backward, whose order is q, k, v, out, dout, lse; here 0 is no softcap."""
        module = _module()
        assert isinstance(module, ModuleType), "refused otherwise"
        q, k, v, out, lse = saved
        softmax = {"softcap": block.softmax.softcap, "deterministic": block.softmax.deterministic}
        with _ONE_THREAD:
            dq, dk, dv, *_ = module._flash_attn_bwd(q, k, v, out, dout, lse, **softmax, **_keywords(block))
        return dq, dk, dv


def _module() -> ModuleType | str:
    return load("flash_attn.cute.interface", "flash-attn-4", ("_flash_attn_fwd", "_flash_attn_bwd"))


def _keywords(block: Block) -> dict[str, Any]:
    """What forward and backward both take; None, not -1, is unbounded, and a causal call has no window beside."""
    left, right = block.window
    causal = is_causal(block.window)
    return {
        "softmax_scale": block.softmax.scale,
        "causal": causal,
        "window_size_left": None if left < 0 else left,
        "window_size_right": None if right < 0 or causal else right,
        **varlen_keywords(block),
    }
