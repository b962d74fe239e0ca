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

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from dtensor_ring.comm import Message, Pending, Transport
from dtensor_ring.ops.kernels import Kernel, Options, Packing, Span
from dtensor_ring.ops.merge import GradSum, OutputSum, accumulate_dtype
from dtensor_ring.ops.schedule import Call, Plan, Problem, Rows, Step, plan

_Pair = tuple[Tensor, Tensor]


def forward(todo: Plan, wire: Transport, kernel: Kernel, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, options: Options) -> _Pair:
    """Out (B, Sq/W, H, Dv) in the dtype of q, and lse (B, H, Sq/W) in float32 (float64 for float64), of this rank's queries."""
    total = OutputSum(q_BSHD, v_BSHD.shape[-1], todo.q_parts)
    packs = _packings(todo.problem, todo.rank, q_BSHD.shape[0], q_BSHD.device)
    for index, keys in _visits(todo, wire, (k_BSHD, v_BSHD), range(len(todo.steps))):
        for call, pack in zip(todo.steps[index].calls, packs[index], strict=True):
            total.add(*_forward_call(kernel, q_BSHD, *keys, call, pack, options))
    return total.result()


def backward(
    todo: Plan,
    wire: Transport,
    kernel: Kernel,
    dout_BSHD: Tensor,
    q_BSHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    out_BSHD: Tensor,
    lse_BHS: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of this rank's shares in the dtypes of q, k, v; out and lse are what `forward` returned."""
    dq = GradSum(q_BSHD, todo.q_parts)
    own = GradSum(k_BSHD, todo.k_parts), GradSum(v_BSHD, todo.k_parts)
    packs = _packings(todo.problem, todo.rank, q_BSHD.shape[0], q_BSHD.device)
    order = [*range(1, len(todo.steps)), 0] if todo.steps else []
    returning: Pending[None] | None = None
    for index, keys in _visits(todo, wire, (k_BSHD, v_BSHD), order):
        step = todo.steps[index]
        sums = tuple(GradSum(x, 1 + 2 * step.sums) for x in keys)
        for call, pack in zip(step.calls, packs[index], strict=True):
            inputs = dout_BSHD, q_BSHD, *keys, out_BSHD, lse_BHS
            q_start, k_start, grads = _backward_call(kernel, *inputs, call, pack, options)
            dq.add(q_start, grads[0])
            for total, grad in zip(sums, grads[1:], strict=True):
                total.add(k_start, grad)
        if returning is not None:
            returning.wait()
        returning = _give_back(todo, index, wire, kernel, sums, own)
    if returning is not None:
        returning.wait()
    return dq.result(q_BSHD.dtype), own[0].result(k_BSHD.dtype), own[1].result(v_BSHD.dtype)


def _visits(todo: Plan, wire: Transport, kv: _Pair, order: Sequence[int]) -> Iterator[tuple[int, _Pair]]:
    """Each step's keys in the given order, the next step's transfer already under way."""
    pending = _fetch(todo, order[0], wire, kv) if order else None
    for place, index in enumerate(order):
        assert pending is not None, "every step but the first is fetched one step ahead"
        ahead = _fetch(todo, order[place + 1], wire, kv) if place + 1 < len(order) else None
        yield index, pending.wait()
        pending = ahead


def _fetch(todo: Plan, index: int, wire: Transport, kv: _Pair) -> Pending[_Pair]:
    """Start to send what others need in this step and to receive what this rank needs."""
    step = todo.steps[index]
    if todo.problem.collective:
        gathers = [wire.all_gather(_padded(todo, x)) for x in kv]
        return Pending(lambda: _pair(_assemble(step, todo.rank, x, list(g.wait())) for x, g in zip(kv, gathers, strict=True)))
    sends = [Message(send.rank, _take(x, send.rows)) for send in todo.sends[index] for x in kv]
    counts: dict[int, int] = {}
    for rows in step.keys:
        counts[rows.source] = counts.get(rows.source, 0) + rows.size
    arrived: list[dict[int, Tensor]] = [
        {source: wire.empty((x.shape[0], n, *x.shape[2:]), x) for source, n in counts.items() if source != todo.rank} for x in kv
    ]
    receives = [Message(source, buffers[source]) for source in arrived[0] for buffers in arrived]
    pending = wire.exchange(sends, receives)

    def finish() -> _Pair:
        pending.wait()
        return _pair(_assemble(step, todo.rank, x, buffers) for x, buffers in zip(kv, arrived, strict=True))

    return Pending(finish)


def _pair(tensors: Iterator[Tensor]) -> _Pair:
    first, second = tensors
    return first, second


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


def _give_back(
    todo: Plan, index: int, wire: Transport, kernel: Kernel, sums: Sequence[GradSum], own: Sequence[GradSum]
) -> Pending[None]:
    """Start to return the gradients of a step's keys; once it is over, `own` holds what this rank's keys got in the step."""
    step = todo.steps[index]
    grads = [total.result() for total in sums]
    if todo.problem.collective:
        return _reduce(todo, wire, step, grads, own)
    sends: list[Message] = []
    starts = list(_offsets(step))
    for source in dict.fromkeys(rows.source for rows in step.keys):
        places = [(start, rows) for start, rows in starts if rows.source == source]
        for grad, total in zip(grads, own, strict=True):
            if source == todo.rank:
                for start, rows in places:
                    total.add(rows.start, grad[:, start : start + rows.size])
            else:
                dtype = accumulate_dtype(grad.dtype) if step.sums else grad.dtype
                parts = [grad[:, start : start + rows.size] for start, rows in places]
                sends.append(Message(source, torch.cat(parts, 1).to(dtype).contiguous()))
    receives: list[Message] = []
    arrivals: list[tuple[GradSum, tuple[Rows, ...], Tensor]] = []
    for send in todo.sends[index]:
        for total in own:
            like = total.like
            dtype = accumulate_dtype(like.dtype) if send.sums else kernel.grad_dtype(like.dtype)
            buffer = wire.empty((like.shape[0], sum(rows.size for rows in send.rows), *like.shape[2:]), like, dtype)
            receives.append(Message(send.rank, buffer))
            arrivals.append((total, send.rows, buffer))
    pending = wire.exchange(sends, receives)

    def finish() -> None:
        pending.wait()
        for total, places, buffer in arrivals:
            start = 0
            for rows in places:
                total.add(rows.start, buffer[:, start : start + rows.size])
                start += rows.size

    return Pending(finish)


def _reduce(todo: Plan, wire: Transport, step: Step, grads: Sequence[Tensor], own: Sequence[GradSum]) -> Pending[None]:
    """Sum the gradients of gathered keys over the ranks in float32, each rank keeping its shard."""
    largest = max(todo.problem.k_rows(rank) for rank in range(todo.problem.world))
    waits: list[tuple[GradSum, Pending[Tensor]]] = []
    for grad, total in zip(grads, own, strict=True):
        batch, _, *rest = grad.shape
        shards = grad.new_zeros((todo.problem.world, batch, largest, *rest), dtype=accumulate_dtype(grad.dtype))
        for start, rows in _offsets(step):
            shards[rows.source, :, rows.start : rows.stop] = grad[:, start : start + rows.size]
        waits.append((total, wire.reduce_scatter(shards)))

    def finish() -> None:
        for total, pending in waits:
            total.add(0, pending.wait()[:, : total.like.shape[1]])

    return Pending(finish)


def _offsets(step: Step) -> Iterator[tuple[int, Rows]]:
    start = 0
    for rows in step.keys:
        yield start, rows
        start += rows.size


@lru_cache(maxsize=64)
def _packings(problem: Problem, rank: int, batch: int, device: torch.device) -> tuple[tuple[Packing | None, ...], ...]:
    """For each call of each step the packing of a batch, None where one segment goes to the kernel as a dense block."""
    todo = plan(problem, rank)
    q_rows = problem.q_rows(rank)
    return tuple(
        tuple(_packing(call, len(problem.bounds), batch, q_rows, step.rows, device) for call in step.calls) for step in todo.steps
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


def _forward_call(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, call: Call, pack: Packing | None, options: Options
) -> tuple[int, int, Tensor, Tensor]:
    """First and last row, out and lse of one call."""
    if pack is None:
        (_, q0, q1, k0, k1), *_ = call.segments
        return q0, q1, *kernel.forward(q[:, q0:q1], k[:, k0:k1], v[:, k0:k1], call.window, options)
    out, lse = kernel.forward_packed(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), pack, call.window, options)
    return 0, q.shape[1], out.unflatten(0, q.shape[:2]), lse.unflatten(1, q.shape[:2]).transpose(0, 1)


def _backward_call(
    kernel: Kernel,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    call: Call,
    pack: Packing | None,
    options: Options,
) -> tuple[int, int, tuple[Tensor, Tensor, Tensor]]:
    """First query and key row, and the gradients of one call."""
    if pack is None:
        (_, q0, q1, k0, k1), *_ = call.segments
        cut_q, cut_k = (
            partial(torch.narrow, dim=1, start=q0, length=q1 - q0),
            partial(torch.narrow, dim=1, start=k0, length=k1 - k0),
        )
        blocks = cut_q(dout), cut_q(q), cut_k(k), cut_k(v), cut_q(out), lse[:, :, q0:q1]
        return q0, k0, kernel.backward(*blocks, call.window, options)
    flat_dout, flat_q, flat_k, flat_v, flat_out = (x.flatten(0, 1) for x in (dout, q, k, v, out))
    inputs = flat_dout, flat_q, flat_k, flat_v, flat_out, lse.transpose(0, 1).flatten(1)
    grads = kernel.backward_packed(*inputs, pack, call.window, options)
    dq, dk, dv = (grad.unflatten(0, x.shape[:2]) for grad, x in zip(grads, (q, k, v), strict=True))
    return 0, 0, (dq, dk, dv)
