"""`math`: attention by matrix products, on any device and dtype, in strips of rows so that scores stay small.

Float64 is computed in float64, everything else in float32, and results come back in that dtype, unrounded. A dropout mask is a
hash of (seed, batch row, head, query position, key position): it does not depend on how a sequence is cut.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from dtensor_ring.ops.dtypes import accumulate_dtype
from dtensor_ring.ops.kernels.base import Kernel, KernelRequirements, PositionContext, Result, SoftmaxParams, band_mask, row_blocks

_SCORES_AT_ONCE = 1 << 24


class MathKernel(Kernel):
    """The reference arithmetic, block by block; quadratic time, memory bounded by strips of scores."""

    name: ClassVar[str] = "math"

    @override
    def unavailable(self, need: KernelRequirements) -> str | None:
        """Runs everywhere."""
        return None

    @override
    def lacks(self, need: KernelRequirements) -> str | None:
        """Takes any floating-point input."""
        return None if need.dtype.is_floating_point else f"needs floating-point tensors, found {need.dtype}"

    @override
    def grad_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Float64 for float64, else float32."""
        return accumulate_dtype(dtype)

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
        """Out and lse in float32 (float64 for float64)."""
        work = self.grad_dtype(q_BSHD.dtype)
        batch, q_rows, heads, _ = q_BSHD.shape
        out = torch.empty((batch, q_rows, heads, v_BSHD.shape[-1]), dtype=work, device=q_BSHD.device)
        lse = torch.empty((batch, heads, q_rows), dtype=work, device=q_BSHD.device)
        for rows, columns in _strips(q_BSHD, k_BSHD, window):
            r, c = _slice(rows), _slice(columns)
            q, k, v = _grouped(q_BSHD[:, r], k_BSHD.shape[2], work), _heads(k_BSHD[:, c], work), _heads(v_BSHD[:, c], work)
            strip = _Strip.of(q, k, rows, columns, k_BSHD.shape[1] - q_rows, window, options, extras)
            strip_lse = torch.logsumexp(strip.scores, -1)
            p = torch.exp(strip.scores - strip_lse.nan_to_num(neginf=0.0)[..., None])
            out[:, r] = _ungrouped(strip.dropped(p) @ v, heads, len(rows))
            lse[:, :, r] = strip_lse.reshape(batch, heads, len(rows))
        return Result(out, lse)

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
        """dq, dk, dv in float32 (float64 for float64); delta = sum(dout * out) is that of the whole attention."""
        work = self.grad_dtype(q_BSHD.dtype)
        batch, q_rows, heads, _ = q_BSHD.shape
        kv_heads = k_BSHD.shape[2]
        dq = torch.empty(q_BSHD.shape, dtype=work, device=q_BSHD.device)
        dk, dv = (torch.zeros(x.transpose(1, 2).shape, dtype=work, device=x.device) for x in (k_BSHD, v_BSHD))
        for rows, columns in _strips(q_BSHD, k_BSHD, window):
            r, c = _slice(rows), _slice(columns)
            q, dout, out = (_grouped(x[:, r], kv_heads, work) for x in (q_BSHD, dout_BSHD, out_BSHD))
            k, v = _heads(k_BSHD[:, c], work), _heads(v_BSHD[:, c], work)
            strip = _Strip.of(q, k, rows, columns, k_BSHD.shape[1] - q_rows, window, options, extras)
            strip_lse = lse_BHS[:, :, r].to(work).reshape(batch, kv_heads, -1)
            p = torch.exp(strip.scores - strip_lse.nan_to_num(neginf=0.0)[..., None])
            delta = (dout * out).sum(-1, keepdim=True)
            ds = p * (strip.dropped(dout @ v.transpose(-1, -2)) - delta) * options.scale
            ds = ds if strip.slope is None else ds * strip.slope
            dq[:, r] = _ungrouped(ds @ k, heads, len(rows))
            dk[:, :, c] += ds.transpose(-1, -2) @ q
            dv[:, :, c] += strip.dropped(p).transpose(-1, -2) @ dout
        return dq, dk.transpose(1, 2).contiguous(), dv.transpose(1, 2).contiguous()


@dataclass(frozen=True, slots=True)
class _Strip:
    """Masked scores (B, Hk, G * rows, columns); with a softcap their slope against the uncapped ones; with dropout what is kept."""

    scores: Tensor
    slope: Tensor | None
    kept: Tensor | None

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        rows: range,
        columns: range,
        offset: int,
        window: tuple[int, int],
        options: SoftmaxParams,
        extras: PositionContext | None,
    ) -> _Strip:
        scores, slope, kept = q @ k.transpose(-1, -2) * options.scale, None, None
        groups = q.shape[2] // len(rows)
        if options.softcap:
            capped = torch.tanh(scores / options.softcap)
            scores, slope = options.softcap * capped, 1 - capped * capped
        if extras is not None:
            part = extras.part(_slice(rows), _slice(columns))
            if part.alibi is not None:
                scores = scores - _alibi(part, k.shape[1], scores.dtype)
            if options.dropout_p:
                heads = k.shape[1] * groups
                row, head = part.origin[0] + part.batch, part.origin[1]
                places = range(row, row + q.shape[0]), range(head, head + heads), *part.positions
                mask = keep_mask(part.seed, *places, options.dropout_p)
                kept = mask.reshape(scores.shape).to(scores.dtype) / (1 - options.dropout_p)
        if window != (-1, -1):
            mask = band_mask(rows, columns, offset, window, q.device).repeat(groups, 1)
            scores = scores.masked_fill(~mask, -math.inf)
        return cls(scores, slope, kept)

    def dropped(self, p: Tensor) -> Tensor:
        """Weights, or their gradients, after dropout."""
        return p if self.kept is None else p * self.kept


def _alibi(part: PositionContext, kv_heads: int, work: torch.dtype) -> Tensor:
    """What scores lose with distance: (B or 1, Hk, G * rows, columns)."""
    assert part.alibi is not None, "called where there are slopes"
    q_positions, k_positions = part.positions
    distance = (q_positions[:, None] - k_positions).abs()
    slopes = part.alibi if part.alibi.dim() == 2 else part.alibi[None]
    bias = slopes.to(work).reshape(slopes.shape[0], kv_heads, -1, 1, 1) * distance
    return bias.flatten(2, 3)


def keep_mask(seed: int, rows: range, heads: range, q_positions: Tensor, k_positions: Tensor, dropout_p: float) -> Tensor:
    """Bool (rows, heads, Sq, Sk): which weights dropout keeps; a hash (splitmix64, Steele et al. 2014) of where each one is."""
    device = q_positions.device
    b = torch.arange(rows.start, rows.stop, device=device).view(-1, 1, 1, 1)
    h = torch.arange(heads.start, heads.stop, device=device).view(-1, 1, 1)
    lines = _mixed(_mixed(_mixed(b + seed) + h) + q_positions[:, None])
    return (_mixed(lines + k_positions) >> 11 & (1 << 53) - 1) >= int(dropout_p * (1 << 53))


def _mixed(x: Tensor) -> Tensor:
    """The output function of splitmix64 on int64, whose products wrap around."""
    x = x * -7046029254386353131  # 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ (x >> 31 & (1 << 33) - 1)


def _strips(q_BSHD: Tensor, k_BSHD: Tensor, window: tuple[int, int]) -> list[tuple[range, range]]:
    batch, q_rows, heads, _ = q_BSHD.shape
    if not q_BSHD.numel():
        return []
    height = max(1, _SCORES_AT_ONCE // max(1, batch * heads * k_BSHD.shape[1]))
    return row_blocks(q_rows, k_BSHD.shape[1], window, height)


def _slice(indices: range) -> slice:
    return slice(indices.start, indices.stop)


def _grouped(x_BSHD: Tensor, kv_heads: int, work: torch.dtype) -> Tensor:
    """(B, S, H, D) to (B, Hk, G * S, D): the query heads of one key head side by side, so that keys are never repeated."""
    batch, rows, heads, dim = x_BSHD.shape
    return x_BSHD.to(work).transpose(1, 2).reshape(batch, kv_heads, heads // kv_heads * rows, dim)


def _ungrouped(x: Tensor, heads: int, rows: int) -> Tensor:
    return x.reshape(x.shape[0], heads, rows, x.shape[-1]).transpose(1, 2)


def _heads(x_BSHD: Tensor, work: torch.dtype) -> Tensor:
    return x_BSHD.to(work).transpose(1, 2)
