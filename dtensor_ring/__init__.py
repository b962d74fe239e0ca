"""Sequence parallelism as DTensor placements: the layout of a sequence over ranks is part of the tensor's type.

    from torch.distributed.device_mesh import init_device_mesh
    from dtensor_ring import Zigzag, distribute_tensor, full_tensor, ring_attention

    mesh = init_device_mesh("cuda", (4,), mesh_dim_names=("cp",))
    q, k, v = (distribute_tensor(x, mesh, [Zigzag(1)]) for x in (q, k, v))       # (B, S, H, D)
    out = ring_attention(q, k, v)                                                 # placed as q, differentiable

Words used throughout:
    axis      an axis of the device mesh; dim is a dim of a tensor
    rank      a place in the process group of one axis, world the number of places
    length    global tokens of a sequence; local is this rank's share of it
    layout    which tokens a rank holds, and in what order it stores them
    run       tokens that a rank stores one after another: start, count, stride
    document  a part of a packed sequence that attends to itself only
    tile      a box of scores under a band; plan: the tiles a rank computes, and what it exchanges for them
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

# `python -m dtensor_ring plan` works on integers and must not wait two seconds for torch. While Python looks for the module that
# `-m` names, sys.argv is that module's arguments after a first "-m", so the name itself stands just before them in sys.orig_argv.
# Only then are public names imported when they are first used. Every other process imports them here, and registers with PyTorch
# what they need: compiled graphs and saved DTensors name our operators and placements, and may be loaded before either is used.
if TYPE_CHECKING or not (sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv) :][:1] == ["dtensor_ring"]):
    from dtensor_ring import _register
    from dtensor_ring.attention import ring_attention
    from dtensor_ring.checkpointing import save_attention
    from dtensor_ring.clipping import clip_gradients
    from dtensor_ring.data import ShardedBatch, sequence_sampler, shard_batch
    from dtensor_ring.estimation import Estimate, estimate
    from dtensor_ring.losses import chunked_cross_entropy
    from dtensor_ring.placements import (
        Contiguous,
        Stripe,
        Zigzag,
        distribute_tensor,
        from_local,
        full_tensor,
        redistribute,
    )
    from dtensor_ring.planning.cost_model import CostModel
    from dtensor_ring.planning.documents import Documents
    from dtensor_ring.replicas import average_gradients, check_replicas
    from dtensor_ring.tools.explain import explain
    from dtensor_ring.tools.verification import Verification

    _register.register()

if TYPE_CHECKING:
    from dtensor_ring.integrations.trainer import RingTrainerMixin
    from dtensor_ring.integrations.transformers import RingPlan, ring_plan
    from dtensor_ring.integrations.verify import verify

__version__ = "0.1.0"

__all__ = [
    "Contiguous",
    "CostModel",
    "Documents",
    "Estimate",
    "RingPlan",
    "RingTrainerMixin",
    "ShardedBatch",
    "Stripe",
    "Verification",
    "Zigzag",
    "average_gradients",
    "check_replicas",
    "chunked_cross_entropy",
    "clip_gradients",
    "distribute_tensor",
    "estimate",
    "explain",
    "from_local",
    "full_tensor",
    "redistribute",
    "ring_attention",
    "ring_plan",
    "save_attention",
    "sequence_sampler",
    "shard_batch",
    "verify",
]


_ROOMS = {
    "CostModel": "dtensor_ring.planning.cost_model",
    "Documents": "dtensor_ring.planning.documents",
    "Estimate": "dtensor_ring.estimation",
    "ShardedBatch": "dtensor_ring.data",
    "sequence_sampler": "dtensor_ring.data",
    "shard_batch": "dtensor_ring.data",
    "RingPlan": "dtensor_ring.integrations.transformers",
    "RingTrainerMixin": "dtensor_ring.integrations.trainer",
    "average_gradients": "dtensor_ring.replicas",
    "check_replicas": "dtensor_ring.replicas",
    "chunked_cross_entropy": "dtensor_ring.losses",
    "clip_gradients": "dtensor_ring.clipping",
    "estimate": "dtensor_ring.estimation",
    "explain": "dtensor_ring.tools.explain",
    "ring_attention": "dtensor_ring.attention",
    "ring_plan": "dtensor_ring.integrations.transformers",
    "Verification": "dtensor_ring.tools.verification",
    "verify": "dtensor_ring.integrations.verify",
    "save_attention": "dtensor_ring.checkpointing",
}


def __getattr__(name: str) -> object:
    """What is imported when first used: names that need transformers, such as `ring_plan`; all names for the command line."""
    if name not in __all__:
        raise AttributeError(f"module 'dtensor_ring' has no attribute {name!r}")
    from dtensor_ring._register import register
    from dtensor_ring.optional import optional

    register()
    return optional(_ROOMS.get(name, "dtensor_ring.placements"), name)
