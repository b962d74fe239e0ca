"""Launches of a Triton kernel that cost the host a third: what Triton works out about the arguments of each is remembered.

Triton looks at every argument of every launch: its type, whether an address is a multiple of 16, whether a number needs 64 bits.
That takes the host several times as long as the launch. Here all tensors are known to lie at such addresses, and all numbers to be
short, or the launch goes Triton's way; then dtypes and constants alone say which compiled kernel it is.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

from torch import Tensor

_GRAIN = 16  # bytes; allocations, and parts of whole heads in 16 bits, begin at multiples
_MOST = (1 << 31) - 1  # what Triton passes in 32 bits


# Asked in every sum, and each time the import system would search the whole path.
@cache
def has_triton() -> bool:
    """Whether there is a Triton, which modules of kernels need when they are imported."""
    return find_spec("triton") is not None


class Launcher:
    """What launches one kernel, whose parameters are tensors first, then numbers that are not specialized, then constants.

    Args:
        kernel: a function under `triton.jit`.
    """

    def __init__(self, kernel: Any) -> None:  # noqa: ANN401  Triton has no types
        self._kernel = kernel
        self._compiled: dict[Hashable, Any] = {}

    def __call__(
        self, grid: tuple[int, int, int], tensors: Sequence[Tensor], numbers: Sequence[int], constants: tuple[int, ...]
    ) -> None:
        """Launch the kernel on the current device, where the tensors lie, and on its current stream."""
        is_plain = max(numbers) <= _MOST and not any(x.data_ptr() % _GRAIN for x in tensors)
        # A kernel is compiled and loaded for one device.
        key = (tensors[0].get_device(), constants, *[x.dtype for x in tensors]) if is_plain else None
        compiled = None if key is None else self._compiled.get(key)
        if compiled is not None:
            compiled[grid](*tensors, *numbers, *constants)
            return
        compiled = self._kernel[grid](*tensors, *numbers, *constants)
        if key is not None and compiled is not None:  # Triton's interpreter compiles nothing
            self._compiled[key] = compiled
