"""What surrounds pointwise ops: activations, masks, fresh tensors, methods on raw storage, and PyTorch's own placements."""

from __future__ import annotations

import programs
import pytest
import torch
import torch.distributed as dist
from helpers import kept_mesh, slow
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn import functional as F

from dtensor_ring import Contiguous, Stripe, Zigzag, distribute_tensor, from_local, full_tensor

REFUSALS = (NotImplementedError, RuntimeError, ValueError)


def _place(x):
    return distribute_tensor(x.clone(), kept_mesh(), [Zigzag(0)], src_data_rank=None).detach()


ACTIVATIONS = {
    name: getattr(F, name)
    for name in (
        *("elu", "leaky_relu", "softplus", "hardtanh", "relu6", "selu", "celu", "hardsigmoid", "hardswish", "mish", "logsigmoid"),
        *("softshrink", "hardshrink", "tanhshrink", "softsign", "gelu", "silu", "relu", "tanh", "sigmoid"),
    )
}
ACTIVATIONS |= {
    "threshold": lambda x: F.threshold(x, 0.1, -3.0),
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "elu of 0.3": lambda x: F.elu(x, 0.3),
    "softplus of 2": lambda x: F.softplus(x, 2, 0.5),
} | {
    f"{name} in place": lambda x, name=name: getattr(F, name)(x * 1, inplace=True)
    for name in ["elu", "leaky_relu", "hardtanh", "relu6", "selu", "celu", "hardsigmoid", "hardswish", "mish", "silu", "relu"]
}


def activations(placement, length: int):
    placements = [placement] if dist.get_world_size() == 2 else [Shard(0), placement]
    for name, act in ACTIVATIONS.items():
        x = (2 * torch.randn(2, length, 3, dtype=torch.float64)).requires_grad_()
        placed = distribute_tensor(x.detach(), kept_mesh(len(placements)), placements, src_data_rank=None).requires_grad_()
        weights = torch.randn(2, length, 3, dtype=torch.float64)
        result, wanted = act(placed), act(x)
        torch.testing.assert_close(full_tensor(result), wanted, msg=name)
        (wanted * weights).sum().backward()
        result.backward(distribute_tensor(weights, kept_mesh(len(placements)), placements, src_data_rank=None))
        assert placed.grad.placements == tuple(placements)
        torch.testing.assert_close(full_tensor(placed.grad), x.grad, msg=name)
    with pytest.raises(NotImplementedError, match=r"aten\._prelu_kernel on .* has a slope a channel"):
        F.prelu(placed, DTensor.from_local(torch.ones(1).double(), placed.device_mesh, [Replicate()] * len(placements)))


@pytest.mark.parametrize(
    ("length", "world", "placement"),
    [
        *((7, 2, Zigzag(1)), (1, 2, Stripe(1, block=2)), (7, 2, Contiguous(1)), (1, 4, Zigzag(1))),
        *(slow(length, 2, place) for length, place in ((1, Zigzag(1)), (7, Stripe(1, block=2)), (1, Contiguous(1)))),
        *(slow(7, 4, place) for place in (Zigzag(1), Stripe(1, block=2), Contiguous(1))),
        *(slow(1, 4, place) for place in (Stripe(1, block=2), Contiguous(1))),
    ],
    ids=repr,
)
def test_activations_and_their_gradients_are_those_of_whole_tensors(pools, placement, length, world):
    pools.run(world, activations, placement, length)


def numbers():
    whole = torch.arange(21).view(7, 3)
    x = _place(whole)
    for number in (2, 2.5, True, 3):
        for act in (torch.floor_divide, torch.add, torch.mul, torch.fmod):
            result, wanted = act(x, number), act(whole, number)
            assert result.dtype == result._spec.tensor_meta.dtype == wanted.dtype
            assert torch.equal(full_tensor(result), wanted)


def test_a_number_decides_on_the_dtype_of_the_result_each_time(pools):
    pools.run(2, numbers)


def masks():
    whole = torch.randn(7, 3)
    x = _place(whole)
    for value in (1.5, torch.tensor(2.0)):
        x[x > 0] = value
        whole[whole > 0] = value
        assert torch.equal(full_tensor(x), whole)
    for index in (_place(torch.ones(7, dtype=torch.bool)), _place(torch.zeros(7, 3, dtype=torch.long)), 0, slice(1)):
        with pytest.raises(NotImplementedError):
            x[index] = 1.0
    assert torch.equal(full_tensor(x), whole)


def test_a_value_is_set_where_a_mask_of_the_same_shape_is_true(pools):
    pools.run(2, masks)


def fresh(length: int) -> dict[str, str]:
    """Fresh tensors beside whole and partial ones: their value over all ranks, or why there is none."""
    world, mesh, shape = dist.get_world_size(), kept_mesh(2), (2, length)
    made = {
        "new_ones": (lambda x: x.new_ones(shape), 1.0),
        "new_full": (lambda x: x.new_full(shape, 3.0), 3.0),
        "new_zeros": (lambda x: x.new_zeros(shape), 0.0),
        "ones_like": (torch.ones_like, 1.0),
        "full_like": (lambda x: torch.full_like(x, 3.0), 3.0),
        "zeros_like": (torch.zeros_like, 0.0),
        "fill_": (lambda x: x.clone().fill_(3.0), 3.0),
        "zero_": (lambda x: x.clone().zero_(), 0.0),
        "new_empty": (lambda x: x.new_empty(shape).fill_(3.0), 3.0),
        "empty_like": (lambda x: torch.empty_like(x).fill_(3.0), 3.0),
        "new_empty_strided": (lambda x: x.new_empty_strided(shape, (1, 2)).copy_(x), None),
        "new_ones of another shape": (lambda x: x.new_ones((3,)), None),
        "new_full in float64": (lambda x: x.new_full(shape, 3.0, dtype=torch.float64), 3.0),
    }
    texts = {}
    for placement in (Replicate(), Shard(0), Partial(), Partial("max"), Partial("avg")):
        tokens = Zigzag(1).layout.local_length(length, world // 2, mesh.get_local_rank("cp"))
        local_shape = (1 if isinstance(placement, Shard) else 2, tokens)
        x = from_local(torch.full(local_shape, 5.0), mesh, [placement, Zigzag(1)], length=length)
        for name, (make, value) in made.items():
            try:
                result = make(x)
            except REFUSALS as refusal:
                texts[f"{name} {placement}"] = str(refusal)
                continue
            assert result.to_local().shape == x.to_local().shape
            wanted = full_tensor(x) if value is None else torch.full(shape, value, dtype=result.dtype)
            assert torch.equal(full_tensor(result), wanted), f"{name} beside {placement}"
    return texts


@pytest.mark.parametrize("length", [5, 1])
def test_fresh_tensors_have_their_value_or_are_refused_beside_partial_sums(pools, length):
    for texts in pools.run(4, fresh, length):
        beside = {entry.rsplit(" ", 1)[0] for entry in texts if "P(" in entry}
        assert {"new_ones", "new_full", "ones_like", "full_like", "fill_", "new_empty", "empty_like"} <= beside
        assert not beside & {"zeros_like", "new_zeros", "new_empty_strided"}
        assert {entry for entry in texts if "P(" not in entry} == {f"new_ones of another shape {p}" for p in ("R", "S(0)")}
        assert "every rank's value would be added up" in texts[f"new_ones {Partial()}"]
        assert "shape (3,) beside" in texts[f"new_ones of another shape {Shard(0)}"]


RAW = """
import os, sys
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.device_mesh import init_device_mesh
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
stock = {name: getattr(DTensor, name) for name in ("apply_", "share_memory_")}
import dtensor_ring
mesh = init_device_mesh("cpu", (1,))
x = torch.arange(6.0).view(2, 3)
mine = dtensor_ring.distribute_tensor(x, mesh, [dtensor_ring.Zigzag(1)]).detach()
theirs = distribute_tensor(x, mesh, [Shard(1)])
for act in (
    lambda: mine.apply_(lambda value: value + 1),
    lambda: mine.share_memory_(),
    lambda: mine.map_(mine, lambda a, b: a + b),
    lambda: mine.map2_(mine, mine, lambda a, b, c: a + b),
    lambda: mine.tolist(),
    lambda: mine.numpy(),
):
    try:
        print("gave", act())
    except (NotImplementedError, RuntimeError) as refusal:
        print(refusal)
print(torch.equal(dtensor_ring.full_tensor(mine), x))
print(torch.equal(mine.to_local().apply_(lambda value: value + 1), x + 1))
# a DTensor of PyTorch's own placements, and a plain tensor, reach the method they always did
reached = []
for name in stock:
    setattr(torch.Tensor, name, lambda self, *args, name=name: reached.append((name, type(self).__name__)))
    getattr(torch.ones(2), name)()
print(all(getattr(DTensor, name).__wrapped__ is stock[name] for name in stock), reached)
"""


def test_methods_on_raw_storage_raise_where_the_process_died():
    done = programs.run(RAW)
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr}"
    apply, share, *others, kept, local, reached = done.stdout.splitlines()
    assert apply.startswith("x.apply_ on [Zigzag(1)]: a DTensor has no storage of its own. Call it on x.to_local()")
    assert share.startswith("x.share_memory_ on [Zigzag(1)]: a DTensor has no storage of its own")
    assert len(others) == 4
    assert all("not supported for tensor subclasses" in text for text in others)
    assert (kept, local) == ("True", "True")
    assert reached == "True [('apply_', 'Tensor'), ('share_memory_', 'Tensor')]"


def stock_placements() -> list[str]:
    """What PyTorch's own placements did before, they do."""
    mesh = kept_mesh()
    whole = torch.arange(15).view(5, 3)
    x = torch.distributed.tensor.distribute_tensor(whole, mesh, [Shard(0)])
    values = torch.distributed.tensor.distribute_tensor(whole.double(), mesh, [Shard(0)])
    assert torch.equal((x << 1).full_tensor(), whole)  # PyTorch's own fault
    assert torch.equal(torch.copysign(values, -values).full_tensor(), torch.copysign(whole.double(), -whole.double()))
    assert torch.equal((values / values.norm()).full_tensor(), whole.double() / whole.double().norm())
    assert torch.equal(torch._foreach_add([x, x], 1)[1].full_tensor(), whole + 1)
    partial = DTensor.from_local(torch.ones(2), mesh, [Partial()])
    return [
        str(values.norm().placements),
        str(torch._foreach_norm([values])[0].placements),
        str(values.new_ones(5, 3).placements),
        str(values.sum().placements),
        str(partial.new_ones(2).placements),
    ]


def test_norms_lists_and_fresh_tensors_of_stock_placements_are_as_ever(pools):
    norm, list_norm, ones, total, beside = pools.run(2, stock_placements)[0]
    assert norm == list_norm == "(_NormPartial(2),)"
    assert ones == "(Shard(dim=0),)"
    assert total == "(Partial(sum),)"
    assert beside == "(Replicate(),)"
