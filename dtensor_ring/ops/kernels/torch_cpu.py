"""`torch_cpu`: PyTorch's flash attention for CPUs.

The op knows no windows and aligns its causal mask top-left, so a block goes to it as it is when unmasked or square causal, and
in strips of queries under a small additive mask otherwise.
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from dtensor_ring.ops.dtypes import accumulate_dtype
from dtensor_ring.ops.kernels.base import DenseKernel, KernelRequirements, band_mask, has_no, strips
from dtensor_ring.ops.kernels.block import Block, Gradients, Result, Saved

_STRIP = 512  # queries that share one additive mask, which is that many times the keys they see


class TorchCpuKernel(DenseKernel):
    """`aten::_scaled_dot_product_flash_attention_for_cpu` and its backward, which both take any block of a larger attention."""

    name: ClassVar[str] = "torch_cpu"

    @override
    def unavailable(self, need: KernelRequirements) -> str | None:
        """It runs on CPUs."""
        return None if need.device == "cpu" else f"runs on CPU tensors, found {need.device}"

    @override
    def lacks(self, need: KernelRequirements) -> str | None:
        """It needs q and v of one head dim and a scale above 0, and has no softcap, dropout or ALiBi."""
        if need.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            return f"needs float64, float32, bfloat16 or float16, found {need.dtype}"
        if need.head_dim != need.v_head_dim:
            return f"needs one head dim for q, k and v, found {need.head_dim} and {need.v_head_dim}"
        # It scales scores that are masked already: -inf times 0 is NaN, and times less than 0 it is +inf, which hides all the rest.
        return has_no(need, "softcap", "dropout", "ALiBi", "scale of 0 or less")

    @override
    def forward_dense(self, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, block: Block) -> Result:
        """Compute out in the input dtype, and lse in float32, or in float64 for float64."""
        q, k, v = (x.transpose(1, 2) for x in (q_BSHD, k_BSHD, v_BSHD))
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        outs: list[Tensor] = []
        lses: list[Tensor] = []
        for queries, keys, causal, mask in _calls(q, k, block.window):
            inputs = q[:, :, queries], k[:, :, keys], v[:, :, keys]
            out, lse = op(*inputs, 0.0, causal, attn_mask=mask, scale=block.softmax.scale)
            outs.append(out.transpose(1, 2))
            lses.append(lse)
        whole = len(outs) == 1
        return Result((outs[0] if whole else torch.cat(outs, 1)).contiguous(), lses[0] if whole else torch.cat(lses, -1))

    @override
    def backward_dense(self, saved: Saved, dout_BSHD: Tensor, block: Block) -> Gradients:
        """Compute dq, dk and dv in the input dtype; the strips of a block are added up in float32."""
        q, k, v, dout, out = (x.transpose(1, 2) for x in (saved.q, saved.k, saved.v, dout_BSHD, saved.out))
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        scale, calls = block.softmax.scale, _calls(q, k, block.window)
        # One call on all keys returns the gradients themselves. Strips return those of the keys they see, which are added up below.
        if len(calls) == 1 and calls[0].keys == slice(0, k.shape[2]):
            _, _, causal, mask = calls[0]
            return _back(*op(dout, q, k, v, out, saved.lse, 0.0, causal, attn_mask=mask, scale=scale))
        # Every strip adds to the gradients of the keys it sees: in 16 bits each addition would round.
        work = accumulate_dtype(q.dtype)
        dqs: list[Tensor] = []
        dk, dv = torch.zeros_like(k, dtype=work), torch.zeros_like(v, dtype=work)
        for queries, keys, causal, mask in calls:
            inputs = (
                dout[:, :, queries],
                q[:, :, queries],
                k[:, :, keys],
                v[:, :, keys],
                out[:, :, queries],
                saved.lse[:, :, queries],
            )
            dq_strip, dk_strip, dv_strip = op(*inputs, 0.0, causal, attn_mask=mask, scale=scale)
            dqs.append(dq_strip)
            dk[:, :, keys] += dk_strip
            dv[:, :, keys] += dv_strip
        return _back(torch.cat(dqs, 2), dk.to(k.dtype), dv.to(v.dtype))


def _back(dq: Tensor, dk: Tensor, dv: Tensor) -> Gradients:
    """(B, H, S, D), as the op has it, to (B, S, H, D)."""
    return dq.transpose(1, 2).contiguous(), dk.transpose(1, 2).contiguous(), dv.transpose(1, 2).contiguous()


class _Call(NamedTuple):
    """One call of the op: on some queries and keys, top-left causal or under an additive mask."""

    queries: slice
    keys: slice
    is_causal: bool
    mask: Tensor | None


def _calls(q: Tensor, k: Tensor, window: tuple[int, int]) -> list[_Call]:
    """List the calls of the op that together make a block."""
    q_length, k_length = q.shape[2], k.shape[2]
    assert q_length and k_length, "the op dies on a block without queries or keys: plans have none"
    # The op aligns its causal mask top-left, which is bottom-right only where the block is square. It gives a query whose keys are
    # all masked lse 0 and not -inf, so no block may have one: plans make none.
    if window == (-1, -1) or (window == (-1, 0) and q_length == k_length):
        return [_Call(slice(0, q_length), slice(0, k_length), window == (-1, 0), None)]
    calls: list[_Call] = []
    for strip in strips((q_length, k_length), window, _STRIP):
        seen = band_mask(strip, k_length - q_length, window, q.device)
        mask = torch.zeros(seen.shape, dtype=q.dtype).masked_fill_(~seen, -math.inf)[None, None]
        queries, keys = (slice(side.start, side.stop) for side in strip)
        calls.append(_Call(queries, keys, False, mask))
    return calls
