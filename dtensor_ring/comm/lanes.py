"""Streams whose progress the host reads without asking CUDA, and the watch that notices where one stands still.

    lane to the others    begun 1 | parcel to rank 1: 2 | parcel to rank 2: 3 |        the word says 2: it waits for rank 2
    lane from the others  begun 1 | parcel of rank 2: 2 | ...                          the word says 0: it waits for this rank

A stream that waits for another rank gives no sign, and the host that waits for the stream none either. So each lane writes a
number into a word of host memory when it has done a piece of work, and the watch compares: where the same piece is under way for
the whole of its patience, and the piece waits for another rank, that rank is silent. The watch reads host memory alone: calls of
CUDA from its thread would break a graph that another thread captures.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from torch.cuda import Stream

from dtensor_ring.comm.stream_memory import StreamMemory

_WRAP = 1 << 32  # numbers are written as 32 bits
_LONGEST_NAP = 1.0  # seconds between two looks


class Stage(NamedTuple):
    """A piece of work: its number, the rank it waits for (None: only this rank's own work), and what it is part of."""

    number: int
    peer: int | None
    activity: object
    axis: str


class Halt(NamedTuple):
    """A lane that stood still: in which stage, and for how many seconds."""

    stage: Stage
    seconds: float


class Lane:
    """A stream, and the stages that it has not passed.

    Args:
        stream: the stream.
        memory: what writes words.
        address: of the word, 4 bytes of pinned host memory that are 0.
    """

    def __init__(self, stream: Stream, memory: StreamMemory, address: int) -> None:
        self.stream = stream
        self._memory = memory
        self._address = address
        self._count = 0
        self._ahead: deque[Stage] = deque()
        self._since: tuple[int, float] = (-1, 0.0)

    def passes(self, peer: int | None, activity: object, axis: str) -> None:
        """Say that what the stream was given so far ends a stage."""
        self._count += 1
        self._ahead.append(Stage(self._count, peer, activity, axis))
        self._memory.write(self.stream, self._address, self._count % _WRAP)

    def look(self, now: float) -> Halt | None:
        """The stage that the lane is in, if it waits for a rank, and since when it was seen there; None if not."""
        # The word before the count: what another thread adds meanwhile must not make the word the larger of the two.
        word = ctypes.c_uint32.from_address(self._address).value
        count = self._count
        over = count - (count - word) % _WRAP
        while self._ahead and self._ahead[0].number <= over:
            self._ahead.popleft()
        if not self._ahead or self._ahead[0].peer is None:
            self._since = -1, now
            return None
        stage = self._ahead[0]
        if self._since[0] != stage.number:
            self._since = stage.number, now
        return Halt(stage, now - self._since[1])


class Watch:
    """A thread that looks at lanes until one stands still for `patience` seconds, or it is told to stop.

    Where one still stands `grace` seconds after that was reported, the process is ended: the host may be in a call of CUDA that
    returns only when the lane goes on, and no error could be raised there.

    Args:
        lanes: what to look at.
        patience: seconds.
        grace: seconds.
        report: called once with the halt, in the watch's thread.
    """

    def __init__(self, lanes: list[Lane], patience: float, grace: float, report: Callable[[Halt], None]) -> None:
        self.halt: Halt | None = None
        self.stop = threading.Event()
        self._lanes = lanes
        self._patience = patience
        self._grace = grace
        self._report = report
        # A daemon: a rank whose work is over must end, whatever its lanes wait for.
        self._thread = threading.Thread(target=self._run, name="dtensor_ring watch", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def _run(self) -> None:
        while not self.stop.wait(min(_LONGEST_NAP, self._patience / 4)):
            halt = self._standing()
            if halt is None:
                continue
            if self.halt is None:
                self.halt = halt
                self._report(halt)
                if self.stop.wait(self._grace):
                    return
                if self._standing() is None:  # it goes on, and may stand again: then there is nobody left to be told
                    continue
            os.abort()
            return

    def _standing(self) -> Halt | None:
        """The lane that has stood still for longest, if longer than there is patience."""
        halts = [halt for lane in self._lanes if (halt := lane.look(time.monotonic())) is not None]
        longest = max(halts, key=lambda halt: halt.seconds, default=None)
        return longest if longest is not None and longest.seconds >= self._patience else None
