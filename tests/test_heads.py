"""Attention of some key heads at a time: the same numbers, with messages and blocks of no more heads than were asked for."""

from __future__ import annotations

import pytest
import torch
from helpers import SEED, make_case, share

from dtensor_ring.comm import LoopbackTransport
from dtensor_ring.ops.executors.head_groups import in_groups
from dtensor_ring.ops.executors.plan_executor import Executor
from dtensor_ring.ops.kernels import Saved, SoftmaxParams
from dtensor_ring.ops.kernels.math import MathKernel
from dtensor_ring.planning.schedule import plan

WORLD, KEY_HEADS = 2, 4


class CountingHeads(MathKernel):
    """Keeps how many query and key heads each block has."""

    def __init__(self) -> None:
        self.blocks = []

    def forward_dense(self, q, k, v, block):
        self.blocks.append((q.shape[2], k.shape[2], v.shape[2]))
        return super().forward_dense(q, k, v, block)

    def backward_dense(self, saved, dout, block):
        self.blocks.append(tuple(x.shape[2] for x in saved[:3]))
        return super().backward_dense(saved, dout, block)


def attend(case, at_once: int, layout: str, strategy: str, extras: bool):
    """Each rank's out, lse and gradients, the heads of its blocks, and its messages and bytes."""
    problem = case.problem(layout, WORLD, strategy)
    softmax = SoftmaxParams(0.3, dropout_p=0.4 if extras else 0.0)
    sinks = torch.linspace(-1, 1, 2 * KEY_HEADS, dtype=torch.float64) if extras else None
    alibi = torch.rand((2, 2 * KEY_HEADS), generator=torch.Generator().manual_seed(2)) if extras else None

    def rank_body(transport: LoopbackTransport):
        q, k, v, dout = (share(x, layout, WORLD, transport.rank).contiguous() for x in (*case.inputs, case.dout))
        kernel = CountingHeads()
        whole = Executor(plan(problem, transport.rank), transport, kernel, softmax, sinks, alibi, origin=(3, 5))
        executor = in_groups(whole, at_once)
        out, lse = executor.forward(q, k, v, SEED)
        grads = executor.backward(Saved(q, k, v, out, lse), dout, SEED)
        return (
            (out, lse, *(x for x in grads if x is not None)),
            kernel.blocks,
            (transport.traffic.messages, transport.traffic.bytes),
        )

    return LoopbackTransport.run(WORLD, rank_body)


@pytest.mark.parametrize("strategy", ["ring", "gather"])
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("extras", [False, True])
def test_heads_at_a_time_bound_what_travels_and_change_no_number(strategy, layout, extras):
    case = make_case(13, heads=(2 * KEY_HEADS, KEY_HEADS), dim=2)
    all_at_once = attend(case, 0, layout, strategy, extras)
    for at_once in (1, 2, 3, KEY_HEADS):
        groups = [min(at_once, KEY_HEADS - first) for first in range(0, KEY_HEADS, at_once)]
        for found, wanted in zip(attend(case, at_once, layout, strategy, extras), all_at_once, strict=True):
            for a, b in zip(found[0], wanted[0], strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
            assert set(wanted[1]) == {(2 * KEY_HEADS, KEY_HEADS, KEY_HEADS)}
            assert set(found[1]) == {(2 * n, n, n) for n in groups}
            assert len(found[1]) == len(wanted[1]) * len(groups)
            assert found[2] == (wanted[2][0] * len(groups), wanted[2][1])
