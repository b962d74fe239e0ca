"""How FlashAttention-2 reads a window, on CPUs: plans whose windows its kernels would misread give wrong numbers here too."""

from __future__ import annotations

from typing import ClassVar

from dtensor_ring.ops.kernels import KERNELS, Block, Kernel, KernelRequirements, Result, Saved

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

    def forward(self, q, k, v, block: Block) -> Result:
        return MATH.forward(q, k, v, self._as_read(block, k))

    def backward(self, saved: Saved, dout, block: Block):
        return MATH.backward(saved, dout, self._as_read(block, saved.k))

    def _as_read(self, block: Block, k) -> Block:
        longest_k = k.shape[1] if block.varlen is None else block.varlen.max_k
        return block._replace(window=as_flash_attn_2(block.window, longest_k))


FLASH_2_WINDOWS = Flash2Windows()
