"""`RingTrainerMixin`: transformers' Trainer, and TRL's, with sequences spread over ranks.

    class RingTrainer(RingTrainerMixin, Trainer): ...

    trainer = RingTrainer(model=model, args=args, train_dataset=data, cp_size=2)      # torchrun --nproc-per-node 4
    trainer.train()

    four processes, cp_size=2     ranks 0 1: rows of batch 0       ranks 2 3: rows of batch 1
    a row of 8 tokens             rank 0 (2): 0 1 | 6 7            rank 1 (3): 2 3 | 4 5
    loss, grad_norm, eval loss    those of two processes with a batch each, on every rank

Every rank computes its tokens' part of the loss, the parts are added up over the ranks of a sequence, and DDP or FSDP2 averages
gradients over all processes. So a Trainer that takes ranks for data-parallel ones computes what it did, with each batch `cp_size`
times: means stay, counts of labels grow with the number of processes they are divided by, and what is counted once (batches,
predictions, tokens seen) is mended here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from dtensor_ring.data.batch import IGNORED, labels_that_count
from dtensor_ring.integrations.trainer.checks import check_made, check_trainer, cp_size_of
from dtensor_ring.integrations.trainer.generation import GenerationMixin
from dtensor_ring.integrations.trainer.outputs import RingLabelSmoother, gather_predictions
from dtensor_ring.integrations.trainer.ranks import TrainerRanks, share_batches
from dtensor_ring.integrations.trainer.ring import PlanMaker, TrainerRing, base_model
from dtensor_ring.integrations.transformers.ask import ring_plan
from dtensor_ring.integrations.transformers.plan import RingPlan
from dtensor_ring.integrations.transformers.token_loss import labels_are_unshifted

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

Inputs = dict[str, Any]


class RingTrainerMixin(GenerationMixin, _Trainer):
    """Spreads the sequences of a Trainer over `cp_size` ranks: `class RingTrainer(RingTrainerMixin, Trainer)`, the mixin first.

    All ranks of a sequence read the same batches. Loss, gradient norm and evaluation are those of one process for each batch;
    predictions are whole (B, S, V), in order, each sample once. It works under DDP and FSDP2, with or without
    `ParallelismConfig(cp_size=)`, and with TRL's SFTTrainer, DPOTrainer and GRPOTrainer. With `cp_size=1` nothing is changed.

    A `compute_loss` of your own is given this rank's tokens: see `plan`, whose `gather` and `sum_over_tokens` make them whole.
    A `compute_loss_func` is given whole logits.

    Args:
        *args: the trainer's.
        cp_size: how many ranks share a sequence; neighbours in the order of processes. Not needed where ParallelismConfig says it.
        make_plan: makes a model's plan; `ring_plan` by default. For arguments: `partial(ring_plan, placement=Stripe(1))`.
        **kwargs: the trainer's.

    Raises:
        TypeError: cp_size is no whole number, or `make_plan` returns no plan.
        ValueError: cp_size is missing, does not divide the processes, or contradicts ParallelismConfig.
        NotImplementedError: a model that `ring_plan` refuses, or arguments of the trainer that would be wrong; the text names them.
            Every rank raises.
    """

    def __init__(
        self,
        *args: Any,  # noqa: ANN401
        cp_size: int | None = None,
        make_plan: PlanMaker = ring_plan,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        self._ring: TrainerRing | None = None
        self._ring_asked = cp_size, make_plan
        super().__init__(*args, **kwargs)
        if self._ring is None:
            return
        check_made(self)
        self._begin_generation()
        self._plan_models()
        own = {name: getattr(self, name) for name in ("label_smoother", "compute_loss_func")}
        self._ring.undo_trainer.append(lambda: vars(self).update(own))
        if self.label_smoother is not None:
            self.label_smoother = RingLabelSmoother(
                self.args.label_smoothing_factor, lambda: self.plan, unshifted=self._labels_are_unshifted()
            )
        if callable(self.compute_loss_func):
            self.compute_loss_func = self._given_whole_logits(self.compute_loss_func)

    @property
    def plan(self) -> RingPlan:
        """The plan of the model, for losses of one's own.

        Raises:
            RuntimeError: there is none, with cp_size=1.
        """
        if self._ring is None:
            raise RuntimeError("this trainer has no plan: one rank holds whole sequences (cp_size=1)")
        return self._ring.plan_of(self._own_model())

    def undo_plans(self) -> None:
        """Gives models and trainer back as they were, for use after training; the trainer must not train on."""
        if self._ring is not None:
            self._ring.undo()
            self._ring = None

    # What follows are methods of Trainer.

    @override
    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        cp_size, make_plan = self._ring_asked
        size = cp_size_of(self.accelerator, cp_size)
        if size == 1:
            return
        check_trainer(self, size)
        ranks = TrainerRanks.of(self.accelerator, size)
        copies = size if self.args.average_tokens_across_devices else 1
        self._ring = TrainerRing(ranks, make_plan, copies, share_batches(self.accelerator, ranks))
        # Trainer took the accelerator's own function a moment ago.
        gather_function = self.gather_function
        self._ring.undo_trainer.append(lambda: vars(self).update(gather_function=gather_function))
        self.gather_function = partial(self.accelerator.gather_for_metrics, use_gather_object=self.args.eval_use_gather_object)

    @override
    def get_cp_size(self) -> int:
        return super().get_cp_size() if self._ring is None else self._ring.ranks.cp_size

    @override
    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: DataLoader[Any] | None = None) -> nn.Module:
        # Called before training and before evaluation: with `model_init` the model is new each time.
        if self._ring is not None:
            self._plan_models()
        return super()._wrap_model(model, training, dataloader)

    @override
    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        loader = super()._get_dataloader(*args, **kwargs)
        if self._ring is not None and kwargs.get("is_training") and loader.worker_init_fn is not None:
            from transformers.trainer_utils import seed_worker

            # Workers that cut or augment samples at random must do so alike for all ranks of a sequence.
            loader.worker_init_fn = partial(
                seed_worker, num_workers=self.args.dataloader_num_workers, rank=self._ring.ranks.dp_rank
            )
        return loader

    @override
    def _prepare_context_parallel_inputs(
        self, model: nn.Module, inputs: Inputs
    ) -> tuple[Callable[[], AbstractContextManager[Any]], Inputs]:
        if self._ring is None:
            return super()._prepare_context_parallel_inputs(model, inputs)
        return nullcontext, inputs  # the model cuts its batch itself

    @override
    def _get_num_items_in_batch(self, batch_samples: list[Inputs], device: torch.device) -> Tensor | int | None:
        """How many labels count, of all processes: those that the loss is divided by where Trainer multiplies it by processes.

        With `average_tokens_across_devices=False` those of this process, whose loss is a mean of its own.
        """
        if self._ring is None:
            return super()._get_num_items_in_batch(batch_samples, device)
        if not batch_samples or "labels" not in batch_samples[0]:
            return None
        if not self.model_accepts_loss_kwargs and self.compute_loss_func is None:
            return None
        # Not Trainer's own count: it divides by the ranks of a sequence, rounding down, and counts labels that padding predicts.
        if self._labels_are_unshifted():
            labels = sum(int((batch["labels"] != IGNORED).sum()) for batch in batch_samples)
        else:
            labels = sum(labels_that_count(batch) for batch in batch_samples)
        count = torch.tensor(labels, device=device)
        return self.accelerator.gather(count).sum() if self.args.average_tokens_across_devices else count

    @override
    def prediction_step(
        self, model: nn.Module, inputs: Inputs, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Any, Any]:
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if self._ring is not None and logits is not None:
            if isinstance(logits, tuple) and not logits:
                raise NotImplementedError(
                    "predictions are asked for, but losses in chunks make no logits: leave compute_metrics out, or set "
                    "prediction_loss_only=True, or plan with loss='model'"
                )
            logits = gather_predictions(logits, self.plan)
        return loss, logits, labels

    @override
    def floating_point_ops(self, inputs: Inputs) -> int:
        whole = super().floating_point_ops(inputs)
        return whole if self._ring is None else whole // self._ring.ranks.cp_size

    @override
    def _track_num_input_tokens(self, inputs: Inputs) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        if self._ring is not None:
            seen = self.state.num_input_tokens_seen - before
            self.state.num_input_tokens_seen = before + seen // self._ring.ranks.cp_size

    # What follows is ours.

    def _plan_models(self) -> None:
        assert self._ring is not None, "models are planned where there are several ranks a sequence"
        reference: nn.Module | None = getattr(self, "ref_model", None)  # of TRL's DPOTrainer and GRPOTrainer
        self._ring.apply([self._own_model()] if reference is None else [self._own_model(), reference])

    def _labels_are_unshifted(self) -> bool:
        return labels_are_unshifted(base_model(self._own_model()))

    def _own_model(self) -> nn.Module:
        assert self.model is not None, "Trainer makes its model before it does anything with it"
        return self.model

    def _given_whole_logits(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The loss function given the outputs of all tokens, since it may do anything with them."""

        @wraps(function)
        def with_whole_logits(outputs: Any, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
            if isinstance(outputs, Mapping):
                whole = type(outputs)(**gather_predictions(dict(outputs), self.plan))
            else:
                whole = gather_predictions(outputs, self.plan)
            return function(whole, *args, **kwargs)

        return with_whole_logits
