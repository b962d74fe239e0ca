"""What pure functions have worked out, kept for the next call: bounded in bytes and in number, the oldest leave first.

    @cached("plans", most_bytes=32 << 20, most_entries=32, size=lambda plan, problem: plan.nbytes)
    def plan(problem): ...

    plan(a)          worked out and kept
    plan(a)          the same object
    plan(b)          worked out and kept; if both are too much, a leaves, because it was used longer ago

`functools.lru_cache` counts entries only, and one entry here may be a few numbers or the index of a million tokens. So each cache
has a limit in bytes, and a function that says how many bytes a value and its arguments hold. A value that alone is larger than
the limit is returned, but not kept. Caches may be read and filled by several threads; a function runs without a lock, so two
threads may work out one value, of which the first is kept and returned to both.

Only values of pure functions belong here: what leaves a cache is worked out again, and must come out the same on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import update_wrapper
from itertools import count
from threading import RLock
from typing import Generic, NamedTuple, ParamSpec, TypeVar
from weakref import WeakKeyDictionary, WeakValueDictionary

P = ParamSpec("P")
T = TypeVar("T")

# Stands between positional arguments and keywords in a key, which might otherwise be those of a call by position.
_KEYWORDS = object()
# For `caches` to list. Weak, so that it keeps no cache of a test or of a module that is gone.
_CACHES: WeakValueDictionary[str, Cache | CacheOfEach] = WeakValueDictionary()


class CacheUse(NamedTuple):
    """What a cache holds, and how much it may hold.

    Attributes:
        name: what is kept.
        entries: values kept now.
        bytes: what they hold, estimated where they are Python objects.
        most_entries: the limit of `entries`.
        most_bytes: the limit of `bytes`.
        too_large: how often a value was worked out that was not kept because it alone is larger than `most_bytes`.
    """

    name: str
    entries: int
    bytes: int
    most_entries: int
    most_bytes: int
    too_large: int


@dataclass(slots=True)
class _Entry:
    """A value that is kept, its bytes, and when it was used last, counted in uses of its cache."""

    value: object
    size: int
    used: int


class Cache:
    """The memory that one or several functions share.

    Args:
        name: what is kept, for `dtensor_ring.debug.caches`.
        most_bytes: bytes that all values together may hold.
        most_entries: values that may be kept.
        is_listed: whether `caches` shows it by itself, and not as part of a `CacheOfEach`.
    """

    def __init__(self, name: str, most_bytes: int, most_entries: int, *, is_listed: bool = True) -> None:
        assert most_bytes > 0 and most_entries > 0, "a cache that may keep nothing is none"
        self._name, self._most_bytes, self._most_entries = name, most_bytes, most_entries
        self._entries: dict[Hashable, _Entry] = {}
        self._uses = count()
        self._bytes = self._too_large = 0
        # A garbage collection, which may start at any line, can run finalizers that call a cached function in this thread.
        self._lock = RLock()
        if is_listed:
            _CACHES[name] = self

    def keeps(self, size: Callable[..., int]) -> Callable[[Callable[P, T]], Cached[P, T]]:
        """A decorator: the function's values are kept here. `size(value, *arguments)` is the bytes that both hold."""
        return lambda function: Cached(function, self, size)

    def find(self, key: Hashable) -> tuple[object] | None:
        """Find the value of a key, which now counts as used last; in a tuple, since the value itself may be None."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            # An ordered dict would hash the key a second time to move it to the end, and keys of calls are costly to hash: shapes,
            # placements, arguments. What was used longest ago is looked for only where something must leave.
            entry.used = next(self._uses)
            return (entry.value,)

    def keep(self, key: Hashable, value: object, size: int) -> object:
        """Keep a value, and return the one that is kept: another thread's, if that came first."""
        with self._lock:
            # Two threads may have worked it out at once. Both get one object, so that what is worked out of it later is worked out
            # once.
            if key in self._entries:
                return self._entries[key].value
            # Kept, it would drive everything else out and then leave itself.
            if size > self._most_bytes:
                self._too_large += 1
                return value
            self._entries[key] = _Entry(value, size, next(self._uses))
            self._bytes += size
            left = self._shrink()
        del left  # outside the lock: what values do when they end is not known here
        return value

    def resize(self, key: Hashable, value: object, size: int) -> None:
        """Count a kept value anew, after it has grown."""
        with self._lock:
            entry = self._entries.get(key)
            # It may have left meanwhile, and another value have been kept under its key.
            if entry is None or entry.value is not value:
                return
            self._bytes += size - entry.size
            entry.size = size
            left = []
            if size > self._most_bytes:
                self._too_large += 1
                left.append(self._remove(key))
            left += self._shrink()
        del left

    def clear(self) -> None:
        """Forget all values."""
        with self._lock:
            left = list(self._entries.values())
            self._entries.clear()
            self._bytes = self._too_large = 0
        del left

    def use(self) -> CacheUse:
        """Say what the cache keeps now."""
        with self._lock:
            limits = self._most_entries, self._most_bytes
            return CacheUse(self._name, len(self._entries), self._bytes, *limits, self._too_large)

    def _shrink(self) -> list[object]:
        left = []
        while len(self._entries) > self._most_entries or self._bytes > self._most_bytes:
            left.append(self._remove(min(self._entries, key=lambda key: self._entries[key].used)))
        return left

    def _remove(self, key: Hashable) -> object:
        entry = self._entries.pop(key)
        self._bytes -= entry.size
        return entry.value


class CacheOfEach:
    """A cache for each object of a kind (a mesh), gone with the object; what it keeps must not refer to the object.

    Args:
        name: what is kept, for `dtensor_ring.debug.caches`, which adds up over the objects.
        most_bytes: bytes that the values of one object may hold.
        most_entries: values that may be kept for one object.
    """

    def __init__(self, name: str, most_bytes: int, most_entries: int) -> None:
        self._limits = name, most_bytes, most_entries
        self._of: WeakKeyDictionary[object, Cache] = WeakKeyDictionary()
        _CACHES[name] = self

    def of(self, owner: object) -> Cache:
        """Give the cache of an object; objects that are equal share one."""
        cache = self._of.get(owner)
        # `setdefault`, since another thread may have made one in the meantime.
        return self._of.setdefault(owner, Cache(*self._limits, is_listed=False)) if cache is None else cache

    def use(self) -> CacheUse:
        """Say what is kept now, added up over all objects."""
        uses = [cache.use() for cache in list(self._of.values())]
        return CacheUse(
            self._limits[0],
            entries=sum(use.entries for use in uses),
            bytes=sum(use.bytes for use in uses),
            most_entries=sum(use.most_entries for use in uses),
            most_bytes=sum(use.most_bytes for use in uses),
            too_large=sum(use.too_large for use in uses),
        )


class Cached(Generic[P, T]):
    """A function whose values are kept in a cache; its arguments must be hashable, and equal ones give equal values."""

    def __init__(self, function: Callable[P, T], cache: Cache, size: Callable[..., int]) -> None:
        self._function, self._cache, self._size = function, cache, size
        update_wrapper(self, function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """Give the value that is kept for these arguments, or work it out and keep it."""
        key = self._key(args, kwargs)
        entry = self._cache.find(key)
        if entry is not None:
            return entry[0]  # pyrefly: ignore[bad-return]  # under this function's keys lie this function's values
        value = self._function(*args, **kwargs)
        return self._cache.keep(key, value, self._size(value, *args, **kwargs))  # pyrefly: ignore[bad-return]

    def resize(self, value: T, *args: P.args, **kwargs: P.kwargs) -> None:
        """Measure the value of these arguments again: it has worked out more of itself since it was returned."""
        self._cache.resize(self._key(args, kwargs), value, self._size(value, *args, **kwargs))

    def cache_clear(self) -> None:
        """Forget all values of the cache, also those of other functions that share it."""
        self._cache.clear()

    def cache_info(self) -> CacheUse:
        """Say what the cache holds, and how much it may hold."""
        return self._cache.use()

    def _key(self, args: tuple[object, ...], kwargs: dict[str, object]) -> Hashable:
        # The function is part of the key, since several share one cache.
        if not kwargs:
            return self._function, *args
        return self._function, *args, _KEYWORDS, *sorted(kwargs.items())


def cached(name: str, *, most_bytes: int, most_entries: int, size: Callable[..., int]) -> Callable[[Callable[P, T]], Cached[P, T]]:
    """A decorator as `functools.lru_cache`, with a limit in bytes.

    Args:
        name: what is kept, for `dtensor_ring.debug.caches`.
        most_bytes: bytes that all values together may hold.
        most_entries: values that may be kept.
        size: called with a value and its arguments, the bytes that both hold.
    """
    return Cache(name, most_bytes, most_entries).keeps(size)


def caches() -> tuple[CacheUse, ...]:
    """What every cache of this process holds, by name; those of single objects added up."""
    # Through a list of references: caches may end while the dict is walked, which would then have changed its size.
    kept = [reference() for reference in _CACHES.valuerefs()]
    return tuple(sorted(cache.use() for cache in kept if cache is not None))
