"""Losses of heads that label each token as it is: masked language models and token classifiers.

    causal         the label of a token is the next token: shifted before rows are cut
    masked         the label of a token is what stood in its place: cut as it is

Those models average over the labels that they see, and some ignore how many there are in the batch, so that the model is not given
its labels: the plan keeps this rank's and computes the sum of losses from the logits.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dtensor_ring.data.batch import IGNORED
from dtensor_ring.ops.dtypes import accumulate_dtype

HEADS = ("ForMaskedLM", "ForTokenClassification")  # ends of class names


def labels_are_unshifted(model: nn.Module) -> bool:
    """Whether a model's labels belong to the tokens that they stand beside."""
    return type(model).__name__.endswith(HEADS)


def keep_from_shift(batch: dict[str, Any]) -> None:
    """Rename `labels` (B, S) of a whole batch, in place, to the name under which they are cut without a shift.

    Raises:
        ValueError: `shift_labels` are given, which such a model has not; or a label that is not -100 at padding.
    """
    if batch.get("shift_labels") is not None:
        raise ValueError("shift_labels are labels of the next token, which this model does not predict: pass labels")
    labels, mask = batch.pop("labels", None), batch.get("attention_mask")
    if labels is None:
        return
    if isinstance(mask, Tensor) and mask.shape == labels.shape:
        counted = int(((mask == 0) & (labels != IGNORED)).sum())
        if counted:
            raise ValueError(f"{counted} labels count at padding, whose logits mean nothing: set them to {IGNORED}")
    batch["shift_labels"] = labels


def take_targets(share: dict[str, Any]) -> Tensor | None:
    """Take this rank's labels (B, S/W) out of its share of a batch, in place; None where the batch has none."""
    return share.pop("shift_labels", None)


def with_loss(output: Any, labels: Tensor, divisor: Tensor | float) -> Any:  # noqa: ANN401
    """A model's output with the sum of the losses of its logits (B, S/W, V), over `divisor`, in the first place.

    The mean is the caller's: a rank whose labels are all -100 has a sum, 0, and no mean.
    """
    logits: Tensor = output[0]
    logits = logits.flatten(0, 1).to(accumulate_dtype(logits.dtype))
    loss = cross_entropy(logits, labels.flatten().to(logits.device), ignore_index=IGNORED, reduction="sum") / divisor
    return (loss, *output) if isinstance(output, tuple) else type(output)(loss=loss, **output)
