"""What would be silently wrong on a part of a sequence, refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from dtensor_ring.placements import SequencePlacement
from dtensor_ring.placements.batch import IGNORED

MODEL_TYPES = ("llama", "qwen3")
_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "proportional")
_HEADS = ("ForCausalLM", "Model")
_LAYER_TYPES = ("full_attention", "sliding_attention")


def check_model(model: PreTrainedModel) -> None:
    """Refuse a model whose layers need more than attention over the whole sequence, or were not tried.

    Raises:
        TypeError: not a transformers model.
        NotImplementedError: the model type, a layer type or the rope type is not supported; the text says which are.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"ring_plan takes a transformers PreTrainedModel, found {type(model).__name__}: see shard_batch for other models"
        )
    if not type(model).__name__.endswith(_HEADS):
        raise NotImplementedError(
            f"{type(model).__name__} is not supported: only {' and '.join('*' + name for name in _HEADS)} work token by token "
            "after attention; heads that pool or pick tokens would see a part of the sequence"
        )
    config: Any = model.config.get_text_config()
    if config.model_type not in MODEL_TYPES:
        raise NotImplementedError(f"models of type {config.model_type!r} are not supported; supported are {', '.join(MODEL_TYPES)}")
    other = sorted(set(getattr(config, "layer_types", None) or ()) - set(_LAYER_TYPES))
    if other:
        raise NotImplementedError(f"layers of type {', '.join(other)} are not supported; supported are {', '.join(_LAYER_TYPES)}")
    for kind in _rope_types(getattr(config, "rope_parameters", None) or {}):
        if kind not in _ROPE_TYPES:
            raise NotImplementedError(
                f"rope type {kind!r} reads the longest position of the rows it sees, which differs from rank to rank; supported "
                f"are {', '.join(_ROPE_TYPES)}"
            )


def _rope_types(parameters: Mapping[str, Any]) -> set[str]:
    """The rope types of a config: one for the model, or one for each layer type."""
    if "rope_type" in parameters:
        return {parameters["rope_type"]}
    return {value["rope_type"] for value in parameters.values() if isinstance(value, Mapping) and "rope_type" in value}


def check_length(length: int, world: int, placement: SequencePlacement) -> None:
    """Raises ValueError where a rank would hold no token: modules of transformers cannot run on none."""
    empty = [rank for rank in range(world) if placement.layout.local_length(length, world, rank) == 0]
    if empty:
        raise ValueError(
            f"rows of {length} tokens leave ranks {empty} of {world} without any, which the model's modules cannot run on: "
            f"use rows of at least {world} tokens or fewer ranks"
        )


def check_call(model: PreTrainedModel, arguments: Mapping[str, Any]) -> None:
    """Refuse forward arguments whose result on a part of the sequence would not be that of the whole.

    Raises:
        NotImplementedError: the text names the argument and what to do.
    """
    if arguments.get("past_key_values") is not None or arguments.get("use_cache"):
        raise NotImplementedError(
            "use_cache=True (generation) is not supported on a parallelized model: its cache would hold a part of the sequence. "
            "Generate with the model before parallelize_module, or after plan.undo()"
        )
    keep = arguments.get("logits_to_keep", 0)
    if isinstance(keep, Tensor) or keep:
        raise NotImplementedError("logits_to_keep counts tokens of the whole sequence, but each rank has a part: leave it out")
    if arguments.get("ignore_index", IGNORED) != IGNORED:
        raise NotImplementedError(f"ignore_index must be {IGNORED}: set the labels that do not count to {IGNORED}")
    for name in ("output_attentions", "output_router_logits"):
        if arguments.get(name):
            raise NotImplementedError(f"{name}=True is not supported on a parallelized model: leave it out")
    if arguments.get("labels") is not None and getattr(model, "loss_function", ForCausalLMLoss) is not ForCausalLMLoss:
        raise NotImplementedError(
            f"{type(model).__name__} computes its loss with {model.loss_function!r}; only the causal language-model loss adds up "
            "over parts of a sequence: pass no labels and compute the loss from the logits"
        )
