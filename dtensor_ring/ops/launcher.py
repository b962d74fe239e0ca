"""Launches of a Triton kernel that cost the host a third: what Triton works out about the arguments of each is remembered.

Triton looks at every argument of every launch: its type, whether an address is a multiple of 16, whether a number needs 64 bits.
That takes the host several times as long as the launch. Here all tensors are known to lie at such addresses, and all numbers to be
short, or the launch goes Triton's way; then dtypes and constants alone say which compiled kernel it is.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cache
from importlib.util import find_spec
from threading import RLock
from typing import Any

import torch
from torch import Tensor

_GRAIN = 16  # bytes; allocations, and parts of whole heads in 16 bits, begin at multiples
_MOST = (1 << 31) - 1  # what Triton passes in 32 bits


# Asked in every sum, and each time the import system would search the whole path.
@cache
def has_triton() -> bool:
    """Whether there is a Triton, which modules of kernels need when they are imported."""
    return find_spec("triton") is not None


# Ranks that are threads, and autograd's, may all come to a kernel that is not compiled yet.
_COMPILING = RLock()


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
        """Launch the kernel on the device of the tensors, and on its current stream."""
        device = tensors[0].get_device()
        if device >= 0 and device != torch.cuda.current_device():  # Triton compiles, loads and launches on the current one
            with torch.cuda.device(device):
                self(grid, tensors, numbers, constants)
            return
        # On AMD's GPUs Triton asks for the size of tensors too.
        is_plain = torch.version.hip is None and max(numbers) <= _MOST and not any(x.data_ptr() % _GRAIN for x in tensors)
        key = (device, constants, *[x.dtype for x in tensors]) if is_plain else None
        compiled = None if key is None else self._compiled.get(key)
        if compiled is not None:
            compiled[grid](*tensors, *numbers, *constants)
            return
        self._check_parameters(len(tensors), len(numbers))
        with _COMPILING:
            compiled = self._kernel[grid](*tensors, *numbers, *constants)
        if key is not None:
            self._compiled[key] = compiled  # None of Triton's interpreter, which is asked each time

    def _check_parameters(self, tensors: int, numbers: int) -> None:
        """A number that Triton specializes by its value would be launched wrongly the next time."""
        parameters = getattr(self._kernel, "params", None)  # the interpreter's functions have none
        if parameters is not None:
            assert not any(each.is_constexpr for each in parameters[: tensors + numbers]), "constants come last"
            assert all(each.do_not_specialize for each in parameters[tensors : tensors + numbers]), "numbers are not specialized"
            assert all(each.is_constexpr for each in parameters[tensors + numbers :]), "numbers come before constants"
