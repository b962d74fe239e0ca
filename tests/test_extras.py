"""Sinks, dropout and ALiBi: exact on every layout, with every gradient."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from helpers import LAYOUTS, assert_exact, grid, line, make_case, run_loopback, share, some_or_every
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from dtensor_ring import Contiguous, Documents, Stripe, Zigzag, distribute_tensor, from_local, full_tensor, ring_attention
from dtensor_ring.ops.call import _choose_for_alibi
from dtensor_ring.ops.executors import plan_executor
from dtensor_ring.ops.executors.plan_executor import _positions
from dtensor_ring.ops.kernels import KernelRequirements, choose_kernel
from dtensor_ring.ops.kernels.math import MathKernel, keep_mask
from dtensor_ring.ops.reference import reference_attention
from dtensor_ring.planning.layout import Layout
from dtensor_ring.planning.mask import Band
from dtensor_ring.planning.problem import AttentionProblem

STRATEGIES = ("ring", "gather")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_dropout_mask_does_not_depend_on_the_ranks_and_is_replayed(layout, strategy, world):
    for mask, documents in (("causal", None), ("full", None), ("window", None), ("causal", Documents.from_lengths([9, 20, 4]))):
        case = make_case(33, mask=mask, documents=documents)
        case.dropout_p = 0.3
        assert_exact(run_loopback(case, layout, world, strategy, "math")[0], case.exact())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("per_row", [False, True])
def test_alibi_measures_positions_across_ranks(layout, strategy, per_row):
    documents = Documents(((0, 9, 33), (0, 20, 33)))
    for world, (mask, packed) in itertools.product(
        (1, 3), (("causal", None), ("full", None), ("window", None), ("causal", documents))
    ):
        case = make_case(33, mask=mask, documents=packed)
        case.alibi = torch.rand((2, 4) if per_row else 4)
        assert_exact(run_loopback(case, layout, world, strategy, "math")[0], case.exact())


def test_alibi_of_two_lengths_counts_from_the_end():
    case = make_case(7, k_length=30)
    case.alibi = torch.rand(4)
    assert_exact(run_loopback(case, "zigzag", 3, "ring", "math")[0], case.exact())


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_share_it_says_in_every_direction(p):
    mask = keep_mask(1, range(3), range(4), torch.arange(200), torch.arange(300), p).double()
    assert mask.mean().item() == pytest.approx(1 - p, abs=0.005)
    for dim in range(4):
        others = [d for d in range(4) if d != dim]
        deviation = (p * (1 - p) * mask.shape[dim] / mask.numel()) ** 0.5
        assert (mask.mean(others) - (1 - p)).abs().max() < 5 * deviation
    again = keep_mask(2, range(3), range(4), torch.arange(200), torch.arange(300), p).double()
    assert (mask * again).mean().item() == pytest.approx((1 - p) ** 2, abs=0.01)
    for shifted in (mask[:, :, 1:] * mask[:, :, :-1], mask[..., 1:] * mask[..., :-1], mask[:, 1:] * mask[:, :-1]):
        assert shifted.mean().item() == pytest.approx((1 - p) ** 2, abs=0.01)


class Drawing(MathKernel):
    """Drops by a seed for each call, as flash kernels do; here nothing, and it keeps the positions that it gets."""

    name = "drawing"
    hashes_positions = False

    def __init__(self) -> None:
        self.kept = []

    def forward_dense(self, q, k, v, block):
        return super().forward_dense(q, k, v, self._plain(block))

    def backward_dense(self, saved, dout, block):
        return super().backward_dense(saved, dout, self._plain(block))

    def _plain(self, block):
        self.kept.append(block.positions)
        positions = None if block.positions.alibi is None else block.positions
        return block._replace(softmax=replace(block.softmax, dropout_p=0.0), positions=positions)


@pytest.mark.parametrize("documents", [None, Documents.from_lengths([9, 20, 4]), Documents(((0, 9, 33), (0, 20, 33)))])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_positions_are_made_only_for_kernels_and_slopes_that_read_them(documents, strategy, monkeypatch):
    case, made = make_case(33, documents=documents), []
    exact = case.exact()
    monkeypatch.setattr(plan_executor, "_positions", lambda *key: made.append(key) or _positions(*key))
    case.dropout_p = 0.3
    kernel = Drawing()
    assert_exact(run_loopback(case, "zigzag", 3, strategy, kernel)[0], exact)
    assert not made
    assert all(part.q_positions is None and part.k_positions is None for part in kernel.kept)
    assert len({part.seed for part in kernel.kept}) > 3
    run_loopback(case, "zigzag", 3, strategy, "math")
    assert made
    made.clear()
    case.alibi, kernel = torch.rand(4), Drawing()
    run_loopback(case, "zigzag", 3, strategy, kernel)
    assert made
    assert all(len(part.q_positions) and len(part.k_positions) for part in kernel.kept)


def test_zero_dropout_keeps_everything():
    assert keep_mask(1, range(2), range(2), torch.arange(9), torch.arange(9), 0.0).all()


def test_which_blocks_let_flash_kernels_measure_distances():
    def chosen(layout, band, world, strategy=None):
        return _choose_for_alibi(strategy or "auto", AttentionProblem(Layout.parse(layout), band, 64, 64, world))

    causal = Band(0, None)
    assert chosen("zigzag", causal, 4) == ("gather", "aligned")
    assert chosen("contiguous", causal, 4) == ("gather", "aligned")
    assert chosen("zigzag", causal, 4, "ring") == ("ring", "shifted")
    assert chosen("stripe", causal, 4) == ("ring", "shifted")
    assert chosen("zigzag", Band(), 4) == ("ring", "shifted")
    assert chosen("zigzag", causal, 1) == ("ring", "aligned")
    assert chosen("zigzag", Band(0, 5), 4) == ("ring", "aligned")


def test_dropout_and_alibi_on_plain_tensors_follow_the_generator():
    case = make_case(20)
    outs = []
    for _ in range(2):
        torch.manual_seed(3)
        outs.append(ring_attention(*case.inputs, dropout_p=0.4, alibi_slopes=torch.rand(4)))
    assert torch.equal(*outs)
    assert not torch.equal(outs[0], ring_attention(*case.inputs, dropout_p=0.4, alibi_slopes=torch.rand(4)))


def over_ranks(every: bool):
    """Every placement, strategy and packing with sinks of both kinds; or with one, so that all pairs of values are there."""
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = line()
    sinks, slopes = torch.randn(4, dtype=torch.float64), torch.rand(4)
    cells = itertools.product((Zigzag(1), Stripe(1), Contiguous(1)), STRATEGIES, (None, Documents.from_lengths([9, 8])), (0, 1))
    for i, (placement, strategy, documents, kind) in enumerate(cells):
        if not every and (i // 4 + i // 2 + i) % 2:
            continue
        case = make_case(17)
        leaves = [x.clone().requires_grad_() for x in (*case.inputs, sinks)]
        torch.manual_seed(9)
        case.seed = int(torch.randint(1 << 62, ()))
        case.dropout_p = 0.2
        options = {"alibi_slopes": slopes, "documents": documents}
        exact, exact_lse = reference_attention(*leaves[:3], sinks=leaves[3], kept=case.kept(), **options)
        wanted = torch.autograd.grad(exact, leaves, case.dout)

        mine = sinks.clone().requires_grad_()  # a plain parameter gets this rank's part
        whole = distribute_tensor(sinks, mesh, [Replicate()]).requires_grad_()  # a DTensor the whole
        for given in ((mine, whole)[kind],):
            shares = [share(x, str(placement.layout), world, rank).requires_grad_() for x in case.inputs]
            placed = [from_local(x, mesh, [placement], length=17) for x in shares]
            torch.manual_seed(9)
            out, lse = ring_attention(*placed, sinks=given, dropout_p=0.2, strategy=strategy, return_lse=True, **options)
            torch.testing.assert_close(full_tensor(out), exact, rtol=0, atol=1e-10)
            torch.testing.assert_close(full_tensor(lse), exact_lse, rtol=0, atol=1e-10)
            local_dout = share(case.dout, str(placement.layout), world, rank)
            *found, dsinks = torch.autograd.grad(out.to_local(), [*shares, given], local_dout)
            for a, b in zip(found, wanted, strict=False):
                torch.testing.assert_close(a, share(b, str(placement.layout), world, rank), rtol=0, atol=1e-10)
            if isinstance(dsinks, DTensor):
                dsinks = dsinks.to_local()
            else:
                dist.all_reduce(dsinks)
            torch.testing.assert_close(dsinks, wanted[3], rtol=0, atol=1e-10)


@some_or_every
@pytest.mark.parametrize("world", [1, 2, 4])
def test_sinks_dropout_and_alibi_together_are_exact_with_every_gradient(pools, world, every):
    pools.run(world, over_ranks, every)


def over_two_axes():
    mesh = grid("other")
    sinks, slopes = torch.randn(4, dtype=torch.float64), torch.rand(2, 4)
    for other, sinks_placement in ((Shard(0), Replicate()), (Shard(2), Shard(0)), (Replicate(), Replicate())):
        case = make_case(13)
        leaves = [x.clone().requires_grad_() for x in (*case.inputs, sinks)]
        exact, _ = reference_attention(*leaves[:3], sinks=leaves[3], alibi_slopes=slopes)
        wanted = torch.autograd.grad(exact, leaves, case.dout)
        ours = [x.clone().requires_grad_() for x in (*case.inputs, sinks)]
        placed = [distribute_tensor(x, mesh, [other, Zigzag(1)], src_data_rank=None) for x in ours[:3]]
        for given in (ours[3], distribute_tensor(sinks, mesh, [sinks_placement, Replicate()]).detach().requires_grad_()):
            out = full_tensor(ring_attention(*placed, sinks=given, alibi_slopes=slopes))
            torch.testing.assert_close(out, exact, rtol=0, atol=1e-10)
            *found, dsinks = torch.autograd.grad(out, [*ours[:3], given], case.dout, retain_graph=True)
            for a, b in zip(found, wanted, strict=False):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
            if isinstance(dsinks, DTensor):
                dsinks = dsinks.full_tensor()
            else:
                dist.all_reduce(dsinks)  # over the ranks that share the queries; replicas each have the whole
                dsinks /= 2 if other == Replicate() else 1
            torch.testing.assert_close(dsinks, wanted[3], rtol=0, atol=1e-10)


def test_sinks_and_slopes_follow_heads_and_batch_on_two_axes(pools):
    pools.run(4, over_two_axes)


def refusals():
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("cp",))
    x = torch.randn(2, 8, 4, 8)
    placed = distribute_tensor(x, mesh, [Zigzag(1)])
    for act, error, text in (
        (
            lambda: ring_attention(x, x, x, strategy="local", sinks=distribute_tensor(torch.zeros(4), mesh, [Replicate()])),
            TypeError,
            "are plain tensors",
        ),
        (
            lambda: ring_attention(placed, placed, placed, sinks=distribute_tensor(torch.zeros(4), mesh, [Shard(0)])),
            ValueError,
            "beside q they must be (Replicate(),)",
        ),
    ):
        with pytest.raises(error) as failure:
            act()
        assert text in str(failure.value)


def test_sinks_that_lie_elsewhere_are_refused(pools):
    pools.run(2, refusals)


def test_flash_kernels_refuse_what_their_blocks_would_measure_wrongly():
    need = KernelRequirements("cpu", torch.bfloat16, 64, 64, alibi="shifted")
    assert choose_kernel(None, need).name == "math"
    with pytest.raises(NotImplementedError, match="torch_cpu: has no ALiBi"):
        choose_kernel("torch_cpu", need)


def test_queries_that_see_no_key_and_no_sink_are_zero_and_give_no_gradient():
    case = make_case(8, k_length=4, heads=(2, 2))
    leaves = [x.clone().requires_grad_() for x in (*case.inputs, torch.tensor([-math.inf, 0.5], dtype=torch.float64))]
    out, lse = ring_attention(*leaves[:3], sinks=leaves[3], return_lse=True)
    wanted, wanted_lse = ring_attention(*leaves[:3], return_lse=True)  # the last four queries see keys
    assert not out[:, :4].any()
    assert (lse[:, 0, :4] == -math.inf).all()
    torch.testing.assert_close(out[:, :, 0], wanted[:, :, 0], rtol=0, atol=0)
    torch.testing.assert_close(lse[:, 0], wanted_lse[:, 0], rtol=0, atol=0)
    grads = torch.autograd.grad(out, leaves, case.dout)
    assert all(grad.isfinite().all() for grad in grads)
    assert grads[3][0] == 0
