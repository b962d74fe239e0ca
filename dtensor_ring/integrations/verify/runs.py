"""The runs that `verify` compares: the model under its plan on all ranks, and without it on every rank by itself."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from dtensor_ring._torch import local_of, tensors_in
from dtensor_ring.integrations.transformers.plan import RingPlan
from dtensor_ring.integrations.verify.batches import Case, Piece
from dtensor_ring.integrations.verify.router_share import router_share
from dtensor_ring.integrations.verify.state import Ranks, global_norm, parameters_of
from dtensor_ring.integrations.verify.watch import Compared, Kept, OwnError, Place, Watch
from dtensor_ring.placements import SequencePlacement
from dtensor_ring.replicas import average_gradients


@dataclass
class Run:
    """What a run gave.

    Attributes:
        loss: of the whole batch; of a model without one, a sum over its first output with random weights.
        logits: (B, S, V) of all tokens in order, or another first output (B, S, H); None where the model gives none.
        gradients: by name, those that one process has, as the shards that this rank holds.
        norm: of all gradients.
        share: the arguments that the plan gave the model on this rank; None of a run without a plan.
    """

    loss: float
    logits: Tensor | None
    gradients: dict[str, Tensor] = field(default_factory=dict)
    norm: float = 0.0
    share: Mapping[str, Any] | None = None


class Runner:
    """Runs cases, and takes gradients out of the parameters after each."""

    def __init__(self, model: PreTrainedModel, plan: RingPlan, placement: SequencePlacement, ranks: Ranks) -> None:
        self._model, self._plan, self._placement = model, plan, placement
        self._ranks, self._mesh = ranks, ranks.mesh
        self.watch = Watch(model)

    @property
    def mesh(self) -> DeviceMesh:
        """The axis that holds the sequence."""
        return self._mesh

    def ring(self, case: Case, kept: Kept | None = None) -> Run:
        """Forward and backward under the plan: the loss's gradients as one process has them, and gathered logits."""
        world = self._mesh.size()
        share: dict[str, Any] = {}

        def note(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            share.update(kwargs)

        handle = self._model.register_forward_pre_hook(note, with_kwargs=True)  # after the plan's own hook, which cuts the batch
        try:
            with self.watch.telling(kept) if kept is not None else nullcontext():
                with self.watch.forward():
                    out = self._model(**case.given)
                loss, is_part = self._objective(out, case, None)
                # Gradients are to be averaged over the ranks afterwards; a part of a sum is scaled up for that.
                (loss * world if is_part else loss).backward()
        finally:
            handle.remove()
        value = float(loss.detach())
        if is_part:
            value = sum(self._ranks.on_axis(value))
        taken = self._take_gradients(average=True)
        return Run(value, self.gathered(out), taken, global_norm(taken), share)

    def ring_forward(self, given: Mapping[str, Any]) -> Any:  # noqa: ANN401  an output of transformers
        """A forward pass under the plan, without gradients."""
        with torch.no_grad():
            return self._model(**given)

    def gathered(self, out: Any) -> Tensor | None:  # noqa: ANN401
        """All tokens of what the model gives for each, on every rank."""
        local = main_output(out)
        return None if local is None else self._plan.gather(local.detach(), documents=self._plan.documents)

    def alone(self, case: Case, sees: Compared | OwnError | None = None, compared: Compared | None = None) -> Run:
        """Forward and backward of one process, piece by piece, on every rank alike. The plan is paused."""
        loss_sum, whole = 0.0, None
        items = case.given.get("num_items_in_batch")
        count = case.count() if items is None else items
        routers = router_share(self._model, case)
        with self.watch.telling(sees) if sees is not None else nullcontext():
            for index, piece in enumerate(case.pieces()):
                if compared is not None:
                    compared.place = self._place(case, piece)
                given = case.alone(piece)
                if given.get("labels") is not None and case.shifted:
                    given["num_items_in_batch"] = torch.as_tensor(count)
                if routers is not None:
                    given["return_dict"] = True
                with self.watch.forward():
                    out = self._model(**given)
                loss = self._objective(out, case, piece)[0] if routers is None else routers.loss(index, out)
                if given.get("labels") is not None and not case.shifted:
                    # The losses of these models are means of what they are given, whatever the number of items.
                    labels = case.count(piece)
                    loss = loss * (labels / float(count)) if labels else loss.nan_to_num() * 0
                loss.backward()
                loss_sum += float(loss.detach())
                whole = _put(whole, main_output(out), case, piece)
        taken = self._take_gradients(average=False)
        return Run(loss_sum, whole, taken, global_norm(taken))

    def _objective(self, out: Any, case: Case, piece: Piece | None) -> tuple[Tensor, bool]:  # noqa: ANN401
        """What backward starts from, and whether over ranks or pieces it is a part of a sum."""
        loss = out[0] if isinstance(out, tuple) else getattr(out, "loss", None)
        if case.given.get("labels") is not None and isinstance(loss, Tensor):
            return loss, case.given.get("num_items_in_batch") is not None or piece is not None
        tokens = main_output(out)
        if tokens is None:
            raise ValueError(f"{type(self._model).__name__} gives neither a loss nor an output (B, S, ...) to compare")
        coins = torch.Generator().manual_seed(7)
        weights = torch.randn(case.rows, case.length, *tokens.shape[2:], generator=coins) / (case.rows * case.length)
        if case.real is not None:
            weights = weights * case.real.cpu()[..., None]
        mine = weights[:, self.tokens(case)] if piece is None else weights[piece.first : piece.last, piece.start : piece.stop]
        return (tokens.float() * mine.to(tokens.device)).sum(), True

    def tokens(self, case: Case) -> list[int]:
        """The tokens that this rank is to hold."""
        return case.tokens_of(self._placement, self._mesh.size())[self._ranks.rank]

    def _place(self, case: Case, piece: Piece) -> Place:
        mine = torch.tensor(self.tokens(case))
        device = next(self._model.parameters()).device
        inside = ((mine >= piece.start) & (mine < piece.stop)).nonzero()[:, 0]
        real = None
        if case.real is not None:
            real = case.real.cpu()[piece.first : piece.last, mine[inside]].to(device)
        there = (mine[inside] - piece.start).to(device)
        return Place(piece, case.rows, len(mine), inside.to(device), there, real, float(self._mesh.size()))

    def _take_gradients(self, *, average: bool) -> dict[str, Tensor]:
        parameters = parameters_of(self._model)
        if average:
            average_gradients([p for name, p in parameters.items() if name not in self._ranks.reduced], self._mesh)
        taken = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        for parameter in parameters.values():
            parameter.grad = None
        return taken


def main_output(out: Any) -> Tensor | None:  # noqa: ANN401  an output of transformers
    """What the model gives for each token, (B, S, ...): logits, or the last hidden states."""
    named = getattr(out, "logits", None)
    if isinstance(named, Tensor):
        return named
    return next((tensor for tensor in tensors_in(out) if tensor.dim() >= 3 and tensor.is_floating_point()), None)


def _put(whole: Tensor | None, part: Tensor | None, case: Case, piece: Piece) -> Tensor | None:
    if part is None:
        return None
    if whole is None:
        whole = part.new_zeros(case.rows, case.length, *part.shape[2:])
    whole[piece.first : piece.last, piece.start : piece.stop] = part.detach()
    return whole


def local_gradients(run: Run) -> dict[str, Tensor]:
    """The gradients as plain tensors: what this rank holds of them."""
    return {name: local_of(gradient) for name, gradient in run.gradients.items()}
