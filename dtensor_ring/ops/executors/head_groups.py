"""An attention some key heads at a time, which bounds the memory of gathered keys: the `heads_k_stride` of llama3.

Each group of key heads, with its query heads, is an attention of its own. The keys of the next group travel while one computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from dtensor_ring.comm import Pending, Transfers
from dtensor_ring.ops.executors.exchange import Direction, Pair
from dtensor_ring.ops.executors.plan_executor import Executor
from dtensor_ring.ops.executors.protocol import AttentionExecutor
from dtensor_ring.ops.kernels import Saved
from dtensor_ring.planning.costs import RankCost, Sent

_Visit = tuple[Executor, slice, Tensor, Tensor, Pending[Pair] | None]


def in_groups(executor: AttentionExecutor, kv_heads: int) -> AttentionExecutor:
    """An executor that takes `kv_heads` key heads at a time; 0 is all of them, which is the executor itself."""
    if not kv_heads:
        return executor
    assert isinstance(executor, Executor), "only plans are carried out some key heads at a time: ulysses takes all heads at once"
    return HeadGroupsExecutor(executor, kv_heads)


@dataclass(frozen=True, slots=True)
class HeadGroupsExecutor(AttentionExecutor):
    """One attention on one rank, group of heads after group of heads.

    Attributes:
        executor: carries out the whole attention; sinks, slopes and origin are cut to each group's heads.
        kv_heads: key heads of a group; the last group may have fewer.
    """

    executor: Executor
    kv_heads: int

    @override
    def forward(self, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
        """As `Executor.forward`, with the results of all groups put side by side."""
        # One group of all heads is the attention itself, without slices and a copy of the results.
        if self.kv_heads == k_BSHD.shape[2]:
            return self.executor.forward(q_BSHD, k_BSHD, v_BSHD, seed)
        with Transfers() as transfers:
            visits = self._visits(transfers, (q_BSHD, k_BSHD, v_BSHD), "forward")
            parts = [part.forward(q_BSHD[:, :, heads], k, v, seed, coming) for part, heads, k, v, coming in visits]
        return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 1)

    @override
    def backward(self, saved: Saved, dout_BSHD: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """As `Executor.backward`, with the gradients of all groups put side by side."""
        if self.kv_heads == saved.k.shape[2]:
            return self.executor.backward(saved, dout_BSHD, seed)
        parts: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []
        with Transfers() as transfers:
            for part, h, k, v, coming in self._visits(transfers, saved[:3], "backward"):
                of_group = Saved(saved.q[:, :, h], k, v, saved.out[:, :, h], saved.lse[:, h])
                parts.append(part.backward(of_group, dout_BSHD[:, :, h], seed, coming))
        dq, dk, dv = (torch.cat(grads, 2) for grads in zip(*(part[:3] for part in parts), strict=True))
        dsinks = [part[3] for part in parts if part[3] is not None]
        return dq, dk, dv, torch.cat(dsinks) if dsinks else None

    @override
    def explain(self, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> RankCost:
        """The groups' costs together: as many bytes as all heads at once, in more messages and calls."""
        groups = self._groups(q_BSHD, k_BSHD, v_BSHD)
        each = [part.explain(q_BSHD[:, :, heads], k, v) for part, heads, k, v in groups]
        forward, backward = (
            Sent(sum(sent.messages for sent in all_sent), sum(sent.bytes for sent in all_sent))
            for all_sent in ([cost.forward for cost in each], [cost.backward for cost in each])
        )
        work, calls = sum(cost.work for cost in each), sum(cost.calls for cost in each)
        return replace(each[0], work=work, calls=calls, forward=forward, backward=backward)

    def _groups(self, q: Tensor, k: Tensor, v: Tensor) -> list[tuple[Executor, slice, Tensor, Tensor]]:
        """List each group: its executor, its query heads, and its keys and values."""
        executor, size = self.executor, self.kv_heads
        ratio, row, head = q.shape[2] // k.shape[2], *executor.origin
        groups: list[tuple[Executor, slice, Tensor, Tensor]] = []
        for first in range(0, k.shape[2], size):
            # Query heads are numbered by key head, so a group's are neighbours; slices of the last group simply end early.
            heads, kv_heads = slice(first * ratio, (first + size) * ratio), slice(first, first + size)
            sinks = None if executor.sinks is None else executor.sinks[heads]
            alibi = None if executor.alibi is None else executor.alibi[..., heads].contiguous()
            # Dropout masks depend on the head's number in the whole batch, so that groups draw what all heads at once would.
            part = replace(executor, sinks=sinks, alibi=alibi, origin=(row, head + heads.start))
            groups.append((part, heads, k[:, :, kv_heads], v[:, :, kv_heads]))
        return groups

    def _visits(self, transfers: Transfers, qkv: tuple[Tensor, Tensor, Tensor], direction: Direction) -> Iterator[_Visit]:
        """Walk through the groups; when one is given, the first transfer of the next is already under way."""
        order = self.executor.forward_order if direction == "forward" else self.executor.backward_order
        groups = self._groups(*qkv)

        def begin(i: int) -> Pending[Pair] | None:
            if i == len(groups) or not order:
                return None
            part, _, k, v = groups[i]
            return transfers.add(part.exchange.fetch(order[0], (k, v), direction))

        # One transfer ahead, as the executor itself is between steps, so the keys of two groups exist at a time. All ranks start
        # their transfers in this order: messages between two of them meet by it.
        coming = begin(0)
        for i, group in enumerate(groups):
            ahead = begin(i + 1)
            yield *group, coming
            coming = ahead
