"""What the flash-attention kernels have in common: one call for dense and varlen blocks, bottom-right windows, 16-bit tensors.

Each adapter says how its package is called, in its own order and names of arguments; callers see `Kernel` and never branch.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from dtensor_ring._torch import constant_when_compiled
from dtensor_ring.ops.kernels.base import Kernel, KernelRequirements, has_no
from dtensor_ring.ops.kernels.block import Block, Gradients, Result, Saved
from dtensor_ring.ops.launcher import has_triton


def is_causal(window: tuple[int, int]) -> bool:
    """Whether a window is just causal: the packages have an argument for that, with faster code than a window's."""
    return window == (-1, 0)


def window_keywords(window: tuple[int, int]) -> dict[str, Any]:
    """A window as flash-attn 2 and 3 name it; -1 is unbounded there too."""
    left, right = window
    return {"causal": is_causal(window), "window_size_left": left, "window_size_right": right}


def varlen_keywords(block: Block) -> dict[str, Any]:
    """Give the segments as the packages name them; a dense block has none."""
    varlen = block.varlen
    if varlen is None:
        return {}
    return {
        "cu_seqlens_q": varlen.cu_q,
        "cu_seqlens_k": varlen.cu_k,
        "max_seqlen_q": varlen.max_q,
        "max_seqlen_k": varlen.max_k,
    }


def empty_gradients(saved: Saved) -> Gradients:
    """Contiguous dq, dk, dv for kernels that write into tensors given to them."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in saved[:3])
    return dq, dk, dv


def lacks_gpu(need: KernelRequirements, smallest_capability: tuple[int, int] = (8, 0)) -> str | None:
    """Why kernels for GPUs of a compute capability cannot run here, or None."""
    if need.device != "cuda":
        return f"runs on CUDA tensors, found {need.device}"
    of_gpu = capability()
    if of_gpu < smallest_capability:
        needed = ".".join(map(str, smallest_capability))
        return f"needs compute capability {needed}, this GPU has {'.'.join(map(str, of_gpu))}"
    return None


def lacks_hopper(need: KernelRequirements) -> str | None:
    """Why kernels for Hopper GPUs alone cannot run here, or None."""
    reason = lacks_gpu(need, (9, 0))
    if reason is None and capability()[0] != 9:
        return "is for Hopper GPUs (compute capability 9)"
    return reason


def capability() -> tuple[int, int]:
    """Give the compute capability of the current GPU."""
    return _capability(torch.cuda.current_device())


@cache
def _capability(device: int) -> tuple[int, int]:
    # Asked for on every call of attention, and PyTorch works it out anew each time, which takes longer than launching a kernel.
    return torch.cuda.get_device_capability(device)


def lacks_tensors(need: KernelRequirements, largest_head_dim: int = 256) -> str | None:
    """Why flash kernels cannot take tensors of this dtype and head dim, or their scale, or None."""
    if need.dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, found {need.dtype}"
    if need.head_dim % 8 or need.head_dim > largest_head_dim:
        return f"needs a head dim that is a multiple of 8 up to {largest_head_dim}, found {need.head_dim}"
    if need.head_dim != need.v_head_dim:
        return f"needs one head dim for q, k and v, found {need.head_dim} and {need.v_head_dim}"
    # They mask by -inf and find the largest score before they scale: both are right only where scaling keeps the order.
    return has_no(need, "scale of 0 or less")


@constant_when_compiled
def load(module: str, package: str, needs: tuple[str, ...]) -> ModuleType | str:
    """A module with the functions it `needs`, or why `package` cannot be used."""
    return _loaded(module, package, needs)


@cache
def _loaded(module: str, package: str, needs: tuple[str, ...]) -> ModuleType | str:
    try:
        imported = import_module(module)
    except ModuleNotFoundError as failure:
        return f"the package {package} is not installed (no module {failure.name!r})"
    # A package that was built for another PyTorch or CUDA fails to load in one of these ways. That is a reason to take the next
    # kernel: the program may not even know that the package is there.
    except (ImportError, OSError, RuntimeError) as failure:
        return f"the installed {package} does not load: {failure}"
    missing = [name for name in needs if not hasattr(imported, name)]
    return f"the installed {package} has no {' and no '.join(missing)}: another version is needed" if missing else imported


@contextmanager
def _drawing(device: torch.device, block: Block) -> Iterator[None]:
    """The device's generator at the start of this call's seed, and afterwards as it was.

    Flash kernels draw their dropout masks from it. Backward replays a mask from the seed, so the state from before the call must
    play no part in it, and what the caller draws later must not depend on how many blocks there were.
    """
    if not block.softmax.dropout_p or block.positions is None:
        yield
        return
    # The packages take no generator as an argument, so the state of the default one is lent and given back.
    generator = torch.cuda.default_generators[device.index]
    state = generator.get_state()
    generator.manual_seed(block.positions.seed)
    try:
        yield
    finally:
        generator.set_state(state)


def drawn(device: torch.device, block: Block) -> Tensor | None:
    """The generator's state at the start of the forward call: seed and offset (2,) int64 on the device; None without dropout."""
    if not block.softmax.dropout_p or block.positions is None:
        return None
    # Filled on the device: a tensor made of Python numbers would be copied there, and the host would wait. The offset is 0 as after
    # `manual_seed`, where the forward call began to draw.
    state = torch.zeros(2, dtype=torch.int64, device=device)
    state[0].fill_(block.positions.seed)
    return state


def without_keys(out_THD: Tensor, lse_HT: Tensor) -> Tensor:
    """The lse with -inf for tokens without keys, for which a kernel gave +inf; it may be the same tensor, changed.

    A merge would give a block whose lse is +inf all the weight, and its zeros would replace what other blocks computed. The out of
    such tokens is 0. That of sums that are NaN, which have that lse too, is NaN, and so is their lse then.
    """
    if lse_HT.is_cuda and has_triton():
        from dtensor_ring.ops.kernels._without_keys_cuda import fused_without_keys_

        return fused_without_keys_(out_THD, lse_HT)
    return torch.where(lse_HT == math.inf, out_THD[..., 0].transpose(0, 1) - math.inf, lse_HT)


class FlashKernel(Kernel):
    """A kernel whose package takes dense and varlen blocks; out and gradients come back in the input dtype, lse in float32."""

    hashes_positions: ClassVar[bool] = False

    @abstractmethod
    def call_forward(self, q: Tensor, k: Tensor, v: Tensor, block: Block) -> Result:
        """The package's forward, dense or varlen; what lse it gives queries without keys does not matter."""

    @abstractmethod
    def call_backward(self, saved: Saved, dout: Tensor, block: Block) -> Gradients:
        """Call the package's backward; the lse in `saved` is contiguous."""

    @override
    def forward(self, q: Tensor, k: Tensor, v: Tensor, block: Block) -> Result:
        """Make one call of the package. Tokens without keys, whose lse kernels give as +inf or -inf, get -inf."""
        with _drawing(q.device, block):
            out, lse = self.call_forward(q, k, v, block)
        # Only a varlen block has tokens without keys: those in no segment. Where each is in one, looking would cost a launch.
        if block.varlen is None or not block.varlen.has_idle_queries:
            return Result(out, lse)
        return Result(out, without_keys(out, lse))

    @override
    def backward(self, saved: Saved, dout: Tensor, block: Block) -> Gradients:
        """Make one call of the package. Keys without queries get gradients 0."""
        # Kernels compute where an lse stands from the lengths and do not look at strides: the lse of half of the queries, which is
        # a slice, would be read wrongly without an error.
        if not saved.lse.is_contiguous():
            saved = saved._replace(lse=saved.lse.contiguous())
        return self.call_backward(saved, dout, block)
