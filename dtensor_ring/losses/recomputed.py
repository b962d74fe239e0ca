"""Losses of heads that are more than a matrix product, and of functions of one's own, in chunks that backward computes again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from typing_extensions import override

from dtensor_ring.losses.terms import chunks
from dtensor_ring.ops.dtypes import accumulate_dtype


def chunked_losses(
    losses_of: Callable[[Tensor, Tensor], Tensor],
    hidden: Tensor,
    shift_labels: Tensor,
    parameters: Sequence[Tensor],
    chunk: int,
) -> Tensor:
    """Losses of any head and any function of its logits, chunk by chunk: each chunk is computed again in backward.

    Gradients of parameters are added up over chunks in float32. Random numbers, such as those of a dropout in the head, and
    autocast are in backward what they were in forward.

    Args:
        losses_of: from hidden states (n, E) of a chunk and its labels (n) to the losses (n) of its tokens, or to their sum. Called
            twice for each chunk.
        hidden: (..., E).
        shift_labels: (...).
        parameters: what `losses_of` reads and gradients are wanted for, as it finds them in forward and in backward.
        chunk: tokens of a chunk.

    Returns:
        The losses (...), or of functions that return sums, the sum of each chunk.
    """
    kept = [parameter for parameter in parameters if parameter.requires_grad]
    flat = hidden.flatten(0, -2), shift_labels.flatten()
    losses = _Recomputed.apply(losses_of, chunk, *flat, *kept)
    return losses.view(shift_labels.shape) if losses.numel() == shift_labels.numel() else losses


class _Recomputed(torch.autograd.Function):
    """`chunked_losses` of flat tensors."""

    @staticmethod
    @override
    def forward(  # pyrefly: ignore[bad-override]
        ctx: Any,
        losses_of: Callable[[Tensor, Tensor], Tensor],
        chunk: int,
        hidden: Tensor,
        labels: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.losses_of, ctx.chunk, ctx.surroundings = losses_of, chunk, _Surroundings(hidden)
        ctx.save_for_backward(hidden, labels, *parameters)
        return torch.cat([losses_of(hidden[part], labels[part]).reshape(-1) for part in chunks(labels.shape[0], chunk)])

    @staticmethod
    @override
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any,
        dlosses: Tensor,
    ) -> tuple[Tensor | None, ...]:
        hidden, labels, *parameters = ctx.saved_tensors
        dhidden = torch.empty_like(hidden) if ctx.needs_input_grad[2] else None
        sums: list[Tensor | None] = [None] * len(parameters)
        with ctx.surroundings.again():
            first = 0
            for part in chunks(labels.shape[0], ctx.chunk):
                h = hidden[part].detach().requires_grad_()
                with torch.enable_grad():
                    losses = ctx.losses_of(h, labels[part]).reshape(-1)
                wanted = dlosses[first : first + losses.shape[0]]
                first += losses.shape[0]
                if not losses.requires_grad:
                    continue
                dh, *grads = torch.autograd.grad(losses, (h, *parameters), wanted, allow_unused=True)
                if dhidden is not None:
                    dhidden[part] = 0 if dh is None else dh
                for i, grad in enumerate(grads):
                    if grad is not None:
                        so_far = sums[i]
                        sums[i] = grad.to(accumulate_dtype(grad.dtype)) if so_far is None else so_far.add_(grad)
        return None, None, dhidden, None, *(s if s is None else s.to(p.dtype) for s, p in zip(sums, parameters, strict=True))


class _Surroundings:
    """Autocast and the random numbers of a forward pass, to be there again in backward."""

    def __init__(self, like: Tensor) -> None:
        self._device = like.device
        kind = like.device.type
        self._autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled()
        self._random = torch.get_rng_state()
        self._of_device = None if kind == "cpu" else torch.get_device_module(kind).get_rng_state(like.device)

    @contextmanager
    def again(self) -> Iterator[None]:
        kind = self._device.type
        enabled, dtype, cached = self._autocast
        devices: list[torch.device] = [] if kind == "cpu" else [self._device]
        with (
            torch.random.fork_rng(devices, device_type="cuda" if kind == "cpu" else kind),
            torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cached),
        ):
            torch.set_rng_state(self._random)
            if self._of_device is not None:
                torch.get_device_module(kind).set_rng_state(self._of_device, self._device)
            yield
