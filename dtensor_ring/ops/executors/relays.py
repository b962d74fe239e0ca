"""Passing on keys of other ranks, and the gradients that come back for them.

    two hosts, ranks 0 1 and 2 3        step 1    rank 1 gets keys of rank 3 from rank 3, over the slow link
                                        step 2    rank 0 gets keys of rank 3 from rank 1, over the fast one
    backward                            step 2    rank 0 returns their gradients to rank 1, which adds them to its own of step 1
                                        step 1    rank 1 returns the sum to rank 3: one message crosses the slow link

A send with a `step` takes its keys from the buffer of that earlier step. Its gradients are added to those of that step, in place,
before they go back themselves. Plans of this package have no such sends yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from dtensor_ring.planning.schedule import KeySend, Plan


def own_sends(sends: Sequence[KeySend]) -> Sequence[KeySend]:
    """Leave out the sends that pass on other ranks' keys."""
    return [send for send in sends if send.step is None]


def with_passed_on(plan: Plan, sends: Sequence[KeySend], own: Sequence[Tensor], arrived: Mapping[int, Tensor]) -> list[Tensor]:
    """What each send carries: `own` has it for own keys, and `arrived` the buffers of earlier steps (B, n, Hk, D)."""

    def passed_on(send: KeySend) -> Tensor:
        assert send.step is not None, "own keys were taken already"
        # A copy, also of one range: messages are contiguous, which a slice of a buffer of several batch rows is not.
        return torch.cat([arrived[send.step][:, a:b] for a, b in _places(plan, send)], 1)

    return _merged(sends, own, passed_on)


def with_return_buffers(sends: Sequence[KeySend], own: Sequence[Tensor], empty: Callable[[int, bool], Tensor]) -> list[Tensor]:
    """A buffer for what comes back of each send: `own` has those of own keys, `empty(keys, sums)` makes the others."""
    return _merged(sends, own, lambda send: empty(sum(keys.size for keys in send.ranges), send.sums))


def add_returned(plan: Plan, sends: Sequence[KeySend], returned: Sequence[Tensor], waiting: Mapping[int, Tensor]) -> None:
    """Add what came back for keys that were passed on to the gradients of the steps in which they had come, in place."""
    for send, part in zip(sends, returned, strict=True):
        if send.step is None:
            continue
        places = _places(plan, send)
        for (a, b), piece in zip(places, part.split([b - a for a, b in places], 1), strict=True):
            # In place: these gradients have not been given back yet, and will take this part along to where the keys came from.
            waiting[send.step][:, a:b] += piece


def _merged(sends: Sequence[KeySend], own: Sequence[Tensor], other: Callable[[KeySend], Tensor]) -> list[Tensor]:
    """A tensor for each send, in the order of the sends: messages to one peer must stay in the order that it expects."""
    of_own = iter(own)
    return [next(of_own) if send.step is None else other(send) for send in sends]


def _places(plan: Plan, send: KeySend) -> list[tuple[int, int]]:
    """Where the keys that a send passes on lie in the key buffer of the step in which they came."""
    assert send.step is not None, "own keys lie in this rank's shard"
    keys = plan.steps[send.step].keys
    starts = list(accumulate((each.size for each in keys), initial=0))

    def find() -> Iterator[tuple[int, int]]:
        for wanted in send.ranges:
            # Not strict: `starts` has the end of the buffer too.
            for start, held in zip(starts, keys, strict=False):
                if held.owner == wanted.owner and held.start <= wanted.start and wanted.stop <= held.stop:
                    yield start + wanted.start - held.start, start + wanted.stop - held.start
                    break

    places = list(find())
    assert len(places) == len(send.ranges), "a rank passes on keys that it got"
    return places
