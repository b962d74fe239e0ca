"""What an allocator would have given out: bytes of all storages that ops made and that are alive, and the most there were."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Allocated(TorchDispatchMode):
    """Counts while it is entered. An op of ours counts as a whole: what it makes and frees inside is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.alive: dict[int, tuple[int, str]] = {}
        self.at_most: Counter[tuple[str, int]] = Counter()
        self._seen = weakref.WeakSet()
        self.since_mark = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in tree_iter(made):
            if isinstance(value, Tensor):
                self.hold(value, str(func))
        return made

    def hold(self, tensor: Tensor, name: str = "given") -> None:
        """Count a tensor's storage from now on."""
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        self._seen.add(storage)
        key, size = id(storage), storage.nbytes()
        self.now += size
        self.alive[key] = size, f"{name} {tuple(tensor.shape)} {str(tensor.dtype)[6:]}"
        weakref.finalize(storage, self._gone, key).atexit = False
        if self.now > self.most:
            self.most = self.now
            self.at_most = Counter((name, size) for size, name in self.alive.values())

    def _gone(self, key: int) -> None:
        size, _ = self.alive.pop(key)
        self.now -= size

    def phase(self) -> int:
        """The most since the last call; what is alive counts for the next one."""
        most, self.most = self.most, self.now
        self.at_peak, self.at_most = self.at_most, Counter((name, size) for size, name in self.alive.values())
        return most
