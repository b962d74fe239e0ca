"""The sum of gradients as one Triton kernel, for one tensor or for two (dK and dV): each element is read and written once.

Imported on first use on a GPU, since it needs Triton.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from dtensor_ring.ops.executors.parts import MOST_GRADIENTS, GradPart, Indexed, Tensors
from dtensor_ring.ops.launcher import Launcher


def fused_add_up(
    sums: Tensors, total: Tensors | None, parts: Sequence[GradPart], indexed: Indexed | None, tokens: tuple[int, int]
) -> None:
    """As `gradients.add_up`, of tokens [low, high), in float32 arithmetic."""
    low, high = tokens
    batch, length = sums[0].shape[:2]
    widths = [x.shape[2] * x.shape[3] for x in sums]  # elements of a token
    columns = min(1 << (max(widths) - 1).bit_length(), _COLUMNS)
    if not batch * (high - low) * max(widths):
        return
    ranges: list[int] = []
    for i in range(MOST_GRADIENTS):
        ranges += [parts[i].start, parts[i].stop] if i < len(parts) else [0, 0]
    # Where there is no such tensor the kernel is compiled without it, and any tensor will do.
    index, offsets, reach, bounds = sums[0], sums[0], (0, 0), (0, 0)
    if indexed is not None:
        narrow = 0 if indexed.narrow is None else len(indexed.narrow[0])
        index, bounds = indexed.index, (indexed.low, indexed.high)
        offsets = index if indexed.offsets is None else indexed.offsets
        reach = len(indexed.wide[0]), len(indexed.wide[0]) + narrow
    of_tensors = [_argued(i, sums, total, parts, indexed) for i in range(len(sums))]
    tensors = *of_tensors[0], *of_tensors[-1], index, offsets
    numbers = low, high - low, length, *ranges, *bounds, *reach
    how_indexed = 0 if indexed is None else 1 if indexed.offsets is None else 2
    has_narrow = indexed is not None and indexed.narrow is not None
    constants = widths[0], widths[-1], columns, total is not None, len(parts), how_indexed, has_narrow, len(sums)
    _launch((batch * (high - low), -(-max(widths) // columns), len(sums)), tensors, numbers, constants)


_COLUMNS = 4096  # elements of one program


def _argued(i: int, sums: Tensors, total: Tensors | None, parts: Sequence[GradPart], indexed: Indexed | None) -> list[Tensor]:
    """The tensors that add up to the sum of number `i`, contiguous: total, parts, what is found by index."""
    any_other = sums[i]
    found = [any_other if total is None else total[i]]
    found += [parts[j].tensors[i].contiguous() if j < len(parts) else any_other for j in range(MOST_GRADIENTS)]
    wide, narrow = (None, None) if indexed is None else (indexed.wide, indexed.narrow)
    return [any_other, *found, *(any_other if buffers is None else buffers[i] for buffers in (wide, narrow))]


# Not specialized: whether a number is a multiple of 16 would be another compiled kernel for each kind of documents.
_NUMBERS = ["low", "count", "length", "a_start", "a_stop", "b_start", "b_stop", "c_start", "c_stop"]
_NUMBERS += ["index_low", "index_high", "split", "end"]


@triton.jit(do_not_specialize=_NUMBERS)
def _add_up(
    k_sum,
    k_total,
    k_a,
    k_b,
    k_c,
    k_wide,
    k_narrow,
    v_sum,
    v_total,
    v_a,
    v_b,
    v_c,
    v_wide,
    v_narrow,
    index,
    offsets,
    low,
    count,
    length,
    a_start,
    a_stop,
    b_start,
    b_stop,
    c_start,
    c_stop,
    index_low,
    index_high,
    split,
    end,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOTAL: tl.constexpr,
    PARTS: tl.constexpr,
    INDEXED: tl.constexpr,
    NARROW: tl.constexpr,
    TENSORS: tl.constexpr,
):
    # int64, since places in a tensor of 4 GiB pass 2**31.
    number = tl.program_id(0).to(tl.int64)
    s = low + number % count
    row = number // count
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    # Which entries of the index are this token's.
    first = number * 0
    last = number * 0
    if INDEXED:  # noqa: SIM102  the first is known when the kernel is compiled, the second is not
        if (s >= index_low) & (s < index_high):
            first = row * (index_high - index_low) + s - index_low
            last = first + 1
            if INDEXED == 2:
                last = tl.load(offsets + last).to(tl.int64)
                first = tl.load(offsets + first).to(tl.int64)
    if tl.program_id(2) == 0:
        x = _parts(
            k_total, k_a, k_b, k_c, row, s, length, a_start, a_stop, b_start, b_stop, c_start, c_stop, column, FIRST, TOTAL, PARTS
        )
        if INDEXED:
            for i in range(first, last):
                x += _contribution(k_wide, k_narrow, tl.load(index + i).to(tl.int64), split, end, column, FIRST, NARROW)
        tl.store(k_sum + (row * length + s) * FIRST + column, x.to(k_sum.dtype.element_ty), column < FIRST)
    elif TENSORS == 2:
        x = _parts(
            v_total, v_a, v_b, v_c, row, s, length, a_start, a_stop, b_start, b_stop, c_start, c_stop, column, SECOND, TOTAL, PARTS
        )
        if INDEXED:
            for i in range(first, last):
                x += _contribution(v_wide, v_narrow, tl.load(index + i).to(tl.int64), split, end, column, SECOND, NARROW)
        tl.store(v_sum + (row * length + s) * SECOND + column, x.to(v_sum.dtype.element_ty), column < SECOND)


@triton.jit
def _parts(
    total,
    a,
    b,
    c,
    row,
    s,
    length,
    a_start,
    a_stop,
    b_start,
    b_stop,
    c_start,
    c_stop,
    column,
    WIDTH: tl.constexpr,
    TOTAL: tl.constexpr,
    PARTS: tl.constexpr,
):
    """What total and parts have for one token."""
    x = tl.zeros_like(column).to(tl.float32)
    if TOTAL:
        x += tl.load(total + (row * length + s) * WIDTH + column, column < WIDTH, 0.0).to(tl.float32)
    if PARTS > 0:
        x += _of_part(a, row, s, a_start, a_stop, column, WIDTH)
    if PARTS > 1:
        x += _of_part(b, row, s, b_start, b_stop, column, WIDTH)
    if PARTS > 2:
        x += _of_part(c, row, s, c_start, c_stop, column, WIDTH)
    return x


@triton.jit
def _of_part(part, row, s, start, stop, column, WIDTH: tl.constexpr):
    reach = tl.where((s >= start) & (s < stop), WIDTH, 0)
    return tl.load(part + (row * (stop - start) + s - start) * WIDTH + column, column < reach, 0.0).to(tl.float32)


@triton.jit
def _contribution(wide, narrow, place, split, end, column, WIDTH: tl.constexpr, NARROW: tl.constexpr):
    """What stands at a place of the buffers: those of `wide` are before `split`, and nothing from `end` on."""
    x = tl.load(wide + place * WIDTH + column, column < tl.where(place < split, WIDTH, 0), 0.0).to(tl.float32)
    if NARROW:
        reach = tl.where((place >= split) & (place < end), WIDTH, 0)
        x += tl.load(narrow + (place - split) * WIDTH + column, column < reach, 0.0).to(tl.float32)
    return x


_launch = Launcher(_add_up)
