"""What a kernel is: attention of one block, forward to (out, lse), backward from the global out and lse.

    shapes   q_BSHD (B, Sq, H, D), k_BSHD (B, Sk, Hk, D), v_BSHD (B, Sk, Hk, Dv), H a multiple of Hk
             out_BSHD (B, Sq, H, Dv), lse_BHS (B, H, Sq): natural log of the sum of exp(scale * q.k), float32 (float64 for float64)
    window   (left, right), aligned bottom-right as in flash-attn: key j for query i when
             i + Sk - Sq - left <= j <= i + Sk - Sq + right; -1 is unbounded

Every row of a block sees at least one key: plans are made so. A packed block holds many segments, each its own small problem,
in the flattened rows of q and k; rows in no segment get out 0 and lse -inf, keys in no segment gradients 0.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from dtensor_ring.ops.dtypes import accumulate_dtype


@dataclass(frozen=True, slots=True)
class KernelRequirements:
    """What a call asks of a kernel; `Kernel.refuses` judges it."""

    device: str
    dtype: torch.dtype
    head_dim: int
    v_head_dim: int
    training: bool = False
    softcap: float = 0.0
    deterministic: bool = False
    dropout: bool = False
    alibi: Literal["no", "aligned", "shifted"] = "no"


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
        q_positions: positions of the rows (Sq,), int64; None where nothing reads them, which is dropout of a kernel that does
            not hash positions, without ALiBi.
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

    def part(self, rows: slice, columns: slice, batch: int | None = None) -> PositionContext:
        """Those of rows and columns of the block, in one batch row if given."""
        alibi = self.alibi
        if alibi is not None and alibi.dim() == 2 and batch is not None:
            alibi = alibi[batch : batch + 1]
        at = self.batch if batch is None else batch
        q_positions = None if self.q_positions is None else self.q_positions[rows]
        k_positions = None if self.k_positions is None else self.k_positions[columns]
        return replace(self, alibi=alibi, q_positions=q_positions, k_positions=k_positions, batch=at)

    @property
    def positions(self) -> tuple[Tensor, Tensor]:
        """Positions of the rows and of the keys, for what cannot do without."""
        assert self.q_positions is not None and self.k_positions is not None, "ALiBi and masks hashed of positions come with them"
        return self.q_positions, self.k_positions


class Result(NamedTuple):
    """Out and lse of a block."""

    out: Tensor
    lse: Tensor


class VarlenSegment(NamedTuple):
    """Flattened query rows [q0, q1) against flattened key rows [k0, k1)."""

    q0: int
    q1: int
    k0: int
    k1: int


@dataclass(frozen=True, slots=True)
class VarlenMetadata:
    """The segments of one packed call, for loops (`spans`) and for varlen kernels (`cu_q`, `cu_k`, int32 on the device).

    The cumulative lengths cover all flattened rows: a gap in the queries is a sequence without keys, a gap in the keys a
    sequence without queries.
    """

    spans: tuple[VarlenSegment, ...]
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int

    @classmethod
    def of(cls, spans: Sequence[VarlenSegment], q_rows: int, k_rows: int, device: torch.device) -> VarlenMetadata:
        """The packing of increasing, disjoint spans in `q_rows` x `k_rows` flattened rows."""
        cu_q, cu_k = [0], [0]
        for span in (*spans, VarlenSegment(q_rows, q_rows, k_rows, k_rows)):
            if span.q0 > cu_q[-1]:
                cu_q.append(span.q0)
                cu_k.append(cu_k[-1])
            if span.k0 > cu_k[-1]:
                cu_q.append(cu_q[-1])
                cu_k.append(span.k0)
            if span.q1 > span.q0:
                cu_q.append(span.q1)
                cu_k.append(span.k1)
        longest_q = max((b - a for a, b in pairwise(cu_q)), default=0)
        longest_k = max((b - a for a, b in pairwise(cu_k)), default=0)
        bounds = torch.tensor([cu_q, cu_k], dtype=torch.int32, device=device)
        return cls(tuple(spans), bounds[0], bounds[1], longest_q, longest_k)


class Kernel(ABC):
    """A block attention; instances hold no state.

    `forward` returns out in any float dtype at least as precise as the input, `backward` gradients likewise: flash kernels
    round both to the input dtype, `math` returns what it computed in.
    """

    name: ClassVar[str]
    hashes_positions: ClassVar[bool] = True  # whether a dropout mask depends on nothing but seed, row, head and positions

    def refuses(self, need: KernelRequirements) -> str | None:
        """Why this kernel cannot do what is needed, or None if it can."""
        return self.unavailable(need) or self.lacks(need)

    @abstractmethod
    def unavailable(self, need: KernelRequirements) -> str | None:
        """Why it cannot run here: device, package, build. None if it can."""

    @abstractmethod
    def lacks(self, need: KernelRequirements) -> str | None:
        """What it has not wherever it runs: dtypes, head dims, features. None if it has all that is needed."""

    @abstractmethod
    def forward(
        self,
        q_BSHD: Tensor,
        k_BSHD: Tensor,
        v_BSHD: Tensor,
        window: tuple[int, int],
        options: SoftmaxParams,
        extras: PositionContext | None = None,
    ) -> Result:
        """Out and lse of one block; `extras` is given where there is dropout or ALiBi."""

    @abstractmethod
    def backward(
        self,
        dout_BSHD: Tensor,
        q_BSHD: Tensor,
        k_BSHD: Tensor,
        v_BSHD: Tensor,
        out_BSHD: Tensor,
        lse_BHS: Tensor,
        window: tuple[int, int],
        options: SoftmaxParams,
        extras: PositionContext | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """This block's share of dq, dk, dv, given the out and lse of the whole attention."""

    def grad_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the gradients that `backward` returns for inputs of `dtype`."""
        return dtype

    def forward_packed(
        self,
        q_THD: Tensor,
        k_THD: Tensor,
        v_THD: Tensor,
        packing: VarlenMetadata,
        window: tuple[int, int],
        options: SoftmaxParams,
        extras: PositionContext | None = None,
    ) -> Result:
        """Out (T, H, Dv) and lse (H, T) of many segments; here one block after the other."""
        accumulate = accumulate_dtype(q_THD.dtype)
        out, lse = None, q_THD.new_full((q_THD.shape[1], q_THD.shape[0]), -math.inf, dtype=accumulate)
        for q, k, part in _parts(packing, extras):
            block = self.forward(q_THD[None, q], k_THD[None, k], v_THD[None, k], window, options, part)
            if out is None:
                out = block.out.new_zeros((*q_THD.shape[:2], v_THD.shape[-1]))
            out[q] = block.out[0]
            lse[:, q] = block.lse[0]
        return Result(q_THD.new_zeros((*q_THD.shape[:2], v_THD.shape[-1])) if out is None else out, lse)

    def backward_packed(
        self,
        dout_THD: Tensor,
        q_THD: Tensor,
        k_THD: Tensor,
        v_THD: Tensor,
        out_THD: Tensor,
        lse_HT: Tensor,
        packing: VarlenMetadata,
        window: tuple[int, int],
        options: SoftmaxParams,
        extras: PositionContext | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The share of many segments in dq, dk, dv."""
        dq, dk, dv = (torch.zeros_like(x, dtype=self.grad_dtype(x.dtype)) for x in (q_THD, k_THD, v_THD))
        for q, k, part in _parts(packing, extras):
            inputs = dout_THD[None, q], q_THD[None, q], k_THD[None, k], v_THD[None, k], out_THD[None, q], lse_HT[None, :, q]
            shares = self.backward(*inputs, window, options, part)
            for grad, share, rows in zip((dq, dk, dv), shares, (q, k, k), strict=True):
                grad[rows] = share[0]
        return dq, dk, dv


def _parts(packing: VarlenMetadata, extras: PositionContext | None) -> Iterator[tuple[slice, slice, PositionContext | None]]:
    """Flattened rows and keys of each span, and its extras, whose positions are those of one batch row."""
    for q0, q1, k0, k1 in packing.spans:
        part = None
        if extras is not None and extras.q_positions is None:
            part = extras  # without positions there are no slopes either: a seed is the same in every part
        elif extras is not None:
            rows, keys = map(len, extras.positions)
            batch = q0 // rows
            part = extras.part(slice(q0 - batch * rows, q1 - batch * rows), slice(k0 - batch * keys, k1 - batch * keys), batch)
        yield slice(q0, q1), slice(k0, k1), part


def band_mask(rows: range, columns: range, offset: int, window: tuple[int, int], device: torch.device) -> Tensor:
    """Bool (rows, columns), True where query i may see key j under a bottom-right window; `offset` is Sk - Sq."""
    left, right = window
    distance = torch.arange(columns.start, columns.stop, device=device) - (
        torch.arange(rows.start, rows.stop, device=device)[:, None] + offset
    )
    mask = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        mask &= distance >= -left
    if right >= 0:
        mask &= distance <= right
    return mask


def row_blocks(q_rows: int, k_rows: int, window: tuple[int, int], height: int) -> list[tuple[range, range]]:
    """The rows of a block in strips of `height`, each with the keys that any of its rows sees."""
    left, right = window
    offset = k_rows - q_rows
    found = []
    for start in range(0, q_rows, height):
        stop = min(start + height, q_rows)
        low = 0 if left < 0 else max(0, start + offset - left)
        high = k_rows if right < 0 else min(k_rows, stop + offset + right)
        found.append((range(start, stop), range(low, max(low, high))))
    return found
