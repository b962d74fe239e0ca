"""`ring_plan`: its arguments, and everything that is refused where the plan is made."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from dtensor_ring.data.batch import check_placement
from dtensor_ring.integrations.transformers.checks import MODEL_TYPES, check_model
from dtensor_ring.integrations.transformers.loss import Loss, ask_loss
from dtensor_ring.integrations.transformers.peft_models import unwrap
from dtensor_ring.integrations.transformers.plan import RingPlan
from dtensor_ring.integrations.transformers.probe import try_tokenwise
from dtensor_ring.integrations.transformers.streams import Dropout
from dtensor_ring.integrations.transformers.structure import check_structure
from dtensor_ring.ops.arguments import Arguments, Strategy, check_stages, check_strategy_name, text_of_model
from dtensor_ring.ops.kernels import KernelName, check_kernel_name
from dtensor_ring.placements import SequencePlacement, Zigzag
from dtensor_ring.planning.cost_model import CostModel


def ring_plan(
    model: PreTrainedModel | nn.Module,
    placement: SequencePlacement | None = None,
    strategy: Strategy | None = None,
    kernel: KernelName | None = None,
    *,
    stages: int | None = None,
    memory: int | None = None,
    cost_model: CostModel | None = None,
    loss: Loss = "model",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    loss_chunk: int | None = None,
    dropout: Dropout = "same",
    unlisted: bool = False,
) -> RingPlan:
    """A plan that makes a Hugging Face model sequence-parallel over one mesh axis.

        plan = ring_plan(model, Zigzag(1))
        parallelize_module(model, mesh["cp"], plan)          # then fully_shard, compile, ...
        out = model(input_ids=ids, labels=labels)            # the whole batch, the same on every rank of the axis

    Then every rank of the axis calls the model with the whole batch. `out.logits` are those of this rank's tokens
    (`plan.gather(out.logits)` for all). `out.loss`:
    without `num_items_in_batch` the mean over the whole batch, with gradients such that averaging them over the axis (as FSDP2
    and DDP do) gives those of one device; with `num_items_in_batch=N` this rank's sum / N, whose sum over ranks is the loss: the
    caller scales, as Trainer and Accelerate do. Packed documents are read from `cu_seq_lens_q`, `seq_idx` or restarting
    `position_ids`, or passed as `documents=`. Rows padded on the left or right come with an `attention_mask` (B, S): logits of
    padding tokens are unspecified, their labels must be -100, and a label at the first real token after padding is ignored.

    Args:
        model: a transformers model of a supported type (`dtensor_ring.integrations.transformers.checks.MODEL_TYPES`), or a PEFT
            model around one; `parallelize_module` then takes the PEFT model or the model inside.
        placement: how sequences are cut; `Zigzag(1)` by default, whatever the batches. Where it balances packed documents badly, a
            warning and `describe()` propose `Zigzag(1, per_document=True)`: it cannot be the default, since it needs the documents
            wherever tokens are gathered, in one row for the whole batch. All ranks must pass the same.
        strategy: as in `ring_attention`.
        kernel: as in `ring_attention`.
        stages: as in `ring_attention`.
        memory: as in `ring_attention`.
        cost_model: as in `ring_attention`.
        loss: "model", its own; "chunked", the same without whole logits, so that `out.logits` is None where labels are given; or a
            function of logits (B, n, V) and shift_labels (B, n) that returns each token's loss, or their sum. See docs/losses.md.
        label_smoothing: the share of the mean over the vocabulary of -log p, as `LabelSmoother` of transformers has it.
        z_loss: the factor of logsumexp(logits)^2 in each token's loss (PaLM, section 5).
        loss_chunk: tokens whose logits are made at a time, with "chunked" or a function; by default as many as take 1 GiB.
        dropout: masks of dropout outside of attention. "same": what the ranks' seeds give, and equal seeds give every rank the same
            mask on other tokens. "per_rank": each rank draws from a stream of its own during the forward pass, and the default
            generators end it equal on all ranks.
        unlisted: also take a model whose type is not listed, if nothing is seen that a part of the sequence would get wrong, in its
            modules, its config and a run of eight tokens (docs/models.md). It is no proof: compare it with one process before
            training, by `dtensor_ring.verify`.

    Returns:
        A dict for `parallelize_module`, with `gather`, `describe` and `undo`.

    Raises:
        TypeError: not a transformers model, stages, memory or a chunk that are no whole number, or no cost model.
        ValueError: the placement does not cut dim 1, there is no such strategy, kernel or loss, or stages and memory do not fit it.
        NotImplementedError: the model has something that would be silently wrong on a part of a sequence.
    """
    # All of this raises where the plan is made, in the user's own line, and not in a hook at the first batch.
    unwrapped = unwrap(model, unlisted)
    check_model(unwrapped.model, unlisted)
    if unlisted and unwrapped.model.config.model_type not in MODEL_TYPES:
        check_structure(unwrapped.model)
        try_tokenwise(unwrapped.model)
    check_strategy_name(strategy)
    check_kernel_name(kernel)
    placement = Zigzag(1) if placement is None else placement
    check_placement(placement)
    asked = Arguments(strategy=strategy, kernel=kernel, stages=stages, memory=memory, cost_model=text_of_model(cost_model))
    check_stages(asked)
    of_loss = ask_loss(unwrapped.model, loss, label_smoothing, z_loss, loss_chunk)
    return RingPlan(unwrapped, placement, asked, of_loss, dropout)
