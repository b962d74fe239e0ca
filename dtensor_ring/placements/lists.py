"""Ops on lists of tensors, which optimizers and gradient clipping call: `torch._foreach_*` and the fused optimizer steps.

    _foreach_addcdiv_([w0, w1], [m0, m1], [v0, v1])    place 0: w0, m0, v0    place 1: w1, m1, v1

Each place of the lists is an op of its own, so placements must agree within a place; places may differ. An op on lists is right
here if the op it repeats works on every element alone, or is the norm of a whole tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch._ops import OpOverload

from dtensor_ring._torch import DTensorSpec, OpSchema, OutputSharding, ops_named, with_meta
from dtensor_ring.placements.elementwise import aten, has_partial, is_elementwise, listed, name_of, overloads
from dtensor_ring.placements.norms import LIST_NORMS, check_order, norm_spec, unreduced_norm

# One step of an optimizer for each place: parameter, gradient and states at the same element, and a step count that all share.
_FUSED_STEPS = overloads(
    "_fused_adagrad_",
    "_fused_adagrad_.tensor_lr",
    "_fused_adam_",
    "_fused_adam_.tensor_lr",
    "_fused_adamw_",
    "_fused_adamw_.tensor_lr",
    "_fused_sgd_",
    "_fused_sgd_.tensor_lr",
)
_COPIES = overloads("_foreach_copy_")


def takes_lists(schema: OpSchema) -> bool:
    """Whether the op works on lists of tensors place by place."""
    return _name(schema).startswith("_foreach_") or schema.op in _FUSED_STEPS


def list_ops() -> list[OpOverload]:
    """Every op on lists of tensors that this PyTorch has."""
    return [*_FUSED_STEPS, *ops_named("_foreach_")]


def list_rule(schema: OpSchema) -> OutputSharding:
    """The placements of the results of an op on lists.

    Raises:
        NotImplementedError: the op, or the placements and shapes at some place of the lists, have no result that is right.
    """
    places = _places(schema)
    if schema.op in LIST_NORMS:
        order = check_order(schema)
        return OutputSharding(with_meta(schema, [norm_spec(schema, specs[0], order) for specs in places]))
    if schema.op not in _FUSED_STEPS | _COPIES and not _repeats_elementwise(schema):
        raise NotImplementedError(
            f"{name_of(schema)} has no rule for {listed(spec for specs in places for spec in specs)}: work on x.to_local(), or "
            "move the tensors first with dtensor_ring.redistribute or dtensor_ring.full_tensor"
        )
    operands = [_operand_at(schema, place, specs) for place, specs in enumerate(places)]
    # Even where nothing is returned the places were checked above: the op writes into its operands.
    if not schema.op._schema.returns:  # in place
        return OutputSharding(None)
    return OutputSharding(with_meta(schema, [DTensorSpec(spec.mesh, spec.placements) for spec in operands]))


def _name(schema: OpSchema) -> str:
    return schema.op._schema.name.removeprefix("aten::")


def _repeats_elementwise(schema: OpSchema) -> bool:
    """Whether the op that is repeated for each place (`add` for `_foreach_add_`) works on every element alone."""
    # Judged by the repeated op, so that a new `_foreach_` op of PyTorch is right or refused without an entry here.
    name = _name(schema).removeprefix("_foreach_").removesuffix("_")
    return any(_is_elementwise_on_tensors(each) for each in (name, f"{name}_") if hasattr(aten, each))


def _is_elementwise_on_tensors(name: str) -> bool:
    packet = getattr(aten, name)
    ops = [getattr(packet, kind) for kind in packet.overloads() if not kind.endswith("out")]
    # "max.default" reduces though "max.other" does not: every overload counts. Those on Python numbers are of TorchScript
    ops = [op for op in ops if any(str(argument.type) == "Tensor" for argument in op._schema.arguments)]
    return bool(ops) and all(is_elementwise(op) for op in ops)


def _places(schema: OpSchema) -> list[list[DTensorSpec]]:
    """The tensors at each place of the lists. What lies outside of lists must be one number for all."""
    lists: list[Sequence[DTensorSpec]] = []
    for argument in (*schema.args_schema, *schema.kwargs_schema.values()):
        if isinstance(argument, DTensorSpec):
            _check_scalar(schema, argument)
        elif isinstance(argument, (list, tuple)) and argument and all(isinstance(each, DTensorSpec) for each in argument):
            lists.append([each for each in argument if isinstance(each, DTensorSpec)])
    counts = {len(specs) for specs in lists}
    if len(counts) != 1:
        raise NotImplementedError(f"{name_of(schema)} on lists of {sorted(counts)} DTensors: the lists must be equally long")
    return [list(specs) for specs in zip(*lists, strict=True)]


def _check_scalar(schema: OpSchema, spec: DTensorSpec) -> None:
    if spec.is_replicated() and torch.Size(spec.shape).numel() == 1:
        return
    advice = "take .full_tensor() of it first" if unreduced_norm([spec]) else "it must be one number, the same on all ranks"
    raise NotImplementedError(f"{name_of(schema)} with a tensor of shape {tuple(spec.shape)} on {listed([spec])}: {advice}")


def _operand_at(schema: OpSchema, place: int, specs: Sequence[DTensorSpec]) -> DTensorSpec:
    """What the result at a place of the lists is laid out as: all tensors there are, but for numbers that all ranks share.

    Raises:
        NotImplementedError: placements or shapes differ, or partial sums wait for their reduction.
    """
    # A step count or a learning rate is the same beside every element, whatever the layout of the others.
    tensors = [spec for spec in specs if spec.ndim or not spec.is_replicated()]
    first = tensors[0] if tensors else specs[0]
    if any(spec.placements != first.placements or spec.mesh != first.mesh for spec in tensors):
        raise NotImplementedError(
            f"{name_of(schema)} needs equal placements at each place of its lists, found {listed(tensors)} at place {place}: bring "
            "them together with dtensor_ring.redistribute (for an optimizer: parameter, gradient and state)"
        )
    if any(spec.shape != first.shape for spec in tensors):
        raise NotImplementedError(
            f"{name_of(schema)} does not broadcast {listed(tensors)} of shapes {[tuple(s.shape) for s in tensors]} at place {place}"
        )
    if has_partial(specs):
        raise NotImplementedError(
            f"{name_of(schema)} on {listed(tensors)} at place {place}: reduce the partial sums first with dtensor_ring.redistribute"
        )
    return first
