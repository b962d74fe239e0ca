"""The fused sum of gradients under Triton's interpreter beside the portable one: `python interpreted_sum.py FILE some` saves both.

A process of its own, since Triton asks for the interpreter once, when it is first imported.
"""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
from interpreted_merge import tried
from torch import Tensor

from dtensor_ring.ops.executors import _sum_cuda
from dtensor_ring.ops.executors.gradients import add_up, changed_tokens
from dtensor_ring.ops.executors.parts import GradPart, Indexed

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Batch, tokens, heads, head dims of the tensors that are summed alike: one or two, narrower and wider than a program's columns.
SHAPES = [(1, 13, 2, (80, 48)), (1, 9, 1, (64, 64)), (2, 7, 1, (24,)), (1, 6, 20, (128, 8)), (1, 1, 1, (1,)), (2, 0, 2, (8,))]
WAYS = ("new", "into the first", "into the first from a total", "total", "by index", "by index of two dtypes", "one by index")
CASES = [(way, dtype, shape) for way in WAYS for dtype in DTYPES for shape in SHAPES]
LEFT, RIGHT = 2, 3  # tokens of NaN that lie around what is written


def case(way: str, dtype: torch.dtype, shape: tuple[int, int, int, tuple[int, ...]]):
    """Sums (of NaN where they are new), total, parts and indexed part, made of one seed."""
    batch, length, heads, dims = shape
    generator = torch.Generator().manual_seed(7)

    def random(count: int, of: torch.dtype = dtype) -> tuple[Tensor, ...]:
        return tuple(torch.randn(batch, count, heads, dim, generator=generator).to(of) for dim in dims)

    low, high = length // 3, length - length // 4
    parts = [GradPart(0, random(length)), GradPart(low, random(high - low), owned=False), GradPart(high, random(length - high))]
    total = random(length, torch.float32)
    new = tuple(torch.full((batch, length, heads, dim), torch.nan, dtype=dtype) for dim in dims)
    if way == "new":
        return new, None, parts[1:], None
    if way == "total":
        return total, total, parts[1:], None
    if way == "into the first":
        return parts[0].tensors, None, parts, None
    if way == "into the first from a total":
        return parts[0].tensors, total, parts[:2], None
    indexed = contributions(way, dims, batch * (high - low), heads, dtype, generator)
    return parts[0].tensors, None, parts[:1], indexed._replace(low=low, high=high)


def contributions(way: str, dims, tokens: int, heads: int, dtype: torch.dtype, generator: torch.Generator) -> Indexed:
    """Up to three contributions of each token, at random places of the buffers; or one, or none, past their end."""
    counts = torch.randint(0, 4, (tokens,), generator=generator)
    if way == "one by index":
        counts = torch.ones(tokens, dtype=torch.int64)
    index = torch.randperm(int(counts.sum()), generator=generator).to(torch.int32)
    if way == "one by index":
        index[::3] = len(index)
    offsets = None if way == "one by index" else torch.cat([torch.zeros(1), counts.cumsum(0)]).to(torch.int32)
    of_first = len(index) // 2 if way == "by index of two dtypes" else len(index)
    first = torch.float32 if way == "by index of two dtypes" else dtype
    wide = tuple(torch.randn(of_first, heads, dim, generator=generator).to(first) for dim in dims)
    narrow = tuple(torch.randn(len(index) - of_first, heads, dim, generator=generator).to(dtype) for dim in dims)
    return Indexed(0, 0, index, offsets, wide, narrow if way == "by index of two dtypes" else None)


def surrounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` in the middle of a longer stretch of memory that is NaN, and that."""
    around = torch.full((LEFT + x.numel() + RIGHT,), torch.nan, dtype=x.dtype)
    part = around[LEFT : LEFT + x.numel()].view(x.shape)
    part.copy_(x)
    return part, around


def results(way: str, dtype: str, shape) -> dict[str, object]:
    """Both sums, and whether what lies around the fused one's tensors is as it was."""
    plain = case(way, DTYPES[dtype], shape)
    add_up(*plain)
    sums, total, parts, indexed = case(way, DTYPES[dtype], shape)
    placed = [surrounded(x) for x in sums]
    mine = tuple(part for part, _ in placed)
    total = mine if total is sums else total
    parts = [part._replace(tensors=mine) if part.tensors is sums else part for part in parts]
    _sum_cuda.fused_add_up(mine, total, parts, indexed, changed_tokens(mine, total, parts, indexed))
    outside = [bool(around[:LEFT].isnan().all() and around[len(around) - RIGHT :].isnan().all()) for _, around in placed]
    return {"fused": mine, "plain": plain[0], "outside": outside}


if __name__ == "__main__":
    torch.save({each: results(*each) for each in tried(sys.argv[2], CASES, DTYPES, SHAPES)}, sys.argv[1])
