"""The merge of two attention outputs as one Triton kernel: each element is read and written once.

Imported on first use on a GPU, since it needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice


def fused_merge_(out_BSHD: Tensor, lse_BHS: Tensor, block_BSHD: Tensor, block_lse_BHS: Tensor) -> None:
    """As `merge.merge_`: merge a block's out and lse in place, last dims contiguous, float32 arithmetic."""
    batch, rows, heads, dim = out_BSHD.shape
    total = batch * rows * heads
    if not total:
        return
    tile = 16
    _merge[(triton.cdiv(total, tile),)](
        out_BSHD,
        lse_BHS,
        block_BSHD,
        block_lse_BHS,
        total,
        rows,
        heads,
        *out_BSHD.stride()[:3],
        *lse_BHS.stride(),
        *block_BSHD.stride()[:3],
        *block_lse_BHS.stride(),
        DIM=dim,
        WIDTH=triton.next_power_of_2(dim),
        TILE=tile,
    )


@triton.jit
def _merge(
    out,
    lse,
    block,
    block_lse,
    total,
    rows,
    heads,
    out_b,
    out_s,
    out_h,
    lse_b,
    lse_h,
    lse_s,
    block_b,
    block_s,
    block_h,
    block_lse_b,
    block_lse_h,
    block_lse_s,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    valid = row < total
    h = row % heads
    s = row // heads % rows
    b = row // heads // rows
    at = lse + b * lse_b + h * lse_h + s * lse_s
    old = tl.load(at, valid, float("-inf"))
    new = tl.load(block_lse + b * block_lse_b + h * block_lse_h + s * block_lse_s, valid, float("-inf"))
    top = tl.maximum(old, new)
    some = top > float("-inf")
    top = tl.where(some, top, 0.0)
    weight_old = libdevice.exp(old - top)  # to the last bit but one, which the approximation of tl.exp is not
    weight_new = libdevice.exp(new - top)
    both = tl.where(some, weight_old + weight_new, 1.0)
    share = weight_new / both
    d = tl.arange(0, WIDTH)
    mask = valid[:, None] & (d < DIM)[None, :]
    place = out + (b * out_b + s * out_s + h * out_h)[:, None] + d[None, :]
    x = tl.load(place, mask, 0.0).to(tl.float32)
    y = tl.load(block + (b * block_b + s * block_s + h * block_h)[:, None] + d[None, :], mask, 0.0).to(tl.float32)
    tl.store(place, (x + share[:, None] * (y - x)).to(out.dtype.element_ty), mask)
    total_lse = top + libdevice.log1p(tl.minimum(weight_old, weight_new))
    tl.store(at, tl.where(some, total_lse, float("-inf")), valid)
