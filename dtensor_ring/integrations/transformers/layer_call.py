"""The arguments of a Hugging Face model and of its attention, read by their names and meaning."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn


class LayerCall(NamedTuple):
    """The arguments with which transformers calls an attention function, read by their meaning.

    Attributes:
        q: queries (B, S/W, H, D) of this rank's tokens.
        k: keys (B, S/W, Hk, D).
        v: values (B, S/W, Hk, D).
        mask: what the layer's mask function made; None for none.
        scale: multiplies q.k; None is D ** -0.5.
        dropout_p: probability of dropping an attention weight.
        is_causal: a query sees keys up to its own position.
        window: (L, R) keys back and ahead; -1 is unbounded.
        softcap: bounds scores, 0 for none.
        sinks: (H,), a parameter of the layer, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float | None
    dropout_p: float
    is_causal: bool
    window: tuple[int, int]
    softcap: float
    sinks: Tensor | None


class LossCall(NamedTuple):
    """What a call of a model asks of its loss, read before the call and carried through it.

    Attributes:
        count: labels that count in the whole batch, where the loss is their mean; None without, or where the caller scales it.
        has_labels: the model is to compute a loss.
        labels: (B, S/W), shifted labels for the head, where it computes losses in chunks; None where it makes logits.
        router: the load-balancing loss of its routers is asked for.
        router_mask: (B, S/W), 1 at this rank's tokens that count in that loss; None where all do.
        as_tuple: the caller wants a tuple, and gets one: inside, outputs have names.
    """

    count: Tensor | None = None
    has_labels: bool = False
    labels: Tensor | None = None
    router: bool = False
    router_mask: Tensor | None = None
    as_tuple: bool = False


NO_LOSS = LossCall()


@dataclass(slots=True)
class LossPass:
    """What one forward pass leaves for its later parts.

    Attributes:
        labels: of this rank's tokens, for the head.
        losses: of the head, for the loss function.
        was_called: the loss function was.
    """

    labels: Tensor | None = None
    losses: Tensor | None = None
    was_called: bool = False

    def clear(self) -> None:
        """As before the pass."""
        self.labels, self.losses, self.was_called = None, None, False

    def __deepcopy__(self, _memo: object) -> LossPass:
        # A copied model has the hooks of its original's plan, which asks here, and a head and loss function that are copies.
        return self


def read_layer_call(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **_rest: object,
) -> LayerCall:
    """Reads what a layer asks for. The names and their order are those by which transformers calls an attention function.

    Query is (B, H, S/W, D), key and value are (B, Hk, S/W, D). Other keywords only describe the mask again, and are not needed.
    """
    dtype = value.dtype  # under autocast rotary embeddings leave q and k in float32, and kernels want one dtype
    # As in transformers' own attention functions: the call goes before the module, and a module that says nothing is causal.
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    return LayerCall(
        query.to(dtype).transpose(1, 2),
        key.to(dtype).transpose(1, 2),
        value.transpose(1, 2),
        attention_mask,
        scaling,
        dropout,
        causal,
        # transformers counts the query itself among the keys of a window.
        (-1, -1) if sliding_window is None else (sliding_window - 1, 0 if causal else sliding_window - 1),
        softcap or 0.0,
        s_aux,
    )


def by_name(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call of a model by name: a batch is checked and cut by the names of its tensors.

    Raises:
        TypeError: more arguments by place than the model takes, or one given twice.
    """
    parameters = inspect.signature(model.forward).parameters
    named = dict(zip(parameters, args, strict=False))
    if len(named) < len(args) or named.keys() & kwargs.keys():
        raise TypeError(
            f"{type(model).__name__} takes {', '.join(parameters)}: found {len(args)} arguments by place and "
            f"{', '.join(kwargs) or 'none'} by name; pass each once"
        )
    return {**named, **kwargs}
