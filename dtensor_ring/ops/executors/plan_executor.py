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

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from dtensor_ring.cache import cached
from dtensor_ring.comm import Pending, Transport
from dtensor_ring.comm.rank_checks import number_of
from dtensor_ring.ops.executors.exchange import Direction, Exchange, Pair
from dtensor_ring.ops.executors.merge import GradSum, OutputSum, sink_gradient, with_sinks
from dtensor_ring.ops.kernels import Kernel, PositionContext, Result, SoftmaxParams, VarlenMetadata, VarlenSegment
from dtensor_ring.planning.kernel_calls import KernelCall
from dtensor_ring.planning.schedule import AttentionProblem, Plan, plan


@dataclass(frozen=True, slots=True)
class Executor:
    """One attention on one rank.

    Attributes:
        plan: what to do.
        transport: how to exchange.
        kernel: what computes a block.
        options: scale, softcap, dropout.
        sinks: a score (H,) that every query of a head also sees, with no value; None for none.
        alibi: slopes (H,) or (B, H), float32; None for none.
        origin: first batch row and head of this rank's tensors in the whole batch: dropout masks depend on them.
    """

    plan: Plan
    transport: Transport
    kernel: Kernel
    options: SoftmaxParams
    sinks: Tensor | None = None
    alibi: Tensor | None = None
    origin: tuple[int, int] = (0, 0)

    @property
    def exchange(self) -> Exchange:
        """What moves keys and gradients."""
        return Exchange(self.plan, self.transport, self.kernel.grad_dtype)

    @property
    def forward_order(self) -> list[int]:
        """Steps as `forward` walks them."""
        return list(range(len(self.plan.steps)))

    @property
    def backward_order(self) -> list[int]:
        """Steps as `backward` walks them: this rank's own keys last."""
        return [*range(1, len(self.plan.steps)), 0] if self.plan.steps else []

    def forward(
        self, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, seed: int = 0, coming: Pending[Pair] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Out (B, Sq/W, H, Dv) in the dtype of q, and lse (B, H, Sq/W) in float32 (float64 for float64).

        `seed` makes the dropout mask: the same seed the same mask, in `backward` too. `coming` is the first step's `fetch`, if it
        was started before.
        """
        only = self._only_call(q_BSHD)
        if only is not None:
            k, v = self._only_keys((k_BSHD, v_BSHD), "forward", coming)
            _, _, (out, lse) = self._forward_call(q_BSHD, k, v, *only, self._only_extras(q_BSHD.device, seed))
            if self.sinks is not None:
                out, lse = with_sinks(out, lse, self.sinks)
            return out.to(q_BSHD.dtype).contiguous(), lse.contiguous()
        total = OutputSum(q_BSHD, v_BSHD.shape[-1], self.plan.q_parts, self.sinks)
        packs, extras = self._packs(q_BSHD), self._extras(q_BSHD.device, seed)
        for index, keys in self._visits(self.exchange, (k_BSHD, v_BSHD), "forward", coming):
            for number, call in enumerate(self.plan.steps[index].calls):
                extra = None if extras is None else extras(index, number)
                start, stop, block = self._forward_call(q_BSHD, *keys, call, packs[index][number], extra)
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
        coming: Pending[Pair] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """dq, dk, dv of this rank's shares in the dtypes of q, k, v, and this rank's part of dsinks (H,)."""
        only = self._only_call(q_BSHD)
        if only is not None:
            extras = self._only_extras(q_BSHD.device, seed)
            dq, dk, dv = self._backward_alone(dout_BSHD, q_BSHD, (k_BSHD, v_BSHD), out_BSHD, lse_BHS, only, extras, coming)
        else:
            dq, dk, dv = self._backward(dout_BSHD, q_BSHD, (k_BSHD, v_BSHD), out_BSHD, lse_BHS, seed, coming)
        dsinks = None if self.sinks is None else sink_gradient(dout_BSHD, out_BSHD, lse_BHS, self.sinks)
        return dq, dk, dv, dsinks

    def _backward(
        self, dout: Tensor, q: Tensor, kv: Pair, out: Tensor, lse: Tensor, seed: int, coming: Pending[Pair] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The sums over all steps and calls."""
        dq = GradSum(q, self.plan.q_parts)
        own = GradSum(kv[0], self.plan.k_parts), GradSum(kv[1], self.plan.k_parts)
        packs, extras, exchange = self._packs(q), self._extras(q.device, seed), self.exchange
        returning: Pending[None] | None = None
        for index, (k, v) in self._visits(exchange, kv, "backward", coming):
            step = self.plan.steps[index]
            dk, dv = GradSum(k, 1 + 2 * step.sums), GradSum(v, 1 + 2 * step.sums)
            for number, call in enumerate(step.calls):
                extra = None if extras is None else extras(index, number)
                q_start, k_start, grads = self._backward_call(dout, q, k, v, out, lse, call, packs[index][number], extra)
                dq.add(q_start, grads[0])
                dk.add(k_start, grads[1])
                dv.add(k_start, grads[2])
            if returning is not None:
                returning.wait()
            returning = exchange.give_back(index, (dk.result(), dv.result()), own)
        if returning is not None:
            returning.wait()
        return dq.result(q.dtype), own[0].result(kv[0].dtype), own[1].result(kv[1].dtype)

    def _backward_alone(
        self,
        dout: Tensor,
        q: Tensor,
        kv: Pair,
        out: Tensor,
        lse: Tensor,
        only: tuple[KernelCall, VarlenMetadata | None],
        extras: PositionContext | None,
        coming: Pending[Pair] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the only call gives; gradients of keys that came from other ranks go back to them."""
        keys = self._only_keys(kv, "backward", coming)
        _, _, (dq, dk, dv) = self._backward_call(dout, q, *keys, out, lse, *only, extras)
        if keys is not kv:
            own = GradSum(kv[0], self.plan.k_parts), GradSum(kv[1], self.plan.k_parts)
            self.exchange.give_back(0, (dk, dv), own).wait()
            dk, dv = own[0].result(), own[1].result()
        return dq.to(q.dtype).contiguous(), dk.to(kv[0].dtype).contiguous(), dv.to(kv[1].dtype).contiguous()

    def _only_call(self, q_BSHD: Tensor) -> tuple[KernelCall, VarlenMetadata | None] | None:
        """The call of a plan that has no other, if it covers all queries and all keys of its step; what it returns is the result.

        A packed call covers everything: it gives rows in no segment out 0 and lse -inf, and keys in none gradients 0.
        """
        steps = self.plan.steps
        if len(steps) != 1 or len(steps[0].calls) != 1:
            return None
        call = steps[0].calls[0]
        if len(call.segments) == 1 and len(self.plan.problem.bounds) == 1:
            _, q0, q1, k0, k1 = call.segments[0]
            return (call, None) if q1 - q0 == q_BSHD.shape[1] and k1 - k0 == steps[0].rows else None
        return call, self._packs(q_BSHD)[0][0]

    def _only_keys(self, kv: Pair, direction: Direction, coming: Pending[Pair] | None) -> Pair:
        """The keys of the only step: `kv` itself where they are all of this rank's and no other rank takes part."""
        if coming is None:
            if self.plan.problem.world == 1 and self.plan.steps[0].keys == ((0, 0, kv[0].shape[1]),):
                return kv
            coming = self.exchange.fetch(0, kv, direction)
        return coming.wait()

    def _only_extras(self, device: torch.device, seed: int) -> PositionContext | None:
        extras = self._extras(device, seed)
        return None if extras is None else extras(0, 0)

    def _packs(self, q_BSHD: Tensor) -> tuple[tuple[VarlenMetadata | None, ...], ...]:
        return _packings(self.plan.problem, self.plan.rank, q_BSHD.shape[0], q_BSHD.device)

    def _extras(self, device: torch.device, seed: int) -> Callable[[int, int], PositionContext] | None:
        """What makes the extras of a call from the numbers of its step and of the call in it; None where no call needs any."""
        if not self.options.dropout_p and self.alibi is None:
            return None
        rank, kernel = self.plan.rank, self.kernel
        first_calls = [0, *accumulate(len(step.calls) for step in self.plan.steps)]
        reads_positions = self.alibi is not None or kernel.hashes_positions
        queries, keys = _positions(self.plan.problem, rank, device) if reads_positions else (None, None)

        def of_call(index: int, number: int) -> PositionContext:
            own_seed = seed
            if not kernel.hashes_positions:  # equal seeds would give every call and rank the same mask
                own_seed = number_of(repr((seed, rank, first_calls[index] + number, self.origin)))
            return PositionContext(self.alibi, own_seed, queries, None if keys is None else keys[index], self.origin)

        return of_call

    def _forward_call(
        self, q: Tensor, k: Tensor, v: Tensor, call: KernelCall, pack: VarlenMetadata | None, extras: PositionContext | None
    ) -> tuple[int, int, Result]:
        """First and last row, out and lse of one call."""
        if pack is None:
            _, q0, q1, k0, k1 = call.segments[0]
            part = None if extras is None else extras.part(slice(q0, q1), slice(k0, k1))
            blocks = _rows(q, q0, q1), _rows(k, k0, k1), _rows(v, k0, k1)
            return q0, q1, self.kernel.forward(*blocks, call.window, self.options, part)
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
        call: KernelCall,
        pack: VarlenMetadata | None,
        extras: PositionContext | None,
    ) -> tuple[int, int, tuple[Tensor, Tensor, Tensor]]:
        """First query and key row, and the gradients of one call."""
        if pack is None:
            _, q0, q1, k0, k1 = call.segments[0]
            part = None if extras is None else extras.part(slice(q0, q1), slice(k0, k1))
            blocks = _rows(dout, q0, q1), _rows(q, q0, q1), _rows(k, k0, k1), _rows(v, k0, k1), _rows(out, q0, q1)
            lse = lse if q1 - q0 == q.shape[1] else lse[:, :, q0:q1]
            return q0, k0, self.kernel.backward(*blocks, lse, call.window, self.options, part)
        flat_dout, flat_q, flat_k, flat_v, flat_out = (x.flatten(0, 1) for x in (dout, q, k, v, out))
        inputs = flat_dout, flat_q, flat_k, flat_v, flat_out, lse.transpose(0, 1).flatten(1)
        grads = self.kernel.backward_packed(*inputs, pack, call.window, self.options, extras)
        dq, dk, dv = (grad.unflatten(0, x.shape[:2]) for grad, x in zip(grads, (q, k, v), strict=True))
        return 0, 0, (dq, dk, dv)

    def _visits(
        self, exchange: Exchange, kv: Pair, direction: Direction, coming: Pending[Pair] | None
    ) -> Iterator[tuple[int, Pair]]:
        """Each step's keys in the order of the pass, the next step's transfer already under way."""
        order = self.forward_order if direction == "forward" else self.backward_order
        pending = exchange.fetch(order[0], kv, direction) if order and coming is None else coming
        for place, index in enumerate(order):
            assert pending is not None, "every step but the first is fetched one step ahead"
            ahead = exchange.fetch(order[place + 1], kv, direction) if place + 1 < len(order) else None
            yield index, pending.wait()
            pending = ahead


def _rows(x_BSHD: Tensor, start: int, stop: int) -> Tensor:
    """Rows [start, stop); the tensor itself where those are all, since a slice costs the host more than the question."""
    return x_BSHD if stop - start == x_BSHD.shape[1] else x_BSHD[:, start:stop]


_Packings = tuple[tuple[VarlenMetadata | None, ...], ...]
_Positions = tuple[Tensor, tuple[Tensor, ...]]


def _packed_bytes(packings: _Packings, problem: AttentionProblem, *_others: object) -> int:
    """Spans are four integers in a tuple each; the cumulative lengths lie on the device."""
    packs = [pack for step in packings for pack in step if pack is not None]
    spans = sum(len(pack.spans) for pack in packs)
    return problem.nbytes + 500 * len(packs) + 224 * spans + sum(pack.cu_q.nbytes + pack.cu_k.nbytes for pack in packs)


def _position_bytes(positions: _Positions, problem: AttentionProblem, *_others: object) -> int:
    queries, keys = positions
    return problem.nbytes + queries.nbytes + sum(each.nbytes for each in keys)


@cached("segments of packed calls", most_bytes=8 << 20, most_entries=32, size=_packed_bytes)
def _packings(problem: AttentionProblem, rank: int, batch: int, device: torch.device) -> _Packings:
    """For each call of each step the packing of a batch, None where one segment goes to the kernel as a dense block."""
    q_rows, steps = problem.q_rows(rank), plan(problem, rank).steps
    return tuple(
        tuple(_packing(call, len(problem.bounds), batch, q_rows, step.rows, device) for call in step.calls) for step in steps
    )


def _packing(call: KernelCall, doc_rows: int, batch: int, q_rows: int, k_rows: int, device: torch.device) -> VarlenMetadata | None:
    if doc_rows == 1 and len(call.segments) == 1:
        return None
    spans = [
        VarlenSegment(row * q_rows + s.q0, row * q_rows + s.q1, row * k_rows + s.k0, row * k_rows + s.k1)
        for row in range(batch)
        for s in call.segments
        if doc_rows == 1 or s.row == row
    ]
    return VarlenMetadata.of(spans, batch * q_rows, batch * k_rows, device)


@cached("positions for dropout and ALiBi", most_bytes=16 << 20, most_entries=32, size=_position_bytes)
def _positions(problem: AttentionProblem, rank: int, device: torch.device) -> _Positions:
    """Positions of this rank's queries, and of the keys in each step's buffer."""
    q_positions, k_positions = plan(problem, rank).positions
    keys = tuple(torch.tensor(positions, dtype=torch.int64, device=device) for positions in k_positions)
    return torch.tensor(q_positions, dtype=torch.int64, device=device), keys
