"""What a plan takes of a machine, in seconds, without running it: the work of `costs` by the figures of a `CostModel`.

    zigzag, 8 ranks, "ring" in 2 stages, forward
    link     |  2 ranks' keys  |      5 ranks' keys           |
    GPU      | own keys | (waits) | 2 ranks' keys | (waits)   | 5 ranks' keys ... |

A transfer starts when the step before the one ahead of it has been computed, and after the transfers before it. The backward pass
walks the rank's own keys last, so it waits for the first keys, and the gradients of a stage travel while the next one computes.
Where launching takes the host longer than computing takes the GPU, the host's time counts.

    the same in 1 stage, whose two steps are computed on two streams
    link     |  7 ranks' keys  |
    GPU      | own keys | own keys beside 7 ranks' keys, which go first | own keys: what is left |

Both streams start at once, and forward that of the own keys takes all but the first of several calls on the others'. Alone, a
call leaves multiprocessors idle while its longest rows of blocks end, for half the time of one on average; beside another call it
does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from dtensor_ring.planning.cost_model import BLOCK, CostModel, KernelSpeed, Link, Speed, Work
from dtensor_ring.planning.costs import AttentionShape, cost_by_heads
from dtensor_ring.planning.kernel_calls import KernelCall, Step
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.schedule import KeySend, Plan, plan


class Seconds(NamedTuple):
    """What the passes of one attention take one rank."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        """Forward and backward, as a training step has them."""
        return self.forward + self.backward


class Leg(NamedTuple):
    """One step of a pass, in seconds.

    Attributes:
        fetch: the transfer of its keys.
        compute: its kernel calls, with what is merged and copied for them.
        give_back: the transfer of its keys' gradients; 0 in a forward pass.
        add: adding the gradients that come back.
        longest: the longest row of blocks of its calls, which one multiprocessor computes alone.
    """

    fetch: float
    compute: float
    give_back: float = 0.0
    add: float = 0.0
    longest: float = 0.0


def walked(legs: Sequence[Leg]) -> float:
    """The time of a pass over its steps, in the order in which it walks them."""
    gpu = link = 0.0
    arrivals = [0.0] * len(legs)
    returned = pending = 0.0  # when the gradients under way have come back, and what adding them takes
    for index, leg in enumerate(legs):
        # As executors do it: the next step's keys are asked for before this step's are waited for.
        for ahead in range(0 if index == 0 else index + 1, min(index + 2, len(legs))):
            if legs[ahead].fetch:
                link = max(link, gpu) + legs[ahead].fetch
                arrivals[ahead] = link
        gpu = max(gpu, arrivals[index]) + leg.compute
        if leg.give_back or leg.add:
            gpu = max(gpu, returned) + pending
            link = max(link, gpu) + leg.give_back
            returned, pending = link, leg.add
    return max(gpu, returned) + pending


def beside(own: Leg, others: Leg) -> float:
    """The time of a pass whose two steps are computed on two streams, on that of other ranks' keys first where they have come."""
    # Each call fills the other's end, so half of a longest row is won; never more than what there is to fill it with.
    won = min(max(own.longest, others.longest), own.compute, others.compute) / 2
    computed = others.fetch + others.compute
    gpu = max(computed, own.compute + others.compute - won)
    return max(gpu, computed + others.give_back) + others.add


def won_beside(calls: Sequence[float], longest: float) -> float:
    """What is won where the calls of a step run beside each other: each but one fills half of a longest row, if it has as much.

    Forward, two streams share the calls on other ranks' keys.
    """
    return sum(min(longest, seconds) / 2 for seconds in sorted(calls)[:-1])


@dataclass(frozen=True, slots=True)
class Predictor:
    """Times of plans on one kind of machine.

    Attributes:
        model: the figures.
        kernel: the kernel's name.
        shape: sizes of the tensors on one rank.
        link: how ranks exchange; None where nothing is known of it, and transfers take no time.
    """

    model: CostModel
    kernel: str
    shape: AttentionShape
    link: Link | None = None

    def rank(self, problem: AttentionProblem, rank: int) -> Seconds:
        """What one rank takes for an attention, alone on its GPU.

        Raises:
            ValueError: the heads cannot be shared out for "ulysses", or the layout cannot be laid out.
        """
        if problem.strategy == "ulysses" and problem.world > 1:
            return self._by_heads(problem, rank)
        return self.plan(plan(problem, rank))

    def plan(self, each: Plan) -> Seconds:
        """What the rank of a plan takes."""
        steps, is_two = range(len(each.steps)), each.is_on_two_streams(self.kernel)
        forward = [self._forward(each, index, at_once=is_two) for index in steps]
        backward = [self._backward(each, index) for index in steps]
        return self.with_host(Seconds(*self.passes(forward, backward, on_two_streams=is_two)), len(steps))

    def passes(self, forward: Sequence[Leg], backward: Sequence[Leg], *, on_two_streams: bool) -> tuple[float, float]:
        """The times of both passes from their steps, this rank's own keys first."""
        if on_two_streams:
            return beside(*forward), beside(*backward)
        return walked(forward), walked([*backward[1:], *backward[:1]])

    def with_host(self, seconds: Seconds, steps: int) -> Seconds:
        """The same on a host that needs time to launch the steps."""
        model = self.model
        return Seconds(
            max(seconds.forward, steps * model.host_forward * 1e-9), max(seconds.backward, steps * model.host_backward * 1e-9)
        )

    def _by_heads(self, problem: AttentionProblem, rank: int) -> Seconds:
        sent = cost_by_heads(problem, rank, self.shape)
        heads = self.shape._replace(heads=self.shape.heads // problem.world, kv_heads=max(1, self.shape.kv_heads // problem.world))
        alone = replace(self, shape=heads, link=None).plan(plan(problem.planned, 0))
        # Heads change places before and after the attention of one device: nothing hides these transfers.
        near = 1.0 if self.link is None or not self.link.host else (self.link.host - 1) / max(1, problem.world - 1)
        moved = [
            0.0 if self.link is None else self.link.seconds(near * b, (1 - near) * b)
            for b in (sent.forward.bytes, sent.backward.bytes)
        ]
        return Seconds(alone.forward + moved[0], alone.backward + moved[1])

    def _forward(self, each: Plan, index: int, *, at_once: bool) -> Leg:
        step, many = each.steps[index], each.calls > 1
        longest = self._longest(step, self.speed.forward)
        of_calls = [self.call(call, self.speed.forward, each) for call in step.calls]
        seconds = self.model.step * 1e-9 + self._arrival(each, index) + sum(of_calls)
        if at_once and index:
            seconds -= won_beside(of_calls, longest)
        for number, call in enumerate(step.calls):
            if many and (index or number):
                seconds += self.merging(_queries(call, each, self.shape.batch), each.q_parts > 2 and not at_once)
        return Leg(self._transfer(each, index, self.shape.itemsize), seconds, longest=longest)

    def _backward(self, each: Plan, index: int) -> Leg:
        step, shape = each.steps[index], self.shape
        seconds = self.model.step * 1e-9 + self._arrival(each, index)
        wide = shape.sum_itemsize + shape.itemsize
        for number, call in enumerate(step.calls):
            seconds += self.call(call, self.speed.backward, each)
            if each.calls > 1:
                seconds += self.copying(_queries(call, each, shape.batch) * shape.batch * shape.heads * shape.head_dim * wide)
            if number or step.sums:
                seconds += self.copying(_keys(call, step, shape.batch) * shape.kv_numbers * wide)
        itemsize = shape.sum_itemsize if step.sums or each.problem.collective else shape.grad_itemsize
        back = (
            each.key_tokens_sent
            if each.problem.collective
            else sum(keys.size for send in each.sends[index] for keys in send.ranges)
        )
        return Leg(
            self._transfer(each, index, shape.itemsize),
            seconds,
            self._transfer(each, index, itemsize),
            self.copying(back * shape.kv_numbers * (itemsize + wide)),
            self._longest(step, self.speed.backward),
        )

    @property
    def speed(self) -> KernelSpeed:
        """How fast the kernel is."""
        return self.model.kernel(self.kernel)

    def call(self, call: KernelCall, speed: Speed, each: Plan) -> float:
        """Seconds of one kernel call in one direction."""
        shape, work = self.shape, work_of(call)
        # Documents of single batch rows are segments of their own; those of all rows alike are repeated for each.
        rows = shape.batch if len(each.problem.bounds) == 1 else 1
        return self.timed(work, rows, speed)

    def timed(self, work: Work, rows: int, speed: Speed) -> float:
        """Seconds of a call in which each head of `rows` batch rows computes `work`."""
        dim = (self.shape.head_dim + self.shape.v_head_dim) / 2
        return speed.nanoseconds(work, rows * self.shape.heads, dim, self.model.multiprocessors) * 1e-9

    def row(self, blocks: int, speed: Speed) -> float:
        """Seconds of a row of so many blocks, computed by one multiprocessor alone."""
        return self.timed(Work(1, 0, 0, blocks, blocks), 1, replace(speed, call=0.0))

    def _longest(self, step: Step, speed: Speed) -> float:
        return max((self.row(work_of(call).longest, speed) for call in step.calls), default=0.0)

    def merging(self, queries: int, is_wide: bool) -> float:
        """Seconds of merging a block's out into the running one."""
        shape = self.shape
        each = 2 * (shape.sum_itemsize if is_wide else shape.itemsize) + shape.itemsize
        return queries * shape.batch * shape.heads * shape.v_head_dim * each / self.model.merge

    def copying(self, nbytes: float) -> float:
        """Seconds of reading and writing so many bytes."""
        return nbytes / self.model.copy

    def _arrival(self, each: Plan, index: int) -> float:
        """Keys of several ranges are put in order after they have come, and taken out before they leave."""
        step, numbers = each.steps[index], self.shape.kv_numbers * self.shape.itemsize
        if len(step.keys) < 2 or each.problem.world == 1:
            return 0.0
        sent = 0 if each.problem.collective else sum(keys.size for send in each.sends[index] for keys in send.ranges)
        return self.copying(2 * (step.key_count + sent) * numbers)

    def _transfer(self, each: Plan, index: int, itemsize: int) -> float:
        if self.link is None:
            return 0.0
        problem, rank = each.problem, each.rank
        if problem.collective:
            padded = each.key_tokens_sent // (problem.world - 1)
            peers = [(peer, padded) for peer in range(problem.world) if peer != rank]
            return self._seconds(rank, peers, itemsize)
        fetched = [(keys.peer, keys.size) for keys in each.steps[index].keys if keys.owner != rank]
        return max(self._seconds(rank, fetched, itemsize), self._seconds(rank, _sent(each.sends[index]), itemsize))

    def _seconds(self, rank: int, tokens: Iterable[tuple[int, int]], itemsize: int) -> float:
        """Seconds of a transfer of keys, given as (peer, tokens)."""
        assert self.link is not None, "asked where there is a link"
        host, near, far = self.link.host, 0, 0
        for peer, count in tokens:
            if host and peer // host != rank // host:
                far += count
            else:
                near += count
        numbers = self.shape.kv_numbers * itemsize
        return self.link.seconds(near * numbers, far * numbers)


def work_of(call: KernelCall) -> Work:
    """What one head of a call computes."""
    total = Work()
    for segment in call.segments:
        total = total.plus(Work.of_segment(segment.q1 - segment.q0, segment.k1 - segment.k0, call.window))
    # A packed call gives every key between its segments a gradient too.
    first, last = call.keys
    return total if len(call.segments) == 1 else total._replace(columns=max(total.columns, -(-(last - first) // BLOCK)))


def _queries(call: KernelCall, each: Plan, batch: int) -> int:
    """Queries that a call gives an out: in several batch rows those of a packed call are all of the rank."""
    first, last = call.queries
    return each.problem.q_local(each.rank) if batch > 1 and len(call.segments) > 1 else last - first


def _keys(call: KernelCall, step: Step, batch: int) -> int:
    first, last = call.keys
    return step.key_count if batch > 1 and len(call.segments) > 1 else last - first


def _sent(sends: Sequence[KeySend]) -> list[tuple[int, int]]:
    return [(send.rank, sum(keys.size for keys in send.ranges)) for send in sends]


__all__ = ["Leg", "Predictor", "Seconds", "walked", "work_of"]
