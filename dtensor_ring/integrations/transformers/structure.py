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
    r"Conv\dd|ShortConv|Mamba|SSM|Rwkv|RWKV|DeltaNet|LinearAttention|LightningAttention|Recurrent|LSTM|GRU|TokenShift|Hyena|Retention|"
    r"Pool|Indexer|Compressor|Fourier|BatchNorm|InstanceNorm"
)
_LAYERDROP = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")


def attends(module: nn.Module) -> bool:
    """Whether a module is an attention module: its forward asks for transformers' attention interface, or it looks like one."""
    return reads_interface(module) or (type(module).__name__.endswith("Attention") and hasattr(module, "layer_idx"))


def reads_interface(module: nn.Module) -> bool:
    """Whether the forward of a module's class asks for transformers' attention interface."""
    # Read off the code, since nothing else tells: attention modules have no common class.
    return "ALL_ATTENTION_FUNCTIONS" in _names_in_forward(module)


def _names_in_forward(module: nn.Module) -> set[str]:
    """Names that the code of a module's forward uses, beside those of its variables; decorators keep what they wrap."""
    names: set[str] = set()
    for kind in type(module).__mro__:
        code = getattr(inspect.unwrap(kind.forward), "__code__", None) if "forward" in vars(kind) else None
        if code is not None:
            names |= set(code.co_names)
            if "super" not in code.co_names:  # what classes below it do is not reached
                break
    return names


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
    for name in _LAYERDROP:
        if getattr(config, name, 0):
            yield f"{name}={getattr(config, name)} skips layers at random, on each rank others, whose attention would wait for ever"
    if not any(reads_interface(module) for module in model.modules()):
        yield "none of its modules asks for the attention interface of transformers"
    for name, module in model.named_modules():
        kind = type(module).__name__
        if reads_interface(module) and "arange" in _names_in_forward(module):
            yield f"{name} ({kind}) counts the tokens that it sees (its forward calls arange) instead of reading position_ids"
        if re.search("attention", kind, re.IGNORECASE) and not any(reads_interface(part) for part in module.modules()):
            if next(module.parameters(), None) is not None:
                yield f"{name} ({kind}) computes attention by itself, of the tokens that it sees"
        elif _MIXING.search(kind) and not _is_pointwise(module):
            yield f"{name} ({kind}) reads other tokens than its own"


def _is_pointwise(module: nn.Module) -> bool:
    """Whether a convolution is a linear layer in disguise."""
    return all(size == 1 for size in getattr(module, "kernel_size", (0,)))
