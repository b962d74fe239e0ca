"""The dtype that attention is summed in, said once for kernels, merging and the reference."""

from __future__ import annotations

import torch


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums of numbers of `dtype` are kept: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
