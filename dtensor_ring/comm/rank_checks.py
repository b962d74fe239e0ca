"""What ranks compare before tensors move: a few integers of each, and why a rank refuses a call.

    rank 0   meet("from_local", [16, 4])          gets [[16, 4], [16, 4]], and compares
    rank 1   meet("from_local", [16, 4])          the same

    rank 0   meet("from_local", [16, 4])          raises ValueError: from_local: rank 1 refuses: dim 1 has 3 tokens ...
    rank 1   with refused_together(...): raise    raises its own error, after it has sent it to rank 0

Every meeting exchanges records of one size, whatever it is about, so ranks that are in different calls find that out instead of
reading one call's integers as another's. The host waits for a meeting; each rank sends 160 bytes to every other rank.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from types import TracebackType

import torch
from torch import Tensor
from typing_extensions import override

from dtensor_ring._torch import is_capturing
from dtensor_ring.captures import check_not_capturing
from dtensor_ring.comm.transport import SilentRankError, Transport

_VALUES = 18  # integers of a record after its two first: whether the rank refuses, and the number of the call or of the refusal
_TEXT_BYTES = 1024  # of a call, where ranks are in different ones
_TEXT = 4000  # letters of a refusal
_NOTES = 64  # texts of refusals that a rank keeps for the others
_AGREEMENTS = 1024  # calls that a group remembers, each at most about 1 KiB
_every_call: ContextVar[bool] = ContextVar("every_call", default=False)
_KNOWN = "_dtensor_ring_known"  # marks an error that the other ranks have or were sent: it is not sent again
_PATIENCE = 5.0  # seconds that a rank which refuses a call waits for the others: longer would hide its error
_KINDS: tuple[type[Exception], ...] = (ValueError, TypeError, NotImplementedError, RuntimeError)  # a record has a class's place
# What wrong arguments end in, also where nobody foresaw them; others see a class that is not among the kinds as a RuntimeError.
REFUSALS: tuple[type[Exception], ...] = (*_KINDS, AttributeError, LookupError, ArithmeticError)


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(values: Tensor) -> int:
    """A number of a tensor's bits, each weighted by its place: tensors of one shape and dtype that differ have different ones.

    The host waits for a GPU.
    """
    flat = (torch.view_as_real(values.detach()) if values.is_complex() else values.detach()).flatten()
    flat = (flat.contiguous().view(_BITS[flat.itemsize]) if flat.is_floating_point() else flat).to(torch.int64)
    places = torch.arange(1, flat.numel() + 1, device=flat.device)
    weights = places * -7046029254386353131  # odd, so that every place has a weight of its own where products wrap around
    return int((flat * weights).sum())


def meet(transport: Transport, call: str, values: Sequence[int]) -> list[list[int]]:
    """The values of every rank, in rank order. Every rank of the group makes the same call.

    Args:
        transport: the group.
        call: what the ranks are about to do, for errors; equal texts are the same call.
        values: up to 18 integers, as many on every rank.

    Raises:
        ValueError, TypeError, NotImplementedError: a rank refuses the call (the class is that of its error), on every rank.
        RuntimeError: ranks are in different calls, on every rank.
        RingCaptureError: a CUDA graph is being captured, on every rank that captures.
    """
    if transport.world == 1:
        return [list(values)]
    check_not_capturing(
        f"{call}: ranks of {transport.axis} compare it, for which the host waits",
        "make the same call once before capturing; where it is compared every time, leave that out, as by run_check=False",
    )
    assert len(values) <= _VALUES, "a record has room for so many values"
    # Ranks over different transports are in different calls: neither would ever get what the other sends.
    record = [0, number_of(f"{call}, over {transport.name}"), *values, *[0] * (_VALUES - len(values))]
    with transport.during(f"comparing the call of ranks: {call}"):
        records = transport.gather_values(record)
        if all(other[:2] == record[:2] for other in records):
            return [other[2 : 2 + len(values)] for other in records]
        raise _explained(transport, call, records)


def is_agreed(transport: Transport, call: Hashable) -> bool:
    """Whether the ranks of the group have compared this very call, and nothing asks for every call to be compared."""
    return call in transport.agreements and not _every_call.get()


def remember(transport: Transport, call: Hashable) -> None:
    """Keep that all ranks of the group agree on a call.

    Agreement lives with the group and ends with it. The oldest one goes when there are too many: what a rank has forgotten then
    follows from the group's own sequence of calls, which is the same on all of its ranks, whatever other groups they are in. A
    rule that looked at anything else (memory, other groups, how often a rank asks) would let one rank meet where others do not.
    """
    transport.agreements[call] = None
    if len(transport.agreements) > _AGREEMENTS:
        del transport.agreements[next(iter(transport.agreements))]


@contextmanager
def check_every_call() -> Iterator[None]:
    """Inside the block ranks compare every call, also those that they have compared before: for finding out where they part.

        with dtensor_ring.debug.check_every_call():
            loss = model(input_ids=ids, labels=ids).loss

    Every rank of a group must be inside. The host waits once for each call; what ranks compare is layout, shapes, mask, numbers,
    strategy, kernel and documents. It holds for the thread that enters it.

    Raises (from the calls):
        ValueError: ranks make different calls, on every rank.
        RuntimeError: ranks are in calls of different kinds, on every rank.
    """
    token = _every_call.set(True)
    try:
        yield
    finally:
        _every_call.reset(token)


def meet_on_axes(
    transports: Sequence[Transport], call: str, values: Sequence[int], judge: Callable[[int, list[list[int]]], None]
) -> None:
    """As `meet`, over one mesh axis after the other; what is refused on one axis is refused on the ones after it.

    So every rank of the mesh raises, also one whose own axes agree. `judge` is given the number of an axis and the values of its
    ranks, and raises where they do not fit.
    """
    failure: Exception | None = None
    for i, transport in enumerate(transports):
        try:
            # Every axis has its meeting, also after a failure: ranks of other rows of the mesh wait there, and know of nothing.
            if failure is None:
                judge(i, meet(transport, call, values))
            else:
                _send(transport, failure)
        except _KINDS as first:
            failure = failure or first
    if failure is not None:
        raise failure


def refused_together(places: Callable[[], Sequence[Transport]]) -> AbstractContextManager[None]:
    """A block whose errors are sent to the other ranks, which may be waiting in a meeting, and then raised as without it.

    The others get the error if they meet within five seconds. They do when the call is new to them; a call that ranks have compared
    before has no meeting, and they learn of the failure when they wait in vain.

    Args:
        places: the groups whose ranks meet, in that order, worked out only where something is refused.
    """
    return _RefusedTogether(places)


class _RefusedTogether(AbstractContextManager[None]):
    # a class, not a generator: every call of attention enters one, and a generator takes four times as long
    __slots__ = ("_places",)

    def __init__(self, places: Callable[[], Sequence[Transport]]) -> None:
        self._places = places

    @override
    def __exit__(self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None) -> None:
        if not isinstance(failure, REFUSALS) or isinstance(failure, SilentRankError) or getattr(failure, _KNOWN, False):
            return
        # Blocks nest (a function that calls another of ours): the innermost sends, and the marked error passes through the others.
        setattr(failure, _KNOWN, True)
        for transport in self._places():
            _send(transport, failure)


def _send(transport: Transport, failure: Exception) -> None:
    """Take part in the meeting that the other ranks are in or come to, with a record that says: refused."""
    if transport.world == 1:
        return
    kind = next((i for i, kind in enumerate(_KINDS) if isinstance(failure, kind)), len(_KINDS) - 1)
    # Before the meeting: who comes too late for this rank finds it too, also when the rank has refused another call since.
    transport.note = (transport.note + 1) % _NOTES
    transport.leave_note(transport.note, str(failure)[:_TEXT])
    if is_capturing():  # the record would be sent by the graph; and the others capture as well, and wait in no meeting
        return
    transport.offer_values([1 + kind, transport.note, *[0] * _VALUES], _PATIENCE)


def _explained(transport: Transport, call: str, records: list[list[int]]) -> Exception:
    """The error of a meeting that did not come about. All ranks read the same records, so all raise."""
    rank = next((r for r, record in enumerate(records) if record[0]), None)
    if rank is not None:
        kind, number = records[rank][:2]
        text = transport.note_of(rank, number)
        failure = _KINDS[kind - 1](f"{call}: rank {rank} of {transport.axis} refuses this call: {text}")
    else:
        mine = f"{call}, over {transport.name}"
        texts = _texts(transport.gather_values(_encoded(mine)))
        rank = next(r for r, record in enumerate(records) if record[1] != records[transport.rank][1])
        failure = RuntimeError(
            f"rank {transport.rank} of {transport.axis} is in: {mine}. Rank {rank} is in: {texts[rank]}. Every rank must make the "
            "same calls in the same order"
        )
    setattr(failure, _KNOWN, True)
    return failure


def number_of(text: str) -> int:
    """A text as an integer that a record has room for: equal texts are equal numbers, others are but by a chance of 2**-56."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def _encoded(text: str) -> list[int]:
    return array("q", text.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")).tolist()


def _texts(records: Sequence[Sequence[int]]) -> list[str]:
    return [array("q", record).tobytes().rstrip(b"\0").decode(errors="ignore") for record in records]
