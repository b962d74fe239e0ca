"""Transfers between GPUs of one machine through memory that all ranks have mapped, moved by copy engines.

    rank 0 sends K to rank 1             lane to the others                 lane from the others
    rank 0                               copies K into its slot for 1
    rank 1                                                                  copies the slot of rank 0 to where K is wanted

Every rank has a buffer of slots, two for each other rank (`mailboxes` has the protocol, and why it neither overwrites nor waits
for ever), made at the first transfer and freed with the group; its size does not depend on what is sent. A message is copied
twice: into a slot by its sender, on the GPU's own memory, and out of it by its receiver, over NVLink. Both are plain copies of
contiguous bytes; the second is done by a copy engine, so that no multiprocessor is taken from attention while keys travel. Ranks
wait for one another on the GPU, by words of the buffers (`stream_memory`), and the host waits for nothing.

A rank that waits in vain shows when its GPU has stood at one parcel for `patience` seconds, seen by a thread (`lanes`): the error,
which names rank, peer and what the transfer was part of, is logged, and raised by the next transfer or wait. As the host may be
inside a call that ends only with the GPU, such as `loss.item()`, the process is ended where the GPU still stands a minute later.
The GPU never goes on past such a wait, so no result of half a transfer is ever read. What a CUDA graph replays is not watched.

What ranks compare goes over the group itself, and so do collectives where the group is NCCL; on gloo those of CUDA tensors are
made of messages. Transfers of CPU tensors are left to the group.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import socket
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar, NamedTuple
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor
from torch.cuda import Event, Stream
from typing_extensions import override

from dtensor_ring._torch_symmetric import lacks_symmetric_memory, map_symmetric, never_free, symmetric_buffer
from dtensor_ring.captures import check_not_capturing
from dtensor_ring.comm.lanes import Halt, Lane, Watch
from dtensor_ring.comm.mailboxes import Mailboxes, Parcel, Piece, Slots, Wait, Write
from dtensor_ring.comm.process_group import ProcessGroupTransport
from dtensor_ring.comm.rank_checks import meet, refused_together
from dtensor_ring.comm.stream_memory import StreamMemory
from dtensor_ring.comm.transport import Message, MessageCollectives, Pending, SilentRankError, TransportRequirements

_LOG = logging.getLogger(__name__)
_OVERLAP = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"
_GRACE = 60.0  # seconds in which a process that waits in vain may end by its own error
_MIB = 1 << 20
_MOST_KEPT = 128  # calls whose parcels a group keeps, each of about 1 KiB a parcel
Sizes = tuple[tuple[int, int], ...]  # of messages: rank and bytes


class SymmetricMemoryTransport(ProcessGroupTransport, MessageCollectives):
    """A transport over PyTorch's symmetric memory, for ranks on GPUs of one machine.

        use_transport(mesh["cp"], "symmetric_memory")         # on every rank, once the process group is there

    Attributes:
        slot_bytes: size of a slot; longer messages go in parts. A rank has two for each other rank.
        most_bytes: a rank's buffer is no larger; where there are many ranks, slots are smaller. Eight ranks take 224 MiB each.
        patience: seconds that the GPU may wait for another rank before that rank counts as silent.
    """

    name: ClassVar[str] = "symmetric_memory"
    slot_bytes: ClassVar[int] = 16 * _MIB
    most_bytes: ClassVar[int] = 256 * _MIB
    patience: ClassVar[float] = 600.0

    @classmethod
    @override
    def refuses(cls, need: TransportRequirements) -> str | None:
        """Refuses ranks without a process group, without CUDA, of several machines, and on GPUs that cannot read each other."""
        reason = super().refuses(need) or _machine_lacks()
        if need.group is None:
            return reason
        subject, answer = "symmetric_memory", _Place.here(reason).text()
        if reason is not None:
            # For the others, who wait for it. This rank need not wait to know that it refuses.
            need.leave_answer(subject, answer)
            return reason
        places = [_Place.read(each) for each in need.every_rank(subject, answer)]
        reason = _misplaced(places)
        if reason is not None:
            return reason
        barred = need.every_rank("symmetric_memory/peers", _unreadable(need.rank, places) or "")
        return next((f"rank {rank}: {text}" for rank, text in enumerate(barred) if text), None)

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self._line: _Line | None = None
        # Backward runs in a thread of its own: what one call gives a stream must stay together.
        self._lock = threading.Lock()

    @override
    def _exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending[None]:
        if self.world == 1:
            return Pending.ready(None)
        with self._lock:
            line = self._line = self._line or self._opened()
            self._check(line)
            out, into = ([message for message in messages if message.tensor.is_cuda] for messages in (sends, receives))
            ended = line.start(out, into, self.activity, self.axis)
        host_out, host_into = ([message for message in messages if not message.tensor.is_cuda] for messages in (sends, receives))
        others = super()._exchange(host_out, host_into) if host_out or host_into else None
        # Held up to the wait: these tensors are under way on streams that the allocator knows nothing of.
        held = [*out, *into]

        def finish() -> None:
            self._check(line)
            current = torch.cuda.current_stream(line.device)
            for event in ended:
                current.wait_event(event)
            held.clear()
            if others is not None:
                others.wait()

        return Pending(finish)

    @override
    def refuses_capture(self) -> None:
        """Refuses nothing: copies and waits are work of streams, whatever the ranks' group runs on."""

    @override
    def _all_gather(self, tensor: Tensor) -> Pending[Tensor]:
        return MessageCollectives._all_gather(self, tensor) if self._by_messages(tensor) else super()._all_gather(tensor)

    @override
    def _reduce_scatter(self, tensor: Tensor) -> Pending[Tensor]:
        return MessageCollectives._reduce_scatter(self, tensor) if self._by_messages(tensor) else super()._reduce_scatter(tensor)

    @override
    def _all_reduce(self, tensor: Tensor, op: str) -> Tensor:
        return MessageCollectives._all_reduce(self, tensor, op) if self._by_messages(tensor) else super()._all_reduce(tensor, op)

    def _by_messages(self, tensor: Tensor) -> bool:
        # gloo has no collectives of CUDA tensors for some dtypes, and copies through the host for the others
        return tensor.is_cuda and not self._is_nccl()

    def _opened(self) -> _Line:
        """Make and map the buffers; every rank comes here at its first transfer."""
        device = torch.device("cuda", torch.cuda.current_device())
        what = f"{self.activity}: the first transfer over {self.axis} makes buffers"
        check_not_capturing(what, "run the call once before it is captured")
        slots = Slots.within(self.world, self.slot_bytes, self.most_bytes)
        with refused_together(lambda: [self]):
            buffer = symmetric_buffer(slots.nbytes, device)
            # Before anybody can write into it, which is once all have mapped it.
            buffer[: slots.flag_bytes].zero_()
            torch.cuda.current_stream(device).synchronize()
        for rank, (size,) in enumerate(meet(self, "opening symmetric memory", [slots.size])):
            if size != slots.size:
                raise ValueError(
                    f"slot_bytes and most_bytes give slots of {slots.size} bytes on rank {self.rank} of {self.axis} and of {size} "
                    f"on rank {rank}: every rank needs the same"
                )
        group = self._group
        handle, addresses, views = self._waited(lambda: map_symmetric(buffer, group), f"{self.activity}, mapping buffers")
        line = _Line(self.rank, device, slots, _Mapped([buffer, handle], addresses, views), self.patience)
        line.closes_with(self)
        return line

    def _check(self, line: _Line) -> None:
        """Raises SilentRankError where the watch has seen this rank wait in vain."""
        halt = line.watch.halt
        if halt is not None:
            what = line.described(halt)
            raise SilentRankError(f"{what}. {self._whereabouts(what)}")


class _Mapped(NamedTuple):
    """What is mapped: what keeps it so, and each rank's buffer by its address and as a tensor."""

    kept: list[object]
    addresses: list[int]
    views: list[Tensor]


class _Carriage(NamedTuple):
    """A parcel on its way: its lane and peer, what the lane does before its pieces are copied and after, and where they lie."""

    lane: Lane
    peer: int
    outgoing: bool
    before: list[Callable[[], None]]
    pieces: tuple[Piece, ...]
    places: list[Tensor]
    after: list[Callable[[], None]]


class _Line:
    """This rank's streams, and the buffers of all ranks."""

    def __init__(self, rank: int, device: torch.device, slots: Slots, mapped: _Mapped, patience: float) -> None:
        self.rank = rank
        self.device = device
        self._slots = slots
        self._mapped = mapped
        self._boxes = Mailboxes(rank, slots)
        self._kept: dict[tuple[int, Sizes, Sizes], tuple[list[_Carriage], int]] = {}
        self._memory = StreamMemory()
        self._words = torch.zeros(2, dtype=torch.int32, pin_memory=torch.cuda.is_available())
        addresses = [self._words.data_ptr() + 4 * i for i in range(2)]
        # High priority: a transfer that is late costs more than a kernel that is.
        self._out, self._in = (Lane(Stream(device, priority=-1), self._memory, address) for address in addresses)
        self.watch = Watch([self._out, self._in], patience, _GRACE, self._halted)
        self.watch.start()
        atexit.register(self.leave)

    def start(self, sends: Sequence[Message], receives: Sequence[Message], activity: object, axis: str) -> list[Event]:
        """Give both lanes the parcels of a call; the events after which all are through."""
        for message in (*sends, *receives):
            if message.tensor.device != self.device:
                raise RuntimeError(
                    f"{activity}: symmetric memory of {axis} lies on {self.device}, and a message on {message.tensor.device}: call "
                    "torch.cuda.set_device before the first transfer, and keep tensors there"
                )
        # What is replayed writes the numbers of its capture, which say nothing.
        watched = not torch.cuda.is_current_stream_capturing()
        tensors = [_bytes(message.tensor) for message in receives], [_bytes(message.tensor) for message in sends]
        begun = _now(torch.cuda.current_stream(self.device))
        lanes = [lane for lane, messages in ((self._out, sends), (self._in, receives)) if messages]
        for lane in lanes:
            lane.stream.wait_event(begun)
            if watched:
                lane.passes(None, activity, axis)
        sizes = [tuple((message.rank, message.tensor.nbytes) for message in messages) for messages in (sends, receives)]
        for carriage in self._carriages(*sizes):
            messages = tensors[carriage.outgoing]
            for prepare in carriage.before:
                prepare()
            with torch.cuda.stream(carriage.lane.stream):
                for (number, start, stop, _), there in zip(carriage.pieces, carriage.places, strict=True):
                    here = messages[number][start:stop]
                    there.copy_(here) if carriage.outgoing else here.copy_(there)
            for conclude in carriage.after:
                conclude()
            if watched:
                carriage.lane.passes(carriage.peer, activity, axis)
        return [_now(lane.stream) for lane in lanes]

    def _carriages(self, sends: Sizes, receives: Sizes) -> list[_Carriage]:
        """The parcels of a call, ready to be carried; kept, since layers send the same sizes again and again."""
        key = self._boxes.turns, sends, receives
        found = self._kept.get(key)
        if found is None:
            parcels = self._boxes.parcels(sends, receives)
            found = [self._carriage(parcel) for parcel in parcels], self._boxes.turns
            if len(self._kept) >= _MOST_KEPT:
                self._kept.clear()
            self._kept[key] = found
        carriages, self._boxes.turns = found
        return carriages

    def _carriage(self, parcel: Parcel) -> _Carriage:
        addresses, lane = self._mapped.addresses, self._out if parcel.outgoing else self._in
        around: list[list[Callable[[], None]]] = [[]]
        for step in self._slots.steps(self.rank, parcel):
            if isinstance(step, Wait):
                around[-1].append(partial(self._memory.wait_for, lane.stream, addresses[self.rank] + step.word, step.value))
            elif isinstance(step, Write):
                around[-1].append(partial(self._memory.write, lane.stream, addresses[step.rank] + step.word, step.value))
            else:
                around.append([])
        before, after = around
        source, target = (self.rank, parcel.peer) if parcel.outgoing else (parcel.peer, self.rank)
        slot = self._mapped.views[source][self._slots.place(source, target, parcel.slot) :]
        places = [slot[piece.at : piece.at + piece.stop - piece.start] for piece in parcel.pieces]
        return _Carriage(lane, parcel.peer, parcel.outgoing, before, parcel.pieces, places, after)

    def described(self, halt: Halt) -> str:
        """What a halt means, as the beginning of an error."""
        _, peer, activity, axis = halt.stage
        return f"{activity}: rank {self.rank} of {axis} waited {halt.seconds:.1f} s for rank {peer}"

    def _halted(self, halt: Halt) -> None:
        # Logged here, since the host may be in a call of CUDA that does not return, where nothing can be raised.
        _LOG.error("%s. If the GPU still waits in %.0f s, this process is ended.", self.described(halt), _GRACE)
        self.leave()

    def leave(self) -> None:
        """Let the buffers be until the process ends: freeing them waits for the device, which may wait for ranks that are gone."""
        never_free([*self._mapped.kept, self._words])

    def closes_with(self, transport: SymmetricMemoryTransport) -> None:
        """Close when the transport ends, but not when the process does: nothing must wait for the device then."""
        self._owner = ref(transport, lambda _: self.close())

    def close(self) -> None:
        """Stop looking, and free the buffers; others keep what they have mapped until they free theirs."""
        atexit.unregister(self.leave)
        self._kept.clear()
        self._mapped.views.clear()
        self._mapped.kept.clear()
        self.watch.stop.set()  # only now: freeing waits for the device, which may wait for a rank that is gone


def _now(stream: Stream) -> Event:
    event = Event()
    event.record(stream)
    return event


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().view(-1).view(torch.uint8)


class _Place(NamedTuple):
    """Where a rank is: why it cannot take part ("" if it can), its machine, its GPU, and whether GPUs may be shared."""

    reason: str
    host: str
    device: int
    uuid: str
    shares: bool

    @classmethod
    def here(cls, reason: str | None) -> _Place:
        shares = os.environ.get(_OVERLAP) == "1"
        if reason is not None:
            return cls(reason, socket.gethostname(), -1, "", shares)
        device = torch.cuda.current_device()
        return cls("", socket.gethostname(), device, str(torch.cuda.get_device_properties(device).uuid), shares)

    def text(self) -> str:
        return json.dumps(self)

    @classmethod
    def read(cls, text: str) -> _Place:
        return cls(*json.loads(text))


def _machine_lacks() -> str | None:
    """Why this rank cannot take part, as far as it is alone to judge."""
    if not torch.cuda.is_available():
        return "needs a CUDA device for every rank, and PyTorch finds none"
    return lacks_symmetric_memory() or StreamMemory.lacks()


def _misplaced(places: Sequence[_Place]) -> str | None:
    """Why ranks in these places cannot share memory; every rank has the same places, and gives the same answer."""
    for rank, place in enumerate(places):
        if place.reason:
            return f"rank {rank} {place.reason}"
        if place.host != places[0].host:
            return f"needs all ranks on one machine: rank 0 is on {places[0].host}, rank {rank} on {place.host}"
    if all(place.shares for place in places):
        return None
    first: dict[int, int] = {}
    for rank, place in enumerate(places):
        other = first.setdefault(place.device, rank)
        if other != rank:
            return (
                f"needs a GPU for each rank: ranks {other} and {rank} both use cuda:{place.device}. Where that is meant, as in "
                f"tests, set {_OVERLAP}=1 for every rank"
            )
    return None


def _unreadable(rank: int, places: Sequence[_Place]) -> str | None:
    """Why this rank's GPU cannot read that of another rank, as far as the process sees both."""
    mine = places[rank].device
    for other, place in enumerate(places):
        visible = (
            place.device < torch.cuda.device_count() and str(torch.cuda.get_device_properties(place.device).uuid) == place.uuid
        )
        if visible and place.device != mine and not torch.cuda.can_device_access_peer(mine, place.device):
            return f"needs GPUs that read each other's memory, and cuda:{mine} cannot read cuda:{place.device} of rank {other}"
    return None
