"""Where the keys of one step are copied from and to, as index tensors made once for a plan: no copy is made range by range.

    rank 1 stores 6 keys and sends keys 0 and 4 5 to rank 0, key 2 to rank 2       take    0 4 5 | 2
    its key buffer wants keys of rank 0 and its own in turn: 0.0 1.0 0.3 1.2       slots   0.0 0.3 | 1.0 1.2
                                                                                   order   0 2 1 3
    gradients of key 0 come from itself and rank 0, of 2 from all, of 4 5 from 0   sums    own 0, rank 0; ...

A place is a number in a tensor (B, S, ...) whose first two dims are flattened: key i of batch row b is at place b * S + i. Keys of
one rank stand together, batch row after batch row, as one contiguous message holds them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dtensor_ring.cache import cached
from dtensor_ring.captures import kept_for_graphs
from dtensor_ring.planning.kernel_calls import Step
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.schedule import KeySend, Plan, plan

_Range = tuple[int, int]
_Origin = tuple[int, int]  # owner and peer


class Slot(NamedTuple):
    """Where one owner's keys, as one peer sends them, stand in the order of arrival: `count` from `first` in each batch row."""

    owner: int
    peer: int
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Own:
    """This rank's own keys in a step's key buffer.

    Attributes:
        start: the first of them in this rank's shard, where `take` is None.
        at: the first of them in the key buffer, where `back` is None.
        count: how many.
        take: their places in the shard; None for one range.
        back: their places in the key buffer; None for one range.
    """

    start: int
    at: int
    count: int
    take: Tensor | None
    back: Tensor | None


@dataclass(frozen=True, slots=True)
class Sums:
    """What the gradients of own keys [low, high) are summed from.

    Contributions stand in one buffer: the own part, then what peers send that is summed in float32 already, then what is not. A
    key's gradient is its own part first, then the peers' in ascending order, so that results do not depend on which came first.
    Where some key has several contributions, those of the key at place i are at `index[offsets[i] : offsets[i + 1]]` of the
    buffer. Where none has, `offsets` is None and the one is at `index[i]`, which is past the buffer's end where there is none.

    Attributes:
        index: int32, places in the buffer.
        offsets: int32, one for each key and one more; None where nothing is added up.
        gaps: whether some `index[i]` is past the buffer's end.
        low: first own key with a contribution.
        high: one past the last.
        sizes: contributions in the buffer for one batch row: own, summed, others.
        firsts: where each send's part begins in a batch row, counted from the buffer's first, in the order of the plan's sends;
            sends of keys that are passed on are left out, since the gradients of those are not summed here.
    """

    index: Tensor
    offsets: Tensor | None
    gaps: bool
    low: int
    high: int
    sizes: tuple[int, int, int]
    firsts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Route:
    """The copies of one step on one rank.

    Attributes:
        take: places of the keys that peers need, peer after peer; None where each needs one range.
        slots: owners and peers of the keys that the step needs, in the order in which they first appear in the key buffer.
        own: this rank's part of the key buffer; None where it has none.
        order: for each place of the key buffer its place in the slots; None where each slot's keys stand together there.
        leave: for each place of the peers' slots its place in the key buffer; None as for `order`.
        sums: how gradients are summed; None where own part and messages are one range each.
    """

    take: Tensor | None
    slots: tuple[Slot, ...]
    own: Own | None
    order: Tensor | None
    leave: Tensor | None
    sums: Sums | None

    @property
    def tensors(self) -> list[Tensor]:
        """All index tensors of the route."""
        own = () if self.own is None else (self.own.take, self.own.back)
        sums = () if self.sums is None else (self.sums.index, self.sums.offsets)
        return [tensor for tensor in (self.take, self.order, self.leave, *own, *sums) if tensor is not None]


def _route_bytes(kept: tuple[Route, ...], problem: AttentionProblem, *_others: object) -> int:
    """Count the index tensors, which lie on the device, and a few Python objects for each step."""
    return problem.nbytes + sum(600 + sum(tensor.nbytes for tensor in route.tensors) for route in kept)


# Places depend on plan and batch, not on what travels: all layers and both passes of a step share them. Made anew they would cost
# the host time that grows with the documents, and a copy to the GPU that the host waits for. The key has the batch, since a place
# counts through all batch rows, and the device, where the index lies.
@kept_for_graphs
@cached("places of transfers", most_bytes=16 << 20, most_entries=32, size=_route_bytes)
def routes(problem: AttentionProblem, rank: int, batch: int, device: torch.device) -> tuple[Route, ...]:
    """The routes of a plan's steps for a batch; plans whose exchange is collective have none."""
    whole = plan(problem, rank)
    return () if problem.collective else tuple(_route(whole, index, batch, device) for index in range(len(whole.steps)))


def _route(whole: Plan, index: int, batch: int, device: torch.device) -> Route:
    step, length = whole.steps[index], whole.problem.k_local(whole.rank)
    sends = [send for send in whole.sends[index] if send.step is None]
    stored, held = _by_origin(step)
    slots: list[Slot] = []
    first = 0
    for (owner, peer), ranges in stored.items():
        slots.append(Slot(owner, peer, first, _count(ranges)))
        first += slots[-1].count
    # Grouped: what arrives from each peer can lie in the key buffer as it is. Otherwise it lands beside it and is put in order.
    grouped = all(a[1] == b[0] for ranges in held.values() for a, b in pairwise(ranges))
    order = leave = None
    if not grouped:
        places = {origin: _flat(ranges, batch, step.key_count) for origin, ranges in held.items()}
        every = torch.cat(list(places.values()))
        # The key buffer reads from the slots, so it wants the inverse: where in the slots each of its places lies.
        order = torch.empty_like(every)
        order[every] = torch.arange(len(every))
        leave = torch.cat([of_owner for (owner, _), of_owner in places.items() if owner != whole.rank])
    own, home = None, next((origin for origin in stored if origin[0] == whole.rank), None)
    mine: list[_Range] = [] if home is None else stored[home]
    if home is not None:
        at = held[home]
        take = None if len(mine) == 1 else _placed(_flat(mine, batch, length), device)
        back = None if grouped or len(at) == 1 else _placed(_flat(at, batch, step.key_count), device)
        own = Own(mine[0][0], at[0][0], _count(mine), take, back)
    sent = [[(keys.start, keys.stop) for keys in send.ranges] for send in sends]
    one_each = all(len(ranges) == 1 for ranges in sent)
    # A plan of one step sums over all own keys, so that the result is the gradient itself. With several steps each covers only the
    # keys that it reaches: what lies outside is left to the others, and adding zeros there would cost as much as the sum.
    return Route(
        None if one_each else _placed(torch.cat([_flat(ranges, batch, length) for ranges in sent]), device),
        tuple(slots),
        own,
        None if order is None else _placed(order, device),
        None if leave is None else _placed(leave, device),
        None if one_each and len(mine) <= 1 else _sums(mine, sends, batch, None if len(whole.steps) > 1 else length, device),
    )


def _by_origin(step: Step) -> tuple[dict[_Origin, list[_Range]], dict[_Origin, list[_Range]]]:
    """The ranges that a step needs, by owner and peer: as their owner stores them, and where they go in the key buffer."""
    stored: dict[_Origin, list[_Range]] = {}
    held: dict[_Origin, list[_Range]] = {}
    offset = 0
    for keys in step.keys:
        origin = keys.owner, keys.peer
        stored.setdefault(origin, []).append((keys.start, keys.stop))
        held.setdefault(origin, []).append((offset, offset + keys.size))
        offset += keys.size
    return stored, held


def _sums(mine: list[_Range], sends: Sequence[KeySend], batch: int, length: int | None, device: torch.device) -> Sums:
    """The sums of own part and sends; they cover all `length` keys if given, else those from first to last contribution."""
    blocks = [mine, *([(keys.start, keys.stop) for keys in send.ranges] for send in sends)]
    low = min(a for ranges in blocks for a, _ in ranges) if length is None else 0
    high = max(b for ranges in blocks for _, b in ranges) if length is None else length
    wide = sum(_count(blocks[i + 1]) for i, send in enumerate(sends) if send.sums)
    next_wide, next_other = _count(mine), _count(mine) + wide
    firsts: list[int] = []
    for send, ranges in zip(sends, blocks[1:], strict=True):
        firsts.append(next_wide if send.sums else next_other)
        if send.sums:
            next_wide += _count(ranges)
        else:
            next_other += _count(ranges)
    # By rank and not by arrival or by distance in the ring: every step and every run adds in one order.
    ascending = sorted(range(len(sends)), key=lambda i: sends[i].rank)
    targets: list[Tensor] = []
    places: list[Tensor] = []
    for first, ranges in [(0, mine), *((firsts[i], blocks[i + 1]) for i in ascending)]:
        target = _flat([(a - low, b - low) for a, b in ranges], batch, high - low)
        targets.append(target)
        places.append(batch * first + torch.arange(len(target)))
    target = torch.cat(targets)
    counts = torch.bincount(target, minlength=batch * (high - low))
    sizes = _count(mine), wide, next_other - _count(mine) - wide
    if (counts > 1).any():
        index = torch.cat(places)[torch.argsort(target, stable=True)]  # stable: a key's contributions stay in the order above
        offsets = _placed(torch.cat([counts.new_zeros(1), counts.cumsum(0)]), device)
        return Sums(_placed(index, device), offsets, False, low, high, sizes, tuple(firsts))
    # A key without a contribution reads the place past the end, where the buffer has one zero for all of them.
    index = torch.full_like(counts, len(target))
    index[target] = torch.cat(places)
    return Sums(_placed(index, device), None, bool((counts == 0).any()), low, high, sizes, tuple(firsts))


def _count(ranges: Iterable[_Range]) -> int:
    return sum(stop - start for start, stop in ranges)


def _flat(ranges: Sequence[_Range], batch: int, length: int) -> Tensor:
    """List the places of some ranges, the same in every batch row, in a tensor that has `length` keys in each row."""
    if not ranges:
        return torch.empty(0, dtype=torch.int64)
    # Written out by PyTorch, since a million tokens are too many for a loop in Python.
    starts, stops = torch.tensor(ranges, dtype=torch.int64).T
    sizes = stops - starts
    inside = torch.arange(int(sizes.sum())) + torch.repeat_interleave(stops - sizes.cumsum(0), sizes)
    return (inside + length * torch.arange(batch)[:, None]).flatten()


def _placed(index: Tensor, device: torch.device) -> Tensor:
    # Both `index_select` and `embedding_bag` take int32, which halves what the cache keeps on the device.
    return index.to(device, torch.int32)
