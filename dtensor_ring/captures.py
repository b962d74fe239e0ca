"""What CUDA graphs ask of this package: what cannot be captured is refused by name, and what a graph reads stays in memory.

    capture    the host runs once; kernels are recorded with the addresses of what they read, and do not run
    replay     the kernels run, the host does not: no check, no choice, no look into a cache

So whatever a call works out on the host (a plan, index tensors, agreement of ranks, a seed) is that of the capture. What is the
same in every replay is worked out in a call before; what would have to differ is refused.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import ParamSpec, TypeVar

from typing_extensions import override

from dtensor_ring._torch import is_capturing
from dtensor_ring.cache import Cache, Cached

P = ParamSpec("P")
T = TypeVar("T")


class RingCaptureError(RuntimeError):
    """Something that a CUDA graph cannot capture, or that its replay would get wrong: the text says what to do instead."""


def check_not_capturing(what: str, instead: str) -> None:
    """Raises RingCaptureError while a CUDA graph is captured on the current stream.

    Args:
        what: what cannot be captured, and why.
        instead: what to do.
    """
    if is_capturing():
        raise RingCaptureError(f"{what}, and a CUDA graph is being captured: {instead}")


class _Held(Cache):
    """Values that captured kernels read. A graph knows addresses only, so none of them leaves by itself: what is full refuses."""

    def hold(self, key: Hashable, value: object, size: int) -> None:
        use = self.use()
        if key not in self._entries and (use.bytes + size > use.most_bytes or use.entries >= use.most_entries):
            raise RingCaptureError(
                f"CUDA graphs hold {use.entries} sets of index tensors of {use.bytes} bytes, and one more of {size} bytes is too "
                f"much ({use.most_entries} sets, {use.most_bytes} bytes): when graphs are no longer replayed, call "
                "dtensor_ring.debug.forget_captured()"
            )
        self.keep(key, value, size)


_HELD = _Held("held by CUDA graphs", most_bytes=256 << 20, most_entries=1024)


class _CachedForGraphs(Cached[P, T]):
    """A cached function whose values hold tensors on the GPU: what is read under capture is held until it is forgotten."""

    @override
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        if not is_capturing():
            return super().__call__(*args, **kwargs)
        key = self._key(args, kwargs)
        # What left the cache may still be held for a graph that was captured before.
        entry = self._cache.find(key) or _HELD.find(key)
        if entry is None:
            use = self._cache.use()
            raise RingCaptureError(
                f"{use.name} of this call must be copied to the GPU, for which the host waits, and a CUDA graph is being captured: "
                "make the same call once before capturing, forward and backward, with the same shapes and documents (sets of more "
                f"than {use.most_bytes} bytes are not kept, and cannot be captured)"
            )
        value: T = entry[0]  # pyrefly: ignore[bad-assignment]  # under this function's keys lie this function's values
        _HELD.hold(key, value, self._size(value, *args, **kwargs))
        return value


def kept_for_graphs(function: Cached[P, T]) -> Cached[P, T]:
    """A decorator of a cached function whose values hold tensors on the GPU, which captured kernels read.

        @kept_for_graphs
        @cached("places of transfers", most_bytes=16 << 20, most_entries=32, size=_route_bytes)
        def routes(...)

    Memory that left the cache would be another tensor's when a graph is replayed, so what is read under capture is held, at most
    256 MiB in all, until `forget_captured`.

    Raises (from the function, while a graph is captured):
        RingCaptureError: the value is not there yet, or nothing more may be held.
    """
    return _CachedForGraphs(function._function, function._cache, function._size)


def forget_captured() -> int:
    """Let go of all that captured calls read, and return its bytes. After this no graph with attention in it may be replayed."""
    held = _HELD.use().bytes
    _HELD.clear()
    return held
