"""What can be seen of a model that is not listed: its modules and its config. `probe` runs it.

A rank holds some tokens of a row, and only attention reaches the others. So a model may be cut where

    attention     goes through transformers' attention interface, in all of its attention modules
    positions     come in as position_ids
    all the rest  works token by token: no convolution, recurrence, pooling or normalisation over tokens
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

# Modules that read neighbours of a token, or all of them, by what their classes are called.
_MIXING = re.compile(
    r"conv\dd|shortconv|mamba|ssm|rwkv|deltanet|linearattention|lightningattention|recurrent|lstm|gru|tokenshift|hyena|retention|"
    r"pool|indexer|compressor|fourier|batchnorm|instancenorm",
    re.IGNORECASE,
)
_LAYERDROP = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")


def attends(module: nn.Module) -> bool:
    """Whether a module is an attention module: its forward asks for transformers' attention interface, or it looks like one."""
    return reads_interface(module) or (type(module).__name__.endswith("Attention") and hasattr(module, "layer_idx"))


def reads_interface(module: nn.Module) -> bool:
    """Whether the forward of a module's class asks for transformers' attention interface."""
    # Read off the code, since nothing else tells: attention modules have no common class. Decorators keep what they wrap.
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def check_structure(model: PreTrainedModel) -> None:
    """Refuse a model whose modules or config show that a part of the sequence would not do.

    Raises:
        NotImplementedError: the first reason that is seen, with the module or the setting.
    """
    for reason in _reasons(model):
        raise NotImplementedError(
            f"{type(model).__name__} cannot be made sequence parallel: {reason}. Use a model whose layers reach other tokens "
            "through attention alone, or call ring_attention in the model's own code"
        )


def _reasons(model: PreTrainedModel) -> Iterator[str]:
    if not model._supports_attention_backend:
        yield "its attention does not go through the attention interface of transformers (_supports_attention_backend is False)"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        yield "its forward takes no position_ids, so that it would count each rank's tokens from 0"
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        yield "it attends to a second sequence (is_encoder_decoder or add_cross_attention)"
    for name in _LAYERDROP:
        if getattr(config, name, 0):
            yield f"{name}={getattr(config, name)} skips layers at random, on each rank others, whose attention would wait for ever"
    if not any(reads_interface(module) for module in model.modules()):
        yield "none of its modules asks for the attention interface of transformers"
    for name, module in model.named_modules():
        kind = type(module).__name__
        if re.search("attention", kind, re.IGNORECASE) and not any(reads_interface(part) for part in module.modules()):
            if any(module.parameters()) or not any(module.children()):
                yield f"{name} ({kind}) computes attention by itself, of the tokens that it sees"
        elif _MIXING.search(kind) and not _is_pointwise(module):
            yield f"{name} ({kind}) reads other tokens than its own"


def _is_pointwise(module: nn.Module) -> bool:
    """Whether a convolution is a linear layer in disguise."""
    return all(size == 1 for size in getattr(module, "kernel_size", (0,)))
