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

from typing import TYPE_CHECKING

from dtensor_ring.attention import ring_attention
from dtensor_ring.documents import Documents
from dtensor_ring.optional import optional
from dtensor_ring.placements import (
    Contiguous,
    ShardedBatch,
    Stripe,
    Zigzag,
    distribute_tensor,
    from_local,
    full_tensor,
    redistribute,
    shard_batch,
)
from dtensor_ring.replicas import average_gradients, check_replicas

if TYPE_CHECKING:
    from dtensor_ring.integrations.transformers import RingPlan, ring_plan

__version__ = "0.1.0"

__all__ = [
    "Contiguous",
    "Documents",
    "RingPlan",
    "ShardedBatch",
    "Stripe",
    "Zigzag",
    "average_gradients",
    "check_replicas",
    "distribute_tensor",
    "from_local",
    "full_tensor",
    "redistribute",
    "ring_attention",
    "ring_plan",
    "shard_batch",
]


def __getattr__(name: str) -> object:
    """`ring_plan` and `RingPlan` are imported when they are first used, since they need transformers."""
    if name in ("ring_plan", "RingPlan"):
        return optional("dtensor_ring.integrations.transformers", name)
    raise AttributeError(f"module 'dtensor_ring' has no attribute {name!r}")
