"""Ranks as threads of one process: the executors run on it unchanged, with no process group.

    outs = LoopbackTransport.run(4, lambda transport: forward(plan(problem, transport.rank), transport, ...))

Transfers are as late as the interface allows: what is sent is read when the receiver waits, so a rank that changes a tensor
under transfer gives a wrong result in tests. Fresh buffers are filled with NaN.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import ClassVar, NoReturn, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from dtensor_ring.comm.transport import Message, MessageCollectives, Pending, TransportRequirements

T = TypeVar("T")


@dataclass(slots=True)
class _Parcel:
    tensor: Tensor
    ready: torch.Event | None
    taken: threading.Event = field(default_factory=threading.Event)
    copied: torch.Event | None = None


class _Switchboard:
    """Lines between ranks: the n-th message a rank posts to another meets the n-th the other expects of it."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.failed = threading.Event()
        self._lines: dict[tuple[int, int, int], SimpleQueue[_Parcel]] = {}
        self._lock = threading.Lock()

    def line(self, source: int, target: int, number: int) -> SimpleQueue[_Parcel]:
        """Where the n-th message of a rank to another is posted, made by whoever of the two comes first."""
        with self._lock:  # two that make it at once would have one each, and the message in the other would be lost
            return self._lines.setdefault((source, target, number), SimpleQueue())

    def take(self, source: int, target: int, number: int) -> _Parcel:
        waited, line = 0.0, self.line(source, target, number)
        while waited < self.timeout and not self.failed.is_set():
            try:
                # A short wait, again and again, so that the failure of another rank ends this one at once and not after the whole
                # timeout.
                return line.get(timeout=0.05)
            except Empty:
                waited += 0.05
        why = "another rank failed" if self.failed.is_set() else f"after {self.timeout:.0f} s"
        raise TimeoutError(f"rank {target} waits for a message of rank {source}, which sent none ({why})")


class LoopbackTransport(MessageCollectives):
    """One rank's end of an in-process exchange; `LoopbackTransport.run` starts a thread for each rank.

    Args:
        rank: this end.
        world: number of ends.
        board: what the ends of one run share.
    """

    name: ClassVar[str] = "loopback"

    @classmethod
    @override
    def refuses(cls, need: TransportRequirements) -> str | None:
        """Refuses ranks that are processes."""
        return f"connects threads of one process, and the ranks are processes ({need.backend})" if need.backend else None

    @classmethod
    @override
    def connect(cls, need: TransportRequirements) -> NoReturn:
        """Raises RuntimeError: `LoopbackTransport.run` makes all ends at once, with what they share."""
        raise RuntimeError("the ends of a loopback are made together, by LoopbackTransport.run")

    @override
    def refuses_capture(self) -> str | None:
        """Refuses: a thread takes what another has left, which no replay would do again."""
        return "connects threads of one process, which meet on the host"

    def __init__(self, rank: int, world: int, board: _Switchboard) -> None:
        super().__init__(rank, world)
        self._board = board
        self._sent: Counter[int] = Counter()
        self._expected: Counter[int] = Counter()

    @classmethod
    def run(cls, world: int, body: Callable[[LoopbackTransport], T], timeout: float = 60.0) -> list[T]:
        """Call `body` with each rank's transport, a thread a rank; the results in rank order, or the first failure.

        Raises:
            TimeoutError: a rank waited `timeout` seconds for a message; the text names both ranks.
        """
        board = _Switchboard(timeout)
        results: dict[int, T] = {}
        failures: list[BaseException] = []

        def work(rank: int) -> None:
            try:
                results[rank] = body(cls(rank, world, board))
            except BaseException as failure:  # noqa: BLE001  handed to the caller below
                failures.append(failure)
                board.failed.set()

        # Daemons: a rank that hangs must not keep the test process from ending.
        threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return [results[rank] for rank in range(world)]

    @override
    def empty(self, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Make a buffer full of NaN, or an uninitialized one where the dtype has no NaN."""
        buffer = super().empty(shape, like, dtype)
        return buffer.fill_(math.nan) if buffer.is_floating_point() else buffer

    @override
    def _exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending[None]:
        # The tensor itself and no copy: a rank that changes it before the receiver took it is to be found out, as NCCL may read it
        # as late. Detached, since a transfer is not part of any rank's graph.
        parcels = [_Parcel(message.tensor.detach(), _now(message.tensor)) for message in sends]
        for message, parcel in zip(sends, parcels, strict=True):
            self._board.line(self.rank, message.rank, self._sent[message.rank]).put(parcel)
            self._sent[message.rank] += 1
        # Numbers are given when a transfer starts and not when it is waited for, since a rank may wait for transfers in another
        # order than it started them.
        numbers = []
        for message in receives:
            numbers.append(self._expected[message.rank])
            self._expected[message.rank] += 1

        def finish() -> None:
            for message, number in zip(receives, numbers, strict=True):
                parcel = self._board.take(message.rank, self.rank, number)
                assert parcel.tensor.shape == message.tensor.shape, (
                    f"rank {message.rank} sent {tuple(parcel.tensor.shape)}, rank {self.rank} expects {tuple(message.tensor.shape)}"
                )
                assert parcel.tensor.dtype == message.tensor.dtype, "both ends of a message agree on the dtype"
                # Ends may work on streams of their own: what is copied must have been computed, and may be changed only afterwards.
                _wait_for(parcel.ready)
                message.tensor.copy_(parcel.tensor)
                parcel.copied = _now(message.tensor)
                parcel.taken.set()
            # Receiving comes first on every rank: two that waited for their own parcels to be taken would wait for each other.
            # After this wait the interface lets a rank change what it sent.
            for message, parcel in zip(sends, parcels, strict=True):
                if not parcel.taken.wait(self._board.timeout):
                    raise TimeoutError(f"rank {message.rank} never took what rank {self.rank} sent it")
                _wait_for(parcel.copied)

        return Pending(finish)


def _now(tensor: Tensor) -> torch.Event | None:
    """What the current stream of a tensor's device has been given so far; None on a CPU, which has no streams."""
    return torch.accelerator.current_stream(tensor.device.index).record_event() if tensor.is_cuda else None


def _wait_for(event: torch.Event | None) -> None:
    if event is not None:
        torch.accelerator.current_stream().wait_event(event)
