"""Losses of heads that label each token as it is: masked language models and token classifiers.

    causal         the label of a token is the next token: shifted before rows are cut
    masked         the label of a token is what stood in its place: cut as it is

Those models average over the labels that they see, and some ignore how many there are in the batch, so that the model is not given
its labels: the plan keeps this rank's and computes the sum of losses from the logits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING

from dtensor_ring.data.batch import IGNORED, ShardedBatch
from dtensor_ring.integrations.transformers.outputs import SumOverRanks
from dtensor_ring.ops.dtypes import accumulate_dtype

HEADS = ("ForMaskedLM", "ForTokenClassification")  # ends of class names


def labels_are_unshifted(model: nn.Module) -> bool:
    """Whether a model's labels belong to the tokens that they stand beside."""
    return type(model).__name__.endswith(HEADS)


def _check_no_function(model: PreTrainedModel) -> None:
    """Raises NotImplementedError for a loss function of one's own: the plan computes the loss, and would pass it by."""
    function: Any = getattr(model, "loss_function", None)
    if function is not None and function not in LOSS_MAPPING.values():
        raise NotImplementedError(
            f"the loss function of this {type(model).__name__} is {getattr(function, '__qualname__', function)}, and the plan "
            "computes cross entropy from the logits of such a head: leave the labels out of the call, and compute the loss from "
            "the logits, plan.global_loss"
        )


def keep_from_shift(model: PreTrainedModel, batch: dict[str, Any]) -> None:
    """Rename `labels` (B, S) of a whole batch, in place, to the name under which they are cut without a shift.

    Raises:
        ValueError: `shift_labels` are given, which such a model has not; or a label that is not -100 at padding.
        NotImplementedError: the model has a loss function of one's own.
    """
    if batch.get("shift_labels") is not None:
        raise ValueError("shift_labels are labels of the next token, which this model does not predict: pass labels")
    labels, mask = batch.pop("labels", None), batch.get("attention_mask")
    if labels is None:
        return
    _check_no_function(model)
    if isinstance(mask, Tensor) and mask.shape == labels.shape:
        counted = int(((mask == 0) & (labels != IGNORED)).sum())
        if counted:
            raise ValueError(f"{counted} labels count at padding, whose logits mean nothing: set them to {IGNORED}")
    batch["shift_labels"] = labels


class Targets(NamedTuple):
    """What this rank needs to compute its loss.

    Attributes:
        labels: (B, S/W), of this rank's tokens.
        count: labels that count in the whole batch.
        items: what the caller divides by, `num_items_in_batch`; None where the loss is the mean over the batch.
    """

    labels: Tensor
    count: Tensor
    items: Tensor | int | None


def take_targets(share: ShardedBatch) -> Targets | None:
    """Take this rank's labels out of its share of a batch, in place; None where the batch has none."""
    labels, items = share.pop("shift_labels", None), share.pop("num_items_in_batch", None)
    if not isinstance(labels, Tensor) or share.num_items is None:
        return None
    return Targets(labels, share.num_items, items if isinstance(items, (Tensor, int)) else None)


def with_loss(output: Any, targets: Targets, mesh: DeviceMesh) -> Any:  # noqa: ANN401
    """A model's output with the loss of its logits (B, S/W, V) in the first place, under the contract of other losses.

    Without `items` the mean over the whole batch, for which ranks add up their sums; else this rank's sum / items.
    """
    logits: Tensor = output[0]
    logits = logits.flatten(0, 1).to(accumulate_dtype(logits.dtype))
    # A sum: a rank whose labels are all -100 has one, 0, and no mean.
    total = cross_entropy(logits, targets.labels.flatten().to(logits.device), ignore_index=IGNORED, reduction="sum")
    loss = SumOverRanks.apply(total, mesh) / targets.count if targets.items is None else total / targets.items
    return (loss, *output) if isinstance(output, tuple) else type(output)(loss=loss, **output)
