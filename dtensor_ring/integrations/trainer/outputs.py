"""What a Trainer reads of a parallelized model's outputs, made whole on every rank of the axis.

    loss           with num_items_in_batch, the sum over ranks of their parts: what one process has, on every rank
    log_probs ...  TRL's values of each token (B, S/W), gathered: (B, S - 1) in order, as TRL has them in one process
    logits         (B, S, V), gathered where predictions are asked for, and not in training

Gradients fit averaging over the axis, as DDP and FSDP2 do it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dtensor_ring.data.batch import IGNORED
from dtensor_ring.data.batch import shift_labels as shifted
from dtensor_ring.integrations.transformers.attention import KEYWORD
from dtensor_ring.integrations.transformers.plan import RingPlan

# Fields of TRL's `FusedCausalLMOutput`, one value for each token, zero where a label does not count.
_PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")


def whole_outputs(model: nn.Module, plan: RingPlan, copies: int) -> Callable[[], None]:
    """Makes the losses and TRL's per-token outputs of a parallelized model whole on every rank; returns what undoes it.

    Args:
        model: the model.
        plan: its plan, applied.
        copies: how often a caller's `num_items_in_batch` counts each label: the loss is the sum over all tokens divided by it.
    """
    shifted_by_caller: list[bool] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # The plan gives the model shifted labels in any case. Which ones the caller gave decides how many columns it expects.
        shifted_by_caller[:] = [kwargs.get("shift_labels") is not None]
        items = None if plan.is_paused else kwargs.get("num_items_in_batch")
        # Routers' losses are means, which the caller multiplies by as many processes as it does the sum: both are divided alike.
        return args, kwargs if items is None else {**kwargs, "num_items_in_batch": items / copies}

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:  # noqa: ANN401
        if KEYWORD not in kwargs:
            return output  # the plan is paused, and the model is whole
        if isinstance(output, Mapping) and "log_probs" in output and "label_mask" in output:
            _gather_per_token(output, plan, kwargs, drop_last=not shifted_by_caller[0])
        if not kwargs[KEYWORD].has_part_of_loss:
            return output  # no loss, or one that the plan has made whole
        if isinstance(output, tuple):
            return (over_ranks(output[0], plan) / copies, *output[1:])
        output["loss"] = over_ranks(output["loss"], plan) / copies
        return output

    handles: list[RemovableHandle] = [
        model.register_forward_pre_hook(enter, with_kwargs=True, prepend=True),
        model.register_forward_hook(leave, with_kwargs=True),
    ]

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


def _gather_per_token(output: Any, plan: RingPlan, kwargs: Mapping[str, Any], *, drop_last: bool) -> None:  # noqa: ANN401
    names = [name for name in _PER_TOKEN if output.get(name) is not None]
    parts = [output[name] for name in names]
    # One transfer for all: they are (B, S/W), and as many numbers as tokens.
    dtype = output["log_probs"].dtype
    joined = torch.stack([part.to(dtype) for part in parts], dim=-1)
    whole = plan.gather(joined, 1, documents=kwargs[KEYWORD].documents)
    if drop_last:
        whole = whole[:, :-1]
    for name, part, values in zip(names, parts, whole.unbind(-1), strict=True):
        output[name] = values.to(part.dtype)


def gather_predictions(outputs: Any, plan: RingPlan) -> Any:  # noqa: ANN401
    """Logits (B, S/W, V) as (B, S, V), and other outputs of tokens likewise; tuples and dicts part by part.

    Raises:
        NotImplementedError: an output whose rows and tokens are one dim, as logits of routers have them.
    """
    if isinstance(outputs, Tensor):
        if outputs.dim() == 2:
            raise NotImplementedError(
                f"an output of shape {tuple(outputs.shape)} is asked for as a prediction, and only outputs (B, tokens, ...) can be "
                "gathered: leave it out by ignore_keys=['router_logits'], or whatever its name is"
            )
        return plan.gather(outputs, 1, documents=plan.documents) if outputs.dim() > 1 else outputs
    if isinstance(outputs, (tuple, list)):
        return type(outputs)(gather_predictions(part, plan) for part in outputs)
    if isinstance(outputs, Mapping):
        return {name: gather_predictions(part, plan) for name, part in outputs.items()}
    return outputs


class RingLabelSmoother:
    """In place of transformers' `LabelSmoother`: the same loss, from the logits of this rank's tokens.

    Whole logits never exist. Labels are shifted within documents, unless the model's are its tokens' own, and cut as the batch was.
    """

    def __init__(self, epsilon: float, plan_of: Callable[[], RingPlan], *, unshifted: bool = False) -> None:
        self.epsilon = epsilon
        self._plan_of, self._unshifted = plan_of, unshifted

    def __call__(
        self,
        model_output: Any,  # noqa: ANN401
        labels: Tensor,
        shift_labels: bool = True,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The smoothed loss of the whole batch, on every rank of the axis.

        Args:
            model_output: of this rank's tokens, with logits (B, S/W, V).
            labels: (B, S), of the whole batch.
            shift_labels: what Trainer says of the model's class. It is wrong for classes that FSDP2 has renamed, and is not used:
                whether labels are shifted was decided when this was made.
            num_items_in_batch: what sums are divided by; by default how many labels count.
        """
        logits = model_output["logits"] if isinstance(model_output, Mapping) else model_output[0]
        plan = self._plan_of()
        targets = plan.cut(labels if self._unshifted else shifted(labels, plan.documents))
        return smoothed_loss(logits, targets, plan, self.epsilon, num_items_in_batch)


def smoothed_loss(logits: Tensor, targets: Tensor, plan: RingPlan, epsilon: float, count: Tensor | int | None) -> Tensor:
    """(1 - epsilon) times the cross entropy and epsilon times the mean over the vocabulary, over all tokens of a batch.

    Args:
        logits: (B, S/W, V), of this rank's tokens.
        targets: (B, S/W), what they are to predict.
        plan: of the model.
        epsilon: the share of the mean.
        count: what the sum is divided by; None for how many targets count.
    """
    counts = targets != IGNORED
    log_probs = logits.log_softmax(-1, dtype=torch.float32)
    expected = -log_probs.gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    spread = -log_probs.mean(-1)
    part = ((1 - epsilon) * expected + epsilon * spread).masked_fill(~counts, 0.0).sum()
    divisor = over_ranks(counts.sum(), plan) if count is None else count
    return over_ranks(part, plan) / divisor


def over_ranks(part: Tensor, plan: RingPlan) -> Tensor:
    """The sum over ranks of a number, such as a rank's part of a loss."""
    return plan.sum_over_tokens(part[None], 0)
