"""`torch_flash`: the FlashAttention-2 kernels built into PyTorch for CUDA, dense and varlen."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from dtensor_ring.ops.kernels.base import KernelRequirements, has_no
from dtensor_ring.ops.kernels.block import Block, Gradients, Result, Saved
from dtensor_ring.ops.kernels.flash import FlashKernel, drawn, is_causal, lacks_gpu, lacks_tensors


class TorchFlashKernel(FlashKernel):
    """`aten::_flash_attention_forward` and `aten::_flash_attention_backward`."""

    name: ClassVar[str] = "torch_flash"

    @override
    def unavailable(self, need: KernelRequirements) -> str | None:
        """It needs CUDA of compute capability 8.0 or more and a PyTorch built with flash attention."""
        reason = lacks_gpu(need)
        if reason is None and not torch.backends.cuda.is_flash_attention_available():
            return "this build of PyTorch has no flash attention"
        return reason

    @override
    def lacks(self, need: KernelRequirements) -> str | None:
        """It needs 16-bit tensors and one head dim, a multiple of 8 up to 256, and has no softcap and no ALiBi."""
        reason = lacks_tensors(need) or has_no(need, "softcap", "ALiBi")
        if reason is not None:
            return reason
        # The op has no argument for it and reads the global setting.
        if need.deterministic and need.training and not torch.are_deterministic_algorithms_enabled():
            return "its backward is deterministic only under torch.use_deterministic_algorithms(True)"
        return None

    @override
    def call_forward(self, q: Tensor, k: Tensor, v: Tensor, block: Block) -> Result:
        """Call the op of the forward pass, whose first two results are out and lse."""
        op = torch.ops.aten._flash_attention_forward
        out, lse, *_ = op(q, k, v, *_lengths(q, k, block), *_softmax(block), False, **_keywords(block))
        return Result(out, lse)

    @override
    def call_backward(self, saved: Saved, dout: Tensor, block: Block) -> Gradients:
        """Call the op of the backward pass; without dropout it does not read its generator arguments."""
        q, k, *_ = saved
        state = drawn(q.device, block)
        # The op takes the state as uint64, flash-attn 2 the same bits as int64.
        seed_and_offset = q.new_empty(2, dtype=torch.uint64) if state is None else state.view(torch.uint64)
        unused = q.new_empty((), dtype=torch.uint64)
        op = torch.ops.aten._flash_attention_backward
        return op(dout, *saved, *_lengths(q, k, block), *_softmax(block), seed_and_offset, unused, **_keywords(block))


def _lengths(q: Tensor, k: Tensor, block: Block) -> tuple[Tensor | None, Tensor | None, int, int]:
    """Give cumulative lengths and longest lengths, as both ops take them."""
    varlen = block.varlen
    return (None, None, q.shape[1], k.shape[1]) if varlen is None else (varlen.cu_q, varlen.cu_k, varlen.max_q, varlen.max_k)


def _softmax(block: Block) -> tuple[float, bool]:
    """Give dropout_p and is_causal, which follow each other in both ops."""
    return block.softmax.dropout_p, is_causal(block.window)


def _keywords(block: Block) -> dict[str, Any]:
    """Give the scale, and the window unless it is causal or full, for which the ops have an argument or a default."""
    left, right = block.window
    if block.window == (-1, -1) or is_causal(block.window):
        return {"scale": block.softmax.scale}
    return {"scale": block.softmax.scale, "window_size_left": left, "window_size_right": right}
