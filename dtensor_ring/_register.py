"""What importing `dtensor_ring` registers with PyTorch: all of it, in one place, once a process.

    ops/operator            dtensor_ring::attention and its backward          every call of attention
    _torch                  dtensor_ring::replicated                          compiled attention on DTensors
    ops/sharding            DTensor's rules of these operators                compiled attention, direct calls on DTensors
    losses/chunked          dtensor_ring::chunked_cross_entropy, its backward compiled losses whose logits are made in chunks
    ops/sdpa                F.scaled_dot_product_attention                    who calls it on DTensors in our placements
    placements/rules        which of PyTorch's ops are right on our tensors   every other op: one would be silently wrong
    placements/placement    the placements as classes to load                 torch.load(weights_only=True) of our DTensors

No other module registers anything when it is imported, so a module can be read, reloaded and tested by itself. Tensors without our
placements go the same way after as before: each rule asks first whether a placement is ours.

What another package keeps (the attention functions of transformers) is registered when a model is parallelized, not here.
"""

from __future__ import annotations

from functools import cache

from dtensor_ring import _torch
from dtensor_ring.losses import chunked
from dtensor_ring.ops import operator, sdpa, sharding
from dtensor_ring.placements import placement, rules


@cache
def register() -> None:
    """Register everything, the first time it is called. A forked process has what its parent had, and this mark too."""
    operator.register()
    _torch.register()
    sharding.register()
    chunked.register()
    sdpa.register()
    rules.register()
    placement.register()
