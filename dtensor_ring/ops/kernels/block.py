"""What a kernel is given: the tensors of one block, and the block itself, which says how they attend to each other.

    dense     q_BSHD (B, Sq, H, D), k_BSHD (B, Sk, Hk, D), v_BSHD (B, Sk, Hk, Dv), H a multiple of Hk
              out_BSHD (B, Sq, H, Dv), lse_BHS (B, H, Sq): natural log of the sum of exp(scale * q.k)
    varlen    the same without the batch dim: q_THD (T, H, D), k_THD, v_THD, out_THD, and lse_HT (H, T). T counts the tokens of all
              batch rows, one row after the other; `Block.varlen` says which of them attend to which
    window    (left, right), aligned bottom-right as in flash-attn: key j for query i when
              i + Sk - Sq - left <= j <= i + Sk - Sq + right; -1 is unbounded

Every query of a dense block, and every query of a segment, sees at least one key: plans are made so. Tokens in no segment take
part in nothing: queries get out 0 and lse -inf, keys gradients 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

Gradients = tuple[Tensor, Tensor, Tensor]  # dq, dk, dv
BlockMask = Literal["full", "square causal", "rectangular causal", "window"]


class Result(NamedTuple):
    """Out and lse of a block."""

    out: Tensor
    lse: Tensor


class Saved(NamedTuple):
    """What backward needs of forward: the inputs of a block, and the out and lse of the whole attention for its queries."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor


@dataclass(frozen=True, slots=True)
class SoftmaxParams:
    """The arguments of attention that change no shapes.

    `scale` multiplies q.k, `softcap` > 0 bounds scores by a tanh, `dropout_p` is the probability that a weight is dropped.
    """

    scale: float
    softcap: float = 0.0
    deterministic: bool = False
    dropout_p: float = 0.0


@dataclass(frozen=True, slots=True)
class PositionContext:
    """What ALiBi and dropout need of a block besides its tensors.

    Attributes:
        alibi: slopes (H,) or (B, H), float32; a score loses slope * |p - t|.
        seed: of the dropout mask: of the whole attention for a kernel that hashes positions, else of this call alone.
        q_positions: positions of the queries (Sq,), int64; None where nothing reads them, which is dropout of a kernel that does
            not hash positions, without ALiBi. In a varlen block these are the positions of one batch row, the same in all.
        k_positions: positions of the keys (Sk,), int64, or None with `q_positions`.
        origin: first batch row and head of this rank's tensors in the whole batch.
        batch: first batch row of the block in this rank's tensors.
    """

    alibi: Tensor | None
    seed: int
    q_positions: Tensor | None
    k_positions: Tensor | None
    origin: tuple[int, int] = (0, 0)
    batch: int = 0

    def part(self, queries: slice, keys: slice, batch: int | None = None) -> PositionContext:
        """The context of some queries and keys of the block, in one batch row if given."""
        alibi = self.alibi
        if alibi is not None and alibi.dim() == 2 and batch is not None:
            # Slopes of each batch row: a dense kernel gets those of the one row that the segment lies in. Slopes (H,) serve all
            # rows.
            alibi = alibi[batch : batch + 1]
        at = self.batch if batch is None else batch
        q_positions = None if self.q_positions is None else self.q_positions[queries]
        k_positions = None if self.k_positions is None else self.k_positions[keys]
        return replace(self, alibi=alibi, q_positions=q_positions, k_positions=k_positions, batch=at)

    def of_segment(self, segment: VarlenSegment) -> PositionContext:
        """Give the context of one segment, which lies in one batch row."""
        if self.q_positions is None:
            return self  # without positions there are no slopes either: a seed is the same in every part
        q_tokens, k_tokens = map(len, self.positions)
        batch = segment.q0 // q_tokens
        queries = slice(segment.q0 - batch * q_tokens, segment.q1 - batch * q_tokens)
        return self.part(queries, slice(segment.k0 - batch * k_tokens, segment.k1 - batch * k_tokens), batch)

    @property
    def positions(self) -> tuple[Tensor, Tensor]:
        """Positions of the queries and of the keys, for what cannot do without."""
        assert self.q_positions is not None and self.k_positions is not None, "ALiBi and masks hashed of positions come with them"
        return self.q_positions, self.k_positions


class VarlenSegment(NamedTuple):
    """Queries [q0, q1) attend to keys [k0, k1), both counted over the flattened batch."""

    q0: int
    q1: int
    k0: int
    k1: int


@dataclass(frozen=True, slots=True)
class VarlenMetadata:
    """The segments of one varlen block: as they are, for loops over them, and as varlen kernels take them.

    Attributes:
        segments: increasing and disjoint in queries and in keys.
        cu_q: cumulative lengths of the sequences' queries, int32 on the device, from 0 to all T.
        cu_k: the same of their keys.
        max_q: queries of the longest sequence.
        max_k: keys of the longest sequence.
        has_idle_queries: whether some query lies in no segment.
    """

    segments: tuple[VarlenSegment, ...]
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    has_idle_queries: bool

    @classmethod
    def of(cls, segments: Sequence[VarlenSegment], q_tokens: int, k_tokens: int, device: torch.device) -> VarlenMetadata:
        """The metadata of increasing, disjoint segments among `q_tokens` queries and `k_tokens` keys.

        Varlen kernels know no gaps: their sequences follow each other and cover every token. So a gap in the queries becomes a
        sequence without keys, for which kernels write out 0, and a gap in the keys a sequence without queries, whose gradients
        they write as 0. Only so do their results need no filling.
        """
        # Sequences are described by their ends alone, so a gap must not be skipped: the next sequence would begin inside it.
        cu_q, cu_k = [0], [0]
        for segment in (*segments, VarlenSegment(q_tokens, q_tokens, k_tokens, k_tokens)):
            if segment.q0 > cu_q[-1]:
                cu_q.append(segment.q0)
                cu_k.append(cu_k[-1])
            if segment.k0 > cu_k[-1]:
                cu_q.append(cu_q[-1])
                cu_k.append(segment.k0)
            if segment.q1 > segment.q0:
                cu_q.append(segment.q1)
                cu_k.append(segment.k1)
        longest_q = max((b - a for a, b in pairwise(cu_q)), default=0)
        longest_k = max((b - a for a, b in pairwise(cu_k)), default=0)
        # One tensor for both, since the host waits for every copy to the device; int32 is what the kernels take.
        bounds = torch.tensor([cu_q, cu_k], dtype=torch.int32, device=device)
        idle = sum(segment.q1 - segment.q0 for segment in segments) < q_tokens
        return cls(tuple(segments), bounds[0], bounds[1], longest_q, longest_k, idle)


class BlockKind(NamedTuple):
    """What a kernel may get wrong about a block whatever its tensors are; `Kernel.refuses_block` judges it.

    Attributes:
        mask: "full"; "square causal", whose diagonal starts top-left and ends bottom-right; "rectangular causal", whose diagonal
            ends bottom-right but starts elsewhere; or "window" for all other masks. In a varlen block it is that of its segments,
            and one rectangle among them makes them rectangular.
        varlen: whether the block is a varlen one.
    """

    mask: BlockMask
    varlen: bool

    @override
    def __str__(self) -> str:
        return f"varlen {self.mask}" if self.varlen else self.mask

    @classmethod
    def of(cls, window: tuple[int, int], lengths: Iterable[tuple[int, int]], *, varlen: bool) -> BlockKind:
        """The kind of a block, from the numbers of queries and of keys of each of its segments, or of the one dense block."""
        if window == (-1, -1):
            return cls("full", varlen)
        if window != (-1, 0):
            return cls("window", varlen)
        # Square blocks are a kind of their own, since a kernel that aligns its causal mask top-left gets them right and rectangles
        # wrong.
        square = all(queries == keys for queries, keys in lengths)
        return cls("square causal" if square else "rectangular causal", varlen)


MASKS: tuple[BlockMask, ...] = ("full", "square causal", "rectangular causal", "window")
EVERY_KIND = frozenset(BlockKind(mask, varlen) for mask, varlen in product(MASKS, (False, True)))


class Block(NamedTuple):
    """One block of attention, apart from its tensors.

    One is made for every kernel call, which is why it is a tuple: a frozen dataclass would cost the host three times as much.

    Attributes:
        window: (left, right), bottom-right; -1 is unbounded. One window serves all segments of a varlen block.
        softmax: scale, softcap, dropout.
        varlen: the segments, for tensors without a batch dim; None for dense tensors.
        positions: given where there is dropout or ALiBi.
    """

    window: tuple[int, int]
    softmax: SoftmaxParams
    varlen: VarlenMetadata | None = None
    positions: PositionContext | None = None

    def kind(self, q: Tensor, k: Tensor) -> BlockKind:
        """Say what kind of block these tensors make."""
        if self.varlen is None:
            return BlockKind.of(self.window, [(q.shape[1], k.shape[1])], varlen=False)
        return BlockKind.of(self.window, [(s.q1 - s.q0, s.k1 - s.k0) for s in self.varlen.segments], varlen=True)
