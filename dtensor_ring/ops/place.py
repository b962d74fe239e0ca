"""Over which ranks an attention runs, how tokens lie on them, and which part of batch and heads this rank has.

mesh ("dp": 2, "cp": 4), q placed [Shard(0), Zigzag(1)]     group of "cp", layout zigzag, origin (first batch row of "dp", 0)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from dtensor_ring.cache import CacheOfEach
from dtensor_ring.comm import Transport, axis_name, transport_along, transport_of
from dtensor_ring.ops.arguments import BSHD, Order, check_tensors
from dtensor_ring.ops.sharding import attention_axis, share_of
from dtensor_ring.planning.layout import Layout

Shape = tuple[int, ...]


class Place(NamedTuple):
    """Where one attention happens.

    Attributes:
        group: the name of the process group whose ranks share the sequence, "" for this rank alone.
        axis: what errors call that group, such as "mesh axis 'cp'".
        world: ranks in the group.
        layout: how tokens are spread over them.
        q_shape: (B, Sq, H, D) of all queries, over all ranks of the mesh.
        k_shape: (B, Sk, Hk, D).
        v_shape: (B, Sk, Hk, Dv).
        origin: first batch row and first query head of this rank's part.
        transport: how the group's ranks talk; None for this rank alone, and while a compiler traces.
    """

    group: str
    axis: str
    world: int
    layout: Layout
    q_shape: Shape
    k_shape: Shape
    v_shape: Shape
    origin: tuple[int, int] = (0, 0)
    transport: Transport | None = None


class _Spread(NamedTuple):
    """What of a place follows from placements and shapes, and so can be remembered."""

    axis: int | None
    name: str
    world: int
    layout: Layout
    shapes: tuple[Shape, Shape, Shape]
    origin: tuple[int, int]


_ALONE = Layout("contiguous")
_SPREAD_BYTES = 2 << 10  # of placements and shapes that are remembered, with what they are known by
# Nothing here depends on a process group, so equal meshes may share.
_SPREADS = CacheOfEach("places of attention", most_bytes=256 << 10, most_entries=128)


def place_alone(q: Tensor, k: Tensor, v: Tensor) -> Place:
    """The place of plain tensors (B, S, H, D) that hold whole sequences."""
    check_tensors(q, k, v)
    return Place("", "", 1, _ALONE, q.shape, k.shape, v.shape)


def place_in_group(
    tensors: tuple[Tensor, Tensor, Tensor], group: dist.ProcessGroup, layout: Layout, lengths: tuple[int, int] | None = None
) -> Place:
    """The place of this rank's q, k, v (B, S/W, H, D) in a process group.

    Args:
        tensors: q, k and v.
        group: the ranks that share the sequence.
        layout: how tokens are spread over them.
        lengths: global tokens of queries and of keys; None where every rank has as many.
    """
    q, k, v = tensors
    check_tensors(q, k, v)
    # While a compiler traces, nothing is compared or sent, and a transport is no value that a graph could hold.
    transport = None if torch.compiler.is_compiling() else transport_of(group)
    axis, world = ("this group", dist.get_world_size(group)) if transport is None else (transport.axis, transport.world)
    q_length, k_length = lengths or (world * q.shape[1], world * k.shape[1])
    whole_q, whole_k, whole_v = ((x.shape[0], n, *x.shape[2:]) for x, n in ((q, q_length), (k, k_length), (v, k_length)))
    return Place(group.group_name, axis, world, layout, whole_q, whole_k, whole_v, transport=transport)


def place_of(q: DTensor, k: DTensor, v: DTensor, order: Order = BSHD) -> Place:
    """The place of DTensors, read off their placements.

    Raises:
        ValueError, TypeError, NotImplementedError: shapes, dtypes, meshes or placements that do not fit together.
    """
    mesh = q.device_mesh
    spread = _spread(q, k, v, order) if torch.compiler.is_compiling() else _remembered(q, k, v, order)
    if spread.axis is None:
        return Place("", "", 1, spread.layout, *spread.shapes, spread.origin)
    group = mesh.get_group(spread.axis).group_name
    transport = None if torch.compiler.is_compiling() else transport_along(mesh, spread.axis)
    return Place(group, spread.name, spread.world, spread.layout, *spread.shapes, spread.origin, transport)


def _remembered(q: DTensor, k: DTensor, v: DTensor, order: Order) -> _Spread:
    """As `_spread`, worked out once for placements and shapes. While a compiler traces, shapes are symbols, which are no keys."""
    mesh = q.device_mesh
    # Whether the three lie on one mesh is asked by identity, which costs nothing; meshes that are only equal are compared below,
    # each time.
    if k.device_mesh is not mesh or v.device_mesh is not mesh:
        return _spread(q, k, v, order)
    known, mine = _SPREADS.of(mesh), mesh.get_coordinate() or ()
    # Equal meshes share what is known, also one that was made for another rank, before process groups were made again.
    key = q.placements, k.placements, v.placements, q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, order, *mine
    entry = known.find(key)
    if entry is not None:
        return entry[0]  # pyrefly: ignore[bad-return]  # nothing else is kept there
    spread = _spread(q, k, v, order)
    known.keep(key, spread, _SPREAD_BYTES)
    return spread


def _spread(q: DTensor, k: DTensor, v: DTensor, order: Order) -> _Spread:
    check_tensors(q, k, v, order)
    mesh = q.device_mesh
    if k.device_mesh != mesh or v.device_mesh != mesh:
        raise ValueError(f"q, k and v must lie on one mesh, found {mesh}, {k.device_mesh} and {v.device_mesh}")
    axis, layout = attention_axis(mesh, q.placements, k.placements, v.placements, q.shape, k.shape, order)
    dims = 0, order.sequence, order.heads, 3
    whole = tuple(tuple(x.shape[dim] for dim in dims) for x in (q, k, v))
    name, world = ("", 1) if axis is None else (f"mesh axis {axis_name(mesh, axis)}", mesh.size(axis))
    # In the whole batch: dropout masks hash batch row and head, and slopes and documents are given for all of them.
    origin = share_of(q, 0).start, share_of(q, order.heads).start
    return _Spread(axis, name, world, layout, (whole[0], whole[1], whole[2]), origin)
