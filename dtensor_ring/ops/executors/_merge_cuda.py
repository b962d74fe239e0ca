"""The merge of two attention outputs as one Triton kernel: each element is read and written once.

Imported on first use on a GPU, since it needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice


def fused_merge_(out_BSHD: Tensor, lse_BHS: Tensor, block_BSHD: Tensor, block_lse_BHS: Tensor) -> None:
    """Merge a block's out and lse in place, in float32 arithmetic, as `merge.merge_` does; last dims must be contiguous."""
    batch, length, heads, dim = out_BSHD.shape
    total = batch * length * heads
    if not total:
        return
    tile = 16
    _merge[(triton.cdiv(total, tile),)](
        out_BSHD,
        lse_BHS,
        block_BSHD,
        block_lse_BHS,
        total,
        length,
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
    length,
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
    # int64, since places in a tensor of 4 GiB pass 2**31.
    number = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    valid = number < total
    # Heads fastest, as out lies in memory: what a tile reads and writes is one stretch of memory.
    h = number % heads
    s = number // heads % length
    b = number // heads // length
    at = lse + b * lse_b + h * lse_h + s * lse_s
    old = tl.load(at, valid, float("-inf"))
    new = tl.load(block_lse + b * block_lse_b + h * block_lse_h + s * block_lse_s, valid, float("-inf"))
    top = tl.maximum(old, new)
    some = top > float("-inf")
    top = tl.where(some, top, 0.0)  # where both are -inf, so that the differences below are -inf and not NaN
    weight_old = libdevice.exp(old - top)  # to the last bit but one, which the approximation of tl.exp is not
    weight_new = libdevice.exp(new - top)
    # With keys in neither both weights are 0: the sum is taken as 1, so that the block's share is 0 and not 0 / 0.
    both = tl.where(some, weight_old + weight_new, 1.0)
    share = weight_new / both
    d = tl.arange(0, WIDTH)
    mask = valid[:, None] & (d < DIM)[None, :]
    place = out + (b * out_b + s * out_s + h * out_h)[:, None] + d[None, :]
    x = tl.load(place, mask, 0.0).to(tl.float32)
    y = tl.load(block + (b * block_b + s * block_s + h * block_h)[:, None] + d[None, :], mask, 0.0).to(tl.float32)
    tl.store(place, (x + share[:, None] * (y - x)).to(out.dtype.element_ty), mask)
    # The larger weight is exactly 1. `log1p` of the smaller keeps the digits that adding it to 1 would lose.
    total_lse = top + libdevice.log1p(tl.minimum(weight_old, weight_new))
    tl.store(at, tl.where(some, total_lse, float("-inf")), valid)
