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

from dtensor_ring.ops.kernels.base import KernelRequirements, PositionContext, Result, SoftmaxParams
from dtensor_ring.ops.kernels.flash import Bounds, FlashKernel, Side, capability, lacks_gpu, lacks_tensors, load


class FlashAttn3Kernel(FlashKernel):
    """`flash_attn_interface._flash_attn_forward` and `_flash_attn_backward`."""

    name: ClassVar[str] = "flash_attn_3"

    @override
    def unavailable(self, need: KernelRequirements) -> str | None:
        """Needs the package and a Hopper GPU, and a backward where gradients are needed."""
        reason = lacks_gpu(need, (9, 0))
        if reason is not None:
            return reason
        if capability()[0] != 9:
            return "is for Hopper GPUs (compute capability 9)"
        module = _module()
        if isinstance(module, str):
            return module
        if need.training and not _has_backward(need.device):
            return "this build is forward-only: use another kernel for training"
        return None

    @override
    def lacks(self, need: KernelRequirements) -> str | None:
        """Needs 16-bit tensors and one head dim; has no dropout and no ALiBi, and softcap in forward only."""
        reason = lacks_tensors(need)
        if reason is not None:
            return reason
        if need.dropout:
            return "has no dropout"
        if need.alibi != "no":
            return "has no ALiBi"
        if need.softcap and need.training:
            return "has no softcap in backward"
        return None

    @override
    def call_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bounds: Bounds | None,
        window: tuple[int, int],
        options: SoftmaxParams,
        extras: PositionContext | None,
    ) -> Result:
        """Out is the result shaped as q, lse the float32 result without a head dim."""
        module = _module()
        assert isinstance(module, ModuleType), "refused otherwise"
        given = {"softmax_scale": options.scale, "softcap": options.softcap}
        results = module._flash_attn_forward(q, k, v, **given, **Side.of(window).keywords(), **Bounds.keywords(bounds))
        rows = q.shape[:-2]
        shape = (q.shape[1], q.shape[0]) if bounds is not None else (rows[0], q.shape[2], rows[1])
        out = next(x for x in results if isinstance(x, Tensor) and x.shape == (*q.shape[:-1], v.shape[-1]))
        lse = next(x for x in results if isinstance(x, Tensor) and x.shape == shape and x.dtype == torch.float32)
        return Result(out, lse)

    @override
    def call_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        bounds: Bounds | None,
        window: tuple[int, int],
        options: SoftmaxParams,
        extras: PositionContext | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The function writes dq, dk, dv into tensors given to it."""
        module = _module()
        assert isinstance(module, ModuleType), "refused otherwise"
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        sides, lengths = Side.of(window).keywords(), Bounds.keywords(bounds)
        sides["is_causal"] = sides.pop("causal")
        options_given = {"softmax_scale": options.scale, "softcap": options.softcap, "deterministic": options.deterministic}
        module._flash_attn_backward(dout, q, k, v, out, lse, dq=dq, dk=dk, dv=dv, **sides, **lengths, **options_given)
        return dq, dk, dv


def _module() -> ModuleType | str:
    return load("flash_attn_interface", "flash-attn-3", ("_flash_attn_forward",))


@cache
def _has_backward(device: str) -> bool:
    """Whether this build computes gradients, asked by a tiny call: some builds have the function, which then raises."""
    module = _module()
    if isinstance(module, str) or not hasattr(module, "_flash_attn_backward"):
        return False
    kernel, options = FlashAttn3Kernel(), SoftmaxParams(1.0)
    x = torch.zeros((1, 8, 1, 64), dtype=torch.bfloat16, device=device)
    try:
        found = kernel.call_forward(x, x, x, None, (-1, -1), options, None)
        kernel.call_backward(x, x, x, x, found.out, found.lse, None, (-1, -1), options, None)
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    return True
