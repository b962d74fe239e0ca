"""The interface that executors and redistribution talk to.

A transfer returns a `Pending` at once; its result is valid after `wait()`, and so is changing what was sent. Every rank of a
group makes the same calls in the same order. Messages of no elements are left out on both sides.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from dtensor_ring._torch import is_capturing, named_in_profiles
from dtensor_ring._torch_groups import store_of
from dtensor_ring.captures import check_not_capturing
from dtensor_ring.planning.cost_model import Link

T = TypeVar("T")


class SilentRankError(RuntimeError):
    """A rank waited in vain: the text names it, the rank it waited for, the mesh axis, and what the transfer was part of."""


class Message(NamedTuple):
    """A contiguous tensor to send to `rank` of the group, or to fill with what that rank sends."""

    rank: int
    tensor: Tensor


@dataclass(slots=True)
class Traffic:
    """What a rank has sent through one transport: messages and bytes, summed over its life."""

    messages: int = 0
    bytes: int = 0

    def add(self, messages: int, count: int) -> None:
        """Count messages, and the bytes that they carry together."""
        self.messages += messages
        self.bytes += count

    def since(self, earlier: Traffic) -> Traffic:
        """Give what was sent after `earlier`, which is a `copy` taken before."""
        return Traffic(self.messages - earlier.messages, self.bytes - earlier.bytes)

    def copy(self) -> Traffic:
        """Give the present count as a value that counts no further."""
        return Traffic(self.messages, self.bytes)


class Pending(Generic[T]):
    """The result of a transfer under way; redeem it with `wait()`, once."""

    def __init__(self, finish: Callable[[], T]) -> None:
        self._finish: Callable[[], T] | None = finish

    @classmethod
    def ready(cls, value: T) -> Pending[T]:
        """Make the result of something that needed no transfer."""
        return cls(lambda: value)

    def wait(self) -> T:
        """The result. On a GPU the current stream waits, the host does not."""
        # The function holds the buffers of the transfer; a pending that is kept after its wait must not keep them alive.
        finish, self._finish = self._finish, None
        assert finish is not None, "a pending transfer is redeemed once"
        return finish()

    def settle(self) -> None:
        """Wait for a transfer whose result nobody will use, unless it was redeemed; how it ends does not matter any more."""
        if self._finish is not None:
            with suppress(RuntimeError):
                self.wait()


class Transfers(AbstractContextManager["Transfers"]):
    """The transfers that a block starts one ahead of its work, each redeemed also where the work ends in an error.

    Messages between two ranks meet by their order: one that nobody waited for would meet what the next call sends, and on gloo
    the group would be broken. Where all ranks end in the same error, as of a kernel that refuses, they can go on together.
    """

    __slots__ = ("_started",)

    def __init__(self) -> None:
        self._started: list[Pending[Any]] = []

    def add(self, pending: Pending[T]) -> Pending[T]:
        """Take note of a transfer, and give it back. One that was redeemed keeps no memory here."""
        self._started.append(pending)
        return pending

    @override
    def __exit__(self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None) -> None:
        # Where a rank waited in vain the rest would be waited for in vain too: the group is broken already.
        if isinstance(failure, Exception) and not isinstance(failure, SilentRankError):
            for pending in self._started:
                pending.settle()


@dataclass(frozen=True, slots=True)
class TransportRequirements:
    """What a group asks of a transport; `Transport.refuses` judges it.

    Attributes:
        rank: this rank of the group.
        world: number of ranks.
        backend: the backend of the process group, such as "nccl" or "gloo"; "" where ranks are threads, or there is one rank.
        group: the process group, or None where there is none.
    """

    rank: int
    world: int
    backend: str = ""
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> TransportRequirements:
        """Read the requirements of a process group off the group."""
        return cls(dist.get_rank(group), dist.get_world_size(group), dist.get_backend(group), group)

    def every_rank(self, subject: str, answer: str) -> list[str]:
        """The answers of all ranks to one question, in rank order: for a refusal that depends on the machine of a rank.

        Ranks must come to the same choice, so what only this rank knows (its host, its driver, a package) counts for the choice
        once every rank knows it. Answers travel through the group's store, not by a collective: a rank may ask at any time, and
        waits until every rank has been asked. The answer to a question stays the same as long as the group lives.
        """
        if self.group is None:
            return [answer] * self.world
        self.leave_answer(subject, answer)
        # `get` waits for the key, so a rank that asks first waits for the others here.
        store = store_of(self.group)
        return [store.get(f"dtensor_ring/{subject}/{rank}").decode() for rank in range(self.world)]

    def leave_answer(self, subject: str, answer: str) -> None:
        """This rank's part of `every_rank`, for the others: for a rank that need not know theirs."""
        if self.group is not None:
            store_of(self.group).set(f"dtensor_ring/{subject}/{self.rank}", answer)


class _During(AbstractContextManager[None]):
    # a class, not a generator: every transfer enters one, and a generator takes four times as long
    __slots__ = ("_activity", "_before", "_named", "_transport")

    def __init__(self, transport: Transport, activity: object) -> None:
        self._transport, self._activity = transport, activity

    @override
    def __enter__(self) -> None:
        transport, activity = self._transport, self._activity
        self._named = named_in_profiles(lambda: f"{transport._of_ranks}, {activity}")
        self._named.__enter__()
        # Activities nest: a collective inside of one compares sizes under a name of its own. Set last: should the above raise,
        # nobody would set it back.
        self._before, transport.activity = transport.activity, activity

    @override
    def __exit__(self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None) -> None:
        self._transport.activity = self._before
        self._named.__exit__(kind, failure, trace)


class Transport(ABC):
    """Data exchange among the `world` ranks of one group, seen from `rank`.

    Attributes:
        name: what the transport is called in `dtensor_ring.comm.TRANSPORTS`, in errors and in tables.
        axis: what errors call the group, such as "mesh axis 'cp'".
        traffic: what this rank has sent.
        activity: what the transfers started now are part of; its text is made only where one fails. See `during`.
        agreements: the calls that the ranks of this group have compared; see `rank_checks`.
        batches: packed batches whose balance was looked at; see `data.batch`.
    """

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def refuses(cls, need: TransportRequirements) -> str | None:
        """Why this transport cannot carry what the group sends, or None if it can; the same answer on every rank of the group.

        An answer that needs to know more than `need` says asks the other ranks with `need.every_rank`.
        """

    @classmethod
    @abstractmethod
    def connect(cls, need: TransportRequirements) -> Transport:
        """This rank's end for a group that the transport does not refuse. It holds the group weakly, if at all.

        Sends nothing and waits for no rank, since a rank may ask for the transport of its group alone; a transport that must meet
        the other ranks first does so in its first transfer.
        """

    def __init__(self, rank: int, world: int, axis: str = "this group") -> None:
        self.rank = rank
        self.world = world
        self.axis = axis
        self.traffic = Traffic()
        self.activity: object = "a transfer"
        # A dict for a set in order of entry: the oldest agreement is the first to be forgotten, on all ranks alike.
        self.agreements: dict[Hashable, None] = {}
        self.note = 0  # the number of the last one that this rank has left
        self.batches = 0

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank {self.rank} of {self.world}, {self.axis})"

    @property
    def _of_ranks(self) -> str:
        return f"dtensor_ring, rank {self.rank} of {self.world}"

    def during(self, activity: object) -> AbstractContextManager[None]:
        """Name what the transfers started inside the block are part of, for the error of one that fails and for profiles."""
        return _During(self, activity)

    def empty(self, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A buffer to receive into, on the device of `like` and of its dtype unless one is given."""
        # Buffers to receive into are made here and nowhere else: a transport may need memory of a kind of its own, and the loopback
        # fills it with NaN, so that a test sees what is read too early.
        return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending[None]:
        """Send each message of `sends` and fill each tensor of `receives`; both sides agree on sizes and order.

        Sends the bytes of `sends`, nothing else.
        """
        self._check_capture()
        # Both sides leave out empty messages by the same rule, so neither waits: backends differ in what they do with them.
        sends = [message for message in sends if message.tensor.numel()]
        receives = [message for message in receives if message.tensor.numel()]
        for message in (*sends, *receives):
            assert message.rank != self.rank, "a rank does not send to itself"
            assert message.tensor.is_contiguous(), "messages are contiguous tensors"
        # Counted where every transfer passes, so that a transport cannot forget it, and bytes mean the same for all of them.
        count = _bytes(sends)
        self.traffic.add(len(sends), count)
        with named_in_profiles(lambda: f"{self._of_ranks}, sends {count} bytes, receives {_bytes(receives)} bytes"):
            return self._exchange(sends, receives)

    def all_gather(self, tensor: Tensor) -> Pending[Tensor]:
        """Tensors of one shape from all ranks, stacked: (world, *shape). Sends the tensor to every other rank."""
        self._check_capture()
        self._compare("all-gather", tensor)
        count = (self.world - 1) * tensor.nbytes
        self.traffic.add(self.world - 1, count)
        with named_in_profiles(lambda: f"{self._of_ranks}, all-gather, sends {count} bytes"):
            return self._all_gather(tensor.contiguous())

    def reduce_scatter(self, tensor: Tensor) -> Pending[Tensor]:
        """The sum over ranks of slice `rank` of (world, *shape) tensors: (*shape). Sends every other rank its slice."""
        assert tensor.shape[0] == self.world, "reduce_scatter takes one slice a rank"
        self._check_capture()
        self._compare("reduce-scatter", tensor)
        count = tensor.nbytes // self.world * (self.world - 1)
        self.traffic.add(self.world - 1, count)
        with named_in_profiles(lambda: f"{self._of_ranks}, reduce-scatter, sends {count} bytes"):
            return self._reduce_scatter(tensor.contiguous())

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        """The sum (or `op`: "sum", "avg", "max", "min", "product") over ranks. Counted as reduce-scatter and all-gather."""
        self._check_capture()
        self._compare(f"all-reduce ({op})", tensor)
        self.traffic.add(2 * (self.world - 1), 2 * tensor.nbytes * (self.world - 1) // self.world)
        return self._all_reduce(tensor.contiguous(), op)

    def gather_values(self, values: Sequence[int]) -> list[list[int]]:
        """A few integers of every rank, on the host of every rank: for checks once a batch, since the host waits."""
        if self.world == 1:
            return [list(values)]
        # Past `all_gather`, which compares and counts: a comparison must not ask for another, and bytes of tensors are what is
        # counted.
        mine = torch.tensor(values, dtype=torch.int64, device=self.value_device())
        return self._all_gather(mine).wait().tolist()

    def offer_values(self, values: Sequence[int], patience: float) -> None:
        """This rank's part of `gather_values`, for the others: returns when they have joined, or after `patience` seconds."""
        self.gather_values(values)

    def leave_note(self, number: int, text: str) -> None:  # noqa: B027  by default nothing keeps it
        """Leave a text for the other ranks of the group, in place of the one of this number; where the transport can keep any."""

    def note_of(self, rank: int, number: int) -> str:
        """Give the text that a rank has left under a number."""
        return "its own output says why"

    @property
    def known_link(self) -> Link | None:
        """How fast the ranks exchange, by which "ring" chooses its stages; None where that is not known. The same on every rank.

        Asked in attention, by every rank of the group: a transport may ask the others the first time.
        """
        return None

    def value_device(self) -> torch.device:
        """The device on which small values must lie to be exchanged."""
        return torch.device("cpu")

    def refuses_capture(self) -> str | None:
        """Why a CUDA graph cannot capture transfers of this end, or None if it can."""
        return None

    def _check_capture(self) -> None:
        # Asked where every transfer passes: what is only recorded must not wait for other ranks on the host.
        reason = self.refuses_capture() if is_capturing() else None
        if reason is not None:
            check_not_capturing(
                f"{self.activity}: the transport {self.name!r} of {self.axis} {reason}",
                "run what exchanges tensors outside of the graph",
            )

    def _compare(self, collective: str, tensor: Tensor) -> None:  # noqa: B027  by default nothing is asked
        """Raises RuntimeError on every rank unless all start this collective on tensors of one shape; where that is asked."""

    @abstractmethod
    def _exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending[None]: ...

    @abstractmethod
    def _all_gather(self, tensor: Tensor) -> Pending[Tensor]: ...

    @abstractmethod
    def _reduce_scatter(self, tensor: Tensor) -> Pending[Tensor]: ...

    @abstractmethod
    def _all_reduce(self, tensor: Tensor, op: str) -> Tensor: ...


def _bytes(messages: Sequence[Message]) -> int:
    return sum(message.tensor.nbytes for message in messages)


class MessageCollectives(Transport):
    """A transport whose collectives are made of messages: each rank sends its part to every other, and adds up by itself."""

    @override
    def _all_gather(self, tensor: Tensor) -> Pending[Tensor]:
        gathered = self.empty((self.world, *tensor.shape), tensor)
        gathered[self.rank] = tensor
        others = [rank for rank in range(self.world) if rank != self.rank]
        pending = self._exchange(_filled(others, [tensor] * self.world), _filled(others, gathered))
        return Pending(lambda: (pending.wait(), gathered)[1])

    @override
    def _reduce_scatter(self, tensor: Tensor) -> Pending[Tensor]:
        others = [rank for rank in range(self.world) if rank != self.rank]
        parts = [torch.empty_like(tensor[self.rank]) for _ in range(self.world)]
        pending = self._exchange(_filled(others, tensor), _filled(others, parts))

        def finish() -> Tensor:
            pending.wait()
            parts[self.rank] = tensor[self.rank]
            # In the order of ranks, whoever came first, so that all runs give the same bits.
            return torch.stack(parts).sum(0, dtype=tensor.dtype)  # left to itself it widens integers

        return Pending(finish)

    @override
    def _all_reduce(self, tensor: Tensor, op: str) -> Tensor:
        every = self._all_gather(tensor).wait()
        if op == "avg":  # in a wider dtype, where a sum of 16 bits may pass what they hold
            return every.mean(0, dtype=torch.promote_types(tensor.dtype, torch.float32)).to(tensor.dtype)
        if op in ("sum", "product"):
            return (every.sum if op == "sum" else every.prod)(0, dtype=tensor.dtype)
        return every.amax(0) if op == "max" else every.amin(0)


def _filled(ranks: Sequence[int], parts: Sequence[Tensor] | Tensor) -> list[Message]:
    """A message for each rank with its part; empty ones are left out, as `exchange` does."""
    return [Message(rank, parts[rank]) for rank in ranks if parts[rank].numel()]
