"""What the loss of a token is made of, the loss from logits that exist, and how many tokens' logits are made at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dtensor_ring.ops.dtypes import accumulate_dtype

IGNORED = -100
_CHUNK = 1 << 28  # logits of a chunk: 1 GiB in float32. Fewer tokens would add up dW, which is V x E, more often than needed.
_STEP = 128  # tokens: chunks are multiples, which matrix products like


class Terms(NamedTuple):
    """What the loss of a token is made of.

    Attributes:
        label_smoothing: the share of the mean over the vocabulary, from 0 to below 1.
        z_loss: the factor of logsumexp^2.
        softcap: logits x become softcap * tanh(x / softcap) first; 0 for none.
        scale: what logits are multiplied by before that.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0
    scale: float = 1.0


def check_terms(terms: Terms) -> None:
    """Raises ValueError for numbers that make no loss."""
    if not 0 <= terms.label_smoothing < 1:
        raise ValueError(
            f"label_smoothing={terms.label_smoothing}: it is the share of the mean over the vocabulary, from 0 to below 1"
        )
    if not 0 <= terms.z_loss < float("inf"):
        raise ValueError(f"z_loss={terms.z_loss}: it is the factor of logsumexp(logits)^2, at least 0, such as 1e-4")
    if not 0 <= terms.softcap < float("inf"):
        raise ValueError(f"softcap={terms.softcap}: it bounds logits, and is above 0, or 0 for none")


def chunk_tokens(vocabulary: int, chunk: int | None = None) -> int:
    """How many tokens' logits are made at a time: `chunk`, or as many as take 1 GiB in float32.

    Raises:
        TypeError: chunk is no whole number.
        ValueError: chunk is below 1.
    """
    if chunk is None:
        return max(_STEP, _CHUNK // max(vocabulary, 1) // _STEP * _STEP)
    if not isinstance(chunk, int) or isinstance(chunk, bool):
        raise TypeError(f"a chunk is a number of tokens, found {chunk!r} of type {type(chunk).__name__}")
    if chunk < 1:
        raise ValueError(f"a chunk has at least 1 token, found {chunk}: leave it out for as many as take 1 GiB in float32")
    return chunk


def token_losses(logits: Tensor, shift_labels: Tensor, terms: Terms) -> Tensor:
    """The cross entropy of every token (...), from logits (..., V) that exist; softcap and scale are those logits' own affair."""
    x = logits.to(accumulate_dtype(logits.dtype)).flatten(0, -2)
    labels = shift_labels.flatten()
    smoothing = terms.label_smoothing
    losses = torch.nn.functional.cross_entropy(x, labels, ignore_index=IGNORED, reduction="none", label_smoothing=smoothing)
    if terms.z_loss:
        losses = losses + terms.z_loss * x.logsumexp(-1).square().masked_fill(labels == IGNORED, 0)
    return losses.view(shift_labels.shape)


def chunks(tokens: int, chunk: int) -> Iterator[slice]:
    """The tokens of each chunk."""
    return (slice(start, min(start + chunk, tokens)) for start in range(0, tokens, chunk))
