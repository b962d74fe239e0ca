"""The keys of a plan's steps, one step after the other: the transfer of the next runs while a step computes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial

from dtensor_ring._torch import named_in_profiles
from dtensor_ring.comm import Pending, Transfers
from dtensor_ring.ops.executors.exchange import Direction, Exchange, Pair
from dtensor_ring.ops.executors.step_streams import StepStreams


class Visits:
    """What one pass over a plan fetches.

    Args:
        exchange: how keys are fetched.
        order: the numbers of the steps in the order of the pass.
        direction: of the pass.
        transfers: takes note of every transfer.
        streams: on which stream each step runs; its keys are fetched and put in order there.
    """

    def __init__(
        self, exchange: Exchange, order: Sequence[int], direction: Direction, transfers: Transfers, streams: StepStreams
    ) -> None:
        self._exchange, self._order, self._direction = exchange, order, direction
        self._transfers, self._streams = transfers, streams
        self._own: Pair | None = None
        self._pending: Pending[Pair] | None = None
        self._arrived: dict[int, Pair] = {}
        self._place = 0

    def begin(self, own: Pair, coming: Pending[Pair] | None) -> None:
        """Start the first step's transfer, unless it is `coming`; `own` are this rank's keys and values."""
        self._own = own
        # Every rank walks the same steps in the same order, also those in which it sends and needs nothing: messages between two
        # ranks meet by their order, so a step left out on one of them would mix up all that follow. One in which nothing travels on
        # any rank takes part in no transfer.
        self._pending = self._fetch(0) if self._order and coming is None else coming

    def keys(self, index: int) -> Pair:
        """The keys and values of the next step in the order of the pass, for which the current stream waits."""
        pending = self._pending
        assert pending is not None and self._order[self._place] == index, "every step is fetched one step ahead, in order"
        if self._exchange.plan.relays:  # the next step may pass these keys on, so they must have come before it starts
            self._arrived[index] = pending.wait()
            pending = Pending.ready(self._arrived[index])
        # Started before this step's keys are waited for: the transfer runs beside the kernels that the caller launches next.
        self._place += 1
        self._pending = None if self._place == len(self._order) else self._fetch(self._place)
        with self._named("waits for keys", index):
            return pending.wait()

    def computing(self, index: int) -> AbstractContextManager[object]:
        """What gives the kernels of a step their name in profiles."""
        return self._named("computes", index)

    def _fetch(self, place: int) -> Pending[Pair]:
        assert self._own is not None, "begun"
        index = self._order[place]
        with self._streams.of_step(index):
            return self._transfers.add(self._exchange.fetch(index, self._own, self._direction, self._arrived))

    def _named(self, what: str, index: int) -> AbstractContextManager[object]:
        return named_in_profiles(partial(self._name, what, index))

    def _name(self, what: str, index: int) -> str:
        """What a step's waiting and computing are called in profiles."""
        todo = self._exchange.plan
        return (
            f"dtensor_ring, rank {todo.rank} of {todo.problem.world}, {self._direction}, step {index} of {len(todo.steps)}, {what}"
        )
