"""What a kernel is: attention of one block, forward to (out, lse), backward from the out and lse of the whole attention.

`block` says what the tensors are; out and lse of several blocks make those of the whole attention, whose lse and out then give each
block's share of the gradients.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from dtensor_ring.ops.dtypes import accumulate_dtype
from dtensor_ring.ops.kernels.block import Block, BlockKind, Gradients, Result, Saved

Feature = Literal["softcap", "dropout", "ALiBi", "scale of 0 or less"]


@dataclass(frozen=True, slots=True)
class KernelRequirements:
    """What a call asks of a kernel; `Kernel.refuses` judges it.

    Attributes:
        device: the type of the device, such as "cuda".
        dtype: that of q, k and v.
        head_dim: last dim of q and k.
        v_head_dim: last dim of v.
        training: whether a backward pass may follow.
        softcap: the bound of scores, 0 for none.
        deterministic: whether gradients must be bitwise the same in every run.
        dropout: whether weights are dropped.
        scale: multiplies q.k.
        alibi: "aligned" where queries and keys of every block end at one position, "shifted" where they may not.
        rows: batch rows on this rank; None, as for the following, while a compiler traces, where shapes are symbols.
        heads: query heads on this rank.
        tokens: queries of the rank that holds the most.
        grain: a number that divides the queries and the keys of every block of every rank.
    """

    device: str
    dtype: torch.dtype
    head_dim: int
    v_head_dim: int
    training: bool = False
    softcap: float = 0.0
    deterministic: bool = False
    dropout: bool = False
    scale: float = 1.0
    alibi: Literal["no", "aligned", "shifted"] = "no"
    rows: int | None = None
    heads: int | None = None
    tokens: int | None = None
    grain: int | None = None


class Kernel(ABC):
    """A block attention; instances hold no state.

    `forward` returns out in any float dtype at least as precise as the input, `backward` gradients likewise: flash kernels
    round both to the input dtype, `math` returns what it computed in. lse is float32, float64 for float64 inputs.
    """

    name: ClassVar[str]
    # Whether a dropout mask depends on nothing but seed, batch row, head and positions. Then all blocks share one seed; a kernel
    # that draws from a generator would give them one mask, and gets a seed for each call.
    hashes_positions: ClassVar[bool] = True

    def refuses(self, need: KernelRequirements) -> str | None:
        """Why this kernel cannot do what is needed, or None if it can."""
        return self.unavailable(need) or self.lacks(need)

    def unasked(self, need: KernelRequirements) -> str | None:
        """Why this kernel is used only where it is asked for by name, or None if it may be the default.

        It is asked only about what it does not refuse. The answer depends on nothing but `need`, so it is the same on every rank.
        """
        return None

    def refuses_block(self, kind: BlockKind) -> str | None:
        """Why this kernel gets blocks of a kind wrong, or None if it gets them right.

        A kernel is asked about every kind that the plan of any rank may have, before anything is computed. The answer depends on
        nothing but the kind, so it is the same on every rank.
        """
        return None

    @abstractmethod
    def unavailable(self, need: KernelRequirements) -> str | None:
        """Why it cannot run here: device, package, build. None if it can."""

    @abstractmethod
    def lacks(self, need: KernelRequirements) -> str | None:
        """Why it cannot do what is needed wherever it runs: dtypes, head dims, features. None if it can."""

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, block: Block) -> Result:
        """Compute out and lse of one block, dense or varlen."""

    @abstractmethod
    def backward(self, saved: Saved, dout: Tensor, block: Block) -> Gradients:
        """This block's share of dq, dk, dv, given the out and lse of the whole attention for its queries."""

    def grad_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the gradients that `backward` returns for inputs of `dtype`."""
        return dtype


class DenseKernel(Kernel):
    """A kernel without a varlen call: the segments of a varlen block are dense blocks, computed one after the other."""

    @abstractmethod
    def forward_dense(self, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, block: Block) -> Result:
        """Compute out and lse of one dense block."""

    @abstractmethod
    def backward_dense(self, saved: Saved, dout_BSHD: Tensor, block: Block) -> Gradients:
        """Compute the share of one dense block in dq, dk and dv."""

    @override
    def forward(self, q: Tensor, k: Tensor, v: Tensor, block: Block) -> Result:
        """Compute a dense block, or the segments of a varlen block one after the other."""
        if block.varlen is None:
            return self.forward_dense(q, k, v, block)
        shape = (*q.shape[:2], v.shape[-1])
        # Tokens in no segment take part in nothing: out 0 and lse -inf are what a merge leaves unchanged. The dtype of out is known
        # from the first segment only, since a kernel may return more precision than it was given.
        out, lse = None, q.new_full((q.shape[1], q.shape[0]), -math.inf, dtype=accumulate_dtype(q.dtype))
        for queries, keys, part in _dense_blocks(block):
            result = self.forward_dense(q[None, queries], k[None, keys], v[None, keys], part)
            if out is None:
                out = result.out.new_zeros(shape)
            out[queries] = result.out[0]
            lse[:, queries] = result.lse[0]
        return Result(q.new_zeros(shape) if out is None else out, lse)

    @override
    def backward(self, saved: Saved, dout: Tensor, block: Block) -> Gradients:
        """As `forward`: one dense block after the other. Segments share no token, so nothing is added up."""
        if block.varlen is None:
            return self.backward_dense(saved, dout, block)
        q, k, v, out, lse = saved
        # Tokens in no segment keep gradients 0, which no kernel would write for them.
        dq, dk, dv = (torch.zeros_like(x, dtype=self.grad_dtype(x.dtype)) for x in (q, k, v))
        for queries, keys, part in _dense_blocks(block):
            of_part = Saved(q[None, queries], k[None, keys], v[None, keys], out[None, queries], lse[None, :, queries])
            shares = self.backward_dense(of_part, dout[None, queries], part)
            dq[queries], dk[keys], dv[keys] = (share[0] for share in shares)
        return dq, dk, dv


def _dense_blocks(block: Block) -> Iterator[tuple[slice, slice, Block]]:
    """Give the queries and keys of each segment, counted over the flattened batch, and the dense block that it is."""
    assert block.varlen is not None, "called on varlen blocks"
    whole = Block(block.window, block.softmax)
    for segment in block.varlen.segments:
        q0, q1, k0, k1 = segment
        part = whole
        if block.positions is not None:
            part = Block(block.window, block.softmax, None, block.positions.of_segment(segment))
        yield slice(q0, q1), slice(k0, k1), part


def has_no(need: KernelRequirements, *features: Feature) -> str | None:
    """The first of some features that is needed, as the reason of a kernel that has none of them; None if none is needed."""
    needed: dict[Feature, bool] = {
        "softcap": bool(need.softcap),
        "dropout": need.dropout,
        "ALiBi": need.alibi != "no",
        "scale of 0 or less": need.scale <= 0,
    }
    return next((f"has no {feature}" for feature in features if needed[feature]), None)


class Strip(NamedTuple):
    """Some queries of a dense block, and the keys between the first and the last that any of them sees."""

    queries: range
    keys: range


def band_mask(strip: Strip, offset: int, window: tuple[int, int], device: torch.device) -> Tensor:
    """Bool (queries, keys), True where a query may see a key under a bottom-right window; `offset` is Sk - Sq of the block."""
    left, right = window
    queries, keys = (torch.arange(side.start, side.stop, device=device) for side in strip)
    distance = keys - (queries[:, None] + offset)
    mask = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        mask &= distance >= -left
    if right >= 0:
        mask &= distance <= right
    return mask


def strips(lengths: tuple[int, int], window: tuple[int, int], height: int) -> list[Strip]:
    """Cut a block of (Sq, Sk) tokens into strips of `height` queries."""
    left, right = window
    queries, keys = lengths
    offset = keys - queries
    cut: list[Strip] = []
    for start in range(0, queries, height):
        stop = min(start + height, queries)
        # The last query of a strip sees the farthest to the right, the first the farthest to the left: keys outside of that are
        # computed for no query. Under a window a strip may see no key at all.
        low = 0 if left < 0 else max(0, start + offset - left)
        high = keys if right < 0 else min(keys, stop + offset + right)
        cut.append(Strip(range(start, stop), range(low, max(low, high))))
    return cut
