"""`flash_attn_2`: the package `flash-attn`, FlashAttention-2, from version 2.7 on.

Its forward and backward are registered operators since 2.7, called here by keyword.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from dtensor_ring.ops.kernels.base import KernelRequirements, PositionContext, Result, SoftmaxParams
from dtensor_ring.ops.kernels.flash import Bounds, FlashKernel, Side, drawn, lacks_gpu, lacks_tensors, load


class FlashAttn2Kernel(FlashKernel):
    """`flash_attn.flash_attn_interface`: windows, softcap, ALiBi, dropout, deterministic backward."""

    name: ClassVar[str] = "flash_attn_2"

    @override
    def unavailable(self, need: KernelRequirements) -> str | None:
        """Needs the package, and CUDA of compute capability 8.0 or more."""
        reason = lacks_gpu(need)
        if reason is not None:
            return reason
        module = _module()
        return module if isinstance(module, str) else None

    @override
    def lacks(self, need: KernelRequirements) -> str | None:
        """Needs 16-bit tensors and one head dim, a multiple of 8 up to 256."""
        reason = lacks_tensors(need)
        if reason is not None:
            return reason
        if need.softcap and need.dropout:
            return "has no softcap together with dropout"
        if need.alibi == "shifted":
            return "takes ALiBi distances from the end of a block, which here is not the end of its queries (strategy='gather' is)"
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
        op = _operator("forward", bounds)
        out, lse, *_ = op(q, k, v, **_common(bounds, window, options, extras), return_softmax=False)
        shift = _alibi_shift(bounds, window, extras, q)
        return Result(out, lse if shift is None else lse - shift)

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
        """The operators write dq, dk, dv into tensors given to them."""
        op = _operator("backward", bounds)
        shift = _alibi_shift(bounds, window, extras, q)
        lse = lse if shift is None else lse + shift
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        common = _common(bounds, window, options, extras)
        op(dout, q, k, v, out, lse, dq, dk, dv, **common, deterministic=options.deterministic, rng_state=drawn(q, options, extras))
        return dq, dk, dv


def _module() -> ModuleType | str:
    return load("flash_attn.flash_attn_interface", "flash-attn", ("_wrapped_flash_attn_forward",))  # since 2.7


def _operator(direction: str, bounds: Bounds | None) -> Callable[..., Any]:
    """The registered operator of the dense or the varlen call; importing the package registers it."""
    assert isinstance(_module(), ModuleType), "refused otherwise"
    return getattr(torch.ops.flash_attn, f"_flash_attn_{direction}" if bounds is None else f"_flash_attn_varlen_{direction}")


def _slopes(bounds: Bounds | None, extras: PositionContext | None) -> Tensor | None:
    """Slopes (H,), or a row of them for each batch row, which in a varlen call is each sequence."""
    if extras is None or extras.alibi is None or extras.alibi.dim() == 1 or bounds is None:
        return None if extras is None else extras.alibi
    rows = (bounds.cu_q[:-1] // max(len(extras.positions[0]), 1)).clamp(max=extras.alibi.shape[0] - 1)
    return extras.alibi.index_select(0, rows)


def _alibi_shift(bounds: Bounds | None, window: tuple[int, int], extras: PositionContext | None, q: Tensor) -> Tensor | None:
    """What the lse of a causal call has too much: its bias is slope * (key's place), which is larger by slope * (query's place).

    (H or B, H, Sq), or (H, T) in a varlen call; None where distances are the bias.
    """
    if extras is None or extras.alibi is None or not Side.of(window).is_causal:
        return None
    q_positions, k_positions = extras.positions
    if bounds is None:
        return extras.alibi[..., None] * (q_positions - k_positions[:1])
    rows = torch.arange(q.shape[0], device=q.device)
    sequence = torch.searchsorted(bounds.cu_q, rows, right=True) - 1
    first_key = bounds.cu_k.index_select(0, sequence)
    place = q_positions[rows % len(q_positions)] - k_positions[first_key % len(k_positions)]
    slopes = extras.alibi if extras.alibi.dim() == 1 else extras.alibi[rows // len(q_positions)].T
    return slopes.reshape(slopes.shape[0], -1) * place


def _common(
    bounds: Bounds | None, window: tuple[int, int], options: SoftmaxParams, extras: PositionContext | None
) -> dict[str, Any]:
    return {
        "dropout_p": options.dropout_p,
        "softmax_scale": options.scale,
        "softcap": options.softcap,
        "alibi_slopes": _slopes(bounds, extras),
        **Side.of(window).keywords(),
        **Bounds.keywords(bounds),
    }
