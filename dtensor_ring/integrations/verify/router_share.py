"""The load-balancing loss of a packed batch in one process, which runs each document by itself.

It is a product of two means over all tokens, so the losses of documents do not add up to it. But where the router's logits of all
other documents are constants, the loss of all has the right gradient by those of one: documents run once for their logits, and then
once more each, with the loss of all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dtensor_ring.integrations.transformers.router import asks_for_router, has_router_loss
from dtensor_ring.integrations.verify.batches import Case

Layers = tuple[Tensor, ...]


class RouterShare:
    """What each piece of a batch adds to the loss of all.

    Args:
        model: of which `load_balancing_loss_func` of transformers is the router's loss.
        pieces: the router's logits of each piece, by layers: (tokens, experts).
    """

    def __init__(self, model: PreTrainedModel, pieces: Sequence[Layers]) -> None:
        self._model: Any = model
        self._pieces = pieces

    def loss(self, index: int, out: Any) -> Tensor:  # noqa: ANN401  an output of transformers
        """The loss of a piece, but for routers the gradient of the loss of all, and an equal share of its value."""
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        pieces = [*self._pieces[:index], out.router_logits, *self._pieces[index + 1 :]]
        layers: Any = tuple(torch.cat([logits.flatten(0, -2) for logits in layer]) for layer in zip(*pieces, strict=True))
        whole = load_balancing_loss_func(layers, self._model.num_experts, self._model.num_experts_per_tok)
        assert isinstance(whole, Tensor), "there are logits"
        share = whole - whole.detach() * (1 - 1 / len(pieces))
        return out.loss + self._model.router_aux_loss_coef * (share - out.aux_loss)


def router_share(model: PreTrainedModel, case: Case) -> RouterShare | None:
    """That of a case, whose pieces are run for it without gradients; None where the loss of a piece is right as it is."""
    pieces = case.pieces()
    is_asked = case.given.get("labels") is not None and asks_for_router(model, case.given) and has_router_loss(model)
    if not is_asked or len(pieces) == 1:
        return None
    with torch.no_grad():
        outs: Iterable[Any] = [model(**{**case.alone(piece), "return_dict": True}) for piece in pieces]
    return RouterShare(model, [out.router_logits for out in outs])
