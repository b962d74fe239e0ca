"""Which ops of PyTorch work on every element alone, by name: these are right wherever tokens lie.

PyTorch marks most of them (`torch.Tag.pointwise`). The tables below add the ones that it leaves unmarked, and take out the ones
that are marked and still wrong on DTensors. Names that a version of PyTorch lacks are passed over.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch._ops import OpOverload
from torch.distributed.tensor import Partial

from dtensor_ring._torch import DTensorSpec, OpSchema

aten = torch.ops.aten


def overloads(*names: str) -> frozenset[OpOverload]:
    """The ops of these names ("add.Tensor", "clone" for "clone.default") that this PyTorch has."""
    pairs = [(name.partition(".")[0], name.partition(".")[2] or "default") for name in names]
    return frozenset(
        getattr(getattr(aten, op), kind) for op, kind in pairs if hasattr(aten, op) and hasattr(getattr(aten, op), kind)
    )


UNMARKED = overloads(
    "clone",
    "_to_copy",
    "copy_",
    "zero_",
    "fill_.Scalar",
    "masked_fill.Scalar",
    "masked_fill_.Scalar",
    "masked_fill.Tensor",
    "masked_fill_.Tensor",
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
    "detach",
    "alias",
    "floor_divide",
    "floor_divide.Scalar",
    "floor_divide_.Scalar",
    "floor_divide_.Tensor",
    "__irshift__.Scalar",
    "__irshift__.Tensor",
    # Activations and their gradients. Each reads the gradient, and the input or result, of its own element, and numbers that are
    # the same for all elements (slopes, thresholds). Those with a parameter a channel (prelu), with noise (rrelu) or that pair
    # elements (glu) are not among them.
    "elu",
    "elu_backward",
    "gelu",
    "hardshrink",
    "hardshrink_backward",
    "hardsigmoid",
    "hardsigmoid_backward",
    "hardswish",
    "hardswish.out",
    "hardswish_backward",
    "hardtanh",
    "hardtanh_backward",
    "leaky_relu",
    "leaky_relu_backward",
    "log_sigmoid_forward",
    "log_sigmoid_backward",
    "mish",
    "mish_backward",
    "silu",
    "softplus",
    "softplus_backward",
    "softshrink",
    "softshrink_backward",
    "threshold",
    "threshold_backward",
)
# Ops that work on every element, or nearly, and are wrong on DTensors of any placements.
_SHIFTS = "is taken for an in-place op by DTensor, which would give x back unchanged: call torch.bitwise_{}_shift(x, y)"
_BITS = "is taken for an in-place op by DTensor, which would give x back unchanged: call torch.bitwise_{}(x, y)"
_PLAIN_GRADIENT = "has a zero gradient that autograd makes as a plain tensor, which then meets DTensors: "
_WRONG = {
    "__lshift__": _SHIFTS.format("left"),
    "__rshift__": _SHIFTS.format("right"),
    # Dispatch meets these in inference mode only, and tries the bitwise_ op itself when they are refused.
    "__and__": _BITS.format("and"),
    "__or__": _BITS.format("or"),
    "__xor__": _BITS.format("xor"),
    "_prelu_kernel": "has a slope a channel: where one slope will do, write torch.where(x > 0, x, slope * x) with slope a number",
    # `sgn` is of this kind too, but the gradient of `abs` calls it.
    "sgn_": _PLAIN_GRADIENT + "use x.sign_()",
    **{
        f"{name}_": f"{_PLAIN_GRADIENT}use x.copy_(x {sign} y)"
        for name, sign in {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}.items()
    },
}
# Ops with an operand whose gradient is zero and made as a plain tensor: the operand's place, and what to write instead. They are
# right as long as it wants no gradient, which is known where an op is called and not where its placements are worked out.
PLAIN_GRADIENTS = {
    "copysign.Tensor": ((1,), "pass y.detach(), whose gradient is zero in any case"),
    "copysign_.Tensor": ((1,), "pass y.detach(), whose gradient is zero in any case"),
    "nextafter": ((0, 1), "pass x.detach() and y.detach(), whose gradients are zero in any case"),
    "nextafter_": ((0, 1), "pass x.detach() and y.detach(), whose gradients are zero in any case"),
}


def why_no_gradient(name: str, operands: Sequence[object]) -> str | None:
    """Why an op of `PLAIN_GRADIENTS` is refused on these operands; None where none of them wants the gradient."""
    places, advice = PLAIN_GRADIENTS[name]
    wanted = torch.is_grad_enabled() and any(getattr(operands[i], "requires_grad", False) for i in places if i < len(operands))
    return f"aten.{name} {_PLAIN_GRADIENT}{advice}" if wanted else None


# Zeros stay zeros under every reduction, and a copy holds what its source holds.
_ANY_PARTIAL = overloads("clone", "detach", "alias", "zeros_like", "empty_like")
_SUMS_ALONE = overloads("add.Tensor", "add_.Tensor")
_FROM_EQUAL = overloads("copy_")


def name_of(schema: OpSchema) -> str:
    """An op as error messages name it."""
    return str(schema.op).removesuffix(".default")


def listed(specs: Iterable[DTensorSpec]) -> str:
    """The placements of some DTensors, each once."""
    return " and ".join(dict.fromkeys(str(list(spec.placements)) for spec in specs))


def why_wrong(schema: OpSchema) -> str | None:
    """Why an op that looks as if it worked on every element alone does not on DTensors, and what to call; None for others."""
    name = name_of(schema).removeprefix("aten.")
    return _WRONG.get(name.split(".")[0]) or _WRONG.get(name)


def is_elementwise(op: OpOverload) -> bool:
    """Whether an op on tensors of one shape gives each element from the elements at the same place alone."""
    return _is_marked(op) or any(_is_marked(twin) for twin in overloads(_out_of_place(op)))


def _out_of_place(op: OpOverload) -> str:
    """The name of the op of which this one is the in-place variant: PyTorch marks not all of these."""
    return f"{op._schema.name.removeprefix('aten::').removesuffix('_')}.{op._overloadname}"


def _is_marked(op: OpOverload) -> bool:
    pure = torch.Tag.nondeterministic_seeded not in op.tags and torch.Tag.data_dependent_output not in op.tags
    return op in UNMARKED or (torch.Tag.pointwise in op.tags and pure)


def keeps_partial(schema: OpSchema) -> bool:
    """Whether the op on partial values gives partial values: copies of any kind, additions of sums alone."""
    if schema.op in _ANY_PARTIAL:
        return True
    operands = [spec for spec in schema.args_schema[:2] if isinstance(spec, DTensorSpec) and spec.ndim]
    kinds = {p.reduce_op for spec in operands for p in spec.placements if isinstance(p, Partial)}
    if schema.op in _FROM_EQUAL:
        return len(operands) == 2
    return schema.op in _SUMS_ALONE and len(operands) == 2 and kinds <= {"sum", "avg"}


def has_partial(specs: Sequence[DTensorSpec]) -> bool:
    """Whether any of the tensors waits for a reduction over some axis."""
    return any(isinstance(placement, Partial) for spec in specs for placement in spec.placements)
