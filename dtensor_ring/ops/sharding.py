"""How DTensor placements of q, k and v become those of out and lse, and the sharding rules of our operators.

    axis    q, k, v          out          lse          what it is
    cp      Zigzag(1)        Zigzag(1)    Zigzag(2)    the sequence, attended over this axis' process group
    dp      Shard(0)         Shard(0)     Shard(0)     the batch
    tp      Shard(2)         Shard(2)     Shard(1)     heads
    any     Replicate()      Replicate()  Replicate()  the same work on every rank of the axis

q, k, v and out are (B, S, H, D), lse is (B, H, S). `Shard(1)` counts as `Contiguous(1)` where the lengths divide by the axis.
With q, k, v and out in PyTorch's order (B, H, S, D) the sequence is dim 2, heads are dim 1, and lse is placed as q.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from dtensor_ring._torch import DTensorSpec, OpSchema, OutputSharding, register_attention_rule
from dtensor_ring.comm import axis_name
from dtensor_ring.comm.collectives import Chunks
from dtensor_ring.ops.arguments import BSHD, Order
from dtensor_ring.ops.call import AttentionCall
from dtensor_ring.placements import SequencePlacement
from dtensor_ring.planning.layout import Layout

_BATCH = 0
_LSE_DIM = {_BATCH: 0, BSHD.sequence: 2, BSHD.heads: 1}


def attention_axis(
    mesh: DeviceMesh,
    q: Sequence[Placement],
    k: Sequence[Placement],
    v: Sequence[Placement],
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    order: Order = BSHD,
) -> tuple[int | None, Layout]:
    """The mesh axis over which attention runs, and the layout of the sequence on it, from the placements of q, k and v.

    Axis None means that every rank attends alone. Out is placed as q.

    Raises:
        ValueError: they do not fit together; the text names the mesh axis, what was given and what is needed.
        NotImplementedError: two mesh axes hold the sequence.
    """
    axis, layout = None, Layout("contiguous")
    for i, (a, b, c) in enumerate(zip(q, k, v, strict=True)):
        where = f"mesh axis {axis_name(mesh, i)}"
        given = f"q is {a!r}, k is {b!r}, v is {c!r}"
        if any(p.is_partial() for p in (a, b, c)):
            raise ValueError(
                f"{where}: {given}: attention needs whole values, reduce partial ones first with dtensor_ring.redistribute"
            )
        # One plan says where queries and keys lie. With k or v placed otherwise it would read other tokens than it means.
        if not a == b == c:
            raise ValueError(
                f"{where}: {given}: attention needs one placement for all three; bring them together with "
                f"dtensor_ring.redistribute(k, {list(q)!r}) or place q as k is"
            )
        if isinstance(a, SequencePlacement) or a == Shard(order.sequence):
            if axis is not None:
                raise NotImplementedError(
                    f"mesh axes {axis_name(mesh, axis)} and {axis_name(mesh, i)} both hold the sequence ({q[axis]!r} and {a!r}): "
                    "flatten them into one axis with mesh[...]._flatten()"
                )
            axis, layout = i, _layout_of(a, where, mesh.size(i), q_shape, k_shape, order)
        elif isinstance(a, Shard) and a.dim == order.heads:
            q_heads, k_heads = q_shape[order.heads], k_shape[order.heads]
            if q_heads % mesh.size(i) or k_heads % mesh.size(i):
                raise ValueError(
                    f"{where}: {a!r} splits heads over {mesh.size(i)} ranks, but q has {q_heads} and k has "
                    f"{k_heads} heads: both must divide"
                )
        elif not (isinstance(a, Replicate) or a == Shard(_BATCH)):
            raise ValueError(
                f"{where}: {a!r} cannot split the head dimension of {order.text()}: use ours or Shard({order.sequence}) for the "
                f"sequence, Shard(0) for the batch, Shard({order.heads}) for heads, or Replicate()"
            )
    return axis, layout


def _layout_of(
    placement: Placement, where: str, world: int, q_shape: Sequence[int], k_shape: Sequence[int], order: Order
) -> Layout:
    dim = order.sequence
    # `Shard` cuts by ceil(S / W), our layouts within one token: both are the same tokens only where the lengths divide.
    if not isinstance(placement, SequencePlacement):
        if q_shape[dim] % world or k_shape[dim] % world:
            raise ValueError(
                f"{where}: {placement!r} of lengths {q_shape[dim]} and {k_shape[dim]} over {world} ranks is not even, "
                f"and PyTorch splits it otherwise than Contiguous({dim}): move q, k and v there with dtensor_ring.redistribute"
            )
        return Layout("contiguous")
    if placement.dim != dim:
        what = {_BATCH: "batch", order.heads: "heads"}.get(placement.dim, "head")
        raise ValueError(
            f"{where}: {type(placement).__name__}(dim={placement.dim}) cannot split the {what} dimension of {order.text()}: the "
            f"sequence is dim {dim}, use {placement.moved_to(dim)!r}"
        )
    return placement.layout


def share_of(q: DTensor, dim: int) -> slice:
    """Give this rank's part of a dim of q that `Shard` splits; all of it where none does."""
    part, mesh = range(q.shape[dim]), q.device_mesh
    # Axis after axis, as DTensor splits a dim that several axes hold: each one splits the part that the axes before it left.
    for i, placement in enumerate(q.placements):
        if placement == Shard(dim):
            tokens = Chunks().tokens(len(part), mesh.size(i), mesh.get_local_rank(i))
            part = part[tokens.start : tokens.stop]
    return slice(part.start, part.stop)


def _of_lse(placement: Placement) -> Placement:
    if isinstance(placement, SequencePlacement):
        return placement.moved_to(_LSE_DIM[placement.dim])
    return Shard(_LSE_DIM[placement.dim]) if isinstance(placement, Shard) else placement


def _check(schema: OpSchema, q: DTensorSpec, k: DTensorSpec, v: DTensorSpec) -> None:
    # The operator was prepared from the DTensors; called directly, it may be handed others, and would compute nonsense of them.
    *_, call, group = schema.args_schema
    layout = AttentionCall.parse(str(call)).layout
    axis, needed = attention_axis(q.mesh, q.placements, k.placements, v.placements, q.shape, k.shape)
    if (layout if group else None) != (None if axis is None else needed):
        raise ValueError(
            f"{schema.op} was given the layout {layout} and group={group!r}, but its inputs are placed as {q.placements}"
        )


def attention_rule(schema: OpSchema) -> OutputSharding:
    """The sharding rule of `dtensor_ring::attention`: out, lse, and the replay, each rank's own."""
    q, k, v, sinks = schema.args_schema[:4]
    assert isinstance(q, DTensorSpec) and isinstance(k, DTensorSpec) and isinstance(v, DTensorSpec), "q, k, v are DTensors"
    _check(schema, q, k, v)
    _check_sinks(schema, q, sinks)
    # Each rank has a seed of its own, which only its own backward reads. DTensor has no placement for that; `Replicate` leaves the
    # local tensor as it is.
    own = (Replicate(),) * q.mesh.ndim
    return OutputSharding(
        tuple(DTensorSpec(q.mesh, placements) for placements in (q.placements, lse_placements(q.placements), own))
    )


def attention_backward_rule(schema: OpSchema) -> OutputSharding:
    """The sharding rule of `dtensor_ring::attention_backward`: dsinks is a part of the sum on axes that split queries."""
    dout, q, k, v, sinks, _alibi, out = schema.args_schema[:7]
    assert isinstance(q, DTensorSpec) and isinstance(k, DTensorSpec) and isinstance(v, DTensorSpec), "q, k, v are DTensors"
    assert isinstance(dout, DTensorSpec) and isinstance(out, DTensorSpec), "so are dout and out"
    _check(schema, q, k, v)
    _check_sinks(schema, q, sinks)
    assert dout.placements == out.placements == q.placements, "autograd brings dout to the placements of out"
    dsinks = sink_gradient_placements(q.placements) if isinstance(sinks, DTensorSpec) else (Replicate(),) * q.mesh.ndim
    grads = (q.placements, q.placements, q.placements, dsinks)
    return OutputSharding(tuple(DTensorSpec(q.mesh, placements) for placements in grads))


def sink_placements(q: Sequence[Placement]) -> tuple[Placement, ...]:
    """How sinks (H,) must lie beside q: split with the heads, whole on every other axis."""
    return tuple(Shard(0) if placement == Shard(BSHD.heads) else Replicate() for placement in q)


def lse_placements(q: Sequence[Placement]) -> tuple[Placement, ...]:
    """How lse (B, H, S) lies beside out, which is placed as q."""
    return tuple(_of_lse(placement) for placement in q)


def sink_gradient_placements(q: Sequence[Placement]) -> tuple[Placement, ...]:
    """How the gradient of sinks (H,) comes out: a part of the sum on every axis that splits queries."""
    return tuple(_of_dsinks(placement) for placement in q)


def _of_dsinks(placement: Placement) -> Placement:
    # Every query adds to the gradient of the sink of its head: an axis that splits queries, by batch or by sequence, has parts.
    if placement == Shard(BSHD.heads):
        return Shard(0)
    return Replicate() if isinstance(placement, Replicate) else Partial()


def _check_sinks(schema: OpSchema, q: DTensorSpec, sinks: object) -> None:
    if isinstance(sinks, DTensorSpec) and sinks.placements != sink_placements(q.placements):
        raise ValueError(
            f"{schema.op}: sinks are {sinks.placements}, beside q {q.placements} they must be {sink_placements(q.placements)}"
        )


def register() -> None:
    """Give DTensor the rules of both operators; what comes after the tensors is part of its cache's keys."""
    register_attention_rule(torch.ops.dtensor_ring.attention.default, attention_rule, static_argnum=6)
    register_attention_rule(torch.ops.dtensor_ring.attention_backward.default, attention_backward_rule, static_argnum=10)
