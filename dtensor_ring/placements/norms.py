"""Norms of whole tensors: each token lies on exactly one rank, so the norm is the norm of the ranks' norms in any layout.

    x over three ranks    rank 0: 1 2    rank 1: 2    rank 2: 4    local norms 5**.5, 2, 4    norm (5 + 4 + 16)**.5 = 5

The result is a DTensor that PyTorch reduces where it is used: `full_tensor()`, arithmetic, `torch.stack`. Nothing is sent before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from dtensor_ring._torch import DTensorSpec, OpSchema, PartialNorm
from dtensor_ring.comm.collectives import local_size
from dtensor_ring.placements.elementwise import listed, name_of, overloads
from dtensor_ring.placements.placement import SequencePlacement, dim_of, split_of

NORMS = overloads("linalg_vector_norm")
LIST_NORMS = overloads("_foreach_norm.Scalar")


def check_order(schema: OpSchema) -> float:
    """The order p of a norm op.

    Raises:
        NotImplementedError: the norm is not that of the whole tensor.
    """
    # The schema leaves out trailing arguments that have their default value.
    order, dims, keepdim = (*schema.args_schema[1:], *(2, None, False)[len(schema.args_schema) - 1 :])[:3]
    if schema.op in NORMS and (dims not in (None, [], ()) or keepdim):
        raise NotImplementedError(
            f"{name_of(schema)} over dims {dims} with keepdim={keepdim}: only the norm of a whole tensor is right in every layout. "
            "Work on x.to_local(), or move the tensor first with dtensor_ring.redistribute or dtensor_ring.full_tensor"
        )
    assert isinstance(order, (int, float)), "PyTorch makes the order of a norm a number"
    return float(order)


def norm_spec(schema: OpSchema, spec: DTensorSpec, order: float) -> DTensorSpec:
    """Where the norm of one tensor lies: a part on every rank of the axes that split the tensor.

    Raises:
        NotImplementedError: an axis holds partial sums, or a rank holds nothing that a norm of this order could be taken of.
    """
    if (math.isinf(order) or order < 0) and _some_rank_is_empty(spec):
        raise NotImplementedError(
            f"{name_of(schema)} of order {order} on {listed([spec])} of shape {tuple(spec.shape)}: some ranks hold no elements, "
            "and nothing has no norm of this order. Take it of dtensor_ring.full_tensor(x)"
        )
    return DTensorSpec(spec.mesh, tuple(_reduced(schema, spec, placement, order) for placement in spec.placements))


def _reduced(schema: OpSchema, spec: DTensorSpec, placement: Placement, order: float) -> Placement:
    if isinstance(placement, (Shard, SequencePlacement)):
        return PartialNorm(order)  # no token lies on two ranks, so no element counts twice
    if isinstance(placement, Replicate):
        return placement
    advice = "reduce the partial sums first with dtensor_ring.redistribute" if isinstance(placement, Partial) else "no rule"
    raise NotImplementedError(f"{name_of(schema)} on {listed([spec])}: {advice}")


def _some_rank_is_empty(spec: DTensorSpec) -> bool:
    """Whether some rank holds no element, asked of the global shape alone, so that all ranks answer the same."""
    smallest = list(spec.shape)
    for axis, placement in enumerate(spec.placements):
        dim, world = dim_of(placement), spec.mesh.size(axis)
        if dim >= 0:
            smallest[dim] = min(local_size(split_of(placement), smallest[dim], world, rank) for rank in range(world))
    return 0 in smallest


def unreduced_norm(specs: Sequence[DTensorSpec]) -> DTensorSpec | None:
    """The first spec that is a norm before its reduction."""
    return next((spec for spec in specs for placement in spec.placements if isinstance(placement, PartialNorm)), None)
