from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from helpers import grid, line, refused, some_or_every
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from dtensor_ring import Contiguous, Documents, Stripe, Zigzag, distribute_tensor, from_local, full_tensor, redistribute
from dtensor_ring.comm import LoopbackTransport, collectives
from dtensor_ring.debug import traffic
from dtensor_ring.planning.layout import Layout, PackedLayout

PLACEMENTS = [Replicate(), Shard(0), Shard(1), Shard(2), Contiguous(1), Zigzag(1), Stripe(1), Stripe(1, block=2), Zigzag(2)]
LENGTHS = (16, 13, 2, 0)


def every_pair(length: int, every: bool):
    """Moves between all pairs of placements; or a third of them, the other two with one rank or two more or less."""
    mesh = line()
    x = torch.arange(3 * length * 4, dtype=torch.float64).view(3, length, 4)
    for (i, source), (j, target) in itertools.product(enumerate(PLACEMENTS), enumerate(PLACEMENTS)):
        if not every and (i + j + mesh.size()) % 3:
            continue
        leaf = x.clone().requires_grad_()
        moved = redistribute(distribute_tensor(leaf, mesh, [source]), [target])
        assert moved.placements == (target,)
        assert moved.shape == x.shape
        back = full_tensor(moved)
        assert torch.equal(back, x), (source, target)
        (grad,) = torch.autograd.grad(back, leaf, x + 1)
        assert torch.equal(grad, x + 1), (source, target)


@some_or_every
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_any_placement_to_any_other_is_a_permutation_and_so_is_its_gradient(pools, world, every):
    for length in LENGTHS if every else sorted({LENGTHS[world - 1], 13}):
        pools.run(world, every_pair, length, every)


def partial_sums(length: int):
    mesh, world, rank = line(), dist.get_world_size(), dist.get_rank()
    x = torch.arange(3 * length * 4, dtype=torch.float64).view(3, length, 4)
    for target, (op, factor) in itertools.product(PLACEMENTS, (("sum", sum(range(1, world + 1))), ("avg", (world + 1) / 2))):
        leaf = (x * (rank + 1)).requires_grad_()
        moved = redistribute(DTensor.from_local(leaf, mesh, [Partial(op)], run_check=False), [target])
        whole = full_tensor(moved)
        assert torch.equal(whole, x * factor), (target, op)
        (grad,) = torch.autograd.grad(whole, leaf, x + 1)
        assert torch.equal(grad, x + 1)


@some_or_every
@pytest.mark.parametrize("world", [2, 3, 4])
def test_partial_values_are_reduced_into_any_placement(pools, world, every):
    for length in (16, 13, 2) if every else (LENGTHS[world - 2],):
        pools.run(world, partial_sums, length)


def two_axes(every: bool):
    """Moves between all pairs of placements; or every thirteenth of them, among which each pair is a source and a target."""
    mesh = grid()
    x = torch.arange(4 * 10 * 6, dtype=torch.float64).view(4, 10, 6)
    one = [Replicate(), Shard(0), Shard(1), Shard(2), Zigzag(1), Stripe(1), Contiguous(1), Zigzag(0)]
    pairs = [
        (a, b) for a, b in itertools.product(one, one) if isinstance(a, Replicate) or isinstance(b, Replicate) or a.dim != b.dim
    ]
    moves = [
        (source, target)
        for source, target in itertools.product(pairs, pairs)
        if not all(isinstance(p, (Replicate, Shard)) for p in (*source, *target))
    ]
    moves = moves if every else moves[::13]
    assert {str(p) for p, _ in moves} == {str(p) for _, p in moves} == {str(p) for p in pairs}
    for source, target in moves:
        leaf = x.clone().requires_grad_()
        moved = redistribute(distribute_tensor(leaf, mesh, source, src_data_rank=None), target)
        back = full_tensor(moved)
        assert torch.equal(back, x), (source, target)
        (grad,) = torch.autograd.grad(back, leaf, x + 1)
        assert torch.equal(grad, x + 1), (source, target)
    return len(moves)


@some_or_every
def test_two_axes_move_between_any_flat_placements(pools, every):
    assert min(pools.run(4, two_axes, every, timeout=280)) > (1000 if every else 100)


def nested_stock_beside_ours():
    mesh = grid()
    x = torch.arange(5 * 7 * 6, dtype=torch.float64).view(5, 7, 6)
    for source, target in itertools.permutations(
        [[Shard(0), Shard(0)], [Shard(0), Zigzag(1)], [Stripe(1), Shard(0)], [Shard(1), Shard(1)], [Zigzag(0), Stripe(1)]], 2
    ):
        moved = redistribute(distribute_tensor(x, mesh, source), target)
        assert torch.equal(full_tensor(moved), x), (source, target)


def test_dims_that_stock_shards_nest_are_undone_and_redone(pools):
    pools.run(4, nested_stock_beside_ours)


def bytes_between(source, target, length: int):
    mesh = line()
    placed = distribute_tensor(torch.zeros(2, length, 8, dtype=torch.float32), mesh, [source], src_data_rank=None)
    before = traffic(mesh)
    redistribute(placed, [target])
    return traffic(mesh).since(before).bytes


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("length", [32, 29])
def test_only_what_must_move_is_sent(pools, world, length):
    token = 2 * 8 * 4
    ours = [Contiguous(1), Zigzag(1), Stripe(1)]
    for source, target in itertools.product(ours, ours):
        sent = pools.run(world, bytes_between, source, target, length)
        for rank in range(world):
            held = set(source.layout.tokens(length, world, rank))
            assert sent[rank] == len(held - set(target.layout.tokens(length, world, rank))) * token
    for placement in ours:
        largest = -(-length // world)
        assert pools.run(world, bytes_between, placement, Replicate(), length) == [(world - 1) * largest * token] * world
        assert pools.run(world, bytes_between, Replicate(), placement, length) == [0] * world
        heads = pools.run(world, bytes_between, placement, Shard(2), length)
        for rank in range(world):
            rows = placement.layout.local_length(length, world, rank)
            assert heads[rank] == rows * token * (world - 1) // world


def distribution(source_rank: int | None):
    mesh, rank = line(), dist.get_rank()
    x = torch.arange(2 * 9 * 4.0).view(2, 9, 4)
    mine = x if source_rank is None or rank == source_rank else torch.full_like(x, -1)
    before = traffic(mesh)
    placed = distribute_tensor(mine, mesh, [Zigzag(1)], src_data_rank=source_rank)
    sent = traffic(mesh).since(before).bytes
    assert torch.equal(full_tensor(placed), x)
    others = 9 - placed.to_local().shape[1]
    assert sent == (others * 2 * 4 * 4 if rank == source_rank else 0)


@pytest.mark.parametrize("source_rank", [0, 2, None])
def test_distribution_sends_each_rank_its_share_of_the_source_s_data(pools, source_rank):
    pools.run(3, distribution, source_rank)


def refusals():
    rank, mesh = dist.get_rank(), line()
    plane = grid()
    x = torch.zeros(4, 8, 3)
    placed = distribute_tensor(x, mesh, [Zigzag(1)])
    cases = [
        (lambda: from_local(x[:, :2], mesh, [Shard(1)], length=8), ValueError, "exactly one mesh axis must hold the sequence"),
        (
            lambda: from_local(x[:, :3], mesh, [Zigzag(1)], length=8),
            ValueError,
            "rank 0 passes 3 tokens in dim 1, but of length=8 Zigzag(1) gives it 2",
        ),
        (lambda: from_local(x[:, : 2 + (rank == 1)], mesh, [Zigzag(1)], length=8), ValueError, "rank 1 passes 3 tokens"),
        (lambda: from_local(x[:, :2], mesh, [Zigzag(1)], length=8 + rank // 3), ValueError, "length=9"),
        (
            lambda: from_local(x[:, :2].to([torch.float32, torch.float64][rank % 2]), mesh, [Zigzag(1)], length=8),
            ValueError,
            "torch.float64",
        ),
        (lambda: from_local(x[: 4 - rank // 2, :2], mesh, [Zigzag(1)], length=8), ValueError, "other dims"),
        (lambda: distribute_tensor(x, mesh, [Zigzag(3)]), ValueError, "mesh axis 'cp': Zigzag(3) on a tensor of 3 dims"),
        (lambda: distribute_tensor(x, mesh, [Partial()]), ValueError, "cannot be distributed as"),
        (lambda: distribute_tensor(x, mesh, [Zigzag(1), Shard(0)]), ValueError, "the mesh has 1 axes, but 2 placements"),
        (lambda: distribute_tensor(x, plane, [Shard(1), Zigzag(1)]), ValueError, "both split dim 1"),
        (
            lambda: distribute_tensor(x, plane, [Zigzag(1), Stripe(1)]),
            ValueError,
            "mesh axes 'dp' (Zigzag(1)) and 'cp' (Stripe(1, block=1))",
        ),
        (lambda: redistribute(placed, [Partial()]), ValueError, "cannot become"),
        (lambda: redistribute(x, [Zigzag(1)]), TypeError, "takes a DTensor, found Tensor"),
        (lambda: full_tensor(x), TypeError, "takes a DTensor, found Tensor"),
        (lambda: redistribute(placed, [Replicate()], mesh=plane), ValueError, "redistribute keeps the mesh"),
    ]
    for act, error, text in cases:
        refused(act, error, text)


def test_what_does_not_fit_is_refused_on_every_rank(pools):
    pools.run(4, refusals)


def meshes_given_again():
    mesh = line()
    x = torch.randn(4, 8)
    placed = distribute_tensor(x, mesh, [Zigzag(1)])
    with pytest.warns(DeprecationWarning, match="mesh= of redistribute does nothing"):
        moved = redistribute(placed, [Replicate()], mesh=mesh)
    assert torch.equal(moved.to_local(), x)


def test_the_mesh_of_redistribute_is_told_to_do_nothing(pools):
    pools.run(2, meshes_given_again)


def strides_in_any_order():
    mesh, rank = line(), dist.get_rank()
    for length, batch, order in itertools.product(LENGTHS, (0, 3), itertools.permutations(range(3))):
        back = [order.index(dim) for dim in range(3)]
        shape = (batch, length, 4)
        whole = torch.zeros([shape[dim] for dim in order]).permute(back)
        local_shape = (batch, Zigzag(1).layout.local_length(length, 2, rank), 4)
        local = torch.zeros([local_shape[dim] for dim in order]).permute(back)
        placed = from_local(local, mesh, [Zigzag(1)], length=length)
        assert placed.shape == whole.shape
        if (batch and length > 2) or order == (0, 1, 2):  # an empty share, or one of one token, has no order of dims to keep
            assert placed.stride() == whole.stride()


def test_the_strides_of_a_dtensor_are_those_of_the_whole_tensor_in_the_same_order_of_dims(pools):
    pools.run(2, strides_in_any_order)


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("length", [0, 1, 9, 16])
def test_moves_are_permutations_without_processes(world, length):
    x = torch.randn(2, length, 6)
    splits = [Layout("contiguous"), Layout("zigzag"), Layout("stripe", 2), collectives.Chunks()]
    for old, new in itertools.product(splits, splits):

        def body(transport: LoopbackTransport, old=old, new=new):
            shard = collectives.take_shard(x, 1, old, transport.world, transport.rank)
            moved = collectives.reshard(shard, 1, old, new, length, transport)
            assert torch.equal(moved, collectives.take_shard(x, 1, new, transport.world, transport.rank))
            assert torch.equal(collectives.gather_shards(shard, 1, old, length, transport), x)
            heads = collectives.exchange_dims(shard, (1, old, length), (2, new, 6), transport)
            assert torch.equal(heads, collectives.take_shard(x, 2, new, transport.world, transport.rank))

        LoopbackTransport.run(world, body)


@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "stripe", "stripe:3", "zigzag/documents", "chunks"])
def test_index_tensors_list_the_tokens_of_the_split(kind):
    for length, world in itertools.product((0, 1, 7, 13, 40, 59), (1, 2, 3, 5)):
        layout = collectives.Chunks() if kind == "chunks" else Layout.parse(kind)
        documents = Documents.from_lengths([length // 3, 0, length - length // 3])
        split = PackedLayout(layout, documents) if kind == "zigzag/documents" else layout
        order, counts = collectives._orders(split, length, world, torch.device("cpu"))
        for rank, part in enumerate(order.split(counts)):
            tokens = collectives._tokens(split, length, world, rank, torch.device("cpu"))
            assert tokens.dtype == torch.int64
            assert tokens.tolist() == part.tolist() == list(split.tokens(length, world, rank))
