"""Optimizers, gradient clipping and norms on parameters in our placements: as on whole tensors, or refused before they act."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import pytest
import torch
import torch.distributed as dist
from helpers import kept_mesh, slow
from torch import nn, optim
from torch.distributed.tensor import Replicate, Shard
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm

from dtensor_ring import Contiguous, Stripe, Zigzag, distribute_tensor, full_tensor

OPTIMIZERS = {
    "SGD": {},
    "SGD momentum": {"momentum": 0.9, "weight_decay": 0.01},
    "SGD nesterov": {"momentum": 0.9, "nesterov": True},
    "Adam": {"weight_decay": 0.01},
    "AdamW": {},
    "AdamW amsgrad": {"amsgrad": True},
    "RMSprop": {},
    "RMSprop centered": {"momentum": 0.5, "centered": True},
    "Adagrad": {},
    "Adadelta": {},
    "Adamax": {},
    "NAdam": {},
    "RAdam": {},
    "ASGD": {},
    "Rprop": {},
}
FUSED = ["SGD", "SGD momentum", "SGD nesterov", "Adam", "AdamW", "AdamW amsgrad", "Adagrad"]
SHAPES = [(7, 3), (5, 4), (9,), (1, 2)]
PLACEMENTS = [[Zigzag(0)], [Stripe(1, block=2)], [Contiguous(0)], [Zigzag(0)]]


def _place(x, placements=None, mesh=None):
    return distribute_tensor(x.clone(), mesh or kept_mesh(), placements or [Zigzag(0)], src_data_rank=None).detach()


def _parameters():
    """Whole parameters and the same ones in our placements."""
    wholes = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    placed = [nn.Parameter(_place(x, placements)) for x, placements in zip(wholes, PLACEMENTS, strict=True)]
    return [nn.Parameter(x.clone()) for x in wholes], placed


def _draw_gradients(wholes, placed):
    for whole, mine, placements in zip(wholes, placed, PLACEMENTS, strict=True):
        whole.grad = torch.randn_like(whole)
        mine.grad = _place(whole.grad, placements)


def five_steps(name: str, options: dict[str, object]):
    wholes, placed = _parameters()
    make = getattr(optim, name.split()[0])
    alone, ours = (make(parameters, lr=0.05, **OPTIMIZERS[name], **options) for parameters in (wholes, placed))
    for _ in range(5):
        _draw_gradients(wholes, placed)
        alone.step()
        ours.step()
    for whole, mine, placements in zip(wholes, placed, PLACEMENTS, strict=True):
        assert mine.placements == tuple(placements)
        torch.testing.assert_close(full_tensor(mine.detach()), whole.detach(), rtol=1e-12, atol=1e-14)


SOME = [(2, True), (2, False), (4, None)]


def some_kinds(values: Iterable[object], number: int) -> list[object]:
    """Each value with so many of `SOME`, in turn; with all numbers of ranks and kinds of loops as slow tests."""
    cells = [(value, *kind) for value in values for kind in itertools.product((2, 4), (None, True, False))]
    by_default = {(value, *SOME[(i + j) % 3]) for i, value in enumerate(values) for j in range(number)}
    return [cell if cell in by_default else slow(*cell) for cell in cells]


@pytest.mark.parametrize(("name", "world", "foreach"), some_kinds(OPTIMIZERS, 2))
def test_an_optimizer_on_shares_is_the_optimizer_on_whole_tensors(pools, name, foreach, world):
    pools.run(world, five_steps, name, {"foreach": foreach})


@pytest.mark.parametrize(
    ("name", "world"), [cell if cell[1] == 2 or cell[0] == "AdamW" else slow(*cell) for cell in itertools.product(FUSED, (2, 4))]
)
def test_a_fused_optimizer_on_shares_is_the_optimizer_on_whole_tensors(pools, name, world):
    pools.run(world, five_steps, name, {"fused": True})


def refused_steps(name: str, options: dict[str, object], unequal: bool) -> str:
    wholes, placed = _parameters()
    wholes, placed = wholes[:2], placed[:2]
    for whole, mine in zip(wholes, placed, strict=True):
        mine.grad = _place(torch.randn_like(whole), mine.placements)
    if unequal:  # a decision that is kept for equal placements must not hold for others
        copies = [nn.Parameter(mine.detach().clone()) for mine in placed]
        for copy, mine in zip(copies, placed, strict=True):
            copy.grad = mine.grad
        getattr(optim, name)(copies, lr=0.05, **options).step()
    for whole, mine in zip(wholes, placed, strict=True):
        mine.grad = _place(torch.randn_like(whole), [Contiguous(0)] if unequal else mine.placements)
    optimizer = getattr(optim, name)(placed, lr=0.05, **options)
    try:
        optimizer.step(*[lambda: torch.zeros(())] if name == "LBFGS" else [])
    except (NotImplementedError, RuntimeError) as refusal:
        for whole, mine in zip(wholes, placed, strict=True):
            assert torch.equal(full_tensor(mine.detach()), whole), f"{name} changed parameters before it raised"
        return str(refusal)
    raise AssertionError(f"{name} stepped")


@pytest.mark.parametrize("name", ["LBFGS", "Adafactor", "Muon"])
def test_an_optimizer_that_reads_more_than_an_element_is_refused_and_changes_nothing(pools, name):
    if not hasattr(optim, name):
        pytest.skip(f"this PyTorch has no {name}")
    for text in pools.run(2, refused_steps, name, {}, False):
        assert "has no rule for [Zigzag(0)]" in text or "beside [Zigzag(0)]" in text
        assert "Adafactor, LBFGS and Muon" in text
        assert "Shard or Replicate placements" in text


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_gradients_of_other_placements_are_refused_and_change_nothing(pools, name, options):
    for text in pools.run(2, refused_steps, name, options, True):
        assert "found [Zigzag(0)] and [Contiguous(0)]" in text or "found [Contiguous(0)] and [Zigzag(0)]" in text
        assert "dtensor_ring.redistribute" in text


def numbers_in_lists():
    """Steps and factors kept as tensors, as optimizers with capturable=True have them, on either side."""
    whole, factor = torch.randn(7, 3), torch.tensor(2.0)
    placed, number = _place(whole), _place(factor, [Replicate()])
    for left, right in (([number], [placed]), ([placed], [number]), ([factor], [placed]), ([placed], [factor])):
        (product,) = torch._foreach_mul(left, right)
        assert product.placements == (Zigzag(0),)
        assert torch.equal(full_tensor(product), whole * 2)


def test_numbers_in_lists_are_the_same_beside_every_element(pools):
    pools.run(2, numbers_in_lists)


def clipped(order: float, foreach: bool | None):
    line, grid = kept_mesh(1), kept_mesh(2)
    lists = [
        [(line, [Zigzag(0)]), (line, [Stripe(0, block=2)])],
        [(line, [Zigzag(0)]), (line, [Replicate()]), (line, [Shard(0)])],
        [(grid, [Shard(1), Zigzag(0)]), (grid, [Replicate(), Contiguous(1)]), (grid, [Zigzag(0), Shard(1)])],
        [(line, [Contiguous(1)])],
    ]
    for places in lists:
        wholes = [nn.Parameter(torch.randn(7, 5, dtype=torch.float64)) for _ in places]
        placed = [nn.Parameter(_place(x.detach(), p, mesh)) for x, (mesh, p) in zip(wholes, places, strict=True)]
        for whole, mine, (mesh, placements) in zip(wholes, placed, places, strict=True):
            whole.grad = torch.randn_like(whole)
            mine.grad = _place(whole.grad, placements, mesh)
        total = get_total_norm([mine.grad for mine in placed], order, foreach=foreach)
        torch.testing.assert_close(total.full_tensor(), get_total_norm([x.grad for x in wholes], order))
        norm = clip_grad_norm_(placed, 0.1, order, error_if_nonfinite=True, foreach=foreach)
        torch.testing.assert_close(norm.full_tensor(), clip_grad_norm_(wholes, 0.1, order))
        for whole, mine in zip(wholes, placed, strict=True):
            torch.testing.assert_close(full_tensor(mine.grad), whole.grad)
        clip_grad_value_(placed, 0.01, foreach=foreach)
        for whole, mine in zip(wholes, placed, strict=True):
            torch.testing.assert_close(full_tensor(mine.grad), whole.grad.clamp(-0.01, 0.01))


@pytest.mark.parametrize(("order", "world", "foreach"), some_kinds([2.0, 1.0, 3.0, math.inf], 1))
def test_clipping_sees_the_norm_of_whole_gradients(pools, order, foreach, world):
    pools.run(world, clipped, order, foreach)


def norms(length: int):
    whole = torch.randn(length, 3, dtype=torch.float64, requires_grad=True)
    placed = _place(whole.detach(), [Zigzag(0)]).requires_grad_()
    for order in (2, 1, 3, 0, 0.5) + ((-1, math.inf, -math.inf) if length >= dist.get_world_size() else ()):
        expected = torch.linalg.vector_norm(whole, order)
        torch.testing.assert_close(torch.linalg.vector_norm(placed, order).full_tensor(), expected)
        torch.testing.assert_close(torch._foreach_norm([placed], order)[0].full_tensor(), expected)
    torch.testing.assert_close(full_tensor(placed / placed.norm()), whole / whole.norm())
    torch.testing.assert_close((placed.norm() + placed.norm()).full_tensor(), 2 * whole.norm())
    (2 * whole.norm()).backward()
    (2 * placed.norm()).full_tensor().backward()
    torch.testing.assert_close(full_tensor(placed.grad), whole.grad)


@pytest.mark.parametrize(("length", "world"), [(7, 2), slow(7, 4), slow(2, 2), (2, 4), (1, 2), slow(1, 4)])
def test_a_norm_of_shares_is_the_norm_of_the_whole_tensor(pools, length, world):
    pools.run(world, norms, length)


def refused_norms(length: int) -> list[str]:
    placed = _place(torch.randn(length, 3), [Zigzag(0)])
    texts = []
    for act in (
        lambda: placed.norm().item(),
        lambda: float(placed.norm()),
        lambda: placed.norm(dim=1),
        lambda: torch.linalg.vector_norm(placed, keepdim=True),
        lambda: torch.linalg.vector_norm(placed, math.inf),
        lambda: torch._foreach_norm([placed], -math.inf),
    ):
        try:
            texts.append(f"gave {act()}")
        except (NotImplementedError, RuntimeError) as refusal:
            texts.append(str(refusal))
    return texts


def test_a_norm_that_would_be_of_one_ranks_part_is_refused_on_every_rank(pools):
    for item, number, dim, keepdim, largest, smallest in pools.run(4, refused_norms, 3):
        assert "not yet reduced. Take .full_tensor() of it first" in item
        assert number == item
        assert "over dims [1]" in dim
        assert "keepdim=True" in keepdim
        assert "some ranks hold no elements" in largest
        assert "some ranks hold no elements" in smallest
