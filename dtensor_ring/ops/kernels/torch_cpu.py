"""`torch_cpu`: PyTorch's flash attention for CPUs.

The op knows no windows and aligns its causal mask top-left, so a block goes to it as it is when unmasked or square causal, and
in strips of rows under a small additive mask otherwise.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from dtensor_ring.ops.dtypes import accumulate_dtype
from dtensor_ring.ops.kernels.base import Kernel, KernelRequirements, PositionContext, Result, SoftmaxParams, band_mask, row_blocks

_STRIP = 512


class TorchCpuKernel(Kernel):
    """`aten::_scaled_dot_product_flash_attention_for_cpu` and its backward, which both take any block of a larger attention."""

    name: ClassVar[str] = "torch_cpu"

    @override
    def unavailable(self, need: KernelRequirements) -> str | None:
        """Runs on CPUs."""
        return None if need.device == "cpu" else f"runs on CPU tensors, found {need.device}"

    @override
    def lacks(self, need: KernelRequirements) -> str | None:
        """Needs q and v of one head dim; has no softcap, dropout or ALiBi."""
        if need.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            return f"needs float64, float32, bfloat16 or float16, found {need.dtype}"
        if need.head_dim != need.v_head_dim:
            return f"needs one head dim for q, k and v, found {need.head_dim} and {need.v_head_dim}"
        if need.softcap:
            return "has no softcap"
        if need.dropout:
            return "has no dropout"
        if need.alibi != "no":
            return "has no ALiBi"
        return None

    @override
    def forward(
        self,
        q_BSHD: Tensor,
        k_BSHD: Tensor,
        v_BSHD: Tensor,
        window: tuple[int, int],
        options: SoftmaxParams,
        extras: PositionContext | None = None,
    ) -> Result:
        """Out in the input dtype, lse in float32 (float64 for float64)."""
        q, k, v = (x.transpose(1, 2) for x in (q_BSHD, k_BSHD, v_BSHD))
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        outs: list[Tensor] = []
        lses: list[Tensor] = []
        for r, c, causal, mask in _strips(q, k, window):
            out, lse = op(q[:, :, r], k[:, :, c], v[:, :, c], 0.0, causal, attn_mask=mask, scale=options.scale)
            outs.append(out.transpose(1, 2))
            lses.append(lse)
        whole = len(outs) == 1
        return Result((outs[0] if whole else torch.cat(outs, 1)).contiguous(), lses[0] if whole else torch.cat(lses, -1))

    @override
    def backward(
        self,
        dout_BSHD: Tensor,
        q_BSHD: Tensor,
        k_BSHD: Tensor,
        v_BSHD: Tensor,
        out_BSHD: Tensor,
        lse_BHS: Tensor,
        window: tuple[int, int],
        options: SoftmaxParams,
        extras: PositionContext | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv in the input dtype; strips add up in float32."""
        q, k, v, dout, out = (x.transpose(1, 2) for x in (q_BSHD, k_BSHD, v_BSHD, dout_BSHD, out_BSHD))
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        strips = _strips(q, k, window)
        if len(strips) == 1 and strips[0][1] == slice(0, k.shape[2]):
            _, _, causal, mask = strips[0]
            return _back(*op(dout, q, k, v, out, lse_BHS, 0.0, causal, attn_mask=mask, scale=options.scale))
        work = accumulate_dtype(q.dtype)
        dqs: list[Tensor] = []
        dk, dv = torch.zeros_like(k, dtype=work), torch.zeros_like(v, dtype=work)
        for r, c, causal, mask in strips:
            blocks = dout[:, :, r], q[:, :, r], k[:, :, c], v[:, :, c], out[:, :, r], lse_BHS[:, :, r]
            dq_strip, dk_strip, dv_strip = op(*blocks, 0.0, causal, attn_mask=mask, scale=options.scale)
            dqs.append(dq_strip)
            dk[:, :, c] += dk_strip
            dv[:, :, c] += dv_strip
        return _back(torch.cat(dqs, 2), dk.to(k.dtype), dv.to(v.dtype))


def _back(dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, H, S, D), as the op has it, to (B, S, H, D)."""
    return dq.transpose(1, 2).contiguous(), dk.transpose(1, 2).contiguous(), dv.transpose(1, 2).contiguous()


def _strips(q: Tensor, k: Tensor, window: tuple[int, int]) -> list[tuple[slice, slice, bool, Tensor | None]]:
    """Strips as (rows, columns, is_causal, additive mask)."""
    q_rows, k_rows = q.shape[2], k.shape[2]
    assert q_rows and k_rows, "the op dies on a block without rows or keys: plans have none"
    if window == (-1, -1) or (window == (-1, 0) and q_rows == k_rows):
        return [(slice(0, q_rows), slice(0, k_rows), window == (-1, 0), None)]
    found: list[tuple[slice, slice, bool, Tensor | None]] = []
    for rows, columns in row_blocks(q_rows, k_rows, window, _STRIP):
        seen = band_mask(rows, columns, k_rows - q_rows, window, q.device)
        mask = torch.zeros(seen.shape, dtype=q.dtype).masked_fill_(~seen, -math.inf)[None, None]
        found.append((slice(rows.start, rows.stop), slice(columns.start, columns.stop), False, mask))
    return found
