"""Which of PyTorch's own ops a DTensor with our placements goes through: only those that are right wherever tokens lie.

An op on every element alone gives the same result in any order of elements, so ops marked pointwise work on DTensors of one
shape and one set of placements, and so do copies, casts and fresh tensors of the same shape, the same ops on lists of tensors,
and norms of whole tensors. Everything else raises: views, slices, reductions, matrix products and broadcasts would need to know
the layout, and a wrong answer must not pass for a right one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch._ops import OpOverload
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from dtensor_ring._torch import (
    DTensorSpec,
    OpSchema,
    OutputSharding,
    complete_cache_keys,
    install_rule,
    refuse_methods,
    specs_of,
    with_meta,
)
from dtensor_ring.comm.collectives import local_size
from dtensor_ring.placements.elementwise import (
    PLAIN_GRADIENTS,
    UNMARKED,
    aten,
    has_partial,
    is_elementwise,
    keeps_partial,
    listed,
    name_of,
    overloads,
    why_no_gradient,
    why_wrong,
)
from dtensor_ring.placements.lists import list_ops, list_rule, takes_lists
from dtensor_ring.placements.norms import NORMS, check_order, norm_spec, unreduced_norm
from dtensor_ring.placements.placement import SequencePlacement, dim_of, holds_sequence, split_of

# Fresh tensors whose size arguments are global: (position of the size, position of the strides).
_FRESH = {
    aten.new_empty_strided.default: (1, 2),
    aten.new_empty.default: (1, None),
    aten.new_zeros.default: (1, None),
    aten.new_ones.default: (1, None),
    aten.new_full.default: (1, None),
}
# Fresh tensors beside partial sums that may hold partial sums too: zeros, and what is not yet written.
_FRESH_PARTIAL = overloads("new_empty_strided", "new_empty", "new_zeros")
# The first ops that F.scaled_dot_product_attention calls on q, k and v where it does not take a backend as they are.
_OF_ATTENTION = {aten.transpose.int, aten.unsqueeze.default, aten.constant_pad_nd.default}
# The first ops of optimizers that read more of a parameter than one element at a time: LBFGS, Adafactor, Muon.
_OF_OPTIMIZERS = overloads("view", "new_zeros", "t", "transpose.int", "permute", "mm")
_INDEX_PUT = overloads("index_put", "index_put_")
# The question that torch.autograd.set_detect_anomaly(True) asks of every gradient, and the reading of its answer.
_ANY_TRUE = overloads("_is_any_true")


def is_ours(schema: OpSchema) -> bool:
    """Whether an op of PyTorch meets a placement of ours, or reads the value of a norm that is not yet reduced."""
    if schema.op.namespace == "dtensor_ring":
        return False  # attention has a rule of its own
    specs = specs_of(schema)
    if schema.op is aten._local_scalar_dense.default and unreduced_norm(specs):
        return True
    return any(holds_sequence(spec.placements) for spec in specs)


def rule(schema: OpSchema) -> OutputSharding | None:
    """The sharding of an op's result, or an error that says what to do instead.

    Raises:
        NotImplementedError: the op, or this mix of placements and shapes, has no result that is right in every layout.
    """
    if takes_lists(schema):
        return list_rule(schema)
    # As in x / x.norm(): used unreduced, each rank would divide by the norm of its own tokens.
    reduced = _with_scalars_reduced(schema)
    if reduced is not None:
        return OutputSharding(_sharding(reduced).output_spec, reduced, needs_redistribute=True)
    return _sharding(schema)


def _sharding(schema: OpSchema) -> OutputSharding:
    # a replicated scalar is the same beside every element; an empty tensor is the workspace that CPUs write and GPUs do not need
    specs = [spec for spec in specs_of(schema) if (spec.ndim and spec.shape != (0,)) or not spec.is_replicated()]
    _check_readable(schema, specs)
    first = specs[0]
    if any(spec.placements != first.placements or spec.mesh != first.mesh for spec in specs):
        raise NotImplementedError(
            f"{name_of(schema)} needs DTensors of the same placements, found {listed(specs)}: bring them together with "
            "dtensor_ring.redistribute"
        )
    if schema.op in _FRESH:
        return _fresh(schema, first)
    if schema.op in NORMS:
        return OutputSharding(with_meta(schema, norm_spec(schema, first, check_order(schema))))
    if schema.op in _ANY_TRUE:
        return _any_true(schema, first)
    if not is_elementwise(schema.op) and not _puts_one_value(schema):
        raise NotImplementedError(
            f"{name_of(schema)} has no rule for {listed(specs)}: work on x.to_local() with the positions of this rank, or move the "
            f"tensor first with dtensor_ring.redistribute or dtensor_ring.full_tensor{_hint(schema, specs)}"
        )
    # An operand of size 1 in the sequence dim lies on one rank, and the others would need it too.
    if any(spec.shape != first.shape for spec in specs):
        raise NotImplementedError(
            f"{name_of(schema)} does not broadcast {listed(specs)} of shapes {[tuple(s.shape) for s in specs]}"
        )
    if has_partial(specs) and not keeps_partial(schema):
        raise NotImplementedError(
            f"{name_of(schema)} on {listed(specs)}: reduce the partial sums first with dtensor_ring.redistribute"
        )
    return OutputSharding(_results(schema, first))


def _with_scalars_reduced(schema: OpSchema) -> OpSchema | None:
    """The op with its one-number operands that wait for a reduction (a norm, a sum) reduced first; None if it has none.

    Each is one all-reduce of one number, which PyTorch makes too where placements are its own.
    """
    waiting = [
        isinstance(argument, DTensorSpec) and not argument.ndim and not argument.is_replicated() for argument in schema.args_schema
    ]
    if not any(waiting) or schema.op is aten._local_scalar_dense.default:
        return None
    arguments = tuple(
        DTensorSpec(argument.mesh, (Replicate(),) * argument.mesh.ndim, tensor_meta=argument.tensor_meta)
        if waits and isinstance(argument, DTensorSpec)
        else argument
        for waits, argument in zip(waiting, schema.args_schema, strict=True)
    )
    return OpSchema(schema.op, arguments, schema.kwargs_schema)


def _check_readable(schema: OpSchema, specs: Sequence[DTensorSpec]) -> None:
    norm = unreduced_norm(specs)
    if norm is not None:
        raise NotImplementedError(
            f"{name_of(schema)} on {listed(specs)}: {listed([norm])} is the norm of each rank's own elements, not yet reduced. "
            "Take .full_tensor() of it first"
        )
    if schema.op is aten._local_scalar_dense.default:
        raise NotImplementedError(f"{name_of(schema)} on {listed(specs)}: read x.to_local() or dtensor_ring.full_tensor(x)")
    reason = why_wrong(schema)
    if reason is not None:
        raise NotImplementedError(f"{name_of(schema)} on {listed(specs)} {reason}")


def _results(schema: OpSchema, spec: DTensorSpec) -> DTensorSpec | tuple[DTensorSpec, ...]:
    """One spec for every result. All are laid out as the operands, but for a workspace that is not needed, and so empty."""
    count = len(schema.op._schema.returns)
    if count == 1:
        return with_meta(schema, DTensorSpec(spec.mesh, spec.placements))
    results = with_meta(schema, [DTensorSpec(spec.mesh, spec.placements)] * count)
    everywhere = (Replicate(),) * spec.mesh.ndim
    return tuple(
        DTensorSpec(spec.mesh, everywhere if each.shape == (0,) else each.placements, tensor_meta=each.tensor_meta)
        for each in results
    )


def _any_true(schema: OpSchema, spec: DTensorSpec) -> OutputSharding:
    """Whether an element is true: each rank's answer for its own elements, a partial value.

    Anomaly mode reads it with `.item()`, which gives the rank's own answer and sends nothing: a rank that finds a NaN in its
    part of a gradient raises, as it does for plain tensors under DDP, and no rank waits for others to look.
    """
    split = (Shard, SequencePlacement)
    placements = tuple(Partial("sum") if isinstance(placement, split) else placement for placement in spec.placements)
    return OutputSharding(with_meta(schema, DTensorSpec(spec.mesh, placements)))


def _puts_one_value(schema: OpSchema) -> bool:
    """Whether the op is `x[mask] = value` with a mask of the shape of x and one value."""
    if schema.op not in _INDEX_PUT:
        return False
    target, masks, value = schema.args_schema[:3]
    mask = masks[0] if isinstance(masks, (list, tuple)) and len(masks) == 1 else None
    if not (isinstance(target, DTensorSpec) and isinstance(mask, DTensorSpec) and isinstance(value, DTensorSpec)):
        return False
    # Positions in place of a mask, and one value for each masked element, count in an order that only the whole tensor has.
    is_mask = mask.tensor_meta is not None and mask.tensor_meta.dtype == torch.bool and mask.shape == target.shape
    return is_mask and not value.ndim and value.is_replicated()


def _fresh(schema: OpSchema, spec: DTensorSpec) -> OutputSharding:
    """A fresh tensor of the same global shape: the local op gets the local size."""
    if has_partial([spec]) and schema.op not in _FRESH_PARTIAL:
        raise NotImplementedError(
            f"{name_of(schema)} beside {listed([spec])}: on an axis of partial sums every rank's value would be added up. Reduce x "
            "first with dtensor_ring.redistribute"
        )
    size_at, stride_at = _FRESH[schema.op]
    size = _ints(schema.args_schema[size_at])
    if size != tuple(spec.shape):
        raise NotImplementedError(
            f"{name_of(schema)} of shape {size} beside {listed([spec])} of shape {tuple(spec.shape)}: only a tensor of the same "
            f"shape has the same layout. Make it with torch.distributed.tensor or beside x.to_local(){_hint(schema, [spec])}"
        )
    # The local op is called with the local size. Strides keep the order of dims in memory, so that a state lies as its parameter.
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
    # DTensor has one channel for arguments that a rule has changed: the schema of a redistribution, which here moves nothing.
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


def _hint(schema: OpSchema, specs: Sequence[DTensorSpec]) -> str:
    """What to do if the op is a step of PyTorch's attention or of an optimizer, which does not show in the op's arguments."""
    sequence = any(spec.ndim == 4 and isinstance(p, SequencePlacement) and p.dim == 2 for spec in specs for p in spec.placements)
    if schema.op not in _OF_ATTENTION or not sequence:
        return _OPTIMIZER_HINT if schema.op in _OF_OPTIMIZERS and not torch.is_grad_enabled() else ""
    return (
        ". If this is F.scaled_dot_product_attention: PyTorch took its math backend or pads the head dim, but over a sequence axis "
        "only flash attention runs. It needs one head dim for q, k and v, and equal numbers of heads or enable_gqa=True; on CPUs "
        "no dropout_p; on GPUs float16 or bfloat16, a head dim that is a multiple of 8 and no attn_mask. `with "
        "sdpa_kernel(SDPBackend.FLASH_ATTENTION)` names what is missing; or call dtensor_ring.ring_attention on (B, S, H, D)"
    )


_OPTIMIZER_HINT = (
    ". If this is an optimizer: Adafactor, LBFGS and Muon read more of a parameter than one element at a time, which needs "
    "parameters in Shard or Replicate placements; SGD, Adam, AdamW and the others that work on every element alone are right here"
)


def _no_storage(tensor: DTensor) -> str | None:
    if not holds_sequence(tensor.placements):
        return None
    return "a DTensor has no storage of its own. Call it on x.to_local(), which shares its memory"


def _refuse_plain_gradients(name: str, op: OpOverload) -> None:
    # A rule sees placements only. Whether an operand wants a gradient is seen where the op is called, so that is where it is asked.
    def check(_cls: type, _op: OpOverload, _types: Sequence[type], args: tuple[object, ...], _kwargs: dict[str, object]) -> object:
        ours = any(isinstance(x, DTensor) and holds_sequence(x.placements) for x in args)
        reason = why_no_gradient(name, args) if ours else None
        if reason is not None:
            raise NotImplementedError(reason)
        return NotImplemented

    torch.library.register_torch_dispatch(op, DTensor, check)


def register() -> None:
    """Puts the rules of this package before PyTorch's own, for DTensors in our placements."""
    install_rule(rule, is_ours)
    complete_cache_keys((*UNMARKED, *_INDEX_PUT, *_ANY_TRUE, *list_ops()))
    refuse_methods(("apply_", "share_memory_"), _no_storage)
    for name in PLAIN_GRADIENTS:
        for op in overloads(name):
            _refuse_plain_gradients(name, op)
