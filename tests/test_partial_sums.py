"""Every generic op beside an axis of partial values gives what it gives on the reduced tensor, or raises; likewise backward."""

from __future__ import annotations

import pytest
import torch
from helpers import grid
from sweeps import swept
from test_ops_sweep import OPS
from torch.distributed.tensor import DTensor, Partial

from dtensor_ring import Contiguous, Stripe, Zigzag, full_tensor
from dtensor_ring.planning.layout import Layout

REDUCED = {"sum": lambda x: x.sum(0), "avg": lambda x: x.mean(0), "max": lambda x: x.amax(0), "min": lambda x: x.amin(0)}
REFUSAL = (NotImplementedError, RuntimeError, ValueError, AssertionError, IndexError)
PLACEMENTS = [Contiguous(1), Zigzag(1), Stripe(1, block=2)]


def sweep(kind: str, placement, ours_first: bool, length: int) -> tuple[list[str], list[str], list[str]]:
    """Ops that were right, that raised, and that were silently wrong on partial values of two ranks."""
    mesh = grid("a", "b")
    ours, theirs = (0, 1) if ours_first else (1, 0)
    parts = torch.randn(2, 2, length, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    tokens = Layout.parse(str(placement.layout)).tokens(length, 2, mesh.get_local_rank(ours))
    local = parts[mesh.get_local_rank(theirs)][:, tokens].contiguous()
    placements = [placement, Partial(kind)] if ours_first else [Partial(kind), placement]
    right, raised, wrong = [], [], []
    for name, op in OPS.items():
        x = REDUCED[kind](parts).requires_grad_()
        placed = DTensor.from_local(local, mesh, placements, run_check=False, shape=x.shape, stride=x.stride())
        placed = placed.detach().requires_grad_()
        try:
            found = op(placed)
            value = full_tensor(found) if isinstance(found, DTensor) else found
        except REFUSAL as failure:
            assert str(failure), f"{name} raised without a text"
            raised.append(name)
            continue
        try:
            wanted = op(x)
        except (RuntimeError, IndexError):
            wrong.append(name)
            continue
        same = value.shape == wanted.shape and torch.allclose(value.to(wanted.dtype), wanted)
        if same and wanted.requires_grad and kind == "sum":  # only a sum has the gradient of its parts
            weights = torch.randn(wanted.shape, dtype=wanted.dtype, generator=torch.Generator().manual_seed(1))
            (want,) = torch.autograd.grad((wanted * weights).sum(), x)
            (got,) = torch.autograd.grad((value * weights).sum(), placed)
            same = torch.allclose(full_tensor(got), want)
        (right if same else wrong).append(name)
    return right, raised, wrong


@pytest.mark.parametrize(("kind", "placement", "ours_first"), swept(REDUCED, PLACEMENTS, [False, True]), ids=str)
def test_no_generic_op_is_silently_wrong_on_partial_values(pools, kind, placement, ours_first):
    for right, raised, wrong in pools.run(4, sweep, kind, placement, ours_first, 16 if ours_first else 13):
        assert not wrong
        assert set(right) >= {"clone", "contiguous", "detach", "zeros_like"} | ({"add"} if kind in ("sum", "avg") else set())
        assert set(raised) >= {"mul", "exp", "relu", "scalar add", "maximum", "where"}  # not additive, so not on parts
        assert len(right) + len(raised) == len(OPS)
