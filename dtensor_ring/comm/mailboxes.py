"""Slots by which ranks hand parcels to one another through memory that both can read: integers only, no tensors.

    two ranks, one slot               rank 0, which sends                          rank 1, which receives
    wait until busy is 0              the slot is free
    busy = 1
    copy the parcel into the slot                                                  wait until full is 1
    full = 1, at rank 1               ------------------------------------------>  full = 0
                                                                                   copy the parcel out of the slot
    (the next parcel waits here)      <------------------------------------------  busy = 0, at rank 0

Of every two ranks each has two slots for the other, in its own buffer, used in turn: one is filled while the other is read. `busy`
lies in the sender's buffer and `full` in the receiver's, so a rank waits on its own memory only, and writes into others'. All are
0 at first. What a message has more than fits into a slot goes in further parcels, and messages to one rank share a parcel where
they fit.

Nothing is overwritten before it was read: a sender fills a slot after `busy` fell back to 0, which the receiver does when it has
read the slot. Nothing is read twice: the receiver takes `full` back before it reads, and the sender sets it anew only after `busy`
fell.

Nothing waits for ever, where all ranks make the same calls. A rank orders its work by rounds: the first parcels to every rank, the
first parcels from every rank, then the second ones to and from, and so on; the rounds of a call before those of the next. Who
waits for `busy` waits for a read of an earlier round, and who waits for `full` for a write of the same round, in which writes
stand before reads. So of all that waits the earliest waits for nothing. That holds even where all streams of a process go through
one queue of the GPU, in which each piece of work waits for the one before. An order by ranks (all parcels to the next rank, then
all to the one after) would not do: three ranks with three parcels for each other can wait in a circle. A rank without messages in
a round has no part in it, and two ranks cut alike what they send each other, since they agree on the sizes of messages.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

SLOTS = 2  # that a rank has for each other rank: a bit says whose turn it is
ALIGNMENT = 256  # bytes: copy engines are slow on odd addresses
_WORD = 4  # bytes of a flag


class Wait(NamedTuple):
    """Wait until a flag in this rank's own buffer has a value."""

    word: int
    value: int


class Write(NamedTuple):
    """Set a flag in the buffer of a rank, once all before it is done."""

    rank: int
    word: int
    value: int


class Piece(NamedTuple):
    """Bytes [start, stop) of a message, and where they lie in the slot."""

    message: int
    start: int
    stop: int
    at: int


class Parcel(NamedTuple):
    """What goes through a slot at a time: to `peer`, or from it."""

    peer: int
    outgoing: bool
    slot: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Slots:
    """Where flags and slots lie in the buffer of a rank, in bytes from its start; alike on all ranks.

        3 ranks, buffer of rank 1      flags | to rank 0, slot 0 and 1 | to rank 2, slot 0 and 1

    Attributes:
        world: number of ranks.
        size: bytes of a slot.
    """

    world: int
    size: int

    @classmethod
    def within(cls, world: int, size: int, most: int) -> Slots:
        """Slots of `size` bytes, or of as many fewer as keep a buffer within `most` bytes."""
        room = (most - cls(world, 0).nbytes) // max(1, (world - 1) * SLOTS)
        size = min(size, room) // ALIGNMENT * ALIGNMENT
        if size <= 0:
            raise ValueError(f"slots for {world} ranks need {cls(world, ALIGNMENT).nbytes} bytes at least, found {most}")
        return cls(world, size)

    @property
    def flag_bytes(self) -> int:
        """The bytes that flags take, which must be 0 before any rank writes."""
        return -(-2 * self.world * SLOTS * _WORD // ALIGNMENT) * ALIGNMENT

    @property
    def nbytes(self) -> int:
        """The bytes of a rank's buffer."""
        return self.flag_bytes + (self.world - 1) * SLOTS * self.size

    def full(self, source: int, slot: int) -> int:
        """In the receiver's buffer: 1 when `source` has filled its slot for this rank."""
        return (source * SLOTS + slot) * _WORD

    def busy(self, target: int, slot: int) -> int:
        """In the sender's buffer: 1 until `target` has read its slot."""
        return ((self.world + target) * SLOTS + slot) * _WORD

    def place(self, source: int, target: int, slot: int) -> int:
        """In the buffer of `source`: its slot for `target`."""
        return self.flag_bytes + ((target - (target > source)) * SLOTS + slot) * self.size

    def steps(self, rank: int, parcel: Parcel) -> tuple[Wait | Write | Parcel, ...]:
        """What a rank does for a parcel, one after the other; the parcel itself stands for the copy."""
        peer, outgoing, slot, _ = parcel
        if outgoing:
            word = self.busy(peer, slot)
            return Wait(word, 0), Write(rank, word, 1), parcel, Write(peer, self.full(rank, slot), 1)
        word = self.full(peer, slot)
        return Wait(word, 1), Write(rank, word, 0), parcel, Write(peer, self.busy(rank, slot), 0)


class Mailboxes:
    """The parcels of one rank, and which slot is next for each other rank.

    Args:
        rank: this rank.
        slots: where slots lie.

    Attributes:
        turns: the next slot for, and from, each other rank, as the bits of an integer. From it and the sizes of messages follow all
            parcels of a call, and what it is afterwards.
    """

    def __init__(self, rank: int, slots: Slots) -> None:
        self.rank = rank
        self.slots = slots
        self.turns = 0

    def parcels(self, sends: Sequence[tuple[int, int]], receives: Sequence[tuple[int, int]]) -> list[Parcel]:
        """The parcels of one call, in the order in which the rank starts them: round by round, outgoing ones first.

        Args:
            sends: the rank that each message goes to, and its bytes.
            receives: the rank that each message comes from, and its bytes.
        """
        lines = [line for outgoing, messages in ((True, sends), (False, receives)) for line in self._lines(outgoing, messages)]
        rounds = zip_longest(*lines)
        return [parcel for each in rounds for parcel in each if parcel is not None]

    def _lines(self, outgoing: bool, messages: Sequence[tuple[int, int]]) -> list[list[Parcel]]:
        """The parcels for each other rank, beginning with the rank next to this one, so that not all ranks read one buffer."""
        of_peer: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
        for number, (peer, size) in enumerate(messages):
            of_peer[peer].append((number, size))
        way = 1 if outgoing else -1
        return [
            self._packed(outgoing, peer, of_peer[peer])
            for peer in sorted(of_peer, key=lambda peer: way * (peer - self.rank) % self.slots.world)
        ]

    def _packed(self, outgoing: bool, peer: int, messages: Sequence[tuple[int, int]]) -> list[Parcel]:
        """Fill one slot after the other, in the order of the messages."""
        filled: list[list[Piece]] = []
        end = self.slots.size  # of what the last slot holds
        for number, size in messages:
            start = 0
            while start < size:
                if end >= self.slots.size:
                    filled.append([])
                    end = 0
                stop = min(size, start + self.slots.size - end)
                filled[-1].append(Piece(number, start, stop, end))
                end += -(-(stop - start) // ALIGNMENT) * ALIGNMENT
                start = stop
        parcels = []
        bit = 2 * peer + outgoing
        for pieces in filled:
            parcels.append(Parcel(peer, outgoing, self.turns >> bit & 1, tuple(pieces)))
            self.turns ^= 1 << bit
        return parcels
