"""The lse of tokens without keys as one Triton kernel, in place: PyTorch's operators would be four launches for it.

Imported on first use on a GPU, since it needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dtensor_ring.ops.launcher import Launcher


def fused_without_keys_(out_THD: Tensor, lse_HT: Tensor) -> Tensor:
    """As `flash.without_keys`, in place; lse is contiguous, as kernels give it."""
    lse_HT = lse_HT.contiguous()
    heads, tokens = lse_HT.shape
    count = heads * tokens
    if count:
        _launch((-(-count // _TILE), 1, 1), (out_THD, lse_HT), (count, tokens, *out_THD.stride()[:2]), (_TILE,))
    return lse_HT


_TILE = 1024  # numbers of one program


@triton.jit(do_not_specialize=["count", "tokens", "out_t", "out_h"])
def _without_keys(out, lse, count, tokens, out_t, out_h, TILE: tl.constexpr):
    number = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    found = tl.load(lse + number, number < count, 0.0)
    has_none = found == float("inf")
    first = tl.load(out + (number % tokens) * out_t + (number // tokens) * out_h, has_none, 0.0).to(tl.float32)
    tl.store(lse + number, first - float("inf"), has_none)


_launch = Launcher(_without_keys)
