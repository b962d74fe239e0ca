"""`torch_flash`: the FlashAttention-2 kernels built into PyTorch for CUDA, dense and varlen.

Windows are aligned bottom-right; a row without keys gives out 0 and lse +inf, which becomes -inf here.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from dtensor_ring.ops.kernels.base import Kernel, Need, Options, Packing


class TorchFlashKernel(Kernel):
    """`aten::_flash_attention_forward` and `aten::_flash_attention_backward`."""

    name: ClassVar[str] = "torch_flash"

    @override
    def refuses(self, need: Need) -> str | None:
        """Needs CUDA of compute capability 8.0 or more, 16-bit tensors, and one head dim, a multiple of 8 up to 256."""
        if need.device != "cuda":
            return f"runs on CUDA tensors, found {need.device}"
        if not torch.backends.cuda.is_flash_attention_available():
            return "this build of PyTorch has no flash attention"
        if torch.cuda.get_device_capability() < (8, 0):
            return f"needs compute capability 8.0, this GPU has {'.'.join(map(str, torch.cuda.get_device_capability()))}"
        if need.dtype not in (torch.bfloat16, torch.float16):
            return f"needs bfloat16 or float16, found {need.dtype}"
        if need.head_dim != need.v_head_dim:
            return f"needs one head dim for q, k and v, found {need.head_dim} and {need.v_head_dim}"
        if need.head_dim % 8 or need.head_dim > 256:
            return f"needs a head dim that is a multiple of 8 up to 256, found {need.head_dim}"
        if need.softcap:
            return "has no softcap"
        if need.deterministic and need.training and not torch.are_deterministic_algorithms_enabled():
            return "its backward is deterministic only under torch.use_deterministic_algorithms(True)"
        return None

    @override
    def forward(
        self, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, window: tuple[int, int], options: Options
    ) -> tuple[Tensor, Tensor]:
        """Out in the input dtype, lse (B, H, Sq) in float32."""
        return _forward(q_BSHD, k_BSHD, v_BSHD, None, None, q_BSHD.shape[1], k_BSHD.shape[1], window, options)

    @override
    def backward(
        self,
        dout_BSHD: Tensor,
        q_BSHD: Tensor,
        k_BSHD: Tensor,
        v_BSHD: Tensor,
        out_BSHD: Tensor,
        lse_BHS: Tensor,
        window: tuple[int, int],
        options: Options,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv in the input dtype."""
        sizes = None, None, q_BSHD.shape[1], k_BSHD.shape[1]
        return _backward(dout_BSHD, q_BSHD, k_BSHD, v_BSHD, out_BSHD, lse_BHS, *sizes, window, options)

    @override
    def forward_packed(
        self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, packing: Packing, window: tuple[int, int], options: Options
    ) -> tuple[Tensor, Tensor]:
        """One varlen call; lse (H, T) in float32."""
        bounds = packing.cu_q, packing.cu_k, packing.max_q, packing.max_k
        out, lse = _forward(q_THD, k_THD, v_THD, *bounds, window, options)
        return out, lse.masked_fill(lse == math.inf, -math.inf)

    @override
    def backward_packed(
        self,
        dout_THD: Tensor,
        q_THD: Tensor,
        k_THD: Tensor,
        v_THD: Tensor,
        out_THD: Tensor,
        lse_HT: Tensor,
        packing: Packing,
        window: tuple[int, int],
        options: Options,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One varlen call; keys without queries get gradients 0."""
        bounds = packing.cu_q, packing.cu_k, packing.max_q, packing.max_k
        return _backward(dout_THD, q_THD, k_THD, v_THD, out_THD, lse_HT, *bounds, window, options)


def _sides(window: tuple[int, int]) -> tuple[bool, dict[str, int]]:
    """`is_causal` and the window arguments: a causal call takes no right side."""
    left, right = window
    causal = right == 0 and left < 0
    return causal, {} if causal or window == (-1, -1) else {"window_size_left": left, "window_size_right": right}


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    window: tuple[int, int],
    options: Options,
) -> tuple[Tensor, Tensor]:
    causal, sides = _sides(window)
    op = torch.ops.aten._flash_attention_forward
    out, lse, *_ = op(q, k, v, cu_q, cu_k, max_q, max_k, 0.0, causal, False, scale=options.scale, **sides)
    return out, lse


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    window: tuple[int, int],
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    causal, sides = _sides(window)
    no_dropout = q.new_empty(2, dtype=torch.uint64), q.new_empty((), dtype=torch.uint64)
    op = torch.ops.aten._flash_attention_backward
    tensors = dout, q, k, v, out, lse.contiguous()
    return op(*tensors, cu_q, cu_k, max_q, max_k, 0.0, causal, *no_dropout, scale=options.scale, **sides)
