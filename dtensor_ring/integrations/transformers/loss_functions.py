"""Loss functions of one's own: what they must be for the parts of ranks to add up, and finding out whether they are.

    of the plan     ring_plan(model, loss=f)      f(logits (B, n, V), shift_labels (B, n)) -> losses (B, n), or their sum ()
    of the model    model.loss_function = f       f(logits, labels, vocab_size, num_items_in_batch=N, shift_labels=...) -> sum / N

A loss of a batch is a sum over its tokens, of which each rank has some, divided by the labels that count in the whole batch. So a
function must give each token its loss without regard for the others, and nothing for tokens whose label is -100. Whether it does is
tried once, on a few random logits: those of all tokens together must give what they give in two parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dtensor_ring.losses import IGNORED

LossFunction = Callable[[Tensor, Tensor], Tensor]
_TOLERANCE = 1e-3  # of the loss; losses in 16 bits round by up to 4e-3 of it, those of random logits in float32 by 1e-6


def without_ignored(losses: Tensor, shift_labels: Tensor) -> Tensor:
    """What a loss function returned: of losses of tokens those at -100 become 0, a sum stays as it is."""
    return losses.masked_fill(shift_labels == IGNORED, 0) if losses.shape == shift_labels.shape else losses


def check_function(function: LossFunction, name: str, vocabulary: int, device: torch.device) -> None:
    """Try a function of the plan's contract.

    Raises:
        TypeError: it returns no tensor.
        ValueError: its result is neither losses of tokens nor their sum; the text says what was found.
    """
    logits, labels = _some(vocabulary, device)
    every = slice(None)
    whole, left, right = (_called(function, name, logits[:, part], labels[:, part]) for part in (every, slice(3), slice(3, None)))
    if whole.shape == labels.shape:
        if left.shape != labels[:, :3].shape or not _close(whole, torch.cat([left, right], 1)):
            raise ValueError(f"{name} gives tokens other losses beside other tokens: {_NEEDED}")
        return
    if whole.dim():
        raise ValueError(
            f"{name} returned a tensor of shape {tuple(whole.shape)} for labels of shape {tuple(labels.shape)}: {_NEEDED}"
        )
    _check_sum(whole, left + right, name)
    none = _called(function, name, logits, torch.full_like(labels, IGNORED))
    if not _close(none, torch.zeros_like(none)):
        raise ValueError(f"{name} gives {none.item():g} for tokens whose label is {IGNORED}, which do not count: {_NEEDED}")


def check_model_function(function: Callable[..., Tensor], name: str, vocabulary: int, device: torch.device) -> None:
    """Try a function that a user has set as the model's own, as transformers calls it.

    Raises:
        TypeError: it returns no tensor.
        ValueError: it does not read shift_labels or num_items_in_batch, or what it returns is no sum over tokens divided by that.
    """
    logits, labels = _some(vocabulary, device)

    def sum_of(part: slice, items: int = 1, shift: int = 0) -> Tensor:
        given: dict[str, Any] = {"num_items_in_batch": items, "shift_labels": labels[:, part]}
        result = function(logits[:, part], labels[:, part].roll(shift, 1), vocabulary, **given)
        if not isinstance(result, Tensor) or result.dim():
            raise TypeError(f"{name} returned {_kind(result)}: the loss of a model is a tensor of no dims")
        return result.detach()

    whole = sum_of(slice(None))
    if not _close(whole, sum_of(slice(None), shift=1)):
        raise ValueError(
            f"{name} reads labels where shift_labels are given: a rank has a part of the tokens, and cannot shift labels itself. "
            "Read shift_labels, the label of the next token of each, as transformers' own losses do"
        )
    _check_sum(whole, sum_of(slice(3)) + sum_of(slice(3, None)), name)
    if not _close(whole / 4, sum_of(slice(None), 4)):
        raise ValueError(
            f"{name} does not divide its sum by num_items_in_batch: it must return the sum over tokens / num_items_in_batch"
        )


_NEEDED = (
    "a loss function is called as f(logits (B, n, V), shift_labels (B, n)), for some of the tokens, and must return the loss of "
    f"each token (B, n), or their sum, not a mean; tokens whose label is {IGNORED} add nothing"
)


def _some(vocabulary: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits (1, 7, V) and labels (1, 7) of which two do not count, in one half one of three, in the other one of four."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 7, vocabulary, generator=generator)
    labels = torch.randint(0, vocabulary, (1, 7), generator=generator)
    labels[0, 1] = labels[0, 5] = IGNORED
    return logits.to(device), labels.to(device)


def _called(function: LossFunction, name: str, logits: Tensor, labels: Tensor) -> Tensor:
    result = function(logits, labels)
    if not isinstance(result, Tensor):
        raise TypeError(f"{name} returned {_kind(result)}: {_NEEDED}")
    return without_ignored(result.detach(), labels)


def _check_sum(whole: Tensor, parts: Tensor, name: str) -> None:
    if not _close(whole, parts):
        raise ValueError(
            f"{name} gives {whole.item():g} for seven tokens, and {parts.item():g} for three and four of them together: a mean, or "
            f"something else that is not linear over tokens, whose parts ranks cannot add up. {_NEEDED}"
        )


def _close(a: Tensor, b: Tensor) -> bool:
    a, b = a.double(), b.double()
    return bool(((a - b).abs() <= _TOLERANCE * torch.maximum(b.abs(), b.abs().mean())).all())


def _kind(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
