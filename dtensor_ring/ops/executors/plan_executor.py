"""Walk a plan: fetch keys, call the kernel, merge; in backward also send gradients back to where the keys came from.

    per rank   q_BSHD (B, Sq/W, H, D), k_BSHD and v_BSHD (B, Sk/W, Hk, D and Dv); Sq/W, Sk/W are this rank's shares
    forward    each step receives the keys of `step.keys` and sends those of `plan.sends`: K and V in their own dtype, each
               rank in all `plan.key_tokens_sent * B * Hk * (D + Dv) * itemsize` bytes
    backward   the same keys again; then dK and dV of every fetched key go back to its owner in the dtype the kernel returned
               them in, where one call made them, and summed in float32 where several did

The transfer of one step runs while the step before computes, so two steps' keys exist at a time. The forward pass begins with
the rank's own keys; the backward pass ends with them, so that the last gradients travel while it still computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from dtensor_ring.cache import cached
from dtensor_ring.captures import kept_for_graphs
from dtensor_ring.comm import Pending, Transfers, Transport
from dtensor_ring.comm.rank_checks import number_of
from dtensor_ring.ops.block_kinds import is_varlen
from dtensor_ring.ops.dtypes import accumulate_dtype
from dtensor_ring.ops.executors.exchange import Direction, Exchange, Pair, Returns
from dtensor_ring.ops.executors.gradients import GradSum
from dtensor_ring.ops.executors.merge import OutputSum, sink_gradient
from dtensor_ring.ops.executors.parts import OutputPart
from dtensor_ring.ops.executors.protocol import AttentionExecutor, shape_of
from dtensor_ring.ops.executors.step_streams import StepStreams
from dtensor_ring.ops.executors.visits import Visits
from dtensor_ring.ops.kernels import (
    Block,
    Gradients,
    Kernel,
    PositionContext,
    Saved,
    SoftmaxParams,
    VarlenMetadata,
    VarlenSegment,
)
from dtensor_ring.planning.costs import RankCost, cost_of_plan
from dtensor_ring.planning.kernel_calls import KernelCall
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.schedule import Plan, plan


@dataclass(frozen=True, slots=True)
class Executor(AttentionExecutor):
    """One attention on one rank, by its plan.

    Attributes:
        plan: what to do.
        transport: how to exchange.
        kernel: what computes a block.
        softmax: scale, softcap, dropout.
        sinks: a score (H,) that every query of a head also sees, with no value; None for none.
        alibi: slopes (H,) or (B, H), float32; None for none.
        origin: first batch row and head of this rank's tensors in the whole batch: dropout masks depend on them.
    """

    plan: Plan
    transport: Transport
    kernel: Kernel
    softmax: SoftmaxParams
    sinks: Tensor | None = None
    alibi: Tensor | None = None
    origin: tuple[int, int] = (0, 0)

    @property
    def exchange(self) -> Exchange:
        """The exchange of this plan over this transport, which moves keys and gradients."""
        return Exchange(self.plan, self.transport, self.kernel.grad_dtype)

    @property
    def forward_order(self) -> list[int]:
        """The numbers of the steps in the order in which `forward` walks them."""
        return list(range(len(self.plan.steps)))

    @property
    def backward_order(self) -> list[int]:
        """The numbers of the steps in the order in which `backward` walks them: this rank's own keys come last."""
        return [*range(1, len(self.plan.steps)), 0] if self.plan.steps else []

    def explain(self, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> RankCost:
        """Work out what the plan costs on these tensors."""
        return cost_of_plan(self.plan, shape_of(q_BSHD, k_BSHD, v_BSHD, self.kernel))

    def forward(
        self, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, seed: int = 0, coming: Pending[Pair] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Out (B, Sq/W, H, Dv) in the dtype of q, and lse (B, H, Sq/W) in float32 (float64 for float64).

        `seed` makes the dropout mask: the same seed the same mask, in `backward` too. `coming` is the first step's `fetch`, if it
        was started before.
        """
        # With one call there is nothing to merge: its tensors are the result, and sums, fills and casts would only cost time.
        only = self._only_call(q_BSHD, seed)
        if only is not None:
            k, v = self._only_keys((k_BSHD, v_BSHD), "forward", coming)
            part = self._forward_call(q_BSHD, k, v, *only)
            if self.sinks is None:
                return part.out.to(q_BSHD.dtype).contiguous(), part.lse.contiguous()
            alone = OutputSum(q_BSHD, v_BSHD.shape[-1], 1, 1, self.sinks)
            alone.add(part)
            return alone.result()
        total = OutputSum(q_BSHD, v_BSHD.shape[-1], self.plan.q_parts, self.plan.calls, self.sinks)
        block_of = self._blocks(q_BSHD, seed)
        with Transfers() as transfers, StepStreams(self.plan, q_BSHD, self.kernel.name, begun=coming is not None) as streams:
            visits = Visits(self.exchange, self.forward_order, "forward", transfers, streams)
            visits.begin((k_BSHD, v_BSHD), coming)
            for index in self.forward_order:
                calls = self.plan.steps[index].calls
                with streams.of_step(index):
                    keys = visits.keys(index)
                    streams.divide(index, len(calls))
                    with visits.computing(index):
                        for number, call in enumerate(calls):
                            with streams.of_call(index, number):
                                part = self._forward_call(q_BSHD, *keys, call, block_of(index, number))
                            total.add(part, more=streams.are_two or number + 1 < len(calls))
        return total.result()

    def backward(
        self, saved: Saved, dout_BSHD: Tensor, seed: int = 0, coming: Pending[Pair] | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """dq, dk, dv of this rank's shares in the dtypes of q, k, v, and this rank's part of dsinks (H,)."""
        # Out and lse are those of the whole attention, sinks included: from them a kernel recomputes each weight as it finally was,
        # so that the gradients of single blocks just add up.
        only = self._only_call(saved.q, seed)
        if only is not None:
            dq, dk, dv = self._backward_alone(saved, dout_BSHD, *only, coming)
        else:
            dq, dk, dv = self._backward(saved, dout_BSHD, seed, coming)
        dsinks = None if self.sinks is None else sink_gradient(dout_BSHD, saved.out, saved.lse, self.sinks)
        return dq, dk, dv, dsinks

    def _backward(self, saved: Saved, dout: Tensor, seed: int, coming: Pending[Pair] | None) -> Gradients:
        """The sums over all steps and calls; `saved` has this rank's own keys."""
        q, own_k, own_v, out, lse = saved
        of_q, own = GradSum((q,)), GradSum((own_k, own_v))
        block_of = self._blocks(q, seed)
        with Transfers() as transfers, StepStreams(self.plan, q, self.kernel.name, begun=coming is not None) as streams:
            returns = Returns(self.exchange, own, transfers)
            visits = Visits(self.exchange, self.backward_order, "backward", transfers, streams)
            visits.begin((own_k, own_v), coming)
            for index in self.backward_order:
                with streams.of_step(index):
                    k, v = visits.keys(index)
                    with visits.computing(index):
                        step, of_step, of_keys = self.plan.steps[index], Saved(q, k, v, out, lse), GradSum((k, v))
                        for number, call in enumerate(step.calls):
                            q_start, k_start, grads = self._backward_call(of_step, dout, call, block_of(index, number))
                            of_q.add(q_start, grads[:1])
                            of_keys.add(k_start, grads[1:])
                        # Where `sums` says that some key of this step gets several gradients, their sum stays in float32: what
                        # leaves here is added to other ranks' parts, and is rounded only once, by the owner.
                        wide, narrow = accumulate_dtype(k.dtype), self.kernel.grad_dtype(k.dtype)
                        dk, dv = of_keys.result(wide if step.sums else narrow)
                    if not index:
                        streams.join()  # what the own keys got is added to what the other step gave them
                    returns.add(index, (dk, dv))
                # Between two steps parts may wait for the last one: they take no more memory than a sum in float32. Between more
                # they would pile up.
                if index and len(self.plan.steps) > 2:
                    of_q.flush()
            returns.finish()
        (dq,), (dk, dv) = of_q.result(q.dtype), own.result(own_k.dtype)
        return dq, dk, dv

    def _backward_alone(
        self, saved: Saved, dout: Tensor, call: KernelCall, block: Block, coming: Pending[Pair] | None
    ) -> Gradients:
        """Give the gradients of a plan's only call; those of keys that came from other ranks go back to them."""
        q, k, v, out, lse = saved
        kv = k, v
        keys = self._only_keys(kv, "backward", coming)
        if keys is not kv:
            saved = Saved(q, *keys, out, lse)
        _, _, (dq, dk, dv) = self._backward_call(saved, dout, call, block)
        if keys is not kv:
            # The keys of the call were put together from several ranks, so dK and dV go back to them, and this rank gets the sum of
            # what its own keys got on all ranks.
            own = GradSum(kv)
            self.exchange.give_back(0, (dk, dv), own).wait()
            dk, dv = own.result(k.dtype)
        return dq.to(q.dtype).contiguous(), dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous()

    def _only_call(self, q_BSHD: Tensor, seed: int) -> tuple[KernelCall, Block] | None:
        """The call of a plan that has no other, if it covers all queries and all keys of its step; what it returns is the result.

        A varlen call covers also what lies between segments: it gives tokens in none out 0 and lse -inf, and keys in none
        gradients 0.
        """
        steps = self.plan.steps
        if len(steps) != 1 or len(steps[0].calls) != 1:
            return None
        call, (batch, tokens) = steps[0].calls[0], q_BSHD.shape[:2]
        varlen, whole = is_varlen(call, self.plan.problem), ((0, tokens), (0, steps[0].key_count))
        if _extent(call, batch, whole, varlen=varlen) != whole:
            return None
        if varlen:
            return call, self._blocks(q_BSHD, seed)(0, 0)
        # a dense block needs nothing that is looked up: the look-up would be most of what the executor costs the host here
        positions_of = self._positions(q_BSHD.device, seed)
        return call, self._block(call, batch, None, None if positions_of is None else positions_of(0, 0))

    def _only_keys(self, kv: Pair, direction: Direction, coming: Pending[Pair] | None) -> Pair:
        """The keys of the only step: `kv` itself where they are all of this rank's and no other rank takes part."""
        # On one rank the step may still leave out keys or take them in another order: only the whole shard as it lies is no fetch.
        if coming is None:
            if self.plan.problem.world == 1 and self.plan.steps[0].keys == ((0, 0, kv[0].shape[1], 0),):
                return kv
            coming = self.exchange.fetch(0, kv, direction)
        return coming.wait()

    def _blocks(self, q_BSHD: Tensor, seed: int) -> Callable[[int, int], Block]:
        """What makes the block of a call from the numbers of its step and of the call in it."""
        steps, device = self.plan.steps, q_BSHD.device
        varlen = _varlen_metadata(self.plan.problem, self.plan.rank, q_BSHD.shape[0], device)
        positions_of = self._positions(device, seed)

        def of_call(index: int, number: int) -> Block:
            positions = None if positions_of is None else positions_of(index, number)
            return self._block(steps[index].calls[number], q_BSHD.shape[0], varlen[index][number], positions)

        return of_call

    def _block(self, call: KernelCall, batch: int, varlen: VarlenMetadata | None, positions: PositionContext | None) -> Block:
        """The block of a call, given the positions of all queries and of all keys of its step."""
        if positions is not None and (varlen is None or batch == 1):
            positions = positions.part(slice(*call.queries), slice(*call.keys))
        return Block(call.window, self.softmax, varlen, positions)

    def _positions(self, device: torch.device, seed: int) -> Callable[[int, int], PositionContext] | None:
        """What gives the positions of a call from the numbers of its step and of the call in it; None where nothing needs them."""
        if not self.softmax.dropout_p and self.alibi is None:
            return None
        rank, kernel = self.plan.rank, self.kernel
        first_calls = [0, *accumulate(len(step.calls) for step in self.plan.steps)]
        reads_positions = self.alibi is not None or kernel.hashes_positions
        queries, keys = _positions(self.plan.problem, rank, device) if reads_positions else (None, None)

        def of_call(index: int, number: int) -> PositionContext:
            own_seed = seed
            # Equal seeds would give every call and rank the same mask. Calls are numbered as the plan has them and not as a pass
            # reaches them, since backward walks the steps in another order and must draw the same masks.
            if not kernel.hashes_positions:
                own_seed = number_of(repr((seed, rank, first_calls[index] + number, self.origin)))
            return PositionContext(self.alibi, own_seed, queries, None if keys is None else keys[index], self.origin)

        return of_call

    def _forward_call(self, q: Tensor, k: Tensor, v: Tensor, call: KernelCall, block: Block) -> OutputPart:
        """Run one call forward; give its first query, and out and lse."""
        (q0, q1), (k0, k1) = _extent(call, q.shape[0], ((0, q.shape[1]), (0, k.shape[1])), varlen=block.varlen is not None)
        # a slice costs the host more than the question whether one is needed
        q = q if q1 - q0 == q.shape[1] else q[:, q0:q1]
        if k1 - k0 != k.shape[1]:
            k, v = k[:, k0:k1], v[:, k0:k1]
        if block.varlen is None:
            return OutputPart(q0, *self.kernel.forward(q, k, v, block))
        out, lse = self.kernel.forward(_joined(q), _joined(k), _joined(v), block)
        return OutputPart(q0, _apart(out, q), lse[None] if q.shape[0] == 1 else lse.unflatten(1, q.shape[:2]).transpose(0, 1))

    def _backward_call(self, saved: Saved, dout: Tensor, call: KernelCall, block: Block) -> tuple[int, int, Gradients]:
        """Run one call backward; give its first query, its first key, and the gradients of its queries and keys."""
        q, k, v, out, lse = saved
        (q0, q1), (k0, k1) = _extent(call, q.shape[0], ((0, q.shape[1]), (0, k.shape[1])), varlen=block.varlen is not None)
        if k1 - k0 != k.shape[1]:
            k, v = k[:, k0:k1], v[:, k0:k1]
            saved = Saved(q, k, v, out, lse)
        if q1 - q0 != q.shape[1]:
            q, out, lse, dout = q[:, q0:q1], out[:, q0:q1], lse[:, :, q0:q1], dout[:, q0:q1]
            saved = Saved(q, k, v, out, lse)
        if block.varlen is None:
            return q0, k0, self.kernel.backward(saved, dout, block)
        # A varlen call counts tokens through all batch rows. Its lse is (H, T), so heads are moved ahead of the batch rows first.
        of_rows = lse[0] if q.shape[0] == 1 else lse.transpose(0, 1).flatten(1)
        joined = Saved(_joined(q), _joined(k), _joined(v), _joined(out), of_rows)
        dq, dk, dv = self.kernel.backward(joined, _joined(dout), block)
        return q0, k0, (_apart(dq, q), _apart(dk, k), _apart(dv, v))


def _joined(x_BSHD: Tensor) -> Tensor:
    """All batch rows one after the other (B * S, H, D), as varlen calls take them."""
    return x_BSHD[0] if x_BSHD.shape[0] == 1 else x_BSHD.flatten(0, 1)  # one row is taken in half the time


def _apart(x_THD: Tensor, like: Tensor) -> Tensor:
    """The batch rows of `like` (B, S, ...), put together before."""
    return x_THD[None] if like.shape[0] == 1 else x_THD.unflatten(0, like.shape[:2])


_Extent = tuple[tuple[int, int], tuple[int, int]]


def _extent(call: KernelCall, batch: int, whole: _Extent, *, varlen: bool) -> _Extent:
    """From where to where a call reaches in the queries and keys of a step, `whole`: from its first segment to its last.

    A varlen call on several batch rows counts through all of them, and a part of each would have to be copied.
    """
    return whole if varlen and batch > 1 else (call.queries, call.keys)


_Varlen = tuple[tuple[VarlenMetadata | None, ...], ...]
_Positions = tuple[Tensor, tuple[Tensor, ...]]


def _varlen_bytes(of_steps: _Varlen, problem: AttentionProblem, *_others: object) -> int:
    """Segments are four integers in a tuple each; the cumulative lengths lie on the device."""
    kept = [varlen for step in of_steps for varlen in step if varlen is not None]
    segments = sum(len(varlen.segments) for varlen in kept)
    return problem.nbytes + 500 * len(kept) + 224 * segments + sum(varlen.cu_q.nbytes + varlen.cu_k.nbytes for varlen in kept)


def _position_bytes(positions: _Positions, problem: AttentionProblem, *_others: object) -> int:
    queries, keys = positions
    return problem.nbytes + queries.nbytes + sum(each.nbytes for each in keys)


# Kept, since the cumulative lengths lie on the device: made for each call they would be a copy there for which the host waits.
@kept_for_graphs
@cached("segments of packed calls", most_bytes=8 << 20, most_entries=32, size=_varlen_bytes)
def _varlen_metadata(problem: AttentionProblem, rank: int, batch: int, device: torch.device) -> _Varlen:
    """For each call of each step its segments in a whole batch; None for a dense block."""
    q_tokens, steps = problem.q_local(rank), plan(problem, rank).steps

    def of_call(call: KernelCall, keys: int) -> VarlenMetadata | None:
        if not is_varlen(call, problem):
            return None
        if batch > 1:
            return VarlenMetadata.of(_segments(call, problem, batch, (q_tokens, keys)), batch * q_tokens, batch * keys, device)
        # What lies before the first segment and after the last is left out, so that nothing is merged and added up there.
        (q0, q1), (k0, k1) = call.queries, call.keys
        inside = [VarlenSegment(s.q0 - q0, s.q1 - q0, s.k0 - k0, s.k1 - k0) for s in call.segments]
        return VarlenMetadata.of(inside, q1 - q0, k1 - k0, device)

    return tuple(tuple(of_call(call, step.key_count) for call in step.calls) for step in steps)


def _segments(call: KernelCall, problem: AttentionProblem, batch: int, tokens: tuple[int, int]) -> list[VarlenSegment]:
    """A call's segments, counted over the flattened batch, which has `tokens` queries and keys in each row.

    Documents that are the same in all rows are planned once: their segments are repeated here for every row.
    """
    repeated, (q, k) = len(problem.bounds) == 1, tokens
    return [
        VarlenSegment(row * q + s.q0, row * q + s.q1, row * k + s.k0, row * k + s.k1)
        for row in range(batch)
        for s in call.segments
        if repeated or s.row == row
    ]


@kept_for_graphs
@cached("positions for dropout and ALiBi", most_bytes=16 << 20, most_entries=32, size=_position_bytes)
def _positions(problem: AttentionProblem, rank: int, device: torch.device) -> _Positions:
    """Positions of this rank's queries, and of the keys in each step's buffer."""
    q_positions, k_positions = plan(problem, rank).positions
    keys = tuple(torch.tensor(positions, dtype=torch.int64, device=device) for positions in k_positions)
    return torch.tensor(q_positions, dtype=torch.int64, device=device), keys
