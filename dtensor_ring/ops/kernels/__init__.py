"""The kernels, and how one is chosen: the first that does not refuse, in this order."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch

from dtensor_ring.ops.kernels.base import Kernel, KernelRequirements
from dtensor_ring.ops.kernels.block import (
    EVERY_KIND,
    Block,
    BlockKind,
    Gradients,
    PositionContext,
    Result,
    Saved,
    SoftmaxParams,
    VarlenMetadata,
    VarlenSegment,
)
from dtensor_ring.ops.kernels.cudnn import CudnnKernel
from dtensor_ring.ops.kernels.flash_attn_2 import FlashAttn2Kernel
from dtensor_ring.ops.kernels.flash_attn_3 import FlashAttn3Kernel
from dtensor_ring.ops.kernels.flash_attn_4 import FlashAttn4Kernel
from dtensor_ring.ops.kernels.math import MathKernel
from dtensor_ring.ops.kernels.torch_cpu import TorchCpuKernel
from dtensor_ring.ops.kernels.torch_flash import TorchFlashKernel

KernelName = Literal["flash_attn_4", "flash_attn_3", "cudnn", "flash_attn_2", "torch_flash", "torch_cpu", "math"]

# The order is that of the choice, the fastest first as measured on Hopper. `math` must be last: it takes any floating-point call,
# and would hide what stands after it.
KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        FlashAttn4Kernel(),
        FlashAttn3Kernel(),
        CudnnKernel(),
        FlashAttn2Kernel(),
        TorchFlashKernel(),
        TorchCpuKernel(),
        MathKernel(),
    )
}


def check_kernel_name(name: str | None) -> None:
    """Raises ValueError unless `name` is that of a kernel, or None."""
    if name is not None and name not in KERNELS:
        raise ValueError(f"unknown kernel {name!r}: choose one of {', '.join(KERNELS)}, or None for the first that does not refuse")


def settings() -> tuple[bool, bool]:
    """PyTorch's settings that kernels read when they are asked: a choice that is remembered without them would outlive them."""
    return torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.cudnn_sdp_enabled()


def choose_kernel(name: str | None, need: KernelRequirements, kinds: Callable[[], Iterable[BlockKind]] | None = None) -> Kernel:
    """The kernel called `name`, or with None the first in `KERNELS` that neither refuses nor wants to be asked for by name.

    Ranks that share an attention must use one kernel: each is handed its part of the others' gradients, and a rank that refused
    alone would leave the others waiting. They do if `need` and `kinds` are the same on all of them.

    Args:
        name: a kernel's name, or None.
        need: what is asked of it.
        kinds: what kinds of blocks it may be given, on any rank, in an order that is the same on all of them. It is called only
            for a kernel that refuses some kind at all, and followed up to the first that is refused, so that nobody pays for more
            than the answer. None leaves blocks unjudged: while a compiler traces, lengths are symbols, and the
            operator judges once it has them.

    Raises:
        ValueError: no kernel has that name.
        NotImplementedError: the kernel, or with None every kernel, refuses; the text lists each with its reason.
    """
    check_kernel_name(name)
    # All reasons are kept: who asked for no kernel in particular must see why none of them would do.
    reasons = {}
    for candidate in KERNELS.values() if name is None else (KERNELS[name],):
        reason = candidate.refuses(need) or (candidate.unasked(need) if name is None else None)
        if reason is None and kinds is not None:
            reason = _refuses_blocks(candidate, kinds)
        if reason is None:
            return candidate
        reasons[candidate.name] = reason
    listed = "; ".join(f"{kernel}: {reason}" for kernel, reason in reasons.items())
    who = "every kernel refuses this attention" if name is None else f"kernel {name!r} refuses this attention"
    raise NotImplementedError(f"{who}. {listed}")


def _refuses_blocks(kernel: Kernel, kinds: Callable[[], Iterable[BlockKind]]) -> str | None:
    """Why a kernel cannot compute blocks of all these kinds, or None if it can."""
    refused = {kind: reason for kind in EVERY_KIND if (reason := kernel.refuses_block(kind)) is not None}
    # `kinds` may make the plans of all ranks: it is called only where the kernel refuses some kind at all.
    for kind in kinds() if refused else ():
        if kind in refused:
            return f"{refused[kind]}, and this attention may have {kind} blocks"
    return None


def kernel_number(kernel: Kernel) -> int:
    """Give the number of a kernel in `KERNELS`: what `kernel_numbered` takes, where only numbers can be kept."""
    return list(KERNELS).index(kernel.name)


def kernel_numbered(number: int) -> str:
    """Give the name of a kernel from its number in `KERNELS`."""
    return list(KERNELS)[number]


__all__ = [
    "EVERY_KIND",
    "KERNELS",
    "Block",
    "BlockKind",
    "Gradients",
    "Kernel",
    "KernelName",
    "KernelRequirements",
    "PositionContext",
    "Result",
    "Saved",
    "SoftmaxParams",
    "VarlenMetadata",
    "VarlenSegment",
    "check_kernel_name",
    "choose_kernel",
    "kernel_number",
    "kernel_numbered",
    "settings",
]
