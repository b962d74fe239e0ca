"""Launches of Triton kernels: what is launched past Triton's looks at arguments is what Triton itself would launch."""

from __future__ import annotations

import pytest
import torch

from dtensor_ring.ops.launcher import Launcher


class Kernel:
    """As a function under `triton.jit`: it counts what goes Triton's way, and returns what was compiled."""

    def __init__(self) -> None:
        self.looked: list[tuple] = []
        self.launched: list[tuple] = []

    def __getitem__(self, grid):
        def run(*arguments):
            self.looked.append((grid, *arguments))
            return Compiled(self.launched)

        return run


class Compiled:
    def __init__(self, launched: list[tuple]) -> None:
        self._launched = launched

    def __getitem__(self, grid):
        return lambda *arguments: self._launched.append((grid, *arguments))


LONG = 1 << 31


def tensors(dtype: torch.dtype = torch.bfloat16, offset: int = 0) -> list[torch.Tensor]:
    return [torch.zeros(64 + offset, dtype=dtype)[offset:], torch.zeros(64)]


@pytest.mark.parametrize(
    ("other", "numbers", "constants", "looks"),
    [
        (tensors(), [3, 4], (True, 2), False),  # other numbers and addresses are no other kernel
        (tensors(torch.float16), [1, 2], (True, 2), True),
        (tensors(), [1, 2], (False, 2), True),
        (tensors(), [1, 2], (True, 3), True),
        (tensors(offset=8), [1, 2], (True, 2), False),
        (tensors(offset=1), [1, 2], (True, 2), True),
        (tensors(), [1, LONG], (True, 2), True),
        (tensors(), [1, LONG - 1], (True, 2), False),
    ],
)
def test_triton_looks_at_a_launch_unless_it_would_find_what_it_found_before(other, numbers, constants, looks):
    kernel = Kernel()
    launch = Launcher(kernel)
    launch((1, 2, 3), first := tensors(), [1, 2], (True, 2))
    launch((4, 5, 6), other, numbers, constants)
    assert kernel.looked[0] == ((1, 2, 3), *first, 1, 2, True, 2)
    called = kernel.looked[1:] if looks else kernel.launched
    assert len(kernel.looked) == 1 + looks
    assert len(kernel.launched) == 1 - looks
    assert called[0][0] == (4, 5, 6)
    assert all(a is b for a, b in zip(called[0][1:3], other, strict=True))
    assert called[0][3:] == (*numbers, *constants)


@pytest.mark.parametrize("unlike", [tensors(offset=1), tensors()])
def test_what_triton_compiled_for_other_addresses_or_numbers_is_not_kept(unlike):
    """Triton compiles another kernel for an address that is no multiple of 16, and for a number of 64 bits."""
    kernel = Kernel()
    launch = Launcher(kernel)
    number = 1 if unlike[0].data_ptr() % 16 else LONG
    for _ in range(2):
        launch((1, 1, 1), unlike, [number], (1,))
    assert len(kernel.looked) == 2
    launch((1, 1, 1), tensors(), [1], (1,))
    assert len(kernel.looked) == 3
    launch((1, 1, 1), tensors(), [1], (1,))
    assert len(kernel.launched) == 1
