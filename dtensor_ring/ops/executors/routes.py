"""Which rows a rank copies where in one step, as index tensors: made once for a plan, so that no copy is made range by range.

    rank 1 has 6 key rows and sends rows 0 and 4 5 to rank 0, row 2 to rank 2      take    0 4 5 | 2
    its key buffer wants rows of rank 0 and its own in turn: 0.0 1.0 0.3 1.2       slots   0.0 0.3 | 1.0 1.2
                                                                                   order   0 2 1 3
    gradients of row 0 come from itself and rank 0, of 2 from all, of 4 5 from 0   sums    own 0, rank 0; ...

Rows are flattened over the batch: row r of batch row b of a tensor (B, S, ...) is row b * S + r. Rows of one rank stand together,
batch row after batch row, as one contiguous message holds them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dtensor_ring.cache import cached
from dtensor_ring.planning.kernel_calls import Step
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.schedule import KeySend, Plan, plan

_Range = tuple[int, int]
_Origin = tuple[int, int]  # owner and peer


class Slot(NamedTuple):
    """Where one owner's keys, as one peer sends them, stand in the order of arrival: `rows` from `first` in each batch row."""

    owner: int
    peer: int
    first: int
    rows: int


@dataclass(frozen=True, slots=True)
class Own:
    """This rank's own rows in a step's key buffer.

    Attributes:
        start: the first of its stored rows, where `take` is None.
        at: the first of its rows in the key buffer, where `back` is None.
        rows: how many.
        take: which stored rows they are, flattened; None for one range.
        back: which rows of the key buffer they are, flattened; None for one range.
    """

    start: int
    at: int
    rows: int
    take: Tensor | None
    back: Tensor | None


@dataclass(frozen=True, slots=True)
class Sums:
    """What the gradients of own key rows [low, high) are summed from.

    Contributions stand in one buffer: the own part, then what peers send that is summed in float32 already, then what is not.
    A row adds its own part first, then the peers' in ascending order. Where some row has several contributions, those of row i,
    flattened, are the buffer's rows `index[offsets[i] : offsets[i + 1]]`. Where none has, `offsets` is None and row i is the
    buffer's row `index[i]`, which is one past the buffer's end where nothing contributes.

    Attributes:
        index: int32.
        offsets: int32, one for each row and one more; None where rows are not added up.
        gaps: whether some `index[i]` is past the buffer's end.
        low: first own key row with a contribution.
        high: one past the last.
        rows: rows of the buffer in one batch row: own, wide, others.
        firsts: first row in a batch row of each send's rows, counted from the first of all, in the order of the plan's sends;
            sends of keys that are passed on are left out, since the gradients of those are not summed here.
    """

    index: Tensor
    offsets: Tensor | None
    gaps: bool
    low: int
    high: int
    rows: tuple[int, int, int]
    firsts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Route:
    """The copies of one step on one rank.

    Attributes:
        take: rows that peers need, peer after peer; None where each needs one range.
        slots: owners and peers of the keys that the step needs, as their first rows follow in the key buffer.
        own: this rank's part of the key buffer; None where it has none.
        order: for each row of the key buffer where it stands in the slots; None where each rank's rows stand together there.
        leave: for each row of the peers' slots where it stands in the key buffer; None as for `order`.
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
        """All index tensors."""
        own = () if self.own is None else (self.own.take, self.own.back)
        sums = () if self.sums is None else (self.sums.index, self.sums.offsets)
        return [tensor for tensor in (self.take, self.order, self.leave, *own, *sums) if tensor is not None]


def _route_bytes(kept: tuple[Route, ...], problem: AttentionProblem, *_others: object) -> int:
    """Index tensors on the device, and a few objects a step."""
    return problem.nbytes + sum(600 + sum(tensor.nbytes for tensor in route.tensors) for route in kept)


@cached("rows of transfers", most_bytes=16 << 20, most_entries=32, size=_route_bytes)
def routes(problem: AttentionProblem, rank: int, batch: int, device: torch.device) -> tuple[Route, ...]:
    """The routes of a plan's steps for a batch; plans whose exchange is collective have none."""
    whole = plan(problem, rank)
    return () if problem.collective else tuple(_route(whole, index, batch, device) for index in range(len(whole.steps)))


def _route(whole: Plan, index: int, batch: int, device: torch.device) -> Route:
    step, length = whole.steps[index], whole.problem.k_rows(whole.rank)
    sends = [send for send in whole.sends[index] if send.step is None]
    stored, held = _by_origin(step)
    slots: list[Slot] = []
    first = 0
    for (owner, peer), ranges in stored.items():
        slots.append(Slot(owner, peer, first, _count(ranges)))
        first += slots[-1].rows
    grouped = all(a[1] == b[0] for ranges in held.values() for a, b in pairwise(ranges))
    order = leave = None
    if not grouped:
        places = {origin: _flat(ranges, batch, step.rows) for origin, ranges in held.items()}
        every = torch.cat(list(places.values()))
        order = torch.empty_like(every)
        order[every] = torch.arange(len(every))
        leave = torch.cat([rows for (owner, _), rows in places.items() if owner != whole.rank])
    own, home = None, next((origin for origin in stored if origin[0] == whole.rank), None)
    mine: list[_Range] = [] if home is None else stored[home]
    if home is not None:
        at = held[home]
        take = None if len(mine) == 1 else _placed(_flat(mine, batch, length), device)
        back = None if grouped or len(at) == 1 else _placed(_flat(at, batch, step.rows), device)
        own = Own(mine[0][0], at[0][0], _count(mine), take, back)
    sent = [[(rows.start, rows.stop) for rows in send.rows] for send in sends]
    one_each = all(len(ranges) == 1 for ranges in sent)
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
    for rows in step.keys:
        origin = rows.owner, rows.peer
        stored.setdefault(origin, []).append((rows.start, rows.stop))
        held.setdefault(origin, []).append((offset, offset + rows.size))
        offset += rows.size
    return stored, held


def _sums(mine: list[_Range], sends: Sequence[KeySend], batch: int, length: int | None, device: torch.device) -> Sums:
    """The sums of own part and sends; they cover all `length` rows if given, else those from first to last contribution."""
    blocks = [mine, *([(rows.start, rows.stop) for rows in send.rows] for send in sends)]
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
    ascending = sorted(range(len(sends)), key=lambda i: sends[i].rank)
    targets: list[Tensor] = []
    rows: list[Tensor] = []
    for first, ranges in [(0, mine), *((firsts[i], blocks[i + 1]) for i in ascending)]:
        target = _flat([(a - low, b - low) for a, b in ranges], batch, high - low)
        targets.append(target)
        rows.append(batch * first + torch.arange(len(target)))
    target = torch.cat(targets)
    counts = torch.bincount(target, minlength=batch * (high - low))
    sizes = _count(mine), wide, next_other - _count(mine) - wide
    if (counts > 1).any():
        index = torch.cat(rows)[torch.argsort(target, stable=True)]  # stable: a row's contributions stay in the order above
        offsets = _placed(torch.cat([counts.new_zeros(1), counts.cumsum(0)]), device)
        return Sums(_placed(index, device), offsets, False, low, high, sizes, tuple(firsts))
    index = torch.full_like(counts, len(target))
    index[target] = torch.cat(rows)
    return Sums(_placed(index, device), None, bool((counts == 0).any()), low, high, sizes, tuple(firsts))


def _count(ranges: Iterable[_Range]) -> int:
    return sum(stop - start for start, stop in ranges)


def _flat(ranges: Sequence[_Range], batch: int, length: int) -> Tensor:
    """The rows of ranges, flattened over batch rows of `length`."""
    if not ranges:
        return torch.empty(0, dtype=torch.int64)
    starts, stops = torch.tensor(ranges, dtype=torch.int64).T
    sizes = stops - starts
    rows = torch.arange(int(sizes.sum())) + torch.repeat_interleave(stops - sizes.cumsum(0), sizes)
    return (rows + length * torch.arange(batch)[:, None]).flatten()


def _placed(index: Tensor, device: torch.device) -> Tensor:
    return index.to(device, torch.int32)
