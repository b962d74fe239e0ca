"""Which of PyTorch's own ops a DTensor with our placements goes through: only those that are right wherever tokens lie.

An op on every element alone gives the same result in any order of elements, so ops marked pointwise work on DTensors of one
shape and one set of placements, and so do copies, casts and fresh tensors of the same shape. Everything else raises: views,
slices, reductions, matrix products and broadcasts would need to know the layout, and a wrong answer must not pass for a right one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed.tensor import Partial

from dtensor_ring._torch import DTensorSpec, OpSchema, OutputSharding, install_rule, specs_of, with_meta
from dtensor_ring.placements.moves import local_size
from dtensor_ring.placements.placement import SequencePlacement, dim_of, split_of

aten = torch.ops.aten

_ELEMENTWISE = {
    aten.clone.default,
    aten._to_copy.default,
    aten.copy_.default,
    aten.zero_.default,
    aten.fill_.Scalar,
    aten.masked_fill.Scalar,
    aten.masked_fill_.Scalar,
    aten.masked_fill.Tensor,
    aten.masked_fill_.Tensor,
    aten.empty_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.detach.default,
    aten.alias.default,
}
# Right also where an axis holds partial sums, as long as every operand holds them.
_LINEAR = {
    aten.clone.default,
    aten.detach.default,
    aten.alias.default,
    aten.add.Tensor,
    aten.add_.Tensor,
    aten.zeros_like.default,
}
# Fresh tensors whose size arguments are global: (position of the size, position of the strides).
_FRESH = {
    aten.new_empty_strided.default: (1, 2),
    aten.new_empty.default: (1, None),
    aten.new_zeros.default: (1, None),
    aten.new_ones.default: (1, None),
}


# The first ops that F.scaled_dot_product_attention calls on q, k and v where it does not take a backend as they are.
_OF_ATTENTION = {aten.transpose.int, aten.unsqueeze.default, aten.constant_pad_nd.default}


def is_ours(schema: OpSchema) -> bool:
    """Whether an op of PyTorch meets a placement of ours."""
    if schema.op.namespace == "dtensor_ring":
        return False
    return any(isinstance(placement, SequencePlacement) for spec in specs_of(schema) for placement in spec.placements)


def rule(schema: OpSchema) -> OutputSharding | None:
    """The sharding of an op's result, or an error that says what to do instead.

    Raises:
        NotImplementedError: the op, or this mix of placements and shapes, has no result that is right in every layout.
    """
    # a replicated scalar is the same beside every element
    specs = [spec for spec in specs_of(schema) if spec.ndim or not spec.is_replicated()]
    if schema.op is aten._local_scalar_dense.default:
        raise NotImplementedError(f"{_name(schema)} on {_listed(specs)}: read x.to_local() or dtensor_ring.full_tensor(x)")
    first = specs[0]
    if any(spec.placements != first.placements or spec.mesh != first.mesh for spec in specs):
        raise NotImplementedError(
            f"{_name(schema)} needs DTensors of the same placements, found {_listed(specs)}: bring them together with "
            "dtensor_ring.redistribute"
        )
    if schema.op in _FRESH:
        return _fresh(schema, first)
    if not _is_elementwise(schema):
        raise NotImplementedError(
            f"{_name(schema)} has no rule for {_listed(specs)}: work on x.to_local() with the positions of this rank, or move the "
            f"tensor first with dtensor_ring.redistribute or dtensor_ring.full_tensor{_hint(schema, specs)}"
        )
    if any(spec.shape != first.shape for spec in specs):
        raise NotImplementedError(
            f"{_name(schema)} does not broadcast {_listed(specs)} of shapes {[tuple(s.shape) for s in specs]}"
        )
    if not _keeps_sums(schema) and any(isinstance(placement, Partial) for placement in first.placements):
        raise NotImplementedError(
            f"{_name(schema)} on {_listed(specs)}: reduce the partial sums first with dtensor_ring.redistribute"
        )
    return OutputSharding(with_meta(schema, DTensorSpec(first.mesh, first.placements)))


def _is_elementwise(schema: OpSchema) -> bool:
    tags = schema.op.tags
    pure = torch.Tag.nondeterministic_seeded not in tags and torch.Tag.data_dependent_output not in tags
    return schema.op in _ELEMENTWISE or (torch.Tag.pointwise in tags and pure)


def _keeps_sums(schema: OpSchema) -> bool:
    """Whether the op on partial sums gives partial sums: copies of any kind of partial value, additions of sums alone."""
    if schema.op not in _LINEAR:
        return False
    if schema.op not in (aten.add.Tensor, aten.add_.Tensor):
        return True
    operands = [specs for specs in schema.args_schema[:2] if isinstance(specs, DTensorSpec) and specs.ndim]
    kinds = {p.reduce_op for spec in operands for p in spec.placements if isinstance(p, Partial)}
    return len(operands) == 2 and kinds <= {"sum", "avg"}


def _fresh(schema: OpSchema, spec: DTensorSpec) -> OutputSharding:
    """A fresh tensor of the same global shape: the local op gets the local size."""
    size_at, stride_at = _FRESH[schema.op]
    size = _ints(schema.args_schema[size_at])
    if size != tuple(spec.shape):
        raise NotImplementedError(f"{_name(schema)} of shape {size} beside {_listed([spec])} of shape {tuple(spec.shape)}")
    local, order = _local_shape(spec), range(len(size))
    args = list(schema.args_schema)
    args[size_at] = local
    if stride_at is not None:
        stride = _ints(schema.args_schema[stride_at])
        order = sorted(order, key=lambda dim: -stride[dim])
        step, strides = 1, [0] * len(size)
        for dim in reversed(order):
            strides[dim] = step
            step *= max(local[dim], 1)
        args[stride_at] = tuple(strides)
    rewritten = OpSchema(schema.op, tuple(args), schema.kwargs_schema)
    return OutputSharding(
        with_meta(schema, DTensorSpec(spec.mesh, spec.placements)),
        rewritten,
        needs_redistribute=True,
        use_val_from_redistribute_schema=True,
    )


def _ints(values: object) -> tuple[int, ...]:
    assert isinstance(values, (list, tuple)), "sizes and strides are sequences of ints"
    return tuple(values)


def _local_shape(spec: DTensorSpec) -> tuple[int, ...]:
    shape, mesh = list(spec.shape), spec.mesh
    for i, placement in enumerate(spec.placements):
        dim = dim_of(placement)
        if dim >= 0:
            shape[dim] = local_size(split_of(placement), shape[dim], mesh.size(i), mesh.get_local_rank(i))
    return tuple(shape)


def _name(schema: OpSchema) -> str:
    return str(schema.op).removesuffix(".default")


def _hint(schema: OpSchema, specs: Sequence[DTensorSpec]) -> str:
    """What to do if the op is a step of PyTorch's attention, which does not show in the op's arguments."""
    sequence = any(spec.ndim == 4 and isinstance(p, SequencePlacement) and p.dim == 2 for spec in specs for p in spec.placements)
    if schema.op not in _OF_ATTENTION or not sequence:
        return ""
    return (
        ". If this is F.scaled_dot_product_attention: PyTorch took its math backend or pads the head dim, but over a sequence axis "
        "only flash attention runs. It needs one head dim for q, k and v, and equal numbers of heads or enable_gqa=True; on CPUs "
        "no dropout_p; on GPUs float16 or bfloat16, a head dim that is a multiple of 8 and no attn_mask. `with "
        "sdpa_kernel(SDPBackend.FLASH_ATTENTION)` names what is missing; or call dtensor_ring.ring_attention on (B, S, H, D)"
    )


def _listed(specs: Sequence[DTensorSpec]) -> str:
    return " and ".join(dict.fromkeys(str(list(spec.placements)) for spec in specs))


install_rule(rule, is_ours)
