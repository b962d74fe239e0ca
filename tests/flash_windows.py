"""How FlashAttention-2 reads a window, on CPUs: plans whose windows its kernels would misread give wrong numbers here too."""

from __future__ import annotations

from typing import ClassVar

from dtensor_ring.ops.kernels import KERNELS, Kernel, KernelRequirements, Result, SoftmaxParams, VarlenMetadata

MATH = KERNELS["math"]


def as_flash_attn_2(window: tuple[int, int], longest_k: int) -> tuple[int, int]:
    """The window that FlashAttention-2 applies to blocks of up to `longest_k` keys.

    In its `mha_fwd` and `mha_varlen_fwd` a side of `longest_k` tokens or more becomes unbounded; then, in `set_params_fprop`,
    where the other side is bounded an unbounded one becomes `longest_k`. The first is wrong for a right side that cuts rows far
    above the last key, the second for a block of more rows than keys whose first rows see every key.
    """
    left, right = (-1 if side >= longest_k else side for side in window)
    if left < 0 <= right:
        return longest_k, right
    return (left, longest_k) if right < 0 <= left else (left, right)


class Flash2Windows(Kernel):
    """The math kernel under the windows that FlashAttention-2 would apply."""

    name: ClassVar[str] = "flash_2_windows"

    def unavailable(self, need: KernelRequirements) -> str | None:
        return MATH.unavailable(need)

    def lacks(self, need: KernelRequirements) -> str | None:
        return MATH.lacks(need)

    def grad_dtype(self, dtype):
        return MATH.grad_dtype(dtype)

    def forward(self, q, k, v, window, options: SoftmaxParams, extras=None) -> Result:
        return MATH.forward(q, k, v, as_flash_attn_2(window, k.shape[1]), options, extras)

    def backward(self, dout, q, k, v, out, lse, window, options: SoftmaxParams, extras=None):
        return MATH.backward(dout, q, k, v, out, lse, as_flash_attn_2(window, k.shape[1]), options, extras)

    def forward_packed(self, q, k, v, packing: VarlenMetadata, window, options: SoftmaxParams, extras=None) -> Result:
        return MATH.forward_packed(q, k, v, packing, as_flash_attn_2(window, packing.max_k), options, extras)

    def backward_packed(self, dout, q, k, v, out, lse, packing: VarlenMetadata, window, options: SoftmaxParams, extras=None):
        return MATH.backward_packed(dout, q, k, v, out, lse, packing, as_flash_attn_2(window, packing.max_k), options, extras)


FLASH_2_WINDOWS = Flash2Windows()
