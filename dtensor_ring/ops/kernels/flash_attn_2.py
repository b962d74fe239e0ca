"""`flash_attn_2`: the package `flash-attn`, FlashAttention-2, from version 2.7 on.

Its forward and backward are registered operators since 2.7, called here by keyword.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from dtensor_ring.ops.kernels.base import KernelRequirements
from dtensor_ring.ops.kernels.block import Block, Gradients, Result, Saved
from dtensor_ring.ops.kernels.flash import (
    FlashKernel,
    drawn,
    empty_gradients,
    is_causal,
    lacks_gpu,
    lacks_tensors,
    load,
    varlen_keywords,
    window_keywords,
)


class FlashAttn2Kernel(FlashKernel):
    """`flash_attn.flash_attn_interface`: windows, softcap, ALiBi, dropout, deterministic backward."""

    name: ClassVar[str] = "flash_attn_2"

    @override
    def unavailable(self, need: KernelRequirements) -> str | None:
        """It needs the package, and CUDA of compute capability 8.0 or more."""
        reason = lacks_gpu(need)
        if reason is not None:
            return reason
        module = _module()
        return module if isinstance(module, str) else None

    @override
    def lacks(self, need: KernelRequirements) -> str | None:
        """It needs 16-bit tensors and one head dim, a multiple of 8 up to 256."""
        reason = lacks_tensors(need)
        if reason is not None:
            return reason
        if need.softcap and need.dropout:
            return "has no softcap together with dropout"
        if need.alibi == "shifted":
            return "takes ALiBi distances from the end of a block, which here is not the end of its queries (strategy='gather' is)"
        return None

    @override
    def call_forward(self, q: Tensor, k: Tensor, v: Tensor, block: Block) -> Result:
        """Call the registered operator of the forward pass, by keyword."""
        out, lse, *_ = _operator("forward", block)(q, k, v, **_keywords(block), return_softmax=False)
        shift = _alibi_shift(q, block)
        return Result(out, lse if shift is None else lse - shift)

    @override
    def call_backward(self, saved: Saved, dout: Tensor, block: Block) -> Gradients:
        """Call the operator of the backward pass, which writes dq, dk and dv into tensors given to it."""
        q, k, v, out, lse = saved
        shift = _alibi_shift(q, block)
        # The kernel recomputes its weights from its own scores, so it must be given the lse as it would have returned it itself.
        lse = lse if shift is None else lse + shift
        grads = empty_gradients(saved)
        rest = {"deterministic": block.softmax.deterministic, "rng_state": drawn(q.device, block)}
        _operator("backward", block)(dout, q, k, v, out, lse, *grads, **_keywords(block), **rest)
        return grads


def _module() -> ModuleType | str:
    # The name came with 2.7, as the registered operators did: a package without it has none to call.
    return load("flash_attn.flash_attn_interface", "flash-attn", ("_wrapped_flash_attn_forward",))


def _operator(direction: str, block: Block) -> Callable[..., Any]:
    """The registered operator of the dense or the varlen call; importing the package registers it."""
    assert isinstance(_module(), ModuleType), "refused otherwise"
    return getattr(torch.ops.flash_attn, f"_flash_attn_{direction}" if block.varlen is None else f"_flash_attn_varlen_{direction}")


def _slopes(block: Block) -> Tensor | None:
    """Slopes (H,), or a row of them for each batch row, which in a varlen call is each sequence."""
    positions, varlen = block.positions, block.varlen
    # In a varlen call the operator takes the n-th line of slopes for the n-th sequence, of which a batch row may have several.
    if positions is None or positions.alibi is None or positions.alibi.dim() == 1 or varlen is None:
        return None if positions is None else positions.alibi
    tokens = len(positions.positions[0])
    # A sequence without queries may begin one past the last batch row; its slopes are not read, but the index must exist.
    rows = (varlen.cu_q[:-1] // max(tokens, 1)).clamp(max=positions.alibi.shape[0] - 1)
    return positions.alibi.index_select(0, rows)


def _alibi_shift(q: Tensor, block: Block) -> Tensor | None:
    """What the lse of a causal call has too much, (H or B, H, Sq), or (H, T) in a varlen call; None where it is right.

    Under a causal mask the kernel adds slope * (the key's place) to a score instead of subtracting slope * (the distance to the
    key). The two differ by slope * (the query's place), the same for all keys of a query: out does not change, lse does.
    """
    if block.positions is None or block.positions.alibi is None or not is_causal(block.window):
        return None
    alibi = block.positions.alibi
    q_positions, k_positions = block.positions.positions
    if block.varlen is None:
        return alibi[..., None] * (q_positions - k_positions[:1])
    # Worked out on the device, where the cumulative lengths lie: reading them would make the host wait.
    tokens = torch.arange(q.shape[0], device=q.device)
    sequence = torch.searchsorted(block.varlen.cu_q, tokens, right=True) - 1
    first_key = block.varlen.cu_k.index_select(0, sequence)
    place = q_positions[tokens % len(q_positions)] - k_positions[first_key % len(k_positions)]
    slopes = alibi if alibi.dim() == 1 else alibi[tokens // len(q_positions)].T
    return slopes.reshape(slopes.shape[0], -1) * place


def _keywords(block: Block) -> dict[str, Any]:
    """Give the arguments that forward and backward have in common."""
    softmax = block.softmax
    return {
        "dropout_p": softmax.dropout_p,
        "softmax_scale": softmax.scale,
        "softcap": softmax.softcap,
        "alibi_slopes": _slopes(block),
        **window_keywords(block.window),
        **varlen_keywords(block),
    }
