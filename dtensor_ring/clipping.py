"""The norm of all gradients of a model, and clipping by it, where parameters lie on several meshes and some on none.

    tensor parallel    q_proj, up_proj, ...     DTensors on mesh["tp"]: a rank has a part
    beside it          embeddings, norms        plain tensors: every rank has the whole

`torch.nn.utils.clip_grad_norm_` takes tensors of one mesh, or plain ones, and refuses the two together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from dtensor_ring._torch import local_of


def clip_gradients(
    model: nn.Module | Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2.0, *, error_if_nonfinite: bool = False
) -> Tensor:
    """Scale all gradients so that their norm is at most `max_norm`, in place: between `average_gradients` and `step`.

        loss.backward()
        average_gradients(model, mesh["cp"])          # first: the norm of a rank's part alone differs from rank to rank
        norm = clip_gradients(model, 1.0)

    As `torch.nn.utils.clip_grad_norm_`, for parameters of any number of meshes: each gradient counts once, however many ranks hold
    it or a part of it. Sends, for each mesh and way of placing, one number along each axis where a rank has a part.

    Args:
        model: a module, a parameter or several; those without a gradient are left out.
        max_norm: the largest norm.
        norm_type: the order of the norm; infinity for the largest element.
        error_if_nonfinite: refuse to clip by a norm that is infinite or NaN.

    Returns:
        The norm before clipping (), a plain tensor, the same on all ranks.

    Raises:
        ValueError: `max_norm` is negative or NaN.
        RuntimeError: the norm is not finite, and that is asked for; no gradient is changed.
    """
    if not max_norm >= 0:
        raise ValueError(f"max_norm is the largest norm that gradients may have, at least 0, found {max_norm}")
    # A tensor alone, as PyTorch's function takes it; its rows, over which it would be gone through, have no gradients.
    parameters = model.parameters() if isinstance(model, nn.Module) else [model] if isinstance(model, Tensor) else model
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.tensor(0.0)
    norms = [_norm(group, norm_type) for group in _alike(gradients)]
    total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]), norm_type)
    if error_if_nonfinite and not math.isfinite(total.item()):
        raise RuntimeError(f"the norm of order {norm_type} of the gradients is {total.item()}: they cannot be clipped by it")
    # The number that PyTorch adds too, and no branch on the norm: the host would wait for the GPU.
    factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for gradient in gradients:
        local_of(gradient).mul_(factor.to(local_of(gradient).device))
    return total


def _alike(gradients: Iterable[Tensor]) -> list[list[Tensor]]:
    """Gradients in groups of one mesh and one way of placing, in an order that is the same on all ranks."""
    groups: dict[object, list[Tensor]] = {}
    for gradient in gradients:
        # Not by mesh alone: norms of parts and norms of wholes, stacked into one DTensor, would all be taken for one or the other.
        place = (gradient.device_mesh, gradient.placements) if isinstance(gradient, DTensor) else None
        groups.setdefault(place, []).append(gradient)
    return list(groups.values())


def _norm(gradients: Sequence[Tensor], norm_type: float) -> Tensor:
    """The norm of gradients placed alike, summed up over the ranks that hold parts."""
    norm = get_total_norm(gradients, norm_type)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
