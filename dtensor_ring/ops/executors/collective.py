"""All keys of all ranks by collectives: an all-gather of keys and values, and a reduce-scatter of their gradients.

    per rank    k_BSHD (B, Sk/W, Hk, D) | v_BSHD (B, Sk/W, Hk, Dv)       one row of numbers a token: key, then value
    gathered    the rows of rank 0, those of rank 1, ...                 padded to the longest share
    keys        the rows that the plan needs, in its order               where they lie one after the other, no copy of them:
                                                                         of several ranks in one batch row alone

Gradients take the same way back, in float32, in which they are summed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dtensor_ring.comm import Pending, Transport
from dtensor_ring.ops.dtypes import accumulate_dtype
from dtensor_ring.ops.executors.gradients import GradSum
from dtensor_ring.planning.kernel_calls import Step
from dtensor_ring.planning.schedule import Plan

Pair = tuple[Tensor, Tensor]


def gather(todo: Plan, transport: Transport, kv: Pair) -> Pending[Pair]:
    """Start to fetch the keys and values of a plan's only step, (B, keys, Hk, D and Dv); views of one tensor."""
    rows = torch.cat([x.flatten(2) for x in kv], 2)
    missing = _longest_share(todo) - rows.shape[1]
    if missing:  # a collective takes tensors of one shape from all ranks, and shares may differ by a token
        rows = torch.cat([rows, rows.new_zeros((rows.shape[0], missing, rows.shape[2]))], 1)
    gathered = transport.all_gather(rows)

    def finish() -> Pair:
        every = gathered.wait()
        parts = [part for _, part in _parts(todo.steps[0], every)] or [every[0, :, :0]]
        return _apart(parts[0] if len(parts) == 1 else torch.cat(parts, 1), kv)

    return Pending(finish)


def scatter(todo: Plan, transport: Transport, grads: Pair, own: GradSum) -> Pending[None]:
    """Start to sum the gradients of these keys and values over the ranks; once it is over `own` has those of this rank's."""
    step, share, batch = todo.steps[0], _longest_share(todo), grads[0].shape[0]
    size, dtype = sum(_numbers(x) for x in own.likes), accumulate_dtype(grads[0].dtype)
    # What no key of the plan lies in is summed as zeros.
    make = torch.empty if step.key_count == todo.problem.world * share else torch.zeros
    rows = make((todo.problem.world, batch, share, size), dtype=dtype, device=grads[0].device)
    for start, part in _parts(step, rows):
        for into, grad in zip(_apart(part, own.likes), grads, strict=True):
            into.copy_(grad[:, start : start + part.shape[1]])
    summed = transport.reduce_scatter(rows)

    def finish() -> None:
        mine = summed.wait()[:, : own.likes[0].shape[1]]
        own.add(0, _apart(mine, own.likes), owned=False)

    return Pending(finish)


def _longest_share(todo: Plan) -> int:
    return -(-todo.problem.k_length // todo.problem.world)  # shares of every layout are within one token of each other


def _parts(step: Step, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Where each part of the keys of a step begins among them, and the part (B, n, ...) of all ranks' rows (W, B, S, ...)."""
    _, batch, share, *_ = rows.shape
    ranges = [(keys.peer * share + keys.start, keys.size) for keys in step.keys]
    if batch == 1:
        rows, ranges = rows.flatten(0, 2)[None], _joined(ranges)
    done = 0
    for first, count in ranges:
        part = rows[:, first : first + count] if batch == 1 else rows[first // share, :, first % share : first % share + count]
        yield done, part
        done += count


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same ranges, where those that follow each other are one."""
    joined: list[tuple[int, int]] = []
    for first, count in ranges:
        if joined and sum(joined[-1]) == first:
            first, count = joined[-1][0], joined.pop()[1] + count
        joined.append((first, count))
    return joined


def _apart(rows: Tensor, likes: tuple[Tensor, ...]) -> Pair:
    """Keys and values in rows (B, n, numbers of a key and of a value), as views (B, n, Hk, D and Dv)."""
    k, v = rows.split([_numbers(x) for x in likes], 2)
    return k.unflatten(2, likes[0].shape[2:]), v.unflatten(2, likes[1].shape[2:])


def _numbers(x_BSHD: Tensor) -> int:
    """Of one token."""
    return x_BSHD.shape[2] * x_BSHD.shape[3]
