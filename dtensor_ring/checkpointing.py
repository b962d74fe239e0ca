"""Activation checkpointing that leaves attention alone: what attention gave is saved, and all else in a layer is computed again.

    plain checkpointing    forward: keys travel    backward: keys travel again, attention runs again, then gradients travel
    save_attention         forward: keys travel    backward: gradients travel

A rank keeps out (B, S/W, H, Dv) and lse (B, H, S/W) of every layer: with 32 query heads of 128, in bfloat16, 8.1 KiB
a token and layer. What is dearest to repeat over ranks costs least to keep: one of the dozen activations of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch._ops import OpOverload
from torch.utils.checkpoint import create_selective_checkpoint_contexts


def save_attention(also: Sequence[OpOverload] = ()) -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    """The `context_fn` of `torch.utils.checkpoint` with which attention over ranks is not repeated in backward.

        checkpoint(layer, hidden, use_reentrant=False, context_fn=save_attention)
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": save_attention})      # transformers
        checkpoint_wrapper(layer, context_fn=save_attention)                                             # PyTorch, torchtitan

    Gradients are those of plain checkpointing, bit by bit. Only calls of `ring_attention` and of models under `ring_plan` are
    saved: PyTorch's own attention operators are among `also` if you put them there.

    Args:
        also: other operators whose results to save, such as `torch.ops.aten.mm.default`; give them with `functools.partial`.

    Returns:
        The contexts of the forward pass and of computing again, as `create_selective_checkpoint_contexts` makes them.

    Raises:
        TypeError: an operator that is no `OpOverload`.
    """
    for op in also:
        if not isinstance(op, OpOverload):
            raise TypeError(f"save_attention saves results of operators such as torch.ops.aten.mm.default, found {op!r}")
    return create_selective_checkpoint_contexts([torch.ops.dtensor_ring.attention.default, *also])
