"""`math`: attention by matrix products, on any device and dtype, in strips of queries so that scores stay small.

Float64 is computed in float64, everything else in float32, and results come back in that dtype, unrounded. A dropout mask is a
hash of (seed, batch row, head, query position, key position): it does not depend on how a sequence is cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from dtensor_ring.ops.dtypes import accumulate_dtype
from dtensor_ring.ops.kernels.base import DenseKernel, KernelRequirements, Strip, band_mask, strips
from dtensor_ring.ops.kernels.block import Block, Gradients, PositionContext, Result, Saved

_SCORES_AT_ONCE = 1 << 24  # 64 MiB of float32; a strip holds a few tensors of that size


class MathKernel(DenseKernel):
    """The reference arithmetic, block by block; quadratic time, memory bounded by strips of scores."""

    name: ClassVar[str] = "math"

    @override
    def unavailable(self, need: KernelRequirements) -> str | None:
        """It runs everywhere."""
        return None

    @override
    def lacks(self, need: KernelRequirements) -> str | None:
        """It takes any floating-point input."""
        return None if need.dtype.is_floating_point else f"needs floating-point tensors, found {need.dtype}"

    @override
    def grad_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Gradients come in float64 for float64, and in float32 for all else."""
        return accumulate_dtype(dtype)

    @override
    def forward_dense(self, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, block: Block) -> Result:
        """Compute out and lse in float32, or in float64 for float64."""
        work = accumulate_dtype(q_BSHD.dtype)
        batch, q_length, heads, _ = q_BSHD.shape
        out = torch.empty((batch, q_length, heads, v_BSHD.shape[-1]), dtype=work, device=q_BSHD.device)
        lse = torch.empty((batch, heads, q_length), dtype=work, device=q_BSHD.device)
        for queries, _, inputs, scores in _scored(q_BSHD, k_BSHD, v_BSHD, block):
            strip_lse = torch.logsumexp(scores.values, -1)
            count = queries.stop - queries.start
            out[:, queries] = _ungrouped(scores.dropped(scores.weights(strip_lse)) @ inputs.v, heads, count)
            lse[:, :, queries] = strip_lse.reshape(batch, heads, count)
        return Result(out, lse)

    @override
    def backward_dense(self, saved: Saved, dout_BSHD: Tensor, block: Block) -> Gradients:
        """dq, dk, dv in float32 (float64 for float64); delta = sum(dout * out) is that of the whole attention."""
        q_BSHD, k_BSHD, v_BSHD, out_BSHD, lse_BHS = saved
        work = accumulate_dtype(q_BSHD.dtype)
        batch, _, heads, _ = q_BSHD.shape
        kv_heads = k_BSHD.shape[2]
        dq = torch.empty(q_BSHD.shape, dtype=work, device=q_BSHD.device)
        dk, dv = (torch.zeros(x.transpose(1, 2).shape, dtype=work, device=x.device) for x in (k_BSHD, v_BSHD))
        for queries, keys, (q, k, v), scores in _scored(q_BSHD, k_BSHD, v_BSHD, block):
            dout, out = (_grouped(x[:, queries], kv_heads, work) for x in (dout_BSHD, out_BSHD))
            p = scores.weights(lse_BHS[:, :, queries].to(work).reshape(batch, kv_heads, -1))
            # The sum over all keys of p * dp, which no single block has: by the out of the whole attention it is dout . out. With
            # dropout too, since out is what dropout left.
            delta = (dout * out).sum(-1, keepdim=True)
            ds = p * (scores.dropped(dout @ v.transpose(-1, -2)) - delta) * block.softmax.scale
            # With a softcap: `ds` is the gradient of the capped scores so far.
            ds = ds if scores.slope is None else ds * scores.slope
            dq[:, queries] = _ungrouped(ds @ k, heads, queries.stop - queries.start)
            dk[:, :, keys] += ds.transpose(-1, -2) @ q
            dv[:, :, keys] += scores.dropped(p).transpose(-1, -2) @ dout
        return dq, dk.transpose(1, 2).contiguous(), dv.transpose(1, 2).contiguous()


class _Inputs(NamedTuple):
    """A strip's q (B, Hk, G * queries, D), and k and v (B, Hk, keys, D and Dv), in the dtype that is computed in."""

    q: Tensor
    k: Tensor
    v: Tensor


class _Scores(NamedTuple):
    """Masked scores (B, Hk, G * queries, keys).

    With a softcap `slope` is the derivative of the capped scores by the uncapped ones, with dropout `kept` is what is left of each
    weight: 0, or 1 / (1 - p).
    """

    values: Tensor
    slope: Tensor | None
    kept: Tensor | None

    def weights(self, lse: Tensor) -> Tensor:
        """The softmax, given the lse (B, Hk, G * queries); 0 for queries that see nothing, whose lse is -inf."""
        # A query that sees nothing has scores and lse -inf, whose difference is NaN; with 0 for the lse its weights are 0.
        return torch.exp(self.values - lse.nan_to_num(neginf=0.0)[..., None])

    def dropped(self, p: Tensor) -> Tensor:
        """Apply dropout to weights, or to their gradients."""
        return p if self.kept is None else p * self.kept


def _scored(q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, block: Block) -> Iterator[tuple[slice, slice, _Inputs, _Scores]]:
    """Strip by strip: which queries and keys it has, the inputs of the matrix products, and the scores."""
    work = accumulate_dtype(q_BSHD.dtype)
    batch, q_length, heads, _ = q_BSHD.shape
    k_length, kv_heads = k_BSHD.shape[1:3]
    if not q_BSHD.shape[:3].numel():  # not of all four dims: queries of head dim 0 have scores, all of them 0
        return
    height = max(1, _SCORES_AT_ONCE // max(1, batch * heads * k_length))
    for strip in strips((q_length, k_length), block.window, height):
        queries, keys = (slice(side.start, side.stop) for side in strip)
        # Converted strip by strip, so that of a long block only the keys that a strip sees exist in the wider dtype.
        k, v = (x[:, keys].to(work).transpose(1, 2) for x in (k_BSHD, v_BSHD))
        inputs = _Inputs(_grouped(q_BSHD[:, queries], kv_heads, work), k, v)
        yield queries, keys, inputs, _scores(inputs, strip, k_length - q_length, block)


def _scores(inputs: _Inputs, strip: Strip, offset: int, block: Block) -> _Scores:
    """The scores of a strip; `offset` is Sk - Sq of the block. Order matters: the cap bounds q.k alone, ALiBi comes after it."""
    q, k, _ = inputs
    softmax, groups = block.softmax, q.shape[2] // len(strip.queries)
    values, slope, kept = q @ k.transpose(-1, -2) * softmax.scale, None, None
    if softmax.softcap:
        capped = torch.tanh(values / softmax.softcap)
        values, slope = softmax.softcap * capped, 1 - capped * capped
    if block.positions is not None:
        queries, keys = (slice(side.start, side.stop) for side in strip)
        part = block.positions.part(queries, keys)
        if part.alibi is not None:
            values = values - _alibi(part, k.shape[1], values.dtype)
        if softmax.dropout_p:
            heads = k.shape[1] * groups
            row, head = part.origin[0] + part.batch, part.origin[1]
            places = range(row, row + q.shape[0]), range(head, head + heads), *part.positions
            # Batch row and head count in the whole batch, not in this rank's part of it: data and tensor parallel ranks then draw
            # what one device would.
            mask = keep_mask(part.seed, *places, softmax.dropout_p)
            kept = mask.reshape(values.shape).to(values.dtype) / (1 - softmax.dropout_p)
    if block.window != (-1, -1):
        # The heads of a group lie one after another along the queries, and the mask is the same for each.
        mask = band_mask(strip, offset, block.window, q.device).repeat(groups, 1)
        values = values.masked_fill(~mask, -math.inf)
    return _Scores(values, slope, kept)


def _alibi(part: PositionContext, kv_heads: int, work: torch.dtype) -> Tensor:
    """What scores lose with distance: (B or 1, Hk, G * queries, keys)."""
    assert part.alibi is not None, "called where there are slopes"
    q_positions, k_positions = part.positions
    distance = (q_positions[:, None] - k_positions).abs()
    slopes = part.alibi if part.alibi.dim() == 2 else part.alibi[None]
    bias = slopes.to(work).reshape(slopes.shape[0], kv_heads, -1, 1, 1) * distance
    return bias.flatten(2, 3)


def keep_mask(seed: int, rows: range, heads: range, q_positions: Tensor, k_positions: Tensor, dropout_p: float) -> Tensor:
    """Bool (batch rows, heads, Sq, Sk): which weights dropout keeps.

    It is a hash (splitmix64, Steele et al. 2014) of where each weight is in the whole attention, so that any cut of it into blocks,
    on any number of ranks, drops the same ones.
    """
    device = q_positions.device
    b = torch.arange(rows.start, rows.stop, device=device).view(-1, 1, 1, 1)
    h = torch.arange(heads.start, heads.stop, device=device).view(-1, 1, 1)
    lines = _mixed(_mixed(_mixed(b + seed) + h) + q_positions[:, None])
    return (_mixed(lines + k_positions) >> 11 & (1 << 53) - 1) >= int(dropout_p * (1 << 53))


def _mixed(x: Tensor) -> Tensor:
    """The output function of splitmix64 on int64, whose products wrap around."""
    # A shift to the right copies the sign bit of an int64: the masks make it the logical shift that the constants are meant for.
    x = x * -7046029254386353131  # 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ (x >> 31 & (1 << 33) - 1)


def _grouped(x_BSHD: Tensor, kv_heads: int, work: torch.dtype) -> Tensor:
    """(B, S, H, D) to (B, Hk, G * S, D): the query heads of one key head side by side, so that keys are never repeated."""
    batch, length, heads, dim = x_BSHD.shape
    return x_BSHD.to(work).transpose(1, 2).reshape(batch, kv_heads, heads // kv_heads * length, dim)


def _ungrouped(x: Tensor, heads: int, length: int) -> Tensor:
    return x.reshape(x.shape[0], heads, length, x.shape[-1]).transpose(1, 2)
