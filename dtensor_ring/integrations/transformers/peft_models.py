"""PEFT models: the transformers model inside, whose calls a plan's hooks see.

    peft_model(...)                       PeftModel      sets adapters, and adds virtual tokens where the method has some
      peft_model.base_model(...)          the tuner      LoraModel and its like
        peft_model.base_model.model(...)  the model      cuts the batch, whichever of the three was called

Adapters may be merged, switched or disabled at any time: they change weights of linear layers and no module of attention.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

# Methods that add to weights, scale or rotate them, or act on each token by itself: the tests train each, or one of its kind.
TUNERS = ("LORA", "LOHA", "LOKR", "IA3", "OFT", "BOFT", "VERA", "LN_TUNING", "TRAINABLE_TOKENS")
# What they do to the sequence, where it is not that of the method's own name.
_REASONS = {
    "PREFIX_TUNING": "puts keys and values before the first token, in a cache, and a parallelized model has none",
    "ADALORA": "adds to the loss in a forward of its own, which goes past the model's hooks",
    "ADAPTION_PROMPT": "replaces attention modules by its own, which attend to prompts",
    "XLORA": "weighs its adapters by what the whole row holds",
    "CARTRIDGE": "puts keys and values before the first token, in a cache, and a parallelized model has none",
}


class Unwrapped(NamedTuple):
    """A model as a plan needs it.

    Attributes:
        model: the innermost model, one of transformers if it is supported.
        roots: what `parallelize_module` may be called on: the model, and what wraps it.
    """

    model: Any
    roots: tuple[nn.Module, ...]


def unwrap(model: Any, unlisted: bool) -> Unwrapped:  # noqa: ANN401
    """The transformers model of a PEFT model, or the model itself.

    Args:
        model: any object; what is no PEFT model is returned as it is.
        unlisted: whether tuners that were not tried are accepted too.

    Raises:
        NotImplementedError: a method that changes the sequence (prompt and prefix tuning), or was not tried.
    """
    if not is_peft(model):
        return Unwrapped(model, (model,))
    for config in model.peft_config.values():
        _check_tuner(config, unlisted)
    inner, tuner = model.get_base_model(), model.base_model
    # Older tuners call `self.model.forward`, past the hooks of the model.
    if tuner is not inner and "forward" in type(tuner).forward.__code__.co_names:
        raise NotImplementedError(
            f"this version of PEFT calls {type(inner).__name__}.forward past the model's hooks: use PEFT 0.18 or newer, or call "
            "ring_plan, parallelize_module and the model itself with peft_model.get_base_model()"
        )
    return Unwrapped(inner, (inner, tuner, model))


def is_peft(model: object) -> bool:
    """Whether a model is one of PEFT's, which is not imported for the question."""
    ours = any(kind.__module__.startswith("peft.") for kind in type(model).__mro__)
    return ours and hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def _check_tuner(config: Any, unlisted: bool) -> None:  # noqa: ANN401
    """Refuse what puts tokens before the sequence, or reads more of it than a token."""
    kind = getattr(config.peft_type, "value", str(config.peft_type))
    if config.is_prompt_learning or kind in _REASONS:
        reason = _REASONS.get(kind, "puts virtual tokens before the first one, where the sequence is cut already")
        raise NotImplementedError(f"PEFT's {kind} {reason}: use a method that adapts weights, such as LoraConfig")
    if getattr(config, "alora_invocation_tokens", None) is not None:
        raise NotImplementedError(
            "alora_invocation_tokens (activated LoRA) counts tokens from the end of the row, of which each rank has a part: "
            "use LoraConfig without it"
        )
    if kind not in TUNERS and not unlisted:
        raise NotImplementedError(
            f"PEFT's {kind} was not tried; tried are {', '.join(TUNERS)}: use one of them, or pass unlisted=True if it acts on "
            "each token by itself, and compare with one process"
        )
