"""Move keys out to where they are needed, and gradients back to where the keys came from.

per rank   k_BSHD and v_BSHD (B, Sk/W, Hk, D and Dv); Sk/W is this rank's share
fetch      the keys of one step, in the order of `step.keys`; K and V travel in their own dtype
give back  dK and dV of the step's keys, to the peers they came from: in the dtype the kernel returned them in, where one call
           made them, and summed in float32 where several did
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from dtensor_ring.comm import Message, Pending, Transfers, Transport
from dtensor_ring.ops.dtypes import accumulate_dtype
from dtensor_ring.ops.executors.collective import gather, scatter
from dtensor_ring.ops.executors.gradients import GradSum
from dtensor_ring.ops.executors.parts import Indexed
from dtensor_ring.ops.executors.relays import add_returned, own_sends, with_passed_on, with_return_buffers
from dtensor_ring.ops.executors.routes import Own, Route, Slot, Sums, routes
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.schedule import KeySend, Plan

Pair = tuple[Tensor, Tensor]
Direction = Literal["forward", "backward"]
Arrived = Mapping[int, Pair]  # by step: its keys and values, or their gradients
_NOTHING: Arrived = MappingProxyType({})


class Activity(NamedTuple):
    """What a transfer is part of.

    It is a value and not a text, since every transfer makes one, and the text is needed only where a transfer fails.
    """

    problem: AttentionProblem
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
        plan: which keys go where.
        transport: how to exchange.
        grad_dtype: the dtype of the kernel's gradients for keys of a dtype.
    """

    plan: Plan
    transport: Transport
    grad_dtype: Callable[[torch.dtype], torch.dtype]

    def fetch(self, index: int, kv: Pair, direction: Direction, arrived: Arrived = _NOTHING) -> Pending[Pair]:
        """Start to send what others need in this step and to receive what this rank needs.

        `arrived` has the keys of earlier steps, as far as this step passes them on.
        """
        if self._is_own(index):
            return Pending.ready(kv)
        with self.transport.during(Activity(self.plan.problem, direction, "keys", index, len(self.plan.steps))):
            return self._fetch(index, kv, arrived)

    def give_back(self, index: int, grads: Pair, own: GradSum, waiting: Arrived = _NOTHING) -> Pending[None]:
        """Start to return the gradients of a step's keys to the peers they came from.

        Once it is over, `own` holds what this rank's keys got in the step. What the keys got that this rank passed on is added, in
        place, to the gradients of the steps in which they came: `waiting` has them, and they must not have been given back yet.
        """
        if self._is_own(index):
            own.add(0, grads)
            return Pending.ready(None)
        with self.transport.during(Activity(self.plan.problem, "backward", "gradients", index, len(self.plan.steps))):
            if self.plan.problem.collective:
                return scatter(self.plan, self.transport, grads, own)
            return self._give_back(index, grads, own, waiting)

    def has_peers(self, index: int) -> bool:
        """Whether a step's keys come from other ranks, or go to them."""
        todo = self.plan
        return todo.problem.collective or bool(todo.sends[index]) or any(keys.owner != todo.rank for keys in todo.steps[index].keys)

    def _is_still(self, index: int) -> bool:
        """Whether nothing travels in a step on any rank, and so no rank takes part in an exchange."""
        return index == 0 and self.plan.begins_alone

    def _is_own(self, index: int) -> bool:
        """Whether besides a step has just this rank's keys as they lie: their way is short, since every pass has such a step."""
        todo = self.plan
        if not self._is_still(index) or len(todo.steps[0].keys) != 1 or todo.relays:
            return False
        _, start, stop, _ = todo.steps[0].keys[0]
        return start == 0 and stop == todo.problem.k_local(todo.rank)

    def _fetch(self, index: int, kv: Pair, arrived: Arrived) -> Pending[Pair]:
        sends, rank, transport = self.plan.sends[index], self.plan.rank, self.transport
        if self.plan.problem.collective:
            return gather(self.plan, transport, kv)
        route = self._route(index, kv[0])
        # Buffers are made before the transfer starts and belong to it until `finish`, on both sides: a backend reads and writes
        # them at any time in between, so that memory given back or changed earlier would end up in another tensor.
        relays = self.plan.relays
        own = own_sends(sends) if relays else sends
        k_taken, v_taken = (_taken(own, route, x) for x in kv)
        if relays:
            k_taken = with_passed_on(self.plan, sends, k_taken, {step: k for step, (k, _) in arrived.items()})
            v_taken = with_passed_on(self.plan, sends, v_taken, {step: v for step, (_, v) in arrived.items()})
        (k_slots, k_keys), (v_slots, v_keys) = (_landing(transport, rank, route, x) for x in kv)
        # Own keys never pass through the transport: they are copied into the key buffer, or are it.
        foreign = [slot for slot in route.slots if slot.owner != rank]
        pending = (
            Pending.ready(None)
            if self._is_still(index)
            else transport.exchange(
                _in_turn([send.rank for send in sends], k_taken, v_taken),
                _in_turn([slot.peer for slot in foreign], [k_slots[slot] for slot in foreign], [v_slots[slot] for slot in foreign]),
            )
        )

        # Keys are put in order after the wait, which on a GPU makes the current stream wait and not the host.
        def finish() -> Pair:
            pending.wait()
            return k_keys(), v_keys()

        return Pending(finish)

    def _give_back(self, index: int, grads: Pair, own: GradSum, waiting: Arrived) -> Pending[None]:
        sends, rank = self.plan.sends[index], self.plan.rank
        if self.plan.steps[index].sums:  # summed in float32, and rounded once, by their owner
            grads = _pair(grad.to(accumulate_dtype(grad.dtype)) for grad in grads)
        route = self._route(index, own.likes[0])
        foreign = [slot for slot in route.slots if slot.owner != rank]
        k_leaving, v_leaving = (_leaving(foreign, route, grad) for grad in grads)
        relays = self.plan.relays
        of_own = own_sends(sends) if relays else sends
        (k_buffers, v_buffers), add = self._returns(of_own, route, grads, own)
        if relays:
            k_buffers, v_buffers = (
                with_return_buffers(sends, buffers, partial(self._empty, like=like))
                for buffers, like in zip((k_buffers, v_buffers), own.likes, strict=True)
            )
        # The exchange of `_fetch` the other way round: what arrived there from a slot leaves for it, and what was sent comes back.
        pending = (
            Pending.ready(None)
            if self._is_still(index)
            else self.transport.exchange(
                _in_turn([slot.peer for slot in foreign], k_leaving, v_leaving),
                _in_turn([send.rank for send in sends], k_buffers, v_buffers),
            )
        )

        def finish() -> None:
            pending.wait()
            add()
            if relays:
                add_returned(self.plan, sends, k_buffers, {step: dk for step, (dk, _) in waiting.items()})
                add_returned(self.plan, sends, v_buffers, {step: dv for step, (_, dv) in waiting.items()})

        return Pending(finish)

    def _empty(self, tokens: int, sums: bool, like: Tensor) -> Tensor:
        """A buffer (B, tokens, Hk, D) for gradients: in the kernel's dtype, or float32 where they were summed."""
        dtype = accumulate_dtype(like.dtype) if sums else self.grad_dtype(like.dtype)
        return self.transport.empty((like.shape[0], tokens, *like.shape[2:]), like, dtype)

    def _route(self, index: int, x_BSHD: Tensor) -> Route:
        return routes(self.plan.problem, self.plan.rank, x_BSHD.shape[0], x_BSHD.device)[index]

    def _returns(
        self, sends: Sequence[KeySend], route: Route, grads: Pair, total: GradSum
    ) -> tuple[list[list[Tensor]], Callable[[], None]]:
        """Buffers of K and of V for what comes back of each send, and what adds them to the total.

        The own part of `grads` is added at once.
        """
        sums, own = route.sums, route.own
        if sums is None:
            if own is not None:
                total.add(own.start, grads if own.count == grads[0].shape[1] else _cut(grads, own.at, own.count))
            ranges = [send.ranges[0] for send in sends]
            # Each message is one range of this rank's keys: it is added as a slice and needs no index.
            buffers = [
                [self._empty(keys.size, send.sums, like) for send, keys in zip(sends, ranges, strict=True)] for like in total.likes
            ]
            # By rank and not by arrival or by distance in the ring: every run adds in one order.
            ascending = sorted(range(len(sends)), key=lambda i: sends[i].rank)

            def add() -> None:
                for i in ascending:
                    total.add(ranges[i].start, tuple(of_tensor[i] for of_tensor in buffers), owned=False)

            return buffers, add
        made = [self._landing(sends, sums, own, *pair) for pair in zip(grads, total.likes, strict=True)]
        wide = tuple(first for _, first, _ in made)
        narrow = tuple(rest for _, _, rest in made if rest is not None)
        indexed = Indexed(sums.low, sums.high, sums.index, sums.offsets, wide, narrow or None)
        return [buffers for buffers, _, _ in made], lambda: total.add_indexed(indexed)

    def _landing(
        self, sends: Sequence[KeySend], sums: Sums, own: Own | None, grad: Tensor, like: Tensor
    ) -> tuple[list[Tensor], Tensor, Tensor | None]:
        """Buffers for what comes back, as parts of one or two tensors (n, H, D) that sums are indexed in, and these."""
        narrow, wide = self.grad_dtype(like.dtype), accumulate_dtype(like.dtype)
        batch, _, *dims = like.shape
        mine, summed, others = (batch * size for size in sums.sizes)
        # What is not summed yet comes in the kernel's dtype, beside what is. Where there is one dtype there is one tensor.
        is_narrow = not summed and (own is None or grad.dtype == narrow)
        split = mine + summed + (others if is_narrow or narrow == wide else 0)
        first = self.transport.empty((split, *dims), like, narrow if is_narrow else wide)
        rest = None if split == mine + summed + others else self.transport.empty((others, *dims), like, narrow)
        if own is not None:
            _own_part(own.at, own.count, own.back, grad, first[:mine])
        buffers = []
        for send, at in zip(sends, sums.firsts, strict=True):
            size = sum(keys.size for keys in send.ranges)
            start, holder = batch * at, first
            if rest is not None and not send.sums:
                start, holder = start - split, rest
            buffers.append(holder[start : start + batch * size].view(batch, size, *dims))
        return buffers, first, rest


class Returns:
    """The return of gradients over a backward pass: at once where they go to the owners, at the end where others pass them on.

    A rank that passed keys on must have their gradients back before it returns its own of the same step, so those of relayed
    plans wait until all steps are computed, and go back in the opposite order. That keeps the gradients of all steps at a time.
    """

    def __init__(self, exchange: Exchange, own: GradSum, transfers: Transfers) -> None:
        self._exchange, self._own, self._transfers = exchange, own, transfers
        self._returning: Pending[None] | None = None
        self._waiting: dict[int, Pair] = {}

    def add(self, index: int, grads: Pair) -> None:
        """Take the gradients of a step's keys; the sum may take them over and change them."""
        if self._exchange.plan.relays:
            if self._exchange.plan.steps[index].sums:  # what others return for these keys is added in float32
                grads = _pair(grad.to(accumulate_dtype(grad.dtype)) for grad in grads)
            self._waiting[index] = grads
            return
        # The own keys' gradients, which come last, are there at once. They become the result, and what returns meanwhile is added
        # to them. In any other step all ranks wait for the return before it, also one that exchanges nothing in this step: a
        # transport may deliver only what is waited for, and ranks that wait in another order than others wait in a circle.
        if index == 0 and not self._exchange.has_peers(index):
            self._exchange.give_back(index, grads, self._own).wait()
            return
        # One return at a time is under way: its buffers, a step's keys in float32, are the most that a backward pass adds.
        if self._returning is not None:
            self._returning.wait()
            self._own.flush()
        self._returning = self._transfers.add(self._exchange.give_back(index, grads, self._own))

    def finish(self) -> None:
        """Return what still waits, and wait until this rank's keys have all of their gradients."""
        if self._returning is not None:
            self._returning.wait()
        # Latest step first: what comes back for keys that were passed on is added to the gradients of an earlier step, which must
        # not have left yet. Each return is waited for, since the next one may carry what it was added to.
        for index in reversed(self._waiting):
            self._exchange.give_back(index, self._waiting[index], self._own, self._waiting).wait()
            self._own.flush()


def _pair(tensors: Iterator[Tensor]) -> Pair:
    first, second = tensors
    return first, second


def _cut(tensors: Pair, start: int, count: int) -> Pair:
    return _pair(x[:, start : start + count] for x in tensors)


def _in_turn(peers: Sequence[int], keys: Sequence[Tensor], values: Sequence[Tensor]) -> list[Message]:
    """Make two messages for each peer, one with keys and one with values.

    Between two ranks the n-th message sent meets the n-th received, so both sides name peers and tensors in this same order.
    """
    return [Message(peer, x) for peer, k, v in zip(peers, keys, values, strict=True) for x in (k, v)]


def _taken(sends: Sequence[KeySend], route: Route, x_BSHD: Tensor) -> list[Tensor]:
    """The keys that each send carries, contiguous: one copy for all of them where some have several ranges.

    A slice that is contiguous is sent without a copy. It must stay as it is until the transfer is over, since a transport reads
    it as late as it likes: keys are inputs, which nobody writes to, and so are what sends of gradients carry, which the sum of a
    step gives away.
    """
    if route.take is None:
        return [x_BSHD[:, keys.start : keys.stop].contiguous() for send in sends for keys in send.ranges]
    return _split(x_BSHD, route.take, [sum(keys.size for keys in send.ranges) for send in sends])


def _leaving(peers: Sequence[Slot], route: Route, grad_BSHD: Tensor) -> list[Tensor]:
    """The gradients of each peer's keys, contiguous: one copy for all of them where a peer's keys are scattered."""
    if route.leave is None:
        return [grad_BSHD[:, slot.first : slot.first + slot.count].contiguous() for slot in peers]
    return _split(grad_BSHD, route.leave, [slot.count for slot in peers])


def _split(x_BSHD: Tensor, index: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    batch, _, *dims = x_BSHD.shape
    parts = x_BSHD.flatten(0, 1).index_select(0, index).split([batch * n for n in sizes])
    return [part.view(batch, n, *dims) for part, n in zip(parts, sizes, strict=True)]


def _landing(transport: Transport, rank: int, route: Route, x_BSHD: Tensor) -> tuple[dict[Slot, Tensor], Callable[[], Tensor]]:
    """Buffers for the keys of each slot but the own one, and what gives the step's key buffer once they are full.

    Where the order of arrival is that of the key buffer, peers' keys land in their place and only this rank's own are copied.
    """
    batch, _, *dims = x_BSHD.shape
    own, slots = route.own, route.slots
    foreign = [slot for slot in slots if slot.owner != rank]
    if not foreign:
        return {}, lambda: x_BSHD[:, :0] if own is None else _own_part(own.start, own.count, own.take, x_BSHD)
    # A message holds all batch rows of one peer, but the key buffer all peers' keys of one batch row after another: with several
    # batch rows, messages cannot land inside it.
    # With one slot its buffer is the key buffer, and nothing need be put together.
    if route.order is None and (batch > 1 or len(slots) == 1):
        apart = {slot: transport.empty((batch, slot.count, *dims), x_BSHD) for slot in foreign}
        if len(slots) == 1:
            return apart, lambda: apart[slots[0]]
        mine = [] if own is None else [_own_part(own.start, own.count, own.take, x_BSHD)]
        return apart, lambda: torch.cat([mine[0] if slot.owner == rank else apart[slot] for slot in slots], 1)
    total = sum(slot.count for slot in slots)
    landed = transport.empty((batch * total, *dims), x_BSHD)
    parts = dict(zip(slots, landed.split([batch * slot.count for slot in slots]), strict=True))
    if own is not None:
        home = next(slot for slot in slots if slot.owner == rank)
        _own_part(own.start, own.count, own.take, x_BSHD, parts[home])

    def keys() -> Tensor:
        flat = landed if route.order is None else landed.index_select(0, route.order)
        return flat.view(batch, total, *dims)

    return {slot: parts[slot].view(batch, slot.count, *dims) for slot in foreign}, keys


def _own_part(start: int, count: int, index: Tensor | None, x_BSHD: Tensor, target: Tensor | None = None) -> Tensor:
    """Keys [start, start + count), or those of an index, as (B, count, H, D); copied to a `target` of shape (B * count, H, D)."""
    batch, _, *dims = x_BSHD.shape
    if index is not None:
        part = x_BSHD.flatten(0, 1)
        # `out=` does not convert: gradients that are widened on their way into the sum take the copy below.
        if target is not None and target.dtype == part.dtype:
            torch.index_select(part, 0, index, out=target)
            return target.view(batch, count, *dims)
        part = part.index_select(0, index).view(batch, count, *dims)
    else:
        part = x_BSHD[:, start : start + count]
    return part if target is None else target.view(batch, count, *dims).copy_(part)
