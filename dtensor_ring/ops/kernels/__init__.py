"""The kernels, and how one is chosen: the first that does not refuse, in this order."""

from __future__ import annotations

from typing import Literal

from dtensor_ring.ops.kernels.base import Kernel, KernelRequirements
from dtensor_ring.ops.kernels.block import (
    Block,
    Gradients,
    PositionContext,
    Result,
    Saved,
    SoftmaxParams,
    VarlenMetadata,
    VarlenSegment,
)
from dtensor_ring.ops.kernels.flash_attn_2 import FlashAttn2Kernel
from dtensor_ring.ops.kernels.flash_attn_3 import FlashAttn3Kernel
from dtensor_ring.ops.kernels.flash_attn_4 import FlashAttn4Kernel
from dtensor_ring.ops.kernels.math import MathKernel
from dtensor_ring.ops.kernels.torch_cpu import TorchCpuKernel
from dtensor_ring.ops.kernels.torch_flash import TorchFlashKernel

KernelName = Literal["flash_attn_4", "flash_attn_3", "flash_attn_2", "torch_flash", "torch_cpu", "math"]

KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        FlashAttn4Kernel(),
        FlashAttn3Kernel(),
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


def choose_kernel(name: str | None, need: KernelRequirements) -> Kernel:
    """The kernel called `name`, or with None the first in `KERNELS` that does not refuse.

    Raises:
        ValueError: no kernel has that name.
        NotImplementedError: the kernel, or with None every kernel, refuses; the text lists each with its reason.
    """
    check_kernel_name(name)
    reasons = {}
    for candidate in KERNELS.values() if name is None else (KERNELS[name],):
        reason = candidate.refuses(need)
        if reason is None:
            return candidate
        reasons[candidate.name] = reason
    listed = "; ".join(f"{kernel}: {reason}" for kernel, reason in reasons.items())
    who = "every kernel refuses this attention" if name is None else f"kernel {name!r} refuses this attention"
    raise NotImplementedError(f"{who}. {listed}")


__all__ = [
    "KERNELS",
    "Block",
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
]
