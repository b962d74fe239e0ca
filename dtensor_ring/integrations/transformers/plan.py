"""`RingPlan`: a plan for `parallelize_module` that makes a Hugging Face model sequence-parallel.

plan = ring_plan(model, Zigzag(1))
parallelize_module(model, mesh["cp"], plan)
loss = model(input_ids=ids, labels=ids).loss      # every rank passes the whole batch; loss and gradients as on one device

in          the root cuts the batch to this rank's tokens and shifts labels before the cut
inside      plain local tensors; only attention exchanges keys and values
out         logits (B, S/W, V) of this rank's tokens, `plan.gather(logits)` for all of them; the loss of the whole batch
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import MutableMapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel
from typing_extensions import override

from dtensor_ring._renamed import renamed
from dtensor_ring._torch import tensors_in
from dtensor_ring.captures import RingCaptureError, check_not_capturing
from dtensor_ring.comm import several_ranks, transport_along
from dtensor_ring.comm.collectives import take_shard
from dtensor_ring.comm.rank_checks import refused_together
from dtensor_ring.data.batch import (
    check_mesh,
    check_same,
    cut_batch,
    is_packed,
    mask_share,
    warn_of_imbalance,
)
from dtensor_ring.data.batch_reading import find_documents, sequence_length
from dtensor_ring.integrations.transformers.attention import (
    KEYWORD,
    NAME,
    NO_MASK,
    STATE,
    AttentionState,
    Graphs,
    RingBatch,
    register,
)
from dtensor_ring.integrations.transformers.checks import check_call, check_length
from dtensor_ring.integrations.transformers.description import axis_text, describe, reach_of
from dtensor_ring.integrations.transformers.layer_call import by_name
from dtensor_ring.integrations.transformers.loss import AskedLoss, ModelLoss
from dtensor_ring.integrations.transformers.outputs import (
    Convention,
    check_convention,
    check_output,
    gather_tokens,
    mean_over_items,
    sum_over_tokens,
)
from dtensor_ring.integrations.transformers.own_inputs import cut_own, take_own
from dtensor_ring.integrations.transformers.paused import Pause
from dtensor_ring.integrations.transformers.peft_models import Unwrapped
from dtensor_ring.integrations.transformers.rotary import longest_position
from dtensor_ring.integrations.transformers.streams import Dropout
from dtensor_ring.integrations.transformers.structure import attends
from dtensor_ring.integrations.transformers.surroundings import Surroundings
from dtensor_ring.integrations.transformers.token_loss import (
    keep_from_shift,
    labels_are_unshifted,
    take_targets,
    with_loss,
)
from dtensor_ring.integrations.transformers.trainer_calls import refuse_counts_of_trainer
from dtensor_ring.ops.arguments import Arguments
from dtensor_ring.placements import SequencePlacement
from dtensor_ring.placements.placement import split_of
from dtensor_ring.planning.documents import Documents

_SEQUENCE_AXIS = r"cp|sp|seq|context|ring"  # how programs name the mesh axis that holds the sequence


class RingPlan(dict[str, ParallelStyle]):
    """A plan for `parallelize_module`: a style for the root (""), which prepares every attention module inside.

    Made by `ring_plan`, for one model, applied once. Where Accelerate's configuration or `RingTrainerMixin` apply it, they make
    losses over a number of items whole, and set `is_made_whole`.
    """

    is_made_whole = False

    def __init__(
        self, unwrapped: Unwrapped, placement: SequencePlacement, asked: Arguments, loss: AskedLoss, dropout: Dropout
    ) -> None:
        self._unwrapped, self._placement, self._asked, self._asked_loss = unwrapped, placement, asked, loss
        self._model: PreTrainedModel = unwrapped.model
        self._loss = ModelLoss(self._model, loss)
        self._pause = Pause(self._model, self._enter, self._leave)
        self._num_items: Tensor | None = None
        self._unshifted = labels_are_unshifted(self._model)
        self._surroundings = Surroundings(self._model, dropout)
        self._mesh: DeviceMesh | None = None
        # Asked now too, for the warning of a plan that was never applied: when it ends the process group may have ended before it.
        self._was_applied, self._begun_among_ranks = False, several_ranks()
        self._before: str | None = None
        self._documents: Documents | None = None
        self._is_packed = False
        # Outputs of an earlier batch may be gathered after the next forward pass. Weak keys, so that no logits are kept alive.
        self._documents_of: MutableMapping[Tensor, Documents] = WeakTensorKeyDictionary()
        self._handles: list[RemovableHandle] = []
        self._marked: list[nn.Module] = []
        # The root alone, which marks the attention modules inside: by names, those of a PEFT model would differ from its base's.
        super().__init__({"": _RootStyle(self)})

    @renamed(local="local_tensor")
    def gather(
        self, local_tensor: Tensor, dim: int = 1, documents: Documents | None = None, *, grad: Convention = "mean"
    ) -> Tensor:
        """All tokens, in order, of a tensor that holds this rank's tokens in `dim`, such as logits (B, S/W, V): (B, S, V).

        Every rank calls it, and computes the same loss from the result. Gradients fit averaging over the axis (FSDP2, DDP,
        `average_gradients`), as those of the model's own loss do.

        Args:
            local_tensor: an output of the model, or a tensor made of one, token by token.
            dim: where its tokens are.
            documents: with `Zigzag(1, per_document=True)` and packed documents, those of the batch that `local_tensor` is of: the
                plan's `documents` after that batch's forward pass. Not needed for outputs of the model as they are.
            grad: "mean", or "sum" where gradients are summed over the axis.

        Raises:
            RuntimeError: the plan was not applied yet, or is paused.
            TypeError: a DTensor.
            ValueError: it is not known which batch's documents lay out this tensor, or no such convention.
        """
        mesh, placement = self._applied(), self._placement.moved_to(range(local_tensor.ndim)[dim])
        check_output(local_tensor, grad)
        return gather_tokens(local_tensor, mesh, placement, self._laid_out_by(local_tensor, documents), grad)

    @renamed(local="local_tensor")
    def sum_over_tokens(self, local_tensor: Tensor, dim: int = 1, *, grad: Convention = "mean") -> Tensor:
        """The sum over all tokens of a sequence, such as its log-probability, of values that hold this rank's tokens in `dim`.

            log_probs = out.logits.log_softmax(-1).gather(2, targets[..., None])[..., 0]      # (B, S/W), this rank's tokens
            plan.sum_over_tokens(log_probs)                                                   # (B,), on every rank

        A plain `.sum(1)` has this rank's tokens alone. Every rank calls it. 16-bit values are added in float32. Gradients as for
        `gather`.

        Raises:
            RuntimeError: the plan was not applied yet, or is paused.
            TypeError: a DTensor.
            ValueError: no such convention.
        """
        mesh = self._applied()
        check_output(local_tensor, grad)
        return sum_over_tokens(local_tensor, mesh, dim, grad)

    def cut(self, tensor: Tensor, dim: int = 1, documents: Documents | None = None) -> Tensor:
        """This rank's tokens of a tensor that holds all of them in `dim`, such as labels (B, S): (B, S/W). Undoes `gather`.

        Nothing is sent. Labels must be shifted before.

        Args:
            tensor: the same on every rank.
            dim: where its tokens are.
            documents: as in `gather`; those of the last batch by default.

        Raises:
            RuntimeError: the plan was not applied yet.
        """
        transport = transport_along(self._applied())
        split = split_of(self._placement.moved_to(range(tensor.ndim)[dim]), documents or self._documents)
        return take_shard(tensor, dim, split, transport.world, transport.rank)

    def global_loss(self, local_loss: Tensor, items: Tensor | int | None = None, *, grad: Convention = "mean") -> Tensor:
        """The mean over the whole batch of a loss of one's own: every rank calls it with its part. Gradients as for `gather`.

            loss = plan.global_loss(my_losses(model(input_ids=ids).logits, mine), items=(mine != -100).sum())

        Args:
            local_loss: this rank's sum (), or the losses of its tokens (B, S/W), 0 where a token does not count.
            items: how many of this rank's tokens count; None where the last batch had labels, for as many as count there.
            grad: "mean", or "sum" where gradients are summed over the axis.

        Raises:
            RuntimeError: the plan was not applied yet.
            ValueError: it is not known how many tokens count, or no such convention.
        """
        check_convention(grad)
        return mean_over_items(local_loss, items, self._num_items, self._applied(), grad)

    @property
    def documents(self) -> Documents | None:
        """The documents of the last batch: packed ones, or real and padding tokens; None for one document a row."""
        return self._documents

    def _laid_out_by(self, local: Tensor, documents: Documents | None) -> Documents | None:
        """The documents by which a tensor's tokens are laid out; None where they do not matter."""
        if not self._placement.layout.cut:
            return None
        # A tensor that was made of an output is no output, and of which batch it is cannot be seen. Where batches are packed, that
        # decides where its tokens lie.
        if documents is None:
            documents = self._documents_of.get(local)
        if documents is None and (self._documents is None or self._is_packed):
            raise ValueError(
                f"{self._placement!r} lays tokens out by the documents of their batch, and it cannot be told which batch this "
                "tensor is of: pass an output of the model as it is, or documents=, the plan's `documents` after the forward pass "
                "of that batch"
            )
        return documents or self._documents

    @property
    def is_paused(self) -> bool:
        """Whether `paused` is on."""
        return self._pause.on

    def describe(self) -> str:
        """What the plan does, in a few lines."""
        batch, attention = self._documents if self._is_packed else None, list(_attention_of(self._model))
        text = describe(self._model, self._placement, self._asked, attention, self._mesh, batch, str(self._asked_loss))
        return f"{text}\n  dropout:   {self._surroundings.text}" + ("\n  paused: all of this rests" if self._pause.on else "")

    def paused(self) -> AbstractContextManager[None]:
        """A context in which the model is as without the plan: `with plan.paused(): model.generate(prompts)`, on every rank.

        Afterwards the plan is as it was, also where the body raises. Backward passes stay on their side of it. Ranks that share
        weights (FSDP2) run equally many forward passes: `generate(..., synced_gpus=True)`.

        Raises:
            RuntimeError: the plan is not applied or paused already, or the model is in the middle of a forward pass.
        """
        mesh = self._applied()
        return self._pause.begin(self._take_off, lambda: self._put_on(mesh), self._marked)

    def undo(self) -> None:
        """Gives the model back as it was: the attention implementation is restored, hooks and marks are removed."""
        self._applied()
        self._take_off()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for module in self._marked:
            delattr(module, STATE)
        self._marked.clear()
        self._mesh = None

    def _applied(self) -> DeviceMesh:
        if self._mesh is None:
            raise RuntimeError("the plan is not applied: call parallelize_module(model, mesh['cp'], plan) first")
        self._pause.check_over()
        return self._mesh

    def __del__(self) -> None:
        # Forgotten, the plan leaves a model that trains on every rank alike, only slower and with more memory: nothing else tells.
        # The attribute is missing where __init__ raised.
        if not getattr(self, "_was_applied", True) and (self._begun_among_ranks or several_ranks()):
            warnings.warn(
                f"ring_plan of a {type(self._model).__name__} was never applied: every rank runs the whole model on the whole "
                "batch. Call parallelize_module(model, mesh['cp'], plan)",
                stacklevel=2,
            )

    def _check_attention_name(self) -> None:
        # Asked before every batch: layers read the name off the config at each call, and anything may set it in between.
        name = self._model.config._attn_implementation
        if name != NAME:
            raise RuntimeError(
                f"the attention implementation of this parallelized {type(self._model).__name__} was changed to {name!r}, so its "
                "layers would attend to part of the sequence. set_attn_implementation does so on this model or on one that shares "
                "its config object: give each model its own, copy.deepcopy(config), and undo() and apply the plan again"
            )

    def _check_replayed(self, batch: RingBatch) -> None:
        """Raises RingCaptureError where a layer was replayed from a graph that was captured with no batch like this one."""
        for module in self._marked:
            graphs: Graphs = getattr(module, STATE).graphs
            reason = graphs.refuses(batch) if graphs.batches else None
            if reason is not None:
                raise RingCaptureError(f"{type(module).__name__} of layer {module.layer_idx} {reason}")

    def _warn_of_one_rank(self, mesh: DeviceMesh) -> None:
        """A mesh axis of one rank in a larger program is right for a setting of 1, and wrong for the axis of another use."""
        if mesh.size() == 1 and several_ranks() and not re.search(_SEQUENCE_AXIS, axis_text(mesh).lower()):
            warnings.warn(
                f"ring_plan is applied over mesh axis {axis_text(mesh)}, which has one rank of {dist.get_world_size()}: nothing is "
                "spread. Pass the axis that holds the sequence, such as mesh['cp']",
                stacklevel=2,
            )

    def _apply_root(self, module: nn.Module, mesh: DeviceMesh) -> None:
        self._was_applied = True  # or refused: that error says more than a warning would
        if not any(module is root for root in self._unwrapped.roots):
            raise ValueError(f"this plan was made for another {type(self._model).__name__}: call ring_plan(model) for each model")
        if self._mesh is not None:
            raise RuntimeError("this plan is applied already: undo() it, or make another with ring_plan(model)")
        check_mesh(mesh)
        register()
        # Our attention is asked for by this model's config and replaces no function of transformers, so that other models go on as
        # before. Two models that share a config object cannot be told apart by it, and are refused.
        self._before = self._model.config._attn_implementation
        if self._before == NAME and any(hasattr(part, STATE) for part in module.modules()):
            raise RuntimeError("this model is sequence parallel already: undo() the plan that made it so")
        if self._before == NAME:
            raise RuntimeError(
                "this model shares its config object with one that is sequence parallel: give it its own, copy.deepcopy(config)"
            )
        self._warn_of_one_rank(mesh)
        self._put_on(mesh)
        self._mesh = mesh
        # Hooks and not another forward: signature and class of the model stay as they are, which Trainer and FSDP2 look at.
        self._handles = self._pause.hook(self._loss.forget) + self._surroundings.hook(mesh)
        for attention in _attention_of(self._model).values():
            setattr(attention, STATE, AttentionState(mesh, self._placement.layout, self._asked))
            self._marked.append(attention)

    def _put_on(self, mesh: DeviceMesh) -> None:
        """Changes the model, but for hooks and marks; `_take_off` changes it back, for good or for a pause."""
        self._model.set_attn_implementation(NAME)
        self._loss.install(mesh.size())

    def _take_off(self) -> None:
        self._model.set_attn_implementation(self._before or "sdpa")
        self._loss.remove()

    # Not compiled: it reads values of the batch and compares ranks on the host. The model behind it is.
    @torch.compiler.disable
    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        """Takes the arguments of the whole batch, and returns those of this rank's share."""
        transport = transport_along(self._applied())
        with refused_together(lambda: [transport]):
            self._check_attention_name()
            check_not_capturing(
                f"a parallelized {type(self._model).__name__} reads its batch on the host",
                "capture its layers, and call the model itself without a graph",
            )
            given = by_name(self._model, args, kwargs)
            check_call(self._model, given, tuple(inspect.signature(self._model.forward).parameters))
            own = take_own(self._model, given)
            if self._unshifted:
                keep_from_shift(self._model, given)
            documents = given.pop("documents", None)
            given.pop("cache_position", None)  # places in a cache, of which there is none
            length = sequence_length(given)
            check_length(length, transport.world, self._placement)
            if given.get("num_items_in_batch") is not None and transport.world > 1 and not self.is_made_whole:
                refuse_counts_of_trainer()
            self._loss.check(given)
            bounds = find_documents(given, length, documents)
        check_same(given, length, bounds, self._placement, transport)
        warn_of_imbalance(bounds, given, self._placement, transport, reach_of(self._model))
        self._is_packed = is_packed(bounds, given)
        batch = cut_batch(given, self._placement, transport, length, bounds)
        longest = longest_position(given, length, bounds)
        bounds = self._documents = batch.documents
        batch.update(cut_own(own, self._placement, transport, bounds))
        self._num_items = batch.num_items
        targets = take_targets(batch) if self._unshifted else None
        loss = self._loss.enter(given, batch, batch.num_items, mask_share(given, self._placement, transport, bounds))
        # No cache, though configs ask for one by default: every forward pass would fill it with this rank's tokens.
        mask = torch.empty(NO_MASK, dtype=torch.bool, device=next(self._model.parameters()).device)
        self._surroundings.enter(longest)
        return (), {**batch, "attention_mask": mask, "use_cache": False, KEYWORD: RingBatch(length, bounds, loss, targets)}

    @torch.compiler.disable
    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:  # noqa: ANN401
        """Makes the loss of the whole batch of this rank's part, and remembers that these outputs are of this batch."""
        # From the keywords that `_enter` returned, not from the plan: they belong to this very forward pass.
        batch: RingBatch = kwargs[KEYWORD]
        self._check_replayed(batch)
        if batch.targets is not None:
            output = with_loss(output, batch.targets, self._applied())
        output = self._loss.leave(output, batch.loss, self._applied())
        if self._placement.layout.cut and batch.documents is not None:
            self._documents_of.update(dict.fromkeys(tensors_in(output), batch.documents))
        return output


class _RootStyle(ParallelStyle):
    def __init__(self, plan: RingPlan) -> None:
        super().__init__()
        self._plan = plan

    @override
    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self._plan._apply_root(module, device_mesh)
        return module


def _attention_of(model: nn.Module) -> dict[str, nn.Module]:
    """The attention modules of a model, by name; asked for when a plan is applied, as wrappers change names before that."""
    return {name: module for name, module in model.named_modules() if attends(module)}
