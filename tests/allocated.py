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
    """Counts while it is entered. An op of ours counts as a whole: what it makes and frees inside is not seen.

    Attributes:
        most: the most bytes since the last `phase`.
        at_most: what they were: (op, shape, dtype; bytes) and how many.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self.at_most: Counter[tuple[str, int]] = Counter()
        self._alive: dict[int, tuple[weakref.ref[torch.UntypedStorage], str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in tree_iter(made):
            if isinstance(value, Tensor):
                self.hold(value, str(func))
        return made

    @property
    def now(self) -> int:
        """Bytes that are alive; FSDP2 empties storages and fills them again, so sizes are asked for."""
        return sum(size for _, size in self._sizes())

    def hold(self, tensor: Tensor, name: str = "given") -> None:
        """Count a tensor's storage from now on."""
        storage = tensor.untyped_storage()
        key, known = storage._cdata, self._alive.get(storage._cdata)
        if known is None or known[0]() is None:  # addresses are used again
            self._alive[key] = weakref.ref(storage), f"{name} {tuple(tensor.shape)} {str(tensor.dtype)[6:]}"
        if self.now > self.most:
            self.most, self.at_most = self.now, Counter(self._sizes())

    def phase(self) -> int:
        """The most since the last call; what is alive counts for the next one."""
        most, self.most = self.most, self.now
        self.at_peak, self.at_most = self.at_most, Counter(self._sizes())
        return most

    def _sizes(self) -> list[tuple[str, int]]:
        alive = [(key, ref(), name) for key, (ref, name) in self._alive.items()]
        for key, storage, _ in alive:
            if storage is None:
                del self._alive[key]
        return [(name, storage.nbytes()) for _, storage, name in alive if storage is not None]
