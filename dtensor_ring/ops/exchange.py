"""Move keys out to where they are needed, and gradients back to where the keys came from.

per rank   k_BSHD and v_BSHD (B, Sk/W, Hk, D and Dv); Sk/W is this rank's share
fetch      the keys of one step, in the order of `step.keys`; K and V travel in their own dtype
give back  dK and dV of the step's keys, each row to its owner: in the dtype the kernel returned them in, where one call made
           them, and summed in float32 where several did
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from dtensor_ring.comm import Message, Pending, Transport
from dtensor_ring.ops.merge import GradSum, accumulate_dtype
from dtensor_ring.ops.schedule import Plan, Problem
from dtensor_ring.ops.steps import Rows, Step

Pair = tuple[Tensor, Tensor]
Direction = Literal["forward", "backward"]


class Activity(NamedTuple):
    """What a transfer is part of: its text is made only for an error."""

    problem: Problem
    direction: Direction
    what: str
    step: int | None = None
    steps: int = 0

    @override
    def __str__(self) -> str:
        where = "" if self.step is None else f" of step {self.step} of {self.steps}"
        return f"attention ({self.problem}), {self.direction}, {self.what}{where}"


@dataclass(frozen=True, slots=True)
class Exchange:
    """The transfers of one attention, seen from one rank.

    Attributes:
        plan: which rows go where.
        wire: how to exchange.
        grad_dtype: the dtype of the kernel's gradients for keys of a dtype.
    """

    plan: Plan
    wire: Transport
    grad_dtype: Callable[[torch.dtype], torch.dtype]

    def fetch(self, index: int, kv: Pair, direction: Direction) -> Pending[Pair]:
        """Start to send what others need in this step and to receive what this rank needs."""
        with self.wire.during(Activity(self.plan.problem, direction, "keys", index, len(self.plan.steps))):
            return self._fetch(index, kv)

    def give_back(self, index: int, grads: Pair, own: tuple[GradSum, GradSum]) -> Pending[None]:
        """Start to return the gradients of a step's keys; once it is over, `own` holds what this rank's keys got in the step."""
        with self.wire.during(Activity(self.plan.problem, "backward", "gradients", index, len(self.plan.steps))):
            return self._reduce(index, grads, own) if self.plan.problem.collective else self._give_back(index, grads, own)

    def _fetch(self, index: int, kv: Pair) -> Pending[Pair]:
        step, rank, wire = self.plan.steps[index], self.plan.rank, self.wire
        if self.plan.problem.collective:
            shards = [_padded(self.plan, x) for x in kv]
            gathered = wire.all_gather(torch.cat([shard.flatten() for shard in shards]))
            return Pending(lambda: _pair(_assemble(step, rank, x, y) for x, y in zip(kv, _apart(gathered, shards), strict=True)))
        sends = [Message(send.rank, _take(x, send.rows)) for send in self.plan.sends[index] for x in kv]
        counts: dict[int, int] = {}
        for rows in step.keys:
            counts[rows.source] = counts.get(rows.source, 0) + rows.size
        arrived: list[dict[int, Tensor]] = [
            {source: wire.empty((x.shape[0], n, *x.shape[2:]), x) for source, n in counts.items() if source != rank} for x in kv
        ]
        receives = [Message(source, buffers[source]) for source in arrived[0] for buffers in arrived]
        pending = wire.exchange(sends, receives)

        def finish() -> Pair:
            pending.wait()
            return _pair(_assemble(step, rank, x, buffers) for x, buffers in zip(kv, arrived, strict=True))

        return Pending(finish)

    def _give_back(self, index: int, grads: Pair, own: tuple[GradSum, GradSum]) -> Pending[None]:
        step, rank = self.plan.steps[index], self.plan.rank
        sends: list[Message] = []
        starts = list(_offsets(step))
        for source in dict.fromkeys(rows.source for rows in step.keys):
            places = [(start, rows) for start, rows in starts if rows.source == source]
            for grad, total in zip(grads, own, strict=True):
                if source == rank:
                    for start, rows in places:
                        total.add(rows.start, grad[:, start : start + rows.size])
                else:
                    dtype = accumulate_dtype(grad.dtype) if step.sums else grad.dtype
                    parts = [grad[:, start : start + rows.size] for start, rows in places]
                    whole = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
                    sends.append(Message(source, whole.to(dtype).contiguous()))
        receives: list[Message] = []
        arrivals: list[tuple[GradSum, tuple[Rows, ...], Tensor]] = []
        for send in self.plan.sends[index]:
            for total in own:
                like = total.like
                dtype = accumulate_dtype(like.dtype) if send.sums else self.grad_dtype(like.dtype)
                shape = like.shape[0], sum(rows.size for rows in send.rows), *like.shape[2:]
                buffer = self.wire.empty(shape, like, dtype)
                receives.append(Message(send.rank, buffer))
                arrivals.append((total, send.rows, buffer))
        pending = self.wire.exchange(sends, receives)

        def finish() -> None:
            pending.wait()
            for total, places, buffer in arrivals:
                start = 0
                for rows in places:
                    total.add(rows.start, buffer[:, start : start + rows.size])
                    start += rows.size

        return Pending(finish)

    def _reduce(self, index: int, grads: Pair, own: tuple[GradSum, GradSum]) -> Pending[None]:
        """Sum the gradients of gathered keys over the ranks in float32, each rank keeping its shard."""
        problem, step = self.plan.problem, self.plan.steps[index]
        largest = max(problem.k_rows(rank) for rank in range(problem.world))
        shapes = [(grad.shape[0], largest, *grad.shape[2:]) for grad in grads]
        sizes = [math.prod(shape) for shape in shapes]
        shards = grads[0].new_zeros((problem.world, sum(sizes)), dtype=accumulate_dtype(grads[0].dtype))
        for grad, shape, part in zip(grads, shapes, shards.split(sizes, 1), strict=True):
            whole = part.view(problem.world, *shape)
            for start, rows in _offsets(step):
                whole[rows.source, :, rows.start : rows.stop] = grad[:, start : start + rows.size]
        summed = self.wire.reduce_scatter(shards)

        def finish() -> None:
            for total, shape, part in zip(own, shapes, summed.wait().split(sizes), strict=True):
                mine = part.view(shape)[:, : total.like.shape[1]]
                total.add(0, mine.clone() if mine.dtype == total.like.dtype else mine)  # dK and dV must not share memory

        return Pending(finish)


def _pair(tensors: Iterator[Tensor]) -> Pair:
    first, second = tensors
    return first, second


def _apart(gathered: Pending[Tensor], shards: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Each rank's shard of keys, then of values, from the buffers that held both."""
    parts = gathered.wait().split([shard.numel() for shard in shards], 1)
    for part, shard in zip(parts, shards, strict=True):
        yield [mine.view(shard.shape) for mine in part]


def _padded(todo: Plan, x: Tensor) -> Tensor:
    """The shard with rows added up to the largest rank's."""
    largest = max(todo.problem.k_rows(rank) for rank in range(todo.problem.world))
    if x.shape[1] == largest:
        return x
    return torch.cat([x, x.new_zeros((x.shape[0], largest - x.shape[1], *x.shape[2:]))], 1)


def _take(x: Tensor, rows: Sequence[Rows]) -> Tensor:
    parts = [x[:, part.start : part.stop] for part in rows]
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, 1)


def _assemble(step: Step, rank: int, own: Tensor, arrived: dict[int, Tensor] | list[Tensor]) -> Tensor:
    """The step's key buffer; gathered shards are addressed by stored row, exchanged ones hold their rows one after another."""
    gathered = isinstance(arrived, list)
    used: dict[int, int] = {}
    parts = []
    for rows in step.keys:
        start = rows.start
        if rows.source != rank and not gathered:
            start = used.get(rows.source, 0)
            used[rows.source] = start + rows.size
        source = own if rows.source == rank else arrived[rows.source]
        parts.append(source[:, start : start + rows.size])
    if not parts:
        return own[:, :0]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _offsets(step: Step) -> Iterator[tuple[int, Rows]]:
    start = 0
    for rows in step.keys:
        yield start, rows
        start += rows.size
