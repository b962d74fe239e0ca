"""Every generic op on a DTensor with our placements is either right or raises, forward and backward: none is silently wrong."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from helpers import slow
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn import functional as F

from dtensor_ring import Contiguous, Stripe, Zigzag, distribute_tensor, full_tensor

OPS = {
    "add": lambda x: x + x,
    "sub": lambda x: x - 2 * x,
    "mul": lambda x: x * x,
    "div": lambda x: x / (x.abs() + 1),
    "scalar add": lambda x: x + 1.5,
    "scalar mul": lambda x: 3 * x,
    "neg": lambda x: -x,
    "abs": lambda x: x.abs(),
    "exp": lambda x: x.exp(),
    "sqrt": lambda x: x.abs().sqrt(),
    "pow": lambda x: x**2,
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "clamp": lambda x: x.clamp(-1, 1),
    "where": lambda x: torch.where(x > 0, x, -x),
    "maximum": lambda x: torch.maximum(x, -x),
    "lerp": lambda x: torch.lerp(x, -x, 0.3),
    "clone": lambda x: x.clone(),
    "contiguous": lambda x: x.contiguous(),
    "double": lambda x: x.double(),
    "zeros_like": torch.zeros_like,
    "ones_like": lambda x: torch.ones_like(x) * x,
    "detach": lambda x: x.detach(),
    "sum": lambda x: x.sum(),
    "sum dim 1": lambda x: x.sum(1),
    "sum dim 2": lambda x: x.sum(2),
    "mean": lambda x: x.mean(),
    "max": lambda x: x.max(),
    "amax dim": lambda x: x.amax(1),
    "norm": lambda x: x.norm(),
    "var": lambda x: x.var(1),
    "cumsum": lambda x: x.cumsum(1),
    "softmax dim 1": lambda x: x.softmax(1),
    "softmax dim 2": lambda x: x.softmax(2),
    "logsumexp": lambda x: x.logsumexp(1),
    "argmax": lambda x: x.argmax(1),
    "sort": lambda x: x.sort(1).values,
    "topk": lambda x: x.topk(1, 1).values,
    "view": lambda x: x.view(x.shape[0], -1),
    "view heads": lambda x: x.view(x.shape[0], x.shape[1], 2, 2),
    "reshape": lambda x: x.reshape(-1, 4),
    "flatten": lambda x: x.flatten(0, 1),
    "unflatten": lambda x: x.unflatten(2, (2, 2)),
    "transpose": lambda x: x.transpose(1, 2),
    "permute": lambda x: x.permute(2, 1, 0),
    "squeeze": lambda x: x.squeeze(0),
    "unsqueeze": lambda x: x.unsqueeze(0),
    "expand": lambda x: x.unsqueeze(0).expand(2, *x.shape),
    "slice seq": lambda x: x[:, 1:],
    "slice last": lambda x: x[..., :2],
    "select": lambda x: x[:, 0],
    "index_select": lambda x: x.index_select(1, torch.tensor([0, 1])),
    "gather ints": lambda x: x[:, [0, 1]],
    "roll": lambda x: x.roll(1, 1),
    "flip": lambda x: x.flip(1),
    "pad": lambda x: F.pad(x, (0, 0, 0, 1)),
    "cat": lambda x: torch.cat([x, x], 1),
    "cat last": lambda x: torch.cat([x, x], 2),
    "stack": lambda x: torch.stack([x, x]),
    "chunk": lambda x: x.chunk(2, 2)[0],
    "split": lambda x: x.split(2, 2)[1],
    "unbind": lambda x: x.unbind(0)[0],
    "matmul": lambda x: x @ x.transpose(1, 2),
    "bmm": lambda x: torch.bmm(x, x.transpose(1, 2)),
    "einsum": lambda x: torch.einsum("bsd,btd->bst", x, x),
    "linear": lambda x: F.linear(x, _replicated(torch.arange(8.0).view(2, 4).to(x.dtype), x)),
    "broadcast mul": lambda x: x * _replicated(torch.arange(4.0).to(x.dtype), x),
    "broadcast row": lambda x: x * _replicated(torch.arange(float(x.shape[1]))[:, None].to(x.dtype), x),
    "rms_norm": lambda x: F.rms_norm(x, (4,)),
    "layer_norm": lambda x: F.layer_norm(x, (4,)),
    "sdpa": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None], is_causal=True),
    "tril": lambda x: x.tril(),
    "masked_fill": lambda x: x.masked_fill(x > 0, 0.0),
    "cross_entropy": lambda x: F.cross_entropy(x.flatten(0, 1), x.flatten(0, 1).softmax(1)),
}
PLACEMENTS = {
    "zigzag": lambda: [Zigzag(1)],
    "stripe": lambda: [Stripe(1, block=2)],
    "contiguous": lambda: [Contiguous(1)],
    "dp zigzag": lambda: [Shard(0), Zigzag(1)],
    "zigzag tp": lambda: [Zigzag(1), Shard(2)],
    "rep zigzag": lambda: [Replicate(), Zigzag(1)],
}


def _replicated(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if not isinstance(like, DTensor):
        return x
    return DTensor.from_local(x, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)


def _value(x: torch.Tensor) -> torch.Tensor:
    return full_tensor(x) if isinstance(x, DTensor) else x


def ops_of(name: str, every: bool) -> list[str]:
    """The ops that a placement is tried on: all, or every second one; other placements of its kind have the others."""
    return list(OPS) if every else list(OPS)[list(PLACEMENTS).index(name) % 2 :: 2]


def sweep(name: str, length: int, every: bool) -> tuple[list[str], list[str], list[str]]:
    """Ops that were right, that raised, and that were silently wrong."""
    placements = PLACEMENTS[name]()
    world = dist.get_world_size()
    shape, names = ((world,), ("cp",)) if len(placements) == 1 else ((2, world // 2), ("a", "b"))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    right, raised, wrong = [], [], []
    for op_name in ops_of(name, every):
        op = OPS[op_name]
        torch.manual_seed(0)
        x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
        wanted, failed = None, False
        try:
            wanted = op(x)
        except (RuntimeError, IndexError):
            failed = True
        placed = distribute_tensor(x.detach(), mesh, placements, src_data_rank=None).detach().requires_grad_()
        try:
            found = op(placed)
            value = _value(found)
        except (NotImplementedError, RuntimeError, ValueError, AssertionError, IndexError) as failure:
            assert str(failure), f"{op_name} raised without a text"
            raised.append(op_name)
            continue
        if (
            failed
            or wanted is None
            or value.shape != wanted.shape
            or not torch.allclose(value.to(wanted.dtype), wanted, equal_nan=True)
        ):
            wrong.append(op_name)
            continue
        if wanted.requires_grad and wanted.is_floating_point():
            weights = torch.randn(wanted.shape, dtype=wanted.dtype, generator=torch.Generator().manual_seed(1))
            (want,) = torch.autograd.grad((wanted * weights).sum(), x)
            try:
                (got,) = torch.autograd.grad((value * weights).sum(), placed)
                if not torch.allclose(_value(got), want):
                    wrong.append(f"{op_name} (backward)")
                    continue
            except (NotImplementedError, RuntimeError, ValueError, AssertionError) as failure:
                raised.append(f"{op_name} (backward: {str(failure)[:80]})")
                continue
        right.append(op_name)
    return right, raised, wrong


MUST_WORK = {"add", "mul", "scalar mul", "silu", "clone", "double", "where", "zeros_like", "detach", "neg"}


# Each placement by default at one length, even, uneven or with a rank that has no tokens, and on half of the ops.
CELLS = list(itertools.product(PLACEMENTS, (16, 13, 2)))
BY_DEFAULT = [(name, (13, 16, 2)[i % 3], False) for i, name in enumerate(PLACEMENTS)]


@pytest.mark.parametrize(("name", "length", "every"), [*BY_DEFAULT, *(slow(*cell, True) for cell in CELLS)])
def test_no_generic_op_is_silently_wrong(pools, name, length, every):
    tried = ops_of(name, every)
    for right, raised, wrong in pools.run(4, sweep, name, length, every):
        assert not wrong
        assert set(right) >= MUST_WORK.intersection(tried)
        assert not [entry for entry in raised if "backward" in entry], raised
        assert len(right) + len(raised) == len(tried)


def mixed_placements() -> list[str]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("cp",))
    x = torch.randn(2, 8, 4)
    zigzag = distribute_tensor(x, mesh, [Zigzag(1)])
    texts = []
    for other in ([Shard(1)], [Contiguous(1)], [Replicate()], [Zigzag(2)]):
        try:
            zigzag + distribute_tensor(x, mesh, other)
        except (NotImplementedError, RuntimeError) as failure:
            texts.append(str(failure).splitlines()[0])
    try:
        zigzag.detach()[0, 0, 0].item()
    except (NotImplementedError, RuntimeError) as failure:
        texts.append(str(failure).splitlines()[0])
    return texts


def test_adding_tensors_of_two_placements_raises_with_both_names(pools):
    shard, contiguous, replicate, dim, item = pools.run(2, mixed_placements)[0]
    assert "found [Zigzag(1)] and [Shard(dim=1)]" in shard
    assert "found [Zigzag(1)] and [Contiguous(1)]" in contiguous
    assert "found [Zigzag(1)] and [Replicate()]" in replicate
    assert "found [Zigzag(1)] and [Zigzag(2)]" in dim
    assert "dtensor_ring.redistribute" in shard
    assert "has no rule for [Zigzag(1)]" in item


def other_dtensors_are_untouched() -> bool:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("cp",))
    x = torch.randn(4, 8)
    placed = distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None)
    torch.testing.assert_close((placed @ placed.t()).full_tensor(), x @ x.t())
    assert torch.equal(placed.view(2, 2, 8).full_tensor(), x.view(2, 2, 8))
    return placed.sum().full_tensor().item() == pytest.approx(x.sum().item(), rel=1e-4)


def test_dtensors_without_our_placements_work_as_ever(pools):
    assert all(pools.run(2, other_dtensors_are_untouched))
