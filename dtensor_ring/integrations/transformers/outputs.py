"""What a parallelized model gives back, made whole: all tokens, or sums over them, with gradients that fit averaging over the axis.

    two ranks, each with half of the tokens      gather                  sum_over_tokens (dim 1)
    rank 0: x0 x1    rank 1: x2 x3               x0 x1 x2 x3 on both     x0 + x1 + x2 + x3 on both

Every rank computes the same loss from the whole, and has gradients for its own tokens only, so the gradients of a weight must be
added up over ranks. FSDP2 and DDP average instead. Under the convention "mean" a rank's gradients are W times its tokens' part, so
that their average is the gradient of one device, as for the model's own loss; under "sum" they are that part itself.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import override

from dtensor_ring.comm import transport_along
from dtensor_ring.ops.dtypes import accumulate_dtype
from dtensor_ring.placements import SequencePlacement, from_local, full_tensor
from dtensor_ring.planning.documents import Documents

Convention = Literal["mean", "sum"]


def check_convention(grad: Convention) -> None:
    """Raises ValueError unless `grad` is a convention."""
    if grad not in get_args(Convention):
        raise ValueError(f"grad={grad!r}: use 'mean' where gradients are averaged over the axis, as FSDP2 and DDP do, or 'sum'")


def gather_tokens(
    local: Tensor, mesh: DeviceMesh, placement: SequencePlacement, documents: Documents | None, grad: Convention
) -> Tensor:
    """The whole of a tensor whose dim `placement.dim` holds this rank's tokens. Each rank sends its share to every other rank."""
    # The tensor may be of any batch of this plan, so its length is asked of the ranks, not of the last batch.
    tokens = transport_along(mesh).gather_values([local.shape[placement.dim]])
    whole = from_local(local, mesh, [placement], length=sum(count for (count,) in tokens))
    gathered = full_tensor(whole, documents=documents)
    # Every rank has the whole loss, so the gradient that comes back is whole, and `full_tensor` cuts this rank's part out of it. An
    # average over W ranks would take 1/W of that part, hence the factor.
    return _Scaled.apply(gathered, mesh.size()) if grad == "mean" else gathered


def sum_over_tokens(local: Tensor, mesh: DeviceMesh, dim: int, grad: Convention) -> Tensor:
    """The sum over all tokens of a tensor whose `dim` holds this rank's. Each rank sends its part, as an all-reduce."""
    # Added in the wider dtype and rounded once: each rank's rounding would be an error of its own.
    part = local.sum(dim, dtype=accumulate_dtype(local.dtype) if local.is_floating_point() else None)
    whole = SumOverRanks.apply(part, mesh, grad)
    return whole.to(local.dtype) if local.is_floating_point() else whole


def mean_over_items(
    local_loss: Tensor, items: Tensor | int | None, whole: Tensor | None, mesh: DeviceMesh, grad: Convention
) -> Tensor:
    """The sum over ranks of a rank's losses, divided by that of its items, or by `whole` where items are left out.

    Raises:
        ValueError: neither is known.
    """
    if items is None and whole is None:
        raise ValueError(
            "it is not known how many tokens this loss is the mean over: the last batch had no labels. Pass items=, how many of "
            "this rank's tokens count"
        )
    if items is not None:
        whole = _summed(torch.as_tensor(items, device=local_loss.device, dtype=torch.int64).sum(), mesh)
    assert whole is not None, "one of the two is there"
    part = local_loss.sum(dtype=accumulate_dtype(local_loss.dtype))  # the sum of a sum is itself
    return SumOverRanks.apply(part, mesh, grad) / whole


class SumOverRanks(torch.autograd.Function):
    """The sum over ranks. Under "mean" its gradient is summed over ranks too: W times that of a value that all ranks use alike."""

    # Summed instead of multiplied by W: ranks may weigh the sum differently, each in a part of the loss, and all of it counts.
    @staticmethod
    @override
    def forward(  # pyrefly: ignore[bad-override]
        ctx: Any,
        value: Tensor,
        mesh: DeviceMesh,
        grad: Convention = "mean",
    ) -> Tensor:
        ctx.mesh, ctx.grad = mesh, grad
        return _summed(value, mesh)

    @staticmethod
    @override
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any,
        grad: Tensor,
    ) -> tuple[Tensor, None, None]:
        return _summed(grad, ctx.mesh) if ctx.grad == "mean" else grad, None, None


class _Scaled(torch.autograd.Function):
    """The same value, and its gradient times a factor."""

    @staticmethod
    @override
    def forward(  # pyrefly: ignore[bad-override]
        ctx: Any,
        value: Tensor,
        factor: int,
    ) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)  # an autograd function must not return its input itself

    @staticmethod
    @override
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any,
        grad: Tensor,
    ) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def _summed(value: Tensor, mesh: DeviceMesh) -> Tensor:
    transport = transport_along(mesh)
    with transport.during("a sum over the tokens of all ranks"):
        return transport.all_reduce(value)
