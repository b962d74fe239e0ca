"""What would be silently wrong on a part of a sequence, refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import TransformersKwargs

from dtensor_ring.data.batch import IGNORED
from dtensor_ring.data.batch_reading import KNOWN_KEYS, refuse_lookalikes
from dtensor_ring.integrations.transformers.own_inputs import embeds_token_types
from dtensor_ring.integrations.transformers.token_loss import HEADS
from dtensor_ring.placements import SequencePlacement
from dtensor_ring.planning.documents import Documents

# Those whose loss, logits and gradients the tests compare with one process. A type that is not among them may mix tokens outside of
# attention, which would see a part of the sequence and raise nothing.
MODEL_TYPES = (
    *("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma2", "gemma3_text", "gpt_oss", "phi3"),
    *("afmoe", "apertus", "arcee", "cohere", "cohere2", "cwm", "deepseek_v2", "deepseek_v3", "diffllama", "dots1", "ernie4_5"),
    *("ernie4_5_moe", "exaone4", "flex_olmo", "gemma", "glm", "glm4", "glm4_moe", "gpt2", "gpt_neox", "granite", "granitemoe"),
    *("helium", "hunyuan_v1_dense", "jais2", "minimax_m2", "ministral", "ministral3", "modernbert-decoder", "nanochat", "olmo"),
    *("olmo2", "olmo3", "olmoe", "persimmon", "phi", "phimoe", "qwen2_moe", "seed_oss", "smollm3", "starcoder2", "vaultgemma"),
    *("bert", "distilbert", "electra", "eurobert", "modernbert", "roberta", "xlm-roberta"),  # encoders
    *("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"),  # text models inside of others, which place tokens on three axes
)
# Types whose windows are in masks alone, which ring attention does not build: their layers pass none on.
_NO_WINDOW = ("phimoe", "qwen2_moe")
# Types that count tokens from the number of their padding token on, where a plan would count from 0.
_OFFSET = ("roberta", "xlm-roberta")
# Rotary embeddings of the first depend on a token's position only; those of the last two also on how long the batch is (`rotary`).
_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "proportional", "dynamic", "longrope")
_HEADS = ("ForCausalLM", "Model", *HEADS)  # ends of class names
# Types whose masks follow `use_bidirectional_attention` under every attention of transformers.
_EITHER_WAY = ("gemma3_text",)
_LAYER_TYPES = ("full_attention", "sliding_attention")
_OUTPUTS = {"output_attentions": "attention weights are never held whole"}
# Keywords that models or their loss take beside those that transformers lists.
_OTHER_KEYWORDS = ("ignore_index", "cache_position")
_OTHER_INPUTS = ("token_type_ids", "mm_token_type_ids", "pixel_values", "visual_pos_masks", "deepstack_visual_embeds")


def check_model(model: PreTrainedModel, unlisted: bool = False) -> None:
    """Refuse a model whose layers need more than attention over the whole sequence, or were not tried.

    Args:
        model: the model.
        unlisted: whether its type may be one that was not tried.

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
    if config.model_type not in MODEL_TYPES and not unlisted:
        raise NotImplementedError(
            f"models of type {config.model_type!r} are not supported; supported are {', '.join(MODEL_TYPES)}. If tokens reach one "
            "another through attention alone, ring_plan(model, unlisted=True) looks at the model and takes it; then compare it "
            "with one process, by dtensor_ring.verify"
        )
    if not type(model).__name__.endswith(_HEADS):
        raise NotImplementedError(
            f"{type(model).__name__} is not supported: only {' and '.join('*' + name for name in _HEADS)} work token by token "
            "after attention; heads that pool or pick tokens would see a part of the sequence"
        )
    if pooler := next((name for name, part in model.named_modules() if type(part).__name__.endswith("Pooler")), None):
        raise NotImplementedError(
            f"{type(model).__name__} has a pooler ({pooler}), which would pick a token of each rank's part: make the model with "
            "add_pooling_layer=False, and pool gathered tokens"
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
    if config.model_type in _NO_WINDOW and ("sliding_attention" in kinds if kinds else window is not None):
        raise NotImplementedError(
            f"sliding_window={window} of a {config.model_type!r} model is not supported: its layers do not pass the window on to "
            "attention; set use_sliding_window=False or sliding_window=None in the config for full attention"
        )
    if window is not None and window < 1 and ("sliding_attention" in kinds or not kinds):
        raise ValueError(f"sliding_window is a number of tokens, at least 1, found {window}: set it to None for full attention")
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise NotImplementedError(
            "models that attend to a second sequence (is_encoder_decoder, add_cross_attention) are not supported"
        )
    if getattr(config, "use_bidirectional_attention", None) and config.model_type not in _EITHER_WAY:
        raise NotImplementedError(
            f"use_bidirectional_attention={config.use_bidirectional_attention!r} of a {config.model_type!r} model is not "
            "supported: its masks stay causal under some attentions of transformers and not under others; set it to None in the "
            f"config if the model is a causal one, or use {' or '.join(_EITHER_WAY)}"
        )
    # The modules say whether they are causal, and an encoder's say that they are not. A setting beside them is read by few.
    if not getattr(config, "is_causal", True):
        raise NotImplementedError("is_causal=False is not supported in the config, which few models read: remove it")
    for kind in _rope_types(getattr(config, "rope_parameters", None) or {}):
        if kind not in _ROPE_TYPES:
            raise NotImplementedError(
                f"rope type {kind!r} was not tried; supported "
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
            "Generate in `with plan.paused():`, or after plan.undo()"
        )
    # `generate` passes it in every call, so that it is known also where it runs without a cache.
    keep = arguments.get("logits_to_keep", 0)
    if isinstance(keep, Tensor) or keep:
        raise NotImplementedError(
            "generation is not supported on a parallelized model, also not without a cache: logits_to_keep counts tokens of the "
            "whole sequence, but each rank has a part. Generate in `with plan.paused():`, or after plan.undo(); in "
            "other calls leave logits_to_keep out"
        )
    if arguments.get("ignore_index", IGNORED) != IGNORED:
        raise NotImplementedError(f"ignore_index must be {IGNORED}: set the labels that do not count to {IGNORED}")
    if arguments.get("is_causal") is False:
        raise NotImplementedError("is_causal=False is not supported in a call: the model's modules say it; leave it out")
    for name in _OTHER_INPUTS:
        if arguments.get(name) is not None and not (name == "token_type_ids" and embeds_token_types(model)):
            raise NotImplementedError(f"{name} is not supported: it tells image tokens, and only text is read; leave it out")
    _check_outputs(model.config, arguments)
    if model.config.model_type in _OFFSET and arguments.get("position_ids") is None:
        first = model.config.pad_token_id + 1
        raise NotImplementedError(
            f"{type(model).__name__} numbers tokens from {first} on, and its padding {first - 1}: pass position_ids (B, S)"
        )
    # An input of the model's own with a value for each token would stay whole, beside tokens that are cut.
    for name in parameters:
        value = arguments.get(name)
        if isinstance(value, Tensor) and name not in (*KNOWN_KEYS, *_OTHER_KEYWORDS, "token_type_ids"):
            raise NotImplementedError(f"{name} is not supported: it is not known how to cut it; leave it out")
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
