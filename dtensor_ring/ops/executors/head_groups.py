"""An attention some key heads at a time, which bounds the memory of gathered keys: the `heads_k_stride` of llama3.

Each group of key heads, with its query heads, is an attention of its own. The keys of the next group travel while one computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from dtensor_ring.comm import Pending
from dtensor_ring.ops.executors.exchange import Direction, Pair
from dtensor_ring.ops.executors.plan_executor import Executor
from dtensor_ring.ops.executors.ulysses import UlyssesExecutor

_Visit = tuple[Executor, slice, Tensor, Tensor, Pending[Pair] | None]


def forward(
    executor: Executor | UlyssesExecutor, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, at_once: int, seed: int
) -> tuple[Tensor, Tensor]:
    """As `Executor.forward`, `at_once` key heads at a time; 0 is all."""
    if at_once in (0, k_BSHD.shape[2]):
        return executor.forward(q_BSHD, k_BSHD, v_BSHD, seed)
    assert isinstance(executor, Executor), "ulysses takes all heads at once"
    visits = _visits(executor, q_BSHD, k_BSHD, v_BSHD, at_once, "forward")
    parts = [part.forward(q_BSHD[:, :, heads], k, v, seed, coming) for part, heads, k, v, coming in visits]
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 1)


def backward(
    executor: Executor | UlyssesExecutor,
    dout_BSHD: Tensor,
    q_BSHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    out_BSHD: Tensor,
    lse_BHS: Tensor,
    at_once: int,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As `Executor.backward`, `at_once` key heads at a time; 0 is all."""
    if at_once in (0, k_BSHD.shape[2]):
        return executor.backward(dout_BSHD, q_BSHD, k_BSHD, v_BSHD, out_BSHD, lse_BHS, seed)
    assert isinstance(executor, Executor), "ulysses takes all heads at once"
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []
    for part, h, k, v, coming in _visits(executor, q_BSHD, k_BSHD, v_BSHD, at_once, "backward"):
        blocks = dout_BSHD[:, :, h], q_BSHD[:, :, h], k, v, out_BSHD[:, :, h], lse_BHS[:, h]
        parts.append(part.backward(*blocks, seed, coming))
    dq, dk, dv = (torch.cat(grads, 2) for grads in zip(*(part[:3] for part in parts), strict=True))
    dsinks = [part[3] for part in parts if part[3] is not None]
    return dq, dk, dv, torch.cat(dsinks) if dsinks else None


def _visits(executor: Executor, q: Tensor, k: Tensor, v: Tensor, at_once: int, direction: Direction) -> Iterator[_Visit]:
    """The executor, query heads and keys of each group, the next group's first transfer already under way."""
    order = executor.forward_order if direction == "forward" else executor.backward_order
    ratio, row, head = q.shape[2] // k.shape[2], *executor.origin
    groups: list[tuple[Executor, slice, Tensor, Tensor]] = []
    for first in range(0, k.shape[2], at_once):
        heads, kv_heads = slice(first * ratio, (first + at_once) * ratio), slice(first, first + at_once)
        sinks = None if executor.sinks is None else executor.sinks[heads]
        alibi = None if executor.alibi is None else executor.alibi[..., heads].contiguous()
        part = replace(executor, sinks=sinks, alibi=alibi, origin=(row, head + heads.start))
        groups.append((part, heads, k[:, :, kv_heads], v[:, :, kv_heads]))

    def begin(i: int) -> Pending[Pair] | None:
        if i == len(groups) or not order:
            return None
        part, _, k, v = groups[i]
        return part.exchange.fetch(order[0], (k, v), direction)

    coming = begin(0)
    for i, group in enumerate(groups):
        ahead = begin(i + 1)
        yield *group, coming
        coming = ahead
