"""Every op that PyTorch marks pointwise, in all its variants, against plain tensors: right, or raises."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.distributed as dist
from helpers import kept_mesh, slow
from torch.distributed.tensor import DTensor

from dtensor_ring import Contiguous, Zigzag, distribute_tensor, full_tensor
from dtensor_ring._torch import ops_named

REFUSALS = (NotImplementedError, RuntimeError, ValueError)
DTYPES = [torch.float64, torch.int64, torch.bool]


def _place(x):
    return distribute_tensor(x.clone(), kept_mesh(), [Zigzag(0)], src_data_rank=None).detach()


def _pointwise_ops():
    for op in ops_named(""):
        name, kind = op._schema.name.removeprefix("aten::"), op._overloadname
        shifts = name.startswith("__") and any(str(argument.type) == "Tensor" for argument in op._schema.arguments)
        twin = getattr(getattr(torch.ops.aten, name.removesuffix("_"), None), kind, op)
        tagged = torch.Tag.pointwise in op.tags or torch.Tag.pointwise in twin.tags
        if tagged or shifts or name.removesuffix("_") in {"hardswish", "log_sigmoid_forward"}:
            yield op


def _arguments(op, dtype):
    """Operands for the op's schema: tensors, numbers, and keywords; `out` tensors apart."""
    generator = torch.Generator().manual_seed(0)
    args, kwargs, outs = [], {}, []
    for argument in op._schema.arguments:
        kind = str(argument.type)
        if argument.is_out:
            outs.append(argument.name)
            continue
        needed = not argument.has_default_value() or (kind.startswith("Optional[number") and argument.name == "min")
        if kind == "Tensor":
            is_mask = argument.name in ("mask", "condition")
            value = torch.rand(5, 3, generator=generator, dtype=torch.float64) * 0.8 + 0.1
            value = value > 0.5 if is_mask or dtype == torch.bool else value if dtype.is_floating_point else (value * 7).long()
        elif kind in ("number", "Optional[number]", "float"):
            value = 0.3 if dtype.is_floating_point else 2
        else:
            value = {"int": 1, "bool": True, "str": "floor"}.get(kind)
        if not needed:
            continue
        if argument.kwarg_only:
            kwargs[argument.name] = value
        else:
            args.append(value)
    return args, kwargs, outs


def _run(op, arguments, place, grad):
    """Results, operands after the call and gradients of every operand."""
    args, kwargs, outs = arguments
    leaves = [place(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64]
    if grad:
        for tensor in tensors:
            tensor.requires_grad_()
        operands = [leaf * 1 if isinstance(leaf, torch.Tensor) and leaf.requires_grad else leaf for leaf in leaves]
    else:
        operands = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    first = next(arg for arg in args if isinstance(arg, torch.Tensor))
    kwargs = {name: place(value) if isinstance(value, torch.Tensor) else value for name, value in kwargs.items()}
    targets = {name: place(torch.zeros(5, 3, dtype=first.dtype)) for name in outs}
    results = op(*operands, **kwargs, **targets)
    results = results if isinstance(results, (tuple, list)) else [results]
    gradients = []
    if grad:
        used = [result for result in results if isinstance(result, torch.Tensor) and result.requires_grad]
        weights = torch.rand(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        if used:
            gradients = torch.autograd.grad(used[:1], tensors, [place(weights)], allow_unused=True)
    after = [operand for operand in operands if isinstance(operand, torch.Tensor)]
    return [*results, *after, *targets.values()], list(gradients)


def _differences(ours, plain, what):
    for index, (mine, wanted) in enumerate(zip(ours, plain, strict=True)):
        if not isinstance(wanted, torch.Tensor):
            same = mine == wanted if wanted is not None else mine is None
        else:
            same = (
                isinstance(mine, DTensor)
                and mine.dtype == wanted.dtype == mine._spec.tensor_meta.dtype
                and mine.placements == (Zigzag(0),)
                and mine.shape == wanted.shape
                and torch.allclose(mine.to_local(), _place(wanted).to_local(), rtol=1e-12, atol=1e-13, equal_nan=True)
            )
        if not same:
            yield f"{what} {index}"


def sweep(dtype, grad: bool, inference: bool):
    """Each op on one of the ranks: it must not wait for another, so that no rank waits for ever."""
    right, raised, wrong = [], {}, []
    for op in list(_pointwise_ops())[dist.get_rank() :: dist.get_world_size()]:
        arguments = _arguments(op, dtype)
        if not any(isinstance(arg, torch.Tensor) for arg in arguments[0]):
            continue
        with torch.inference_mode(inference):
            try:
                wanted, wanted_gradients = _run(op, arguments, torch.clone, grad)
            except (RuntimeError, TypeError, IndexError):
                continue  # plain tensors have no such op in this dtype
            try:
                results, gradients = _run(op, arguments, _place, grad)
            except REFUSALS as refusal:
                raised[str(op)] = str(refusal)
                continue
        differences = [*_differences(results, wanted, "result"), *_differences(gradients, wanted_gradients, "gradient")]
        (wrong if differences else right).append(f"{op} {differences}" if differences else str(op))
    return right, raised, wrong


# What is refused by name, each with what to call instead.
REFUSED = {"__lshift__", "__rshift__", "sgn_", "eq_", "ne_", "lt_", "le_", "gt_", "ge_"}
# Refused where the gradient of an operand is wanted that autograd makes as a plain tensor.
WITHOUT_GRADIENT = {"copysign", "copysign_", "nextafter", "nextafter_"}
# Random numbers, answers that depend on data, a workspace that only CPUs write, a sum over rows in the gradient.
WITHOUT_RULE = {"bernoulli", "rrelu", "rrelu_", "native_dropout", "equal", "log_sigmoid_forward.output", "mvlgamma", "mvlgamma_"}


def _unexpected(raised, *others):
    known = REFUSED.union(WITHOUT_RULE, *others)
    names = [str(op).removeprefix("aten.") for op in raised]
    return {name: text for name, text in zip(names, raised.values(), strict=True) if not {name, name.split(".")[0]} & known}


@pytest.mark.parametrize(
    ("dtype", "inference"), [(torch.float64, False), (torch.int64, False), slow(torch.int64, True), (torch.bool, False)], ids=str
)
def test_every_pointwise_op_is_right_or_raises(pools, dtype, inference):
    for right, raised, wrong in pools.run(2, sweep, dtype, False, inference):
        assert not wrong
        assert not _unexpected(raised)
        assert len(right) > 100


def test_the_gradient_of_every_pointwise_op_is_right_or_raises(pools):
    for right, raised, wrong in pools.run(2, sweep, torch.float64, True, False):
        # autograd makes the zero gradient of sgn as a plain tensor, whatever the placements; sgn stays for the gradient of abs
        assert wrong in ([], ["aten.sgn.default ['gradient 0']"])
        assert not _unexpected(raised, WITHOUT_GRADIENT)
        assert len(right) > 100


OPERATORS = ["and_", "or_", "xor", "lshift", "rshift", "add", "sub", "mul", "floordiv", "mod", "pow", "eq", "lt", "ge"]
OPERATORS += [f"i{name.removesuffix('_')}" for name in OPERATORS[:10]] + ["invert", "neg", "pos", "abs"]


def operators(mode: str) -> dict[str, str]:
    """What each of Python's operators says on our tensors, where it does not give what it gives on plain ones."""
    texts = {}
    modes = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
    for name in OPERATORS:
        act = getattr(operator, name)
        for dtype in (torch.int64, torch.int32, torch.bool):
            for other in ("tensor", "number", "one"):
                whole = (torch.arange(15).view(5, 3) % 6 + 1).to(dtype)
                if name in ("invert", "neg", "pos", "abs"):
                    second = []
                else:
                    number = {"number": True if dtype == torch.bool else 2, "one": torch.tensor(1, dtype=dtype)}.get(other)
                    second = [whole.flip(0) if number is None else number]
                try:
                    wanted = act(whole.clone(), *second)
                except (RuntimeError, TypeError):
                    continue
                with modes[mode]():
                    mine = _place(whole)
                    try:
                        result = act(mine, *[_place(x) if other == "tensor" else x for x in second])
                    except REFUSALS as refusal:
                        texts[name] = str(refusal)
                        continue
                    assert result.dtype == wanted.dtype, name
                    assert torch.equal(full_tensor(result), wanted), f"{name} of {dtype} with a {other} in mode {mode}"
                    if name.startswith("i") and name != "invert":
                        assert torch.equal(full_tensor(mine), wanted), f"{name} of {dtype} left its operand as it was"
    return texts


@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference"])
def test_pythons_operators_are_right_and_shifts_say_what_to_call(pools, mode):
    for texts in pools.run(2, operators, mode):
        assert set(texts) == {"lshift", "rshift"}
        assert "call torch.bitwise_left_shift(x, y)" in texts["lshift"]
        assert "call torch.bitwise_right_shift(x, y)" in texts["rshift"]


def substitutes():
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    y[0, 0] = -0.0
    mine, sign = _place(x).requires_grad_(), _place(y)
    plain = x.clone().requires_grad_()
    wanted = torch.copysign(plain, y)
    result = torch.where(torch.signbit(sign), -mine.abs(), mine.abs())
    assert torch.equal(full_tensor(result), wanted)
    wanted.backward(torch.ones_like(wanted))
    result.backward(torch.ones_like(result))
    assert torch.equal(full_tensor(mine.grad), plain.grad)
    mine.grad = None
    direct = torch.copysign(mine, sign)
    assert torch.equal(full_tensor(direct), wanted)
    direct.backward(torch.ones_like(direct))
    assert torch.equal(full_tensor(mine.grad), plain.grad)
    wanting = sign.detach().requires_grad_()
    for act in (
        lambda: torch.copysign(mine, wanting),
        lambda: torch.nextafter(mine, sign),
        lambda: torch.nextafter(mine.detach(), wanting),
        lambda: _place(x).copysign_(wanting),
    ):
        with pytest.raises(
            NotImplementedError, match=r"autograd makes as a plain tensor, which then meets DTensors: pass .*y\.detach\(\)"
        ):
            act()
    with torch.no_grad():
        assert torch.equal(full_tensor(torch.nextafter(mine, wanting)), torch.nextafter(x, y))
    assert torch.equal(full_tensor(_place(x).copysign_(sign)), torch.copysign(x, y))
    with pytest.raises(NotImplementedError, match=r"use x.copy_\(x > y\)"):
        _place(x).gt_(sign)
    assert torch.equal(full_tensor(_place(x).copy_(_place(x) > sign)), x.clone().gt_(y))
    counts = _place(torch.arange(15).view(5, 3))
    assert torch.equal(full_tensor(torch.bitwise_left_shift(counts, 1)), torch.arange(15).view(5, 3) << 1)
    assert torch.equal(full_tensor(torch.bitwise_right_shift(counts, counts)), torch.arange(15).view(5, 3) >> full_tensor(counts))


def test_what_the_errors_say_to_call_instead_is_right(pools):
    pools.run(2, substitutes)


def result_of_other_placements():
    x = _place(torch.ones(5, 3))
    target = distribute_tensor(torch.zeros(5, 3), kept_mesh(), [Contiguous(0)], src_data_rank=None).detach()
    torch.add(x, x, out=_place(torch.zeros(5, 3)))  # a decision that is kept must not hold for other targets
    for act in (torch.add, torch.atan2, torch.bitwise_or):
        operand = x.long() if act is torch.bitwise_or else x
        with pytest.raises(NotImplementedError, match=r"found \[Zigzag\(0\)\] and \[Contiguous\(0\)\]"):
            act(operand, operand, out=target.to(operand.dtype))
    assert target.placements == (Contiguous(0),)


def test_a_result_is_not_written_into_other_placements(pools):
    pools.run(2, result_of_other_placements)
