"""The merge of attention outputs as one Triton kernel: each element that changes is read and written once.

Imported on first use on a GPU, since it needs Triton.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from dtensor_ring.ops.executors.parts import MOST_OUTPUTS, OutputPart, Rests
from dtensor_ring.ops.launcher import Launcher


def fused_merge_(
    out_BSHD: Tensor, lse_BHS: Tensor, parts: Sequence[OutputPart], rests: Rests, sinks_H: Tensor | None
) -> Tensor | None:
    """As `merge.merge_`, for up to two parts, in float32 arithmetic."""
    batch, length, heads, dim = out_BSHD.shape
    rest, is_new = rests.kept, rests.needed and rests.kept is None
    if is_new:
        rest = torch.empty_like(out_BSHD)
    low, high = 0, length
    if sinks_H is None and not is_new:  # else no row stays as it was
        low, high = min(part.start for part in parts), max(part.stop for part in parts)
    rows = batch * (high - low) * heads
    if not rows:
        return rest if rests.needed else None
    # Where there is no such tensor the kernel is compiled without it, and any tensor will do.
    tensors = [out_BSHD, out_BSHD if rest is None else rest, lse_BHS, lse_BHS if sinks_H is None else sinks_H]
    numbers: list[int] = []
    for start, out, lse in parts:  # out is contiguous, and the queries of a head lie together in lse
        lse = lse if lse.stride(2) == 1 else lse.contiguous()
        tensors += [out.contiguous(), lse]
        numbers += [start, out.shape[1], *lse.stride()[:2]]
    for _ in range(MOST_OUTPUTS - len(parts)):
        tensors += [out_BSHD, lse_BHS]
        numbers += [0, 0, 0, 0]
    numbers += [rows, low, high - low, length, *lse_BHS.stride()[:2]]
    flags = rests.kept is not None, rests.needed, is_new, sinks_H is not None
    constants = heads, dim, 1 << (dim - 1).bit_length(), _TILE, len(parts), *flags
    _launch((-(-rows // _TILE), 1, 1), tensors, numbers, constants)
    return rest if rests.needed else None


_TILE = 16  # rows of one program


# Not specialized: whether a number is a multiple of 16 would be another compiled kernel for each kind of documents.
_NUMBERS = ["a_start", "a_count", "a_lse_b", "a_lse_h", "b_start", "b_count", "b_lse_b", "b_lse_h"]
_NUMBERS += ["rows", "low", "count", "length", "lse_b", "lse_h"]


@triton.jit(do_not_specialize=_NUMBERS)
def _merge(
    out,
    rest,
    lse,
    sinks,
    a,
    a_lse,
    b,
    b_lse,
    a_start,
    a_count,
    a_lse_b,
    a_lse_h,
    b_start,
    b_count,
    b_lse_b,
    b_lse_h,
    rows,
    low,
    count,
    length,
    lse_b,
    lse_h,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
    READ_REST: tl.constexpr,
    WRITE_REST: tl.constexpr,
    NEW_REST: tl.constexpr,
    SINKS: tl.constexpr,
):
    # int64, since places in a tensor of 4 GiB pass 2**31.
    number = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    valid = number < rows
    # Heads fastest, as out lies in memory: what a tile reads and writes is one stretch of memory.
    h = number % HEADS
    s = low + number // HEADS % count
    row = number // HEADS // count
    lse_at = lse + row * lse_b + h * lse_h + s
    old = tl.load(lse_at, valid, float("-inf"))
    top = old
    a_new = old
    b_new = old
    sink = old
    if PARTS > 0:
        a_has = valid & (s >= a_start) & (s < a_start + a_count)
        a_new = tl.load(a_lse + row * a_lse_b + h * a_lse_h + (s - a_start), a_has, float("-inf"))
        top = tl.maximum(top, a_new)
    if PARTS > 1:
        b_has = valid & (s >= b_start) & (s < b_start + b_count)
        b_new = tl.load(b_lse + row * b_lse_b + h * b_lse_h + (s - b_start), b_has, float("-inf"))
        top = tl.maximum(top, b_new)
    if SINKS:
        sink = tl.load(sinks + h, valid, float("-inf")).to(tl.float32)
        top = tl.maximum(top, sink)
    some = top > float("-inf")
    top = tl.where(some, top, 0.0)  # where all are -inf, so that the differences below are -inf and not NaN
    largest = libdevice.exp(old - top)  # to the last bit but one, which the approximation of tl.exp is not
    weight = largest
    others = tl.zeros_like(largest)
    changes = tl.zeros_like(largest) > 0

    # The largest weight is exactly 1. `log1p` of the sum of the others keeps the digits that adding it to 1 would lose.
    a_weight = largest
    b_weight = largest
    # NaN is something new too: `minimum` and `maximum` would leave it out, and a row that went wrong would look right.
    if PARTS > 0:
        a_weight = libdevice.exp(a_new - top)
        others += tl.where(a_new != a_new, a_new, tl.minimum(largest, a_weight))
        largest = tl.maximum(largest, a_weight)
        changes = changes | (a_new != float("-inf"))
    if PARTS > 1:
        b_weight = libdevice.exp(b_new - top)
        others += tl.where(b_new != b_new, b_new, tl.minimum(largest, b_weight))
        largest = tl.maximum(largest, b_weight)
        changes = changes | (b_new != float("-inf"))
    if SINKS:
        sink_weight = libdevice.exp(sink - top)
        others += tl.where(sink != sink, sink, tl.minimum(largest, sink_weight))
        changes = changes | (sink != float("-inf"))
    # Rows that see nothing new are neither read nor written. A sum of weights of 0 is taken as 1, for shares of 0 and not 0 / 0.
    changes = changes & valid
    both = tl.where(some, 1.0 + others, 1.0 + 0.0 * others)
    d = tl.arange(0, WIDTH)
    inside = (d < DIM)[None, :]
    at = (((row * length + s) * HEADS + h) * DIM)[:, None] + d[None, :]
    mask = changes[:, None] & inside
    x = tl.load(out + at, mask, 0.0).to(tl.float32)
    if READ_REST:
        x += tl.load(rest + at, mask, 0.0).to(tl.float32)
    x *= (weight / both)[:, None]
    if PARTS > 0:
        a_at = (((row * a_count + s - a_start) * HEADS + h) * DIM)[:, None] + d[None, :]
        y = tl.load(a + a_at, (changes & (a_new != float("-inf")))[:, None] & inside, 0.0).to(tl.float32)
        x += (a_weight / both)[:, None] * y
    if PARTS > 1:
        b_at = (((row * b_count + s - b_start) * HEADS + h) * DIM)[:, None] + d[None, :]
        z = tl.load(b + b_at, (changes & (b_new != float("-inf")))[:, None] & inside, 0.0).to(tl.float32)
        x += (b_weight / both)[:, None] * z
    rounded = x.to(out.dtype.element_ty)
    tl.store(out + at, rounded, mask)
    if WRITE_REST:
        # A new rest is written for all rows: 0 where nothing was rounded.
        tl.store(rest + at, (x - rounded.to(tl.float32)).to(out.dtype.element_ty), (valid[:, None] & inside) if NEW_REST else mask)
    tl.store(lse_at, top + libdevice.log1p(others), changes)


_launch = Launcher(_merge)
