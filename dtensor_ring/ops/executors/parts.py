"""What sums are made of: what blocks, other ranks and the sum itself contribute, as values that both codes of a sum take."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dtensor_ring.ops.launcher import has_triton

Tensors = tuple[Tensor, ...]
MOST_OUTPUTS = 2  # blocks that one merge takes in
MOST_GRADIENTS = 3  # parts that one sum of gradients takes in


class OutputPart(NamedTuple):
    """What one block gives: out (B, n, H, Dv) and lse (B, H, n) of queries [start, start + n)."""

    start: int
    out: Tensor
    lse: Tensor

    @property
    def stop(self) -> int:
        """One past the last query."""
        return self.start + self.out.shape[1]


class Rests(NamedTuple):
    """What rounding drops of a running out (B, S, H, Dv).

    Attributes:
        kept: what it dropped until now, in the dtype of out; None for nothing.
        needed: whether a later merge needs what it drops now.
    """

    kept: Tensor | None = None
    needed: bool = False


class GradPart(NamedTuple):
    """Gradients (B, n, H, D) of tokens [start, start + n), one for each tensor of a sum; the sum may change them if `owned`."""

    start: int
    tensors: Tensors
    owned: bool = True

    @property
    def stop(self) -> int:
        """One past the last token."""
        return self.start + self.tensors[0].shape[1]


class Indexed(NamedTuple):
    """Gradients of tokens [low, high) of every batch row, found in buffers (n, H, D) by index.

    Attributes:
        low: the first token.
        high: one past the last.
        index: int32, places in the buffers: `wide` first, then `narrow`; a place past the end of both is no contribution.
        offsets: int32, the places of token i (batch row after batch row) are index[offsets[i] : offsets[i + 1]]; None where each
            token has the one place index[i].
        wide: contributions, one buffer for each tensor of the sum.
        narrow: more of them, in another dtype; None where `wide` has all.
    """

    low: int
    high: int
    index: Tensor
    offsets: Tensor | None
    wide: Tensors
    narrow: Tensors | None


def is_fused(x: Tensor) -> bool:
    """Whether sums of such tensors are computed by one Triton kernel each, and not by PyTorch's operators."""
    return x.is_cuda and x.dtype != torch.float64 and has_triton()
