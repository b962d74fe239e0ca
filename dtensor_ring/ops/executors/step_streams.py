"""Two streams for the calls of a plan of two steps: one for this rank's own keys, one for those of other ranks.

    one stream     [own keys  ########..][keys of others  ##########...][more calls on them  ######...]
    two streams    [own keys  ########[more calls on them  ######...]           . multiprocessors that have nothing left to do
                               [keys of others  ##########..]

A kernel ends when its longest block of queries ends. Until then most multiprocessors of the GPU idle: up to a fifth of the time of
a call on packed documents, whose lengths differ most. Calls on two streams fill each other's ends. The stream of other ranks' keys
goes first where both have work: its blocks are the longer ones, and short ones fill gaps best; and in the backward pass its
gradients travel while the own keys' are still computed. In the forward pass, which begins with the own keys, their stream has
nothing to do once these are computed: of several calls on other ranks' keys it takes all but the first.

Memory is safe by four rules. The second stream, which passes of one thread alone use, waits at its beginning for all that the
first was given so far, so that what it allocates is free. All that belongs to the step of other ranks' keys is allocated there,
from its fetch on. The first stream waits for the second before it reads what was computed there, and before the pass ends. And
where the first has read other ranks' keys, the second waits for it before the pass ends, after which their memory is free.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

import torch
from torch import Tensor
from typing_extensions import override

from dtensor_ring.ops.executors.parts import MOST_GRADIENTS, MOST_OUTPUTS
from dtensor_ring.planning.schedule import CALLS_OF_TWO_STREAMS, Plan


class _Current(AbstractContextManager[None]):
    """Makes a stream the current one, and then the one before: `torch.cuda.stream`, which asks for both and takes twice as long."""

    __slots__ = ("_after", "_stream")

    def __init__(self, stream: torch.cuda.Stream, after: torch.cuda.Stream) -> None:
        self._stream, self._after = stream, after

    @override
    def __enter__(self) -> None:
        torch.cuda.set_stream(self._stream)

    @override
    def __exit__(self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None) -> None:
        torch.cuda.set_stream(self._after)


class _OfThread(threading.local):
    """The second streams of one thread, by first ones.

    Passes of other threads run meanwhile: what this one frees would be theirs at once, though the first stream may still read it.
    """

    def __init__(self) -> None:
        self.second: dict[torch.cuda.Stream, torch.cuda.Stream] = {}


_OF_THREAD = _OfThread()
_UNCHANGED = nullcontext()
# Tokens of a rank below which a second stream costs the host more than the GPU gains.
_FEWEST = 2048
assert min(MOST_OUTPUTS + 1, MOST_GRADIENTS) >= CALLS_OF_TWO_STREAMS, "what two streams compute is merged, and added up, at once"


class StepStreams(AbstractContextManager["StepStreams"]):
    """On which stream each step of a plan runs, on GPUs; a pass of any other plan, or device, stays on the current stream.

    Args:
        todo: the plan.
        like: a tensor of the pass, for its device and its tokens.
        kernel: the name of the kernel that computes.
        begun: whether its keys are coming already, which were then asked for on the first stream and stay there.
    """

    __slots__ = ("_first", "_is_divided", "_is_joined", "_of_others", "_of_own", "_second")

    def __init__(self, todo: Plan, like: Tensor, kernel: str, *, begun: bool) -> None:
        self._second: torch.cuda.Stream | None = None
        self._is_joined = self._is_divided = False
        if begun or not like.is_cuda or like.shape[0] * like.shape[1] < _FEWEST or not todo.is_on_two_streams(kernel):
            return
        device = like.get_device()
        if device != torch.cuda.current_device():  # to make a stream the current one is to make its device so
            return
        self._first = torch.cuda.current_stream(device)  # by its number: the lookup of a device takes longer
        # A second stream of each first one: two passes on streams of their own must not wait for each other.
        self._second = _second_stream(self._first)
        self._second.wait_stream(self._first)
        self._of_others, self._of_own = _Current(self._second, self._first), _Current(self._first, self._second)

    @property
    def are_two(self) -> bool:
        """Whether the two steps run beside each other: until `join` neither may use what the other computes."""
        return self._second is not None

    def of_step(self, index: int) -> AbstractContextManager[object]:
        """What makes the stream of a step the current one."""
        if self._second is None or not index:
            return _UNCHANGED
        self._is_joined = False
        return self._of_others

    def divide(self, index: int, calls: int) -> None:
        """Let both streams take calls on a step's keys, which have come on its own stream, where there are several."""
        if self._second is not None and index and calls > 1:
            self._first.wait_event(self._second.record_event())
            self._is_divided = True

    def of_call(self, index: int, number: int) -> AbstractContextManager[object]:
        """What makes the stream of a call the current one, inside of `of_step` and after `divide`."""
        return self._of_own if self._second is not None and index and number else _UNCHANGED

    def join(self) -> None:
        """Make the first stream wait for what the second was given so far."""
        if self._second is not None and not self._is_joined:
            self._first.wait_stream(self._second)
            self._is_joined = True

    @override
    def __exit__(self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None) -> None:
        # In an error too: the caller may free what the second stream still reads.
        self.join()
        if self._second is not None and self._is_divided:
            self._second.wait_stream(self._first)


def _second_stream(first: torch.cuda.Stream) -> torch.cuda.Stream:
    second = _OF_THREAD.second.get(first)
    if second is None:
        # The lower the number, the earlier a stream's blocks start. PyTorch gives streams of a pool of 32, in turns.
        second = _OF_THREAD.second[first] = torch.cuda.Stream(first.device, priority=-1)
    return second
