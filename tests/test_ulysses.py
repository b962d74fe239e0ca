"""strategy="ulysses": heads instead of tokens on each rank, exact on every layout and mask."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from helpers import assert_exact, assert_like_kernel, grid, line, make_case, once, single_device, some_or_every
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

from dtensor_ring import Contiguous, Documents, Stripe, Zigzag, distribute_tensor, full_tensor, ring_attention
from dtensor_ring.comm import transport_of

PLACEMENTS = [Contiguous(1), Zigzag(1), Stripe(1, block=3), Zigzag(1, per_document=True)]


def attended(case, mesh, placements, **options):
    places = {"documents": case.documents} if any(getattr(p, "per_document", False) for p in placements) else {}
    leaves = [x.clone().requires_grad_() for x in case.inputs]
    placed = [distribute_tensor(x, mesh, placements, src_data_rank=None, **places) for x in leaves]
    masks = {"is_causal": case.is_causal, "window": case.window, "documents": case.documents}
    out, lse = ring_attention(*placed, strategy="ulysses", return_lse=True, **masks, **options)
    assert out.placements == tuple(placements)
    found = full_tensor(out, **places)
    return found.detach(), full_tensor(lse.detach(), **places), *torch.autograd.grad(found, leaves, case.dout)


def exact(heads, every: bool):
    """Every layout with every mask and length; or four of those cells, other ones for other heads and numbers of ranks."""
    mesh = line()
    cells = list(itertools.product(PLACEMENTS, ("causal", "full", "window"), (1, 7, 33)))
    first = 7 * HEADS.index((mesh.size(), heads))
    for placement, mask, length in cells if every else [cells[(first + 10 * i) % len(cells)] for i in range(4)]:
        documents = Documents.from_lengths([length // 3, 1, length - length // 3 - 1]) if placement.layout.cut else None
        case = make_case(length, heads=heads, mask=mask, documents=documents)
        assert_exact(attended(case, mesh, [placement]), once(case.exact))
    case = make_case(7, k_length=20, heads=heads, v_dim=5)
    assert_exact(attended(case, mesh, [Zigzag(1)], kernel="math"), once(case.exact))


HEADS = [(1, (4, 2)), (2, (4, 4)), (2, (4, 1)), (2, (6, 2)), (3, (6, 3)), (3, (6, 1)), (4, (4, 2)), (4, (8, 1))]


@some_or_every
@pytest.mark.parametrize(("world", "heads"), HEADS)
def test_it_is_exact_on_every_layout(pools, world, heads, every):
    pools.run(world, exact, heads, every)


def bytes_sent():
    world = dist.get_world_size()
    mesh = line()
    transport = transport_of(mesh.get_group())
    for heads, kv_heads in ((8, 4), (8, 2)):
        case = make_case(16, heads=(heads, kv_heads), dtype=torch.float32)
        placed = [distribute_tensor(x, mesh, [Zigzag(1)], src_data_rank=None) for x in case.inputs]
        ring_attention(*placed, strategy="ulysses")
        before = transport.traffic.bytes
        ring_attention(*placed, strategy="ulysses")
        batch, _, _, dim = case.q.shape
        rows = 16 // world
        rest = (world - 1) / world * batch * rows * 4
        assert transport.traffic.bytes - before == rest * (2 * heads * dim + heads + 2 * max(kv_heads, world) * dim)


def test_bytes_are_those_of_the_formula(pools):
    pools.run(4, bytes_sent)


def other_axes_and_extras():
    mesh = grid("cp", "other")
    case = make_case(13, heads=(8, 4))
    for other in (Shard(0), Shard(2), Replicate()):
        assert_exact(attended(case, mesh, [Zigzag(1), other]), case.exact())
        sinks = torch.linspace(-1, 1, 8, dtype=torch.float64).requires_grad_()
        slopes = torch.rand(8, generator=torch.Generator().manual_seed(1))
        results = []
        for strategy in ("ring", "ulysses"):
            torch.manual_seed(4)
            placed = [distribute_tensor(x, mesh, [Zigzag(1), other], src_data_rank=None) for x in case.inputs]
            options = {"dropout_p": 0.3, "alibi_slopes": slopes, "softcap": 2.0, "kernel": "math"}
            out = full_tensor(ring_attention(*placed, sinks=sinks, strategy=strategy, **options))
            (grad,) = torch.autograd.grad(out, sinks, case.dout)
            dist.all_reduce(grad)
            results.append((out.detach(), grad))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_other_mesh_axes_sinks_dropout_alibi_and_softcap(pools):
    pools.run(4, other_axes_and_extras)


def sixteen_bits():
    mesh = line()
    for dtype, heads in itertools.product((torch.bfloat16, torch.float16), ((4, 4), (4, 1))):
        case = make_case(300, heads=heads, dim=32, dtype=dtype)
        single, found = single_device(case, "torch_cpu"), attended(case, mesh, [Zigzag(1)], kernel="torch_cpu")
        assert torch.equal(found[0], single[0])
        assert_like_kernel(found, single, case.exact())


def test_out_is_bit_equal_to_one_device(pools):
    pools.run(4, sixteen_bits)


def refused():
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("cp",))
    x, y = (distribute_tensor(torch.zeros(1, 8, heads, 4), mesh, [Zigzag(1)]) for heads in (6, 2))
    with pytest.raises(ValueError, match=r"6 query and 2 key heads cannot be shared by 4 ranks: 1, 2, 6 ranks could"):
        ring_attention(x, y, y, strategy="ulysses")


def test_heads_that_do_not_divide_are_refused_with_the_numbers_that_would(pools):
    pools.run(4, refused)
