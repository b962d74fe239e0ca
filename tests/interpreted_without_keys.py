"""The lse of tokens without keys as the Triton kernel gives it, under Triton's interpreter, beside the portable code.

A process of its own, since Triton asks for the interpreter once, when it is first imported.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from without_keys_cases import CASES, made

from dtensor_ring.ops.kernels._without_keys_cuda import fused_without_keys_
from dtensor_ring.ops.kernels.flash import without_keys

if __name__ == "__main__":
    for case in CASES:
        out, lse = made(*case)
        wanted = without_keys(out, lse)
        assert wanted is not lse, "the portable code leaves what it is given"
        found = fused_without_keys_(out, lse)
        assert torch.equal(found, wanted) or torch.equal(found.nan_to_num(7.0), wanted.nan_to_num(7.0)), case
        assert torch.equal(found.isnan(), wanted.isnan()), case
        assert torch.equal(out.nan_to_num(7.0), made(*case)[0].nan_to_num(7.0)), "out is read only"
