"""The loss of a parallelized model: which one is computed, and how the parts of ranks become that of the whole batch.

    "model"     head -> logits (B, S/W, V) -> the model's own loss function -> this rank's sum / N
    "chunked"   head: losses (B, S/W), its logits in chunks; the model goes on with logits (B, 0, V), which cost nothing
    a function  of logits and shifted labels, on whole logits, or on chunks with loss_chunk=

The sum is made inside the model, so that FSDP2 has the head's weight whole where it is read: losses in chunks are computed within
the call of the head itself, which also lets FSDP2 gather the weight again before their backward. After the model's forward pass the
sums of ranks are added up, and the load-balancing loss of routers is added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from dtensor_ring.integrations.transformers.layer_call import NO_LOSS, LossCall, LossPass
from dtensor_ring.integrations.transformers.loss_functions import (
    LossFunction,
    check_function,
    check_model_function,
    without_ignored,
)
from dtensor_ring.integrations.transformers.outputs import SumOverRanks
from dtensor_ring.integrations.transformers.router import asks_for_router, has_router_loss, router_loss
from dtensor_ring.integrations.transformers.token_loss import labels_are_unshifted
from dtensor_ring.losses import Terms, check_terms, chunk_tokens, chunked_cross_entropy, chunked_losses, token_losses

LossName = Literal["model", "chunked"]
Loss = LossName | LossFunction
_CROSS_ENTROPY = Terms()


@dataclass(frozen=True, slots=True)
class AskedLoss:
    """What a plan's loss was asked to be: the arguments of `ring_plan`, checked for one model.

    Attributes:
        function: the user's function of logits and shifted labels, or None for cross entropy.
        terms: what cross entropy is made of; softcap and scale are the model's, and used where logits are made here.
        chunk: tokens whose logits are made at a time, or None where the model makes all of them.
    """

    function: LossFunction | None = None
    terms: Terms = _CROSS_ENTROPY
    chunk: int | None = None

    @property
    def is_ours(self) -> bool:
        """Whether the model's loss function is replaced."""
        return self.function is not None or self.chunk is not None or self.terms.label_smoothing > 0 or self.terms.z_loss > 0

    def __str__(self) -> str:
        """In a few words, for `RingPlan.describe`."""
        text = "cross entropy" if self.function is None else _name(self.function)
        extras = [f"{name} {getattr(self.terms, name)}" for name in ("label_smoothing", "z_loss") if getattr(self.terms, name)]
        chunked = [f"logits in chunks of {self.chunk} tokens"] if self.chunk else []
        return ", ".join([text, *extras, *chunked])


def ask_loss(model: PreTrainedModel, loss: Loss, label_smoothing: float, z_loss: float, chunk: int | None) -> AskedLoss:
    """Read and check the arguments of `ring_plan` that are about the loss.

    Raises:
        TypeError: loss is neither a name nor a function, or chunk no whole number.
        ValueError: no such name, numbers that make no loss, or arguments that exclude each other.
        NotImplementedError: the model has no head, and so no loss.
    """
    if not callable(loss) and loss not in get_args(LossName):
        kind = ValueError if isinstance(loss, str) else TypeError
        raise kind(f"loss={loss!r}: use 'model', 'chunked', or a function of logits (B, n, V) and shift_labels (B, n)")
    asks_for_router(model, {})
    terms = Terms(label_smoothing, z_loss, *_tail_of(model))
    check_terms(terms)
    if chunk is not None and loss == "model":
        raise ValueError(f"loss_chunk={chunk} with loss='model', which makes all logits: use loss='chunked', or a function")
    asked = AskedLoss(loss if callable(loss) else None, terms)
    if loss == "chunked" or chunk is not None:
        asked = AskedLoss(asked.function, terms, chunk_tokens(model.config.vocab_size, chunk))
    if not asked.is_ours:
        return asked
    if labels_are_unshifted(model):
        raise NotImplementedError(
            f"loss={asked} of a {type(model).__name__}, whose labels stay with their tokens: it is for heads that predict the next "
            "token, *ForCausalLM. Leave loss, loss_chunk, label_smoothing and z_loss out, or compute the loss from the logits, "
            "plan.global_loss"
        )
    if asked.function is not None and (label_smoothing or z_loss):
        raise ValueError(
            f"label_smoothing and z_loss are of cross entropy, and loss is {_name(asked.function)}: leave them out, and compute "
            "them there"
        )
    if model.get_output_embeddings() is None:
        raise NotImplementedError(
            f"{type(model).__name__} has no language-model head, and so no loss: plan the model with its head, such as "
            "*ForCausalLM, or compute the loss from its hidden states, dtensor_ring.chunked_cross_entropy"
        )
    if (own := _own_function(model)) is not None:
        raise ValueError(
            f"{type(model).__name__} has a loss function of its own, {_name(own)}, which loss={asked} would replace: pass it "
            "as loss=, or leave loss, label_smoothing and z_loss out"
        )
    return asked


class ModelLoss:
    """The loss of one model under one plan: installed on the model, asked before and after each of its forward passes."""

    def __init__(self, model: PreTrainedModel, asked: AskedLoss) -> None:
        self._model, self._asked = model, asked
        self._pass = LossPass()
        self._knows_tail = False
        self._checked: object = None
        self._function = self._loss_of_model  # one object: every access to a method makes another
        self._undo: list[Callable[[], None]] = []

    def install(self, ranks: int) -> None:
        """Hook into the model, over so many ranks: its loss function and head where they are ours, and routers."""
        if ranks > 1:
            # Read by Trainer when it is given the model. It counts items once for each process, and would take a sum over them for
            # that of all tokens: 1/ranks of the loss. Told so it passes no number of items, and the loss that it gets is whole.
            self._replace(self._model, "accepts_loss_kwargs", value=False)
        base = self._model.base_model
        if base is not self._model and (self._asked.chunk is not None or has_router_loss(self._model)):
            handle: RemovableHandle = base.register_forward_pre_hook(self._before_base, with_kwargs=True)
            self._undo.append(handle.remove)
        if self._asked.is_ours:
            self._replace(self._model, "_loss_function", self._function)
        if self._asked.chunk is not None:
            head = self._model.get_output_embeddings()
            assert isinstance(head, nn.Module), "ask_loss found one"
            self._head, self._logits_of = head, head.forward
            # Its forward and not a hook: hooks of FSDP2, which gather the weight, run around it, whether they came before or after.
            self._replace(head, "forward", self._losses_of_head)

    def remove(self) -> None:
        """Give the model back as it was."""
        while self._undo:
            self._undo.pop()()

    def forget(self) -> None:
        """After a forward pass, also one that raised: a head that is called next by itself gives logits."""
        self._pass.clear()

    def _replace(self, module: nn.Module, name: str, value: object) -> None:
        before = vars(module).get(name)
        setattr(module, name, value)
        self._undo.append(lambda: delattr(module, name) if before is None else setattr(module, name, before))

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Refuse a call whose loss would not be that of the whole batch: every rank asks before anything is sent.

        Raises:
            NotImplementedError: a router loss that is not known.
            RuntimeError: the model's loss function was changed after the plan was applied.
            ValueError: a loss function that is not linear over tokens, and TypeError: one that returns no tensor.
        """
        asks_for_router(self._model, arguments)
        if arguments.get("labels") is None:
            return
        current = getattr(self._model, "loss_function", ForCausalLMLoss)
        if self._asked.is_ours and current is not self._function:
            raise RuntimeError(
                f"the loss function of this parallelized {type(self._model).__name__} was changed to {_name(current)}, where the "
                f"plan had set its own ({self._asked}): pass it as loss= of ring_plan"
            )
        if self._asked.chunk is not None:
            self._check_head()
        tried = self._asked.function if self._asked.is_ours else _own_function(self._model)
        if tried is None or tried is self._checked:
            return
        check = check_function if self._asked.is_ours else check_model_function
        check(tried, f"loss function {_name(tried)}", self._model.config.vocab_size, next(self._model.parameters()).device)
        self._checked = tried

    def _check_head(self) -> None:
        # A module around the head, such as one with adapters, would add whole logits to those of no tokens.
        now: Any = self._model.get_output_embeddings()
        if now is not self._head and {id(p) for p in now.parameters()} != {id(p) for p in self._head.parameters()}:
            raise RuntimeError(
                f"the head of this parallelized {type(self._model).__name__} was changed to a {type(now).__name__} after the plan "
                "was applied, and its losses in chunks are those of the head before: change the head (adapters, a resized "
                "vocabulary) first, then apply the plan; now undo() it, and apply it again"
            )

    def enter(self, arguments: Mapping[str, Any], batch: dict[str, Any], count: Tensor | None, mask: Tensor | None) -> LossCall:
        """Before the model runs: changes what it is called with, and returns what `leave` needs.

        Args:
            arguments: those of the call.
            batch: this rank's share of them.
            count: labels that count in the whole batch, None without labels.
            mask: (B, S/W), this rank's part of the attention mask, or None.
        """
        self._pass.clear()
        labels = batch.get("labels")
        # The model is to return this rank's sum of losses, which it does where it is to divide by 1; `leave` makes the mean of it.
        # A mean of each rank's own labels, averaged over ranks, would weigh labels by how few there are on their rank.
        if batch.get("num_items_in_batch") is not None or labels is None:
            count = None
        elif count is not None:
            batch["num_items_in_batch"] = 1
        chunked = self._asked.chunk is not None and labels is not None
        router = asks_for_router(self._model, arguments)
        as_tuple = False
        if router and has_router_loss(self._model):
            batch["output_router_logits"] = False
        if chunked or router:
            asked = arguments.get("return_dict")
            as_tuple = not (self._model.config.return_dict if asked is None else asked)
            batch["return_dict"] = True
        for_head = batch["shift_labels"] if chunked else None
        return LossCall(count, labels is not None, for_head, router, mask if router else None, as_tuple)

    def _before_base(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Before the model below the head runs: labels are laid out for the head, and routers record logits if asked."""
        # From the keywords of the call, since compilers take what hangs on a module to be of one shape for ever.
        batch = kwargs.get("ring_batch")
        call: LossCall = NO_LOSS if batch is None else batch.loss
        self._pass.labels = call.labels
        # The model with the head was not told so: it would compute a loss of this rank's tokens alone.
        return args, {**kwargs, "output_router_logits": True} if call.router else kwargs

    def leave(self, output: Any, call: LossCall, mesh: DeviceMesh) -> Any:  # noqa: ANN401
        """After the model ran: its outputs with the loss of the whole batch.

        Raises:
            NotImplementedError: the model computed a loss past the plan's.
        """
        if call.has_labels and self._asked.is_ours and not self._pass.was_called:
            raise NotImplementedError(
                f"{type(self._model).__name__} computed its loss without its head or loss function, as forward passes with a "
                f"fused loss do (Liger's, for one), so that the plan's ({self._asked}) was not computed: turn that off "
                "(use_liger_kernel=False, or its fused_linear_cross_entropy), or use loss='model' without label_smoothing and "
                "z_loss, which takes the model's loss as it is"
            )
        if call.count is not None:
            place, loss = (0, output[0]) if isinstance(output, tuple) else ("loss", output.loss)
            loss = SumOverRanks.apply(_whole(loss), mesh) / call.count
            output = (loss, *output[1:]) if place == 0 else _with(output, loss=loss)
        if call.router and has_router_loss(self._model):
            output = self._with_router_loss(output, call, mesh)
        if call.has_labels and self._asked.chunk is not None:
            output = _with(output, logits=None)
        return output.to_tuple() if call.as_tuple else output

    def _with_router_loss(self, output: Any, call: LossCall, mesh: DeviceMesh) -> Any:  # noqa: ANN401
        aux = router_loss(self._model, output.router_logits, call.router_mask, mesh)
        if call.has_labels:
            of_model: Any = self._model
            # Every rank has all of it. Where ranks' losses are parts that the caller adds up, this one is shared out.
            part = aux / mesh.size() if call.count is None else aux
            output = _with(output, loss=output.loss + of_model.router_aux_loss_coef * part.to(output.loss.device))
        return _with(output, aux_loss=aux)

    def _loss_of_model(
        self,
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int,
        num_items_in_batch: Tensor | int = 1,
        shift_labels: Tensor | None = None,
        **_rest: object,
    ) -> Tensor:
        """The model's loss function: this rank's sum of losses / num_items_in_batch."""
        assert shift_labels is not None, "the batch was cut with its labels"
        self._pass.was_called = True
        if self._pass.losses is not None:
            losses, self._pass.losses = self._pass.losses, None
            self._check_tail(logits)
            # Zero, but autograd goes through the logits of the head, where FSDP2 waits to gather its weight.
            total = losses.sum() + logits[:, :0].sum()
        else:
            if isinstance(logits, DTensor):
                _check_placed(self._asked)
            total = self._of_logits(logits, shift_labels).sum()
        return total / num_items_in_batch

    def _of_logits(self, logits: Tensor, shift_labels: Tensor) -> Tensor:
        if self._asked.function is None:
            return token_losses(logits, shift_labels, self._asked.terms)
        losses = without_ignored(self._asked.function(logits, shift_labels), shift_labels)
        return losses.to(torch.promote_types(losses.dtype, torch.float32))

    def _losses_of_head(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """The head's forward: with labels waiting their losses are set aside, and logits of no tokens returned."""
        labels, self._pass.labels = self._pass.labels, None
        if labels is None:
            return self._logits_of(hidden, *args, **kwargs)
        head, terms, chunk = self._head, self._asked.terms, self._asked.chunk
        assert chunk is not None, "only a chunked loss replaces the head's forward"
        if placed := next((name for name, p in head.named_parameters() if isinstance(p, DTensor)), None):
            raise NotImplementedError(
                f"the {placed} of the head of {type(self._model).__name__} is a DTensor in its forward pass (tensor parallelism?), "
                "and a chunked loss needs it whole: leave the head out of the tensor-parallel plan, or use loss='model'"
            )
        if self._asked.function is None and isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward:
            # A matrix product and nothing else; FSDP2 makes a subclass of its class.
            each = chunked_cross_entropy(hidden, head.weight, labels, head.bias, **terms._asdict(), chunk=chunk)
        else:
            each = chunked_losses(self._of_chunk, hidden, labels, list(head.parameters()), chunk)
        self._pass.losses = each
        # No tokens, but made of the losses: see `_loss_of_model`. No view, of which FSDP2 warns. A probe is of one token.
        none = each.flatten()[:0].view(0, 1, 1).expand(0, labels.shape[0], self._model.config.vocab_size).transpose(0, 1)
        return (none.clone() if self._skips_probe() else torch.cat([none, _probe(none)], 1)).to(hidden.dtype)

    def _of_chunk(self, hidden: Tensor, shift_labels: Tensor) -> Tensor:
        """Losses (n,) of hidden states (n, E) through whatever the head is, such as one with adapters; or their sum."""
        logits = self._logits_of(hidden[None])
        terms = self._asked.terms
        if terms.scale != 1:
            logits = logits * terms.scale
        if terms.softcap:
            logits = terms.softcap * torch.tanh(logits / terms.softcap)
        return self._of_logits(logits, shift_labels[None])

    def _skips_probe(self) -> bool:
        return self._knows_tail or torch.compiler.is_compiling()

    def _check_tail(self, logits: Tensor) -> None:
        """Compares, once, what the model did to the probe with what chunks do to logits.

        Raises:
            NotImplementedError: they differ.
        """
        if self._skips_probe() or not logits.shape[1]:
            return
        terms = self._asked.terms
        x = _probe(logits) * terms.scale
        wanted = terms.softcap * torch.tanh(x / terms.softcap) if terms.softcap else x
        if not torch.allclose(logits.detach().to(wanted.dtype), wanted, rtol=2e-2, atol=1e-2):
            raise NotImplementedError(
                f"{type(self._model).__name__} changes the logits of its head in a way that a chunked loss does not know (known "
                f"are {', '.join(_TAILS)} of its config): use loss='model'"
            )
        self._knows_tail = True


# How configs say what is done to logits after the head, and what of `Terms` it is.
_TAILS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def _tail_of(model: PreTrainedModel) -> tuple[float, float]:
    """Softcap and scale of a model's logits."""
    softcap, scale, divisor = (getattr(model.config, name, None) for name in _TAILS)
    return float(softcap or 0.0), float(1.0 if scale is None else scale) / float(1.0 if divisor is None else divisor)


def _own_function(model: PreTrainedModel) -> Callable[..., Tensor] | None:
    """A loss function that is neither transformers' causal one nor a plan's, whose model no second plan can be applied to."""
    function = getattr(model, "loss_function", ForCausalLMLoss)
    return None if function is ForCausalLMLoss or isinstance(getattr(function, "__self__", None), ModelLoss) else function


def _probe(like: Tensor) -> Tensor:
    """Logits (B, 1, V) of one token, from -40 to 40, which softcaps bend."""
    x = torch.linspace(-40, 40, like.shape[2], device=like.device, dtype=torch.float32)
    return x.expand(like.shape[0], 1, -1)


def _check_placed(asked: AskedLoss) -> None:
    if asked.function is not None or asked.terms.label_smoothing or asked.terms.z_loss:
        raise NotImplementedError(
            f"logits are a DTensor (loss_parallel), and the plan's loss is {asked}: only plain cross entropy is computed from "
            "logits that lie on several ranks. Let the head return whole logits, output_layouts=Replicate()"
        )


def _whole(loss: Tensor) -> Tensor:
    """A loss as a plain tensor: under loss_parallel it is a DTensor, the same on all ranks of its mesh."""
    return loss.full_tensor() if isinstance(loss, DTensor) else loss


def _with(output: Any, **fields: Tensor | None) -> Any:  # noqa: ANN401
    # Made anew: an output of transformers keeps its fields twice, and set to None one would stay in its tuple.
    return type(output)(**{**output, **fields})


def _name(function: object) -> str:
    return getattr(function, "__qualname__", None) or repr(function)
