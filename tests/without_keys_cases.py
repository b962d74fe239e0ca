"""Outs and lse as flash kernels give them, of which some tokens have no keys and the sums of others are NaN."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

# Heads and tokens: less and more than one program of the kernel takes, and none.
CASES = list(itertools.product([(1, 1), (3, 700), (2, 1024), (4, 0)], [torch.bfloat16, torch.float16]))


def made(shape: tuple[int, int], dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    heads, tokens = shape
    generator = torch.Generator().manual_seed(heads * tokens)
    out = torch.randn(tokens, heads, 8, generator=generator).to(dtype)
    lse = torch.randn(heads, tokens, generator=generator)
    none = torch.rand(heads, tokens, generator=generator) < 0.4
    lse[none] = math.inf
    out[none.T] = 0
    wrong = none & (torch.rand(heads, tokens, generator=generator) < 0.2)
    out[wrong.T] = math.nan
    lse[:, ::5] = lse[:, ::5].masked_fill(~none[:, ::5], -math.inf)  # what is right already stays
    return out.to(device), lse.to(device)
