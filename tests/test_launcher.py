"""Launches of Triton kernels: what is launched past Triton's looks at arguments is what Triton itself would launch."""

from __future__ import annotations

from contextlib import contextmanager
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from dtensor_ring.ops.launcher import Launcher, has_triton


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


@pytest.mark.parametrize("device", [0, 1, 2])
def test_a_launch_is_made_on_the_device_of_its_tensors(device, monkeypatch):
    """Triton compiles, loads and launches on the current one."""
    current = [1]

    @contextmanager
    def on(number: int):
        before, current[0] = current[0], number
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", on)
    placed = SimpleNamespace(get_device=lambda: device, data_ptr=lambda: 16, dtype=torch.float32)
    kernel, seen = Kernel(), []
    kernel_getitem = Kernel.__getitem__
    monkeypatch.setattr(Kernel, "__getitem__", lambda self, grid: seen.append(current[0]) or kernel_getitem(self, grid))
    Launcher(kernel)((1, 1, 1), [placed], [1], (1,))
    assert seen == [device]
    assert len(kernel.looked) == 1
    assert current == [1]


def parameter(is_constexpr: bool = False, do_not_specialize: bool = False) -> SimpleNamespace:
    return SimpleNamespace(is_constexpr=is_constexpr, do_not_specialize=do_not_specialize)


TENSOR, NUMBER, CONSTANT, SPECIALIZED = parameter(), parameter(False, True), parameter(True), parameter()


@pytest.mark.parametrize(
    ("parameters", "fails"),
    [
        ([TENSOR, TENSOR, NUMBER, CONSTANT], None),
        ([TENSOR, TENSOR, SPECIALIZED, CONSTANT], "numbers are not specialized"),
        ([TENSOR, CONSTANT, NUMBER, CONSTANT], "constants come last"),
        ([TENSOR, TENSOR, NUMBER, NUMBER], "numbers come before constants"),
    ],
)
def test_a_kernel_that_triton_would_specialize_by_a_number_is_not_launched(parameters, fails):
    kernel = Kernel()
    kernel.params = parameters
    launch = Launcher(kernel)
    if fails is None:
        launch((1, 1, 1), tensors(), [1], (1,))
        return
    with pytest.raises(AssertionError, match=fails):
        launch((1, 1, 1), tensors(), [1], (1,))
    assert kernel.looked == []


def test_triton_is_there_where_it_can_be_imported():
    assert has_triton() == (find_spec("triton") is not None)
