"""`flash_attn_4`: the package `flash-attn-4`, FlashAttention-4 in the CuTe DSL, compiled at first use, for Hopper and Blackwell."""

from __future__ import annotations

from types import ModuleType
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from dtensor_ring.ops.kernels.base import KernelRequirements, PositionContext, Result, SoftmaxParams
from dtensor_ring.ops.kernels.flash import Bounds, FlashKernel, Side, lacks_gpu, lacks_tensors, load


class FlashAttn4Kernel(FlashKernel):
    """`flash_attn.cute.interface._flash_attn_fwd` and `_flash_attn_bwd`."""

    name: ClassVar[str] = "flash_attn_4"

    @override
    def unavailable(self, need: KernelRequirements) -> str | None:
        """Needs the package and compute capability 9.0 or more."""
        reason = lacks_gpu(need, (9, 0))
        if reason is not None:
            return reason
        module = _module()
        return module if isinstance(module, str) else None

    @override
    def lacks(self, need: KernelRequirements) -> str | None:
        """Needs 16-bit tensors and one head dim up to 128; has no dropout and no ALiBi."""
        reason = lacks_tensors(need, largest_head_dim=128)
        if reason is not None:
            return reason
        if need.dropout:
            return "has no dropout"
        if need.alibi != "no":
            return "has no ALiBi"
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
        """Called by keyword."""
        module = _module()
        assert isinstance(module, ModuleType), "refused otherwise"
        softcap = options.softcap or None
        out, lse, *_ = module._flash_attn_fwd(
            q, k, v, softmax_scale=options.scale, softcap=softcap, return_lse=True, **_sides(window), **Bounds.keywords(bounds)
        )
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
        """The package's order is q, k, v, out, dout, lse."""
        module = _module()
        assert isinstance(module, ModuleType), "refused otherwise"
        given = {"softmax_scale": options.scale, "softcap": options.softcap, "deterministic": options.deterministic}
        dq, dk, dv, *_ = module._flash_attn_bwd(q, k, v, out, dout, lse, **given, **_sides(window), **Bounds.keywords(bounds))
        return dq, dk, dv


def _module() -> ModuleType | str:
    return load("flash_attn.cute.interface", "flash-attn-4", ("_flash_attn_fwd", "_flash_attn_bwd"))


def _sides(window: tuple[int, int]) -> dict[str, Any]:
    """None, not -1, is unbounded."""
    is_causal, left, right = Side.of(window)
    return {
        "causal": is_causal,
        "window_size_left": None if left < 0 else left,
        "window_size_right": None if right < 0 else right,
    }
