"""Walk a plan: fetch keys, call the kernel, merge; in backward also send gradients back to where the keys came from.

    per rank   q_BSHD (B, Sq/W, H, D), k_BSHD and v_BSHD (B, Sk/W, Hk, D and Dv); Sq/W, Sk/W are this rank's shares
    forward    each step receives the key rows of `step.keys` and sends those of `plan.sends`: K and V in their own dtype, each
               rank in all `plan.rows_sent * B * Hk * (D + Dv) * itemsize` bytes
    backward   the same keys again; then dK and dV of every fetched row go back to its owner in the dtype the kernel returned
               them in, where one call made them, and summed in float32 where several did

The transfer of one step runs while the step before computes, so two steps' keys exist at a time. The forward pass begins with
the rank's own keys; the backward pass ends with them, so that the last gradients travel while it still computes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from dtensor_ring.cache import cached
from dtensor_ring.comm import Message, Pending, Transport
from dtensor_ring.comm.rank_checks import number_of
from dtensor_ring.ops.kernels import Extras, Kernel, Options, Packing, Result, Span
from dtensor_ring.ops.merge import GradSum, OutputSum, accumulate_dtype, sink_gradient
from dtensor_ring.ops.schedule import Plan, Problem, plan
from dtensor_ring.ops.steps import Call, Rows, Step

_Pair = tuple[Tensor, Tensor]
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
class Executor:
    """One attention on one rank.

    Attributes:
        plan: what to do.
        wire: how to exchange.
        kernel: what computes a block.
        options: scale, softcap, dropout.
        sinks: a score (H,) that every query of a head also sees, with no value; None for none.
        alibi: slopes (H,) or (B, H), float32; None for none.
        origin: first batch row and head of this rank's tensors in the whole batch: dropout masks depend on them.
    """

    plan: Plan
    wire: Transport
    kernel: Kernel
    options: Options
    sinks: Tensor | None = None
    alibi: Tensor | None = None
    origin: tuple[int, int] = (0, 0)

    @property
    def forward_order(self) -> list[int]:
        """Steps as `forward` walks them."""
        return list(range(len(self.plan.steps)))

    @property
    def backward_order(self) -> list[int]:
        """Steps as `backward` walks them: this rank's own keys last."""
        return [*range(1, len(self.plan.steps)), 0] if self.plan.steps else []

    def forward(
        self, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, seed: int = 0, coming: Pending[_Pair] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Out (B, Sq/W, H, Dv) in the dtype of q, and lse (B, H, Sq/W) in float32 (float64 for float64).

        `seed` makes the dropout mask: the same seed the same mask, in `backward` too. `coming` is the first step's `fetch`, if it
        was started before.
        """
        total = OutputSum(q_BSHD, v_BSHD.shape[-1], self.plan.q_parts, self.sinks)
        first_call = self._first_calls()
        for index, keys in self._visits((k_BSHD, v_BSHD), "forward", coming):
            for number, (call, pack) in enumerate(self._calls(index, q_BSHD), first_call[index]):
                extras = self._extras(index, q_BSHD.device, seed, number)
                start, stop, block = self._forward_call(q_BSHD, *keys, call, pack, extras)
                total.add(start, stop, block.out, block.lse)
        return total.result()

    def backward(
        self,
        dout_BSHD: Tensor,
        q_BSHD: Tensor,
        k_BSHD: Tensor,
        v_BSHD: Tensor,
        out_BSHD: Tensor,
        lse_BHS: Tensor,
        seed: int = 0,
        coming: Pending[_Pair] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """dq, dk, dv of this rank's shares in the dtypes of q, k, v, and this rank's part of dsinks (H,)."""
        dq = GradSum(q_BSHD, self.plan.q_parts)
        own = GradSum(k_BSHD, self.plan.k_parts), GradSum(v_BSHD, self.plan.k_parts)
        first_call = self._first_calls()
        returning: Pending[None] | None = None
        for index, keys in self._visits((k_BSHD, v_BSHD), "backward", coming):
            sums = tuple(GradSum(x, 1 + 2 * self.plan.steps[index].sums) for x in keys)
            for number, (call, pack) in enumerate(self._calls(index, q_BSHD), first_call[index]):
                extras = self._extras(index, q_BSHD.device, seed, number)
                inputs = dout_BSHD, q_BSHD, *keys, out_BSHD, lse_BHS
                q_start, k_start, grads = self._backward_call(*inputs, call, pack, extras)
                dq.add(q_start, grads[0])
                for total, grad in zip(sums, grads[1:], strict=True):
                    total.add(k_start, grad)
            if returning is not None:
                returning.wait()
            with self.wire.during(self._activity("backward", "gradients", index)):
                returning = self._give_back(index, sums, own)
        if returning is not None:
            returning.wait()
        dsinks = None if self.sinks is None else sink_gradient(dout_BSHD, out_BSHD, lse_BHS, self.sinks)
        return dq.result(q_BSHD.dtype), own[0].result(k_BSHD.dtype), own[1].result(v_BSHD.dtype), dsinks

    def _calls(self, index: int, q_BSHD: Tensor) -> Iterator[tuple[Call, Packing | None]]:
        packs = _packings(self.plan.problem, self.plan.rank, q_BSHD.shape[0], q_BSHD.device)
        return zip(self.plan.steps[index].calls, packs[index], strict=True)

    def _first_calls(self) -> list[int]:
        """The number of each step's first call, counted as the forward pass makes them."""
        numbers = [0]
        for step in self.plan.steps:
            numbers.append(numbers[-1] + len(step.calls))
        return numbers

    def _extras(self, index: int, device: torch.device, seed: int, number: int) -> Extras | None:
        if not self.options.dropout_p and self.alibi is None:
            return None
        if not self.kernel.hashes_positions:  # equal seeds would give every call and rank the same mask
            seed = number_of(repr((seed, self.plan.rank, number, self.origin)))
        if self.alibi is None and not self.kernel.hashes_positions:
            return Extras(None, seed, None, None, self.origin)
        q_positions, k_positions = _positions(self.plan.problem, self.plan.rank, device)
        return Extras(self.alibi, seed, q_positions, k_positions[index], self.origin)

    def _forward_call(
        self, q: Tensor, k: Tensor, v: Tensor, call: Call, pack: Packing | None, extras: Extras | None
    ) -> tuple[int, int, Result]:
        """First and last row, out and lse of one call."""
        if pack is None:
            rows, columns = _box(call)
            part = None if extras is None else extras.part(rows, columns)
            block = self.kernel.forward(q[:, rows], k[:, columns], v[:, columns], call.window, self.options, part)
            return rows.start, rows.stop, block
        flat = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        out, lse = self.kernel.forward_packed(*flat, pack, call.window, self.options, extras)
        return 0, q.shape[1], Result(out.unflatten(0, q.shape[:2]), lse.unflatten(1, q.shape[:2]).transpose(0, 1))

    def _backward_call(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        call: Call,
        pack: Packing | None,
        extras: Extras | None,
    ) -> tuple[int, int, tuple[Tensor, Tensor, Tensor]]:
        """First query and key row, and the gradients of one call."""
        if pack is None:
            r, c = _box(call)
            part = None if extras is None else extras.part(r, c)
            blocks = dout[:, r], q[:, r], k[:, c], v[:, c], out[:, r], lse[:, :, r]
            return r.start, c.start, self.kernel.backward(*blocks, call.window, self.options, part)
        flat_dout, flat_q, flat_k, flat_v, flat_out = (x.flatten(0, 1) for x in (dout, q, k, v, out))
        inputs = flat_dout, flat_q, flat_k, flat_v, flat_out, lse.transpose(0, 1).flatten(1)
        grads = self.kernel.backward_packed(*inputs, pack, call.window, self.options, extras)
        dq, dk, dv = (grad.unflatten(0, x.shape[:2]) for grad, x in zip(grads, (q, k, v), strict=True))
        return 0, 0, (dq, dk, dv)

    def _activity(self, direction: Direction, what: str, step: int) -> Activity:
        return Activity(self.plan.problem, direction, what, step, len(self.plan.steps))

    def _visits(self, kv: _Pair, direction: Direction, coming: Pending[_Pair] | None) -> Iterator[tuple[int, _Pair]]:
        """Each step's keys in the order of the pass, the next step's transfer already under way."""
        order = self.forward_order if direction == "forward" else self.backward_order
        pending = self.fetch(order[0], kv, direction) if order and coming is None else coming
        for place, index in enumerate(order):
            assert pending is not None, "every step but the first is fetched one step ahead"
            ahead = self.fetch(order[place + 1], kv, direction) if place + 1 < len(order) else None
            yield index, pending.wait()
            pending = ahead

    def fetch(self, index: int, kv: _Pair, direction: Direction) -> Pending[_Pair]:
        """Start to send what others need in this step and to receive what this rank needs."""
        with self.wire.during(self._activity(direction, "keys", index)):
            return self._fetch(index, kv)

    def _fetch(self, index: int, kv: _Pair) -> Pending[_Pair]:
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

        def finish() -> _Pair:
            pending.wait()
            return _pair(_assemble(step, rank, x, buffers) for x, buffers in zip(kv, arrived, strict=True))

        return Pending(finish)

    def _give_back(self, index: int, sums: Sequence[GradSum], own: Sequence[GradSum]) -> Pending[None]:
        """Start to return the gradients of a step's keys; once it is over, `own` holds what this rank's keys got in the step."""
        step, rank = self.plan.steps[index], self.plan.rank
        grads = [total.result() for total in sums]
        if self.plan.problem.collective:
            return self._reduce(step, grads, own)
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
                dtype = accumulate_dtype(like.dtype) if send.sums else self.kernel.grad_dtype(like.dtype)
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

    def _reduce(self, step: Step, grads: Sequence[Tensor], own: Sequence[GradSum]) -> Pending[None]:
        """Sum the gradients of gathered keys over the ranks in float32, each rank keeping its shard."""
        problem = self.plan.problem
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


def _pair(tensors: Iterator[Tensor]) -> _Pair:
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


def _box(call: Call) -> tuple[slice, slice]:
    """Rows and keys of a call of one segment."""
    (_, q0, q1, k0, k1), *_ = call.segments
    return slice(q0, q1), slice(k0, k1)


_Packings = tuple[tuple[Packing | None, ...], ...]
_Positions = tuple[Tensor, tuple[Tensor, ...]]


def _packed_bytes(packings: _Packings, problem: Problem, *_others: object) -> int:
    """Spans are four integers in a tuple each; the cumulative lengths lie on the device."""
    packs = [pack for step in packings for pack in step if pack is not None]
    spans = sum(len(pack.spans) for pack in packs)
    return problem.nbytes + 500 * len(packs) + 224 * spans + sum(pack.cu_q.nbytes + pack.cu_k.nbytes for pack in packs)


def _position_bytes(positions: _Positions, problem: Problem, *_others: object) -> int:
    queries, keys = positions
    return problem.nbytes + queries.nbytes + sum(each.nbytes for each in keys)


@cached("segments of packed calls", most_bytes=16 << 20, most_entries=32, size=_packed_bytes)
def _packings(problem: Problem, rank: int, batch: int, device: torch.device) -> _Packings:
    """For each call of each step the packing of a batch, None where one segment goes to the kernel as a dense block."""
    q_rows, steps = problem.q_rows(rank), plan(problem, rank).steps
    return tuple(
        tuple(_packing(call, len(problem.bounds), batch, q_rows, step.rows, device) for call in step.calls) for step in steps
    )


def _packing(call: Call, doc_rows: int, batch: int, q_rows: int, k_rows: int, device: torch.device) -> Packing | None:
    if doc_rows == 1 and len(call.segments) == 1:
        return None
    spans = [
        Span(row * q_rows + s.q0, row * q_rows + s.q1, row * k_rows + s.k0, row * k_rows + s.k1)
        for row in range(batch)
        for s in call.segments
        if doc_rows == 1 or s.row == row
    ]
    return Packing.of(spans, batch * q_rows, batch * k_rows, device)


@cached("positions for dropout and ALiBi", most_bytes=24 << 20, most_entries=32, size=_position_bytes)
def _positions(problem: Problem, rank: int, device: torch.device) -> _Positions:
    """Positions of this rank's queries, and of the keys in each step's buffer."""
    q_positions, k_positions = plan(problem, rank).positions
    keys = tuple(torch.tensor(positions, dtype=torch.int64, device=device) for positions in k_positions)
    return torch.tensor(q_positions, dtype=torch.int64, device=device), keys
