"""Cumulative lengths on the host, read from a GPU once for each tensor, however many layers pass it."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from dtensor_ring._torch import TensorCache
from dtensor_ring.captures import check_not_capturing

# flash-attn's functions take lengths on the GPU. Read for every layer, they would make the host wait for all work before.
_read: TensorCache[tuple[int, ...]] = TensorCache()


def host_lengths(name: str, cu_seqlens: Tensor) -> tuple[int, ...]:
    """The values of a 1-D integer tensor; the host waits for a GPU the first time it sees the tensor, or after it was changed.

    Raises:
        TypeError: not one-dimensional integers.
        ValueError: does not start at 0, or decreases.
        RingCaptureError: it would have to be read while a CUDA graph is being captured.
    """
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point():
        raise TypeError(f"{name} must be a 1-D integer tensor, found {cu_seqlens!r}")
    values = _read.get(cu_seqlens) if _is_kept(cu_seqlens) else None
    if values is None:
        if cu_seqlens.is_cuda:
            check_not_capturing(f"the host reads {name} off the GPU", "make the same call once before, with the very same tensor")
        values = tuple(cu_seqlens.tolist())
        if not values or values[0] != 0 or any(b < a for a, b in pairwise(values)):
            raise ValueError(f"{name} must start at 0 and never decrease, found {values[:8]}{'...' if len(values) > 8 else ''}")
        # Only lengths that passed the checks are kept, so that later layers need not check them again.
        remember(cu_seqlens, values)
    return values


def remember(cu_seqlens: Tensor, values: tuple[int, ...]) -> None:
    """Keeps the values of a tensor that the host has just made, so that `host_lengths` need not read them back."""
    if _is_kept(cu_seqlens):
        _read.put(cu_seqlens, values)


def _is_kept(cu_seqlens: Tensor) -> bool:
    """Whether values of this tensor may be kept."""
    # CPU tensors cost nothing to read, and NumPy changes them unseen. Inference tensors do not count their changes, so that a kept
    # value could be an old one.
    return cu_seqlens.is_cuda and not cu_seqlens.is_inference()


def check_tokens(function: str, name: str, bounds: tuple[int, ...], tokens: int, longest: int) -> None:
    """Raises ValueError unless bounds end at the number of tokens and no document is longer than said."""
    if bounds[-1] != tokens:
        raise ValueError(f"{function}: {name} ends at {bounds[-1]}, but there are {tokens} tokens")
    tokens_of_longest = max((b - a for a, b in pairwise(bounds)), default=0)
    if tokens_of_longest > longest:
        raise ValueError(
            f"{function}: {name} has a document of {tokens_of_longest} tokens, longer than the longest length given, {longest}"
        )
