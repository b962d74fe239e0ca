"""What would be silently wrong on a part of a sequence, refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import TransformersKwargs

from dtensor_ring.data.batch import IGNORED
from dtensor_ring.data.batch_reading import KNOWN_KEYS, refuse_lookalikes
from dtensor_ring.placements import SequencePlacement
from dtensor_ring.planning.documents import Documents

# Those whose loss, logits and gradients the tests compare with one process. A type that is not among them may mix tokens outside of
# attention, which would see a part of the sequence and raise nothing.
MODEL_TYPES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "mixtral",
    "gemma2",
    "gemma3_text",
    "gpt_oss",
    "phi3",
)
# Rotary embeddings of these types depend on a token's position only.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "proportional")
_HEADS = ("ForCausalLM", "Model")  # ends of class names
_LAYER_TYPES = ("full_attention", "sliding_attention")
_OUTPUTS = {"output_attentions": "attention weights are never held whole"}
# Keywords that models or their loss take beside those that transformers lists.
_OTHER_KEYWORDS = ("ignore_index", "cache_position")
_OTHER_INPUTS = ("token_type_ids", "mm_token_type_ids", "pixel_values")


def check_model(model: PreTrainedModel) -> None:
    """Refuse a model whose layers need more than attention over the whole sequence, or were not tried.

    Raises:
        TypeError: not a transformers model.
        ValueError: a window of no tokens, or layers with a window where the config has none.
        NotImplementedError: the model type, its head, a layer type, the rope type or an output that the config asks for is not
            supported; the text says what is.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"ring_plan takes a transformers PreTrainedModel, found {type(model).__name__}: see shard_batch for other models"
        )
    # A text model inside a larger one would get its tokens from the outside, where they are not cut.
    config: Any = model.config
    if config.get_text_config() is not config:
        raise NotImplementedError(
            f"{type(model).__name__} holds more than a text model (its config is {type(config).__name__}): its image or audio "
            "tokens would be put into a part of the sequence. Parallelize a text-only model, such as one of class "
            f"{type(config.get_text_config()).__name__.removesuffix('Config').removesuffix('Text')}ForCausalLM"
        )
    if config.model_type not in MODEL_TYPES:
        raise NotImplementedError(f"models of type {config.model_type!r} are not supported; supported are {', '.join(MODEL_TYPES)}")
    if not type(model).__name__.endswith(_HEADS):
        raise NotImplementedError(
            f"{type(model).__name__} is not supported: only {' and '.join('*' + name for name in _HEADS)} work token by token "
            "after attention; heads that pool or pick tokens would see a part of the sequence"
        )
    _check_layers(config)
    _check_outputs(config, {})


def _check_layers(config: Any) -> None:  # noqa: ANN401
    """Refuse layers, windows, directions and rotary embeddings that a part of the sequence would get wrong."""
    # Configs have what their model type needs: a name that one lacks is a thing that its model does not do.
    kinds = set(getattr(config, "layer_types", None) or ())
    if other := sorted(kinds - set(_LAYER_TYPES)):
        raise NotImplementedError(f"layers of type {', '.join(other)} are not supported; supported are {', '.join(_LAYER_TYPES)}")
    window = getattr(config, "sliding_window", None)
    if "sliding_attention" in kinds and window is None:
        raise ValueError("layer_types name sliding_attention, but sliding_window is None: set it to a number of tokens")
    if window is not None and window < 1:
        raise ValueError(f"sliding_window is a number of tokens, at least 1, found {window}: set it to None for full attention")
    if getattr(config, "use_bidirectional_attention", None):
        raise NotImplementedError(
            f"use_bidirectional_attention={config.use_bidirectional_attention!r} (embedding models) is not supported: only causal "
            "attention is; set it to None in the config if the model is a causal one"
        )
    if not getattr(config, "is_causal", True):
        raise NotImplementedError("is_causal=False is not supported: only causal attention is; remove it from the config")
    for kind in _rope_types(getattr(config, "rope_parameters", None) or {}):
        if kind not in _ROPE_TYPES:
            raise NotImplementedError(
                f"rope type {kind!r} reads the longest position of the rows it sees, which differs from rank to rank; supported "
                f"are {', '.join(_ROPE_TYPES)}: set rope_parameters in the config to one of them, or use a checkpoint that has one"
            )


def _check_outputs(config: Any, arguments: Mapping[str, Any]) -> None:  # noqa: ANN401
    """Refuse outputs that are asked for in a call, or by the config where the call says nothing."""
    # The call goes before the config, as in transformers.
    for name, reason in _OUTPUTS.items():
        asked = arguments.get(name)
        if getattr(config, name, False) if asked is None else asked:
            where = "in the config" if asked is None else "in the call"
            raise NotImplementedError(f"{name}=True {where} is not supported on a parallelized model, {reason}: set it to False")


def _rope_types(parameters: Mapping[str, Any]) -> set[str]:
    """The rope types of a config: one for the model, or one for each layer type."""
    if "rope_type" in parameters:
        return {parameters["rope_type"]}
    return {value["rope_type"] for value in parameters.values() if isinstance(value, Mapping) and "rope_type" in value}


def check_length(length: int, world: int, placement: SequencePlacement) -> None:
    """Raises ValueError where a rank would hold no token: modules of transformers cannot run on none."""
    # Every rank finds the same empty ranks, so all raise, and none waits for one that has nothing to compute.
    empty = [rank for rank in range(world) if placement.layout.local_length(length, world, rank) == 0]
    if empty:
        raise ValueError(
            f"rows of {length} tokens leave ranks {empty} of {world} without any, which the model's modules cannot run on: "
            f"use rows of at least {world} tokens or fewer ranks"
        )


def check_call(model: PreTrainedModel, arguments: Mapping[str, Any], parameters: Sequence[str] = ()) -> None:
    """Refuse forward arguments whose result on a part of the sequence would not be that of the whole.

    Args:
        model: the model.
        arguments: what its forward is called with, by name.
        parameters: names of its forward's own parameters; other keywords go on to its layers.

    Raises:
        NotImplementedError: the text names the argument and what to do.
        ValueError: a keyword looks like one that is read under another name, or has tensors or bounds that no layer reads.
    """
    if arguments.get("past_key_values") is not None or arguments.get("use_cache"):
        raise NotImplementedError(
            "use_cache=True (generation) is not supported on a parallelized model: its cache would hold a part of the sequence. "
            "Generate with the model before parallelize_module, or after plan.undo()"
        )
    # `generate` passes it in every call, so that it is known also where it runs without a cache.
    keep = arguments.get("logits_to_keep", 0)
    if isinstance(keep, Tensor) or keep:
        raise NotImplementedError(
            "generation is not supported on a parallelized model, also not without a cache: logits_to_keep counts tokens of the "
            "whole sequence, but each rank has a part. Generate with the model before parallelize_module, or after plan.undo(); in "
            "other calls leave logits_to_keep out"
        )
    if arguments.get("ignore_index", IGNORED) != IGNORED:
        raise NotImplementedError(f"ignore_index must be {IGNORED}: set the labels that do not count to {IGNORED}")
    if arguments.get("is_causal") is False:
        raise NotImplementedError("is_causal=False is not supported: only causal attention is; leave it out")
    for name in _OTHER_INPUTS:
        if arguments.get(name) is not None:
            raise NotImplementedError(f"{name} is not supported: it tells image tokens, and only text is read; leave it out")
    _check_outputs(model.config, arguments)
    # Models take any keyword and hand it to their layers, which ignore what they do not know: documents under a wrong name would be
    # lost without an error, and a tensor of the whole sequence would meet tokens of a part.
    own = (*parameters, *TransformersKwargs.__annotations__, *_OTHER_KEYWORDS)
    refuse_lookalikes(arguments, own)
    for name, value in arguments.items():
        numbers = isinstance(value, (list, tuple)) and not any(isinstance(x, str) for x in value)
        if (numbers or isinstance(value, (Tensor, Documents))) and name not in own and name not in KNOWN_KEYS:
            raise ValueError(
                f"{name!r} of type {type(value).__name__} is read by no layer, and cannot be cut: pass what is known "
                f"({', '.join(KNOWN_KEYS)}), or leave it out"
            )
