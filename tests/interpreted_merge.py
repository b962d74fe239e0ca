"""The fused merge under Triton's interpreter beside the portable one: `python interpreted_merge.py FILE` saves what both make.

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

DTYPES = {"float32": (torch.float32,) * 2, "bfloat16": (torch.bfloat16,) * 2, "float16": (torch.float16,) * 2}
DTYPES["bfloat16 into float32"] = (torch.float32, torch.bfloat16)
# Batch, tokens, heads, head dim: tiles of 16 rows with and without a rest, head dims that are no power of two.
SHAPES = [(2, 37, 5, 80), (1, 16, 1, 64), (1, 1, 1, 1), (3, 7, 2, 24), (1, 5, 3, 128), (2, 0, 2, 8)]
CASES = [(dtype, shape) for dtype in DTYPES for shape in SHAPES]


def on_cpu(function):
    """A function of libdevice, which is CUDA code, as the interpreter would have it."""
    return lambda x: tl.tensor(TensorHandle(function(x.handle.data), x.handle.dtype), x.type)


def inputs(dtypes: tuple[torch.dtype, torch.dtype], shape: tuple[int, int, int, int]) -> list[Tensor]:
    """out, lse, block, block_lse; some rows have no keys in the first, the second, or both, others are decided by one of them."""
    batch, tokens, heads, _ = shape
    generator = torch.Generator().manual_seed(0)
    out, block = (torch.randn(shape, generator=generator).to(dtype) for dtype in dtypes)
    lse, block_lse = (torch.randn(batch, heads, tokens, generator=generator) * 3 for _ in range(2))
    for rows, x, x_lse in ((slice(0, 3), out, lse), (slice(2, 6), block, block_lse)):
        x[:, rows], x_lse[:, :, rows] = 0, -torch.inf
    lse[:, :, 6:7], block_lse[:, :, 6:7] = -1e4, 1e4
    return [out, lse, block, block_lse]


def surrounded(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """`x` as a part of a tensor of NaN, two longer at each end of `dim`, and that tensor."""
    shape = list(x.shape)
    shape[dim] += 4
    around = torch.full(shape, torch.nan, dtype=x.dtype)
    part = around.narrow(dim, 2, x.shape[dim])
    part.copy_(x)
    return part, around


def results(dtype: str, shape: tuple[int, int, int, int]) -> dict[str, Tensor]:
    """Both merges' out and lse, and whether what lies around the fused one's tensors is as it was."""
    plain = inputs(DTYPES[dtype], shape)
    pairs = [surrounded(x, dim) for x, dim in zip(inputs(DTYPES[dtype], shape), (1, 2, 1, 2), strict=True)]
    merge_(*plain)
    _merge_cuda.fused_merge_(*(part for part, _ in pairs))
    outside = [around.isnan().sum() == around.numel() - part.numel() for part, around in pairs]
    return {"out": pairs[0][0], "lse": pairs[1][0], "plain out": plain[0], "plain lse": plain[1], "outside": torch.stack(outside)}


if __name__ == "__main__":
    _merge_cuda.libdevice = SimpleNamespace(exp=on_cpu(np.exp), log1p=on_cpu(np.log1p))
    torch.save({case: results(*case) for case in CASES}, sys.argv[1])
