"""What every executor of an attention can do, whether it moves keys between ranks, heads, or nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from dtensor_ring.ops.dtypes import accumulate_dtype
from dtensor_ring.ops.kernels import Kernel, Saved
from dtensor_ring.planning.costs import AttentionShape, RankCost


class AttentionExecutor(ABC):
    """One attention on one rank, of q_BSHD (B, Sq/W, H, D), k_BSHD (B, Sk/W, Hk, D) and v_BSHD (B, Sk/W, Hk, Dv)."""

    __slots__ = ()

    @abstractmethod
    def forward(self, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Out (B, Sq/W, H, Dv) in the dtype of q, and lse (B, H, Sq/W) in float32 (float64 for float64).

        `seed` makes the dropout mask: the same seed gives the same mask, in `backward` too.
        """

    @abstractmethod
    def backward(self, saved: Saved, dout_BSHD: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """dq, dk, dv of this rank's shares in the dtypes of q, k, v, and this rank's part of dsinks (H,), None without sinks.

        `saved` has what `forward` took and gave; its out and lse are of the whole attention.
        """

    @abstractmethod
    def explain(self, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> RankCost:
        """What `forward` and `backward` of these tensors compute and send.

        Only shapes and dtypes are read, so tensors without memory will do. Nothing is sent or computed, and ranks need not call
        it together.
        """


def shape_of(q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, kernel: Kernel) -> AttentionShape:
    """Read off tensors and kernel the sizes that costs depend on."""
    batch, _, heads, head_dim = q_BSHD.shape
    kv_heads, v_head_dim = v_BSHD.shape[2:]
    grad_itemsize = kernel.grad_dtype(k_BSHD.dtype).itemsize
    shape = AttentionShape(heads, kv_heads, head_dim, v_head_dim, batch, k_BSHD.dtype.itemsize, grad_itemsize)
    # Planning has no torch, so its costs know the dtype of sums as a number of bytes: both must say the same.
    assert shape.sum_itemsize == accumulate_dtype(q_BSHD.dtype).itemsize, "costs count what the executors sum in"
    return shape
