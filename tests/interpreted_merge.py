"""The fused merge under Triton's interpreter beside the portable one: `python interpreted_merge.py FILE some` saves what both make.

A process of its own, since Triton asks for the interpreter once, when it is first imported.
"""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import TensorHandle

from dtensor_ring.ops.executors import _merge_cuda
from dtensor_ring.ops.executors.merge import merge_
from dtensor_ring.ops.executors.parts import OutputPart, Rests

DTYPES = {"float32": (torch.float32,) * 2, "bfloat16": (torch.bfloat16,) * 2, "float16": (torch.float16,) * 2}
DTYPES["bfloat16 into float32"] = (torch.float32, torch.bfloat16)
# Batch, tokens, heads, head dim: tiles of 16 rows with and without a rest, head dims that are no power of two.
SHAPES = [(1, 17, 2, 80), (1, 16, 1, 64), (1, 1, 1, 1), (3, 7, 2, 24), (1, 5, 3, 128), (2, 0, 2, 8)]
WAYS = ("one", "two", "two of some", "new rest", "kept rest", "last rest", "sinks", "sinks alone", "NaN", "NaN sinks")
CASES = [
    (way, dtype, shape)
    for way in WAYS
    for dtype in DTYPES
    for shape in SHAPES
    if "rest" not in way or dtype in ("bfloat16", "float16")
]


def tried(part: str, cases, dtypes, shapes):
    """Every case, or some: each way with each shape, and with every second shape in each dtype."""
    return [each for each in cases if part == "every" or (list(dtypes).index(each[1]) + shapes.index(each[2])) % 2 == 0]


def on_cpu(function):
    """A function of libdevice, which is CUDA code, as the interpreter would have it."""
    return lambda x: tl.tensor(TensorHandle(function(x.handle.data), x.handle.dtype), x.type)


def inputs(way: str, dtypes: tuple[torch.dtype, torch.dtype], shape: tuple[int, int, int, int]):
    """Out, lse, the parts, what rests and sinks there are.

    Some rows have no keys in the first, the second, or both, others are decided by one of them.
    """
    batch, tokens, heads, _ = shape
    generator = torch.Generator().manual_seed(0)

    def block(dtype: torch.dtype, count: int, empty: slice) -> tuple[Tensor, Tensor]:
        out = torch.randn(batch, count, *shape[2:], generator=generator).to(dtype)
        # As a varlen call gives it: batch rows lie inside heads.
        lse = torch.randn(heads, batch, count, generator=generator).mul(3).transpose(0, 1)
        out[:, empty], lse[:, :, empty] = 0, -torch.inf
        return out, lse

    out, lse = block(dtypes[0], tokens, slice(0, 3))
    first, second = block(dtypes[1], tokens, slice(2, 6)), block(dtypes[1], tokens, slice(1, 3))
    lse[:, :, 6:7], first[1][:, :, 6:7] = -1e4, 1e4
    second[1][:, :, 7:8] = 300
    if way == "NaN":
        first[0][:, 4:5], first[1][:, :, 4:5], second[0][:, 5:6], second[1][:, :, 5:6] = (torch.nan,) * 4
    parts = [OutputPart(0, *first), OutputPart(0, *second)]
    if way == "two of some":  # they overlap, and neither reaches either end
        low, high = tokens // 4, tokens - tokens // 4
        cuts = [slice(low, high), slice(tokens // 2, high)]
        parts = [
            OutputPart(cut.start, part.out[:, cut].clone(), part.lse[:, :, cut]) for part, cut in zip(parts, cuts, strict=True)
        ]
    if way in ("one", "new rest"):
        parts = parts[:1]
    rest = torch.randn(shape, generator=generator).mul(1e-3).to(dtypes[0])
    rest[:, :3] = 0  # as that of an out of 0
    rests = Rests(rest if way in ("kept rest", "last rest") else None, way in ("new rest", "kept rest"))
    sinks = torch.randn(heads, generator=generator)
    sinks[:1] = torch.nan if way == "NaN sinks" else -torch.inf
    if way == "new rest":
        parts = [
            parts[0]._replace(start=tokens // 2, out=parts[0].out[:, tokens // 2 :].clone(), lse=parts[0].lse[:, :, tokens // 2 :])
        ]
    return out, lse, [] if way == "sinks alone" else parts, rests, sinks if "sinks" in way else None


def surrounded(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """`x` as a part of a tensor of NaN, two longer at each end of `dim`, and that tensor."""
    shape = list(x.shape)
    shape[dim] += 4
    around = torch.full(shape, torch.nan, dtype=x.dtype)
    part = around.narrow(dim, 2, x.shape[dim])
    part.copy_(x)
    return part, around


def results(way: str, dtype: str, shape: tuple[int, int, int, int]) -> dict[str, Tensor]:
    """Both merges' out, lse and rest, and whether what lies around the fused one's out and lse is as it was."""
    plain = inputs(way, DTYPES[dtype], shape)
    plain_rest = merge_(*plain)
    out, lse, parts, rests, sinks = inputs(way, DTYPES[dtype], shape)
    (lse, lse_around) = surrounded(lse, 2)
    # Out is contiguous: what lies around it is before and after its memory.
    around = torch.full((out.numel() + 8,), torch.nan, dtype=out.dtype)
    out = around[4:-4].view(shape).copy_(out)
    rest = _merge_cuda.fused_merge_(out, lse, parts, rests, sinks)
    outside = [bool(around[:4].isnan().all() and around[-4:].isnan().all())]
    outside.append(bool(lse_around.isnan().sum() == lse_around.numel() - lse.numel() + lse.isnan().sum()))
    return {
        "out": out,
        "lse": lse,
        "rest": rest,
        "plain out": plain[0],
        "plain lse": plain[1],
        "plain rest": plain_rest,
        "outside": torch.tensor(outside),
    }


if __name__ == "__main__":
    _merge_cuda.libdevice = SimpleNamespace(exp=on_cpu(np.exp), log1p=on_cpu(np.log1p))
    torch.save({each: results(*each) for each in tried(sys.argv[2], CASES, DTYPES, SHAPES)}, sys.argv[1])
