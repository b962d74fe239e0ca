"""`torch_flash`: the FlashAttention-2 kernels built into PyTorch for CUDA, dense and varlen."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from dtensor_ring.ops.kernels.base import KernelRequirements, PositionContext, Result, SoftmaxParams
from dtensor_ring.ops.kernels.flash import Bounds, FlashKernel, Side, drawn, lacks_gpu, lacks_tensors


class TorchFlashKernel(FlashKernel):
    """`aten::_flash_attention_forward` and `aten::_flash_attention_backward`."""

    name: ClassVar[str] = "torch_flash"

    @override
    def unavailable(self, need: KernelRequirements) -> str | None:
        """Needs CUDA of compute capability 8.0 or more and a PyTorch built with flash attention."""
        reason = lacks_gpu(need)
        if reason is None and not torch.backends.cuda.is_flash_attention_available():
            return "this build of PyTorch has no flash attention"
        return reason

    @override
    def lacks(self, need: KernelRequirements) -> str | None:
        """Needs 16-bit tensors and one head dim, a multiple of 8 up to 256; has no softcap and no ALiBi."""
        reason = lacks_tensors(need)
        if reason is not None:
            return reason
        if need.softcap:
            return "has no softcap"
        if need.alibi != "no":
            return "has no ALiBi"
        if need.deterministic and need.training and not torch.are_deterministic_algorithms_enabled():
            return "its backward is deterministic only under torch.use_deterministic_algorithms(True)"
        return None

    @override
    def call_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bounds: Bounds | None,
        window: tuple[int, int],
        options: SoftmaxParams,
        extras: PositionContext | None,
    ) -> Result:
        """Out and lse are the first two results."""
        arguments, sides = _arguments(q, k, bounds, window)
        op = torch.ops.aten._flash_attention_forward
        *sizes, is_causal = arguments
        out, lse, *_ = op(q, k, v, *sizes, options.dropout_p, is_causal, False, scale=options.scale, **sides)
        return Result(out, lse)

    @override
    def call_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        bounds: Bounds | None,
        window: tuple[int, int],
        options: SoftmaxParams,
        extras: PositionContext | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Without dropout the op does not read its generator arguments."""
        arguments, sides = _arguments(q, k, bounds, window)
        state = drawn(q, options, extras)
        rng = q.new_empty(2, dtype=torch.uint64) if state is None else state.view(torch.uint64)
        unused = q.new_empty((), dtype=torch.uint64)
        op = torch.ops.aten._flash_attention_backward
        *sizes, is_causal = arguments
        return op(dout, q, k, v, out, lse, *sizes, options.dropout_p, is_causal, rng, unused, scale=options.scale, **sides)


def _arguments(
    q: Tensor, k: Tensor, bounds: Bounds | None, window: tuple[int, int]
) -> tuple[tuple[Tensor | None, Tensor | None, int, int, bool], dict[str, int]]:
    """Cumulative lengths, longest lengths, is_causal; and the window keywords, which a causal or full call leaves out."""
    is_causal, left, right = Side.of(window)
    cu_q, cu_k, max_q, max_k = (None, None, q.shape[1], k.shape[1]) if bounds is None else bounds
    sides = {} if (left, right) == (-1, -1) else {"window_size_left": left, "window_size_right": right}
    return (cu_q, cu_k, max_q, max_k, is_causal), sides
