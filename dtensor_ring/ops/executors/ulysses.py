"""Strategy "ulysses": all tokens of some heads on each rank, instead of some tokens of all heads.

    2 ranks, 4 query heads, 2 key heads      before: tokens of rank r x heads 0 1 2 3     within: all tokens x heads 2r 2r+1

Queries, keys and values go from tokens to heads by an all-to-all, a rank attends as one device does, and the output goes back
("DeepSpeed Ulysses", Jacobs et al., 2023). Nothing is merged, whatever the mask and the layout. Where there are fewer key heads
than ranks, each key head goes to every rank that has queries of it.

    per rank and forward pass   (W-1)/W * B * Sq/W * H * (D + Dv) elements of queries and outputs, and
                                (W-1)/W * B * Sk/W * max(Hk, W) * (D + Dv) of keys and values are sent
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dtensor_ring.comm import AloneTransport, Transport
from dtensor_ring.comm.collectives import Chunks, exchange_dims
from dtensor_ring.ops.dtypes import accumulate_dtype
from dtensor_ring.ops.executors.exchange import Activity
from dtensor_ring.ops.executors.plan_executor import Executor
from dtensor_ring.ops.executors.protocol import AttentionExecutor, shape_of
from dtensor_ring.ops.kernels import Kernel, Saved, SoftmaxParams
from dtensor_ring.planning.costs import RankCost, cost_by_heads
from dtensor_ring.planning.head_sharing import copies_of_key_heads
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.schedule import plan


@dataclass(frozen=True, slots=True)
class UlyssesExecutor(AttentionExecutor):
    """One attention on one rank, by heads.

    Attributes:
        problem: the attention; its strategy plays no part.
        transport: how to exchange.
        kernel: what computes.
        softmax: scale, softcap, dropout.
        sinks: (H,), or None.
        alibi: slopes (H,) or (B, H), float32, or None.
        origin: first batch row and head of this rank's tensors in the whole batch.
    """

    problem: AttentionProblem
    transport: Transport
    kernel: Kernel
    softmax: SoftmaxParams
    sinks: Tensor | None = None
    alibi: Tensor | None = None
    origin: tuple[int, int] = (0, 0)

    def explain(self, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> RankCost:
        """Work out what the all-to-alls and the attention between them cost on these tensors."""
        return cost_by_heads(self.problem, self.transport.rank, shape_of(q_BSHD, k_BSHD, v_BSHD, self.kernel))

    def forward(self, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Out (B, Sq/W, H, Dv) in the dtype of q, and lse (B, H, Sq/W)."""
        heads = q_BSHD.shape[2]
        with self.transport.during(Activity(self.problem, "forward", "tokens to heads and back")):
            out, lse = self._inner(heads).forward(self._to_heads(q_BSHD), self._kv(k_BSHD), self._kv(v_BSHD), seed)
            by_head, by_token = (1, Chunks(), heads), (2, self.problem.split, self.problem.q_length)
            return self._to_tokens(out, heads), exchange_dims(lse, by_head, by_token, self.transport)

    def backward(self, saved: Saved, dout_BSHD: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """dq, dk, dv of this rank's shares, and the part of dsinks (H,) of its heads."""
        with self.transport.during(Activity(self.problem, "backward", "tokens to heads and back")):
            return self._backward(saved, dout_BSHD, seed)

    def _backward(self, saved: Saved, dout_BSHD: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        heads, kv_heads = saved.q.shape[2], saved.k.shape[2]
        # Autograd keeps what the operator took and gave, which is this rank's tokens of all heads: so they travel to heads once
        # more.
        dout, q, out = (self._to_heads(x) for x in (dout_BSHD, saved.q, saved.out))
        lse = exchange_dims(saved.lse, (2, self.problem.split, self.problem.q_length), (1, Chunks(), heads), self.transport)
        by_head = Saved(q, self._kv(saved.k), self._kv(saved.v), out, lse)
        dq, dk, dv, dmine = self._inner(heads).backward(by_head, dout, seed)
        # Every rank gives the part of its own heads and zeros for the rest; whoever holds the sinks sums the parts over ranks, as
        # with the other strategies, where each rank has the part of its own queries.
        dsinks = None
        if self.sinks is not None and dmine is not None:
            dsinks = torch.zeros_like(self.sinks)
            dsinks[self._mine(heads)] = dmine
        return self._to_tokens(dq, heads), self._kv_grad(dk, kv_heads), self._kv_grad(dv, kv_heads), dsinks

    def _mine(self, heads: int) -> slice:
        each = heads // self.transport.world
        return slice(self.transport.rank * each, (self.transport.rank + 1) * each)

    def _inner(self, heads: int) -> Executor:
        """Make what attends to all tokens of this rank's heads, as one device does."""
        # Dropout masks depend on a head's number in the whole batch, so the origin moves on to this rank's first head.
        mine, (row, head) = self._mine(heads), self.origin
        sinks = None if self.sinks is None else self.sinks[mine]
        alibi = None if self.alibi is None else self.alibi[..., mine].contiguous()
        # All tokens are here in the order of positions, so the layout plays no part any more and no transport is needed.
        inner = plan(self.problem.planned, 0)
        return Executor(inner, AloneTransport(), self.kernel, self.softmax, sinks, alibi, (row, head + mine.start))

    def _to_heads(self, x_BSHD: Tensor, length: int | None = None) -> Tensor:
        length = self.problem.q_length if length is None else length
        return exchange_dims(x_BSHD, (1, self.problem.split, length), (2, Chunks(), x_BSHD.shape[2]), self.transport)

    def _to_tokens(self, x_BSHD: Tensor, heads: int, length: int | None = None) -> Tensor:
        length = self.problem.q_length if length is None else length
        return exchange_dims(x_BSHD, (2, Chunks(), heads), (1, self.problem.split, length), self.transport)

    def _kv(self, x_BSHD: Tensor) -> Tensor:
        # Neighbouring copies: rank r's query heads r * H/W .. belong to key head r // copies, as grouped heads are numbered.
        copies = copies_of_key_heads(self.transport.world, x_BSHD.shape[2])
        return self._to_heads(x_BSHD.repeat_interleave(copies, 2) if copies > 1 else x_BSHD, self.problem.k_length)

    def _kv_grad(self, grad: Tensor, kv_heads: int) -> Tensor:
        """Bring the gradients of keys or values back to tokens, and sum those of a key head's copies in float32.

        The copies were attended to on different ranks, so only the rank that has the tokens again can add their gradients up.
        """
        copies = copies_of_key_heads(self.transport.world, kv_heads)
        if copies == 1:
            return self._to_tokens(grad, kv_heads, self.problem.k_length)
        parts = self._to_tokens(grad, kv_heads * copies, self.problem.k_length).unflatten(2, (kv_heads, copies))
        return parts.to(accumulate_dtype(grad.dtype)).sum(3).to(grad.dtype)
