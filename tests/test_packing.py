"""Packed documents: exact on every layout, balanced where documents are cut one by one, nothing sent that no query needs."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import torch.distributed as dist
from helpers import assert_exact, blocks_touched, line, make_case, run_loopback, solved, some_or_every
from sweeps import swept
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

from dtensor_ring import (
    Contiguous,
    Documents,
    Stripe,
    Zigzag,
    distribute_tensor,
    from_local,
    full_tensor,
    redistribute,
    ring_attention,
    shard_batch,
)
from dtensor_ring.planning.layout import Layout
from dtensor_ring.planning.mask import Band
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.schedule import Plan, plan

PER_DOCUMENT = "zigzag/documents"
CAUSAL = Band(0, None)
# of the varlen benchmark of ring-flash-attn, for one rank
LISTS = ((0, 8192), (0, 256, 7648, 8192), (0, 4096, 8192), (0, 3104, 6304, 7904, 8064, 8192))


def plans_of(bounds: tuple[int, ...], layout: str, world: int, strategy: str = "ring", band: Band = CAUSAL) -> list[Plan]:
    problem = AttentionProblem(Layout.parse(layout), band, bounds[-1], bounds[-1], world, strategy, Documents((bounds,)))
    return [plan(problem, rank) for rank in range(world)]


def long_tailed(generator: random.Random, length: int) -> tuple[int, ...]:
    """Document lengths over three orders of magnitude, packed until a row is full."""
    bounds = [0]
    while bounds[-1] < length:
        bounds.append(min(length, bounds[-1] + max(1, int(generator.lognormvariate(6.0, 1.5)))))
    return tuple(bounds)


def work_of(bounds: tuple[int, ...], world: int) -> tuple[float, float]:
    """Blocks of the most loaded rank, and of the documents uncut, a rank; tokens are as even as they can be."""
    runs = [Layout.parse(PER_DOCUMENT).runs(bounds[-1], world, rank, bounds) for rank in range(world)]
    tokens = [sum(run.count for run in each) for each in runs]
    assert sum(tokens) == bounds[-1]
    assert max(tokens) - min(tokens) <= 1
    work = [blocks_touched(bounds, [(run.start, run.count) for run in each]) for each in runs]
    return max(work), blocks_touched(bounds, [(0, bounds[-1])]) / world


@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("bounds", LISTS)
def test_work_and_tokens_are_balanced_on_the_known_lists(bounds, world):
    most, share = work_of(tuple(world * bound for bound in bounds), world)
    assert most <= 1.015 * share


@some_or_every
@pytest.mark.parametrize("world", [2, 4, 8])
def test_work_and_tokens_are_balanced_on_random_packings(world, every):
    # A rank here has 1,024 to 4,096 tokens: 8 to 32 rows of blocks. A row of the longest document may be a third of all its work,
    # and is the least that can be moved, so that one rank or the other has half of one too much or too little.
    generator = random.Random(world)
    over = []
    for _ in range(334 if every else 80):
        bounds = long_tailed(generator, generator.randint(1024, 4096) * world)
        most, share = work_of(bounds, world)
        assert most <= 1.05 * share + 0.75 * (max(b - a for a, b in itertools.pairwise(bounds)) / 128 + 1), bounds
        over.append(most / share)
    assert sum(over) / len(over) <= 1.08
    assert sorted(over)[len(over) * 19 // 20] <= 1.15


@pytest.mark.parametrize("strategy", ["ring", "gather"])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "stripe", PER_DOCUMENT])
def test_only_keys_that_some_query_needs_are_sent(layout, strategy):
    generator = random.Random(1)
    for world in (2, 3, 4):
        bounds = long_tailed(generator, 700)
        held = [Layout.parse(layout).tokens(bounds[-1], world, rank, bounds) for rank in range(world)]
        plans = plans_of(bounds, layout, world, strategy)
        for rank, each in enumerate(plans):
            last = {Documents.find(bounds, token): token for token in sorted(held[rank])}
            for other in set(range(world)) - {rank}:
                needed = [t for t in held[other] if t <= last.get(Documents.find(bounds, t), -1)]
                fetched = [rows for step in each.steps for rows in step.keys if rows.owner == other]
                assert sorted(held[other][i] for rows in fetched for i in range(rows.start, rows.stop)) == sorted(needed)
                sends = [send for step in plans[other].sends for send in step if send.rank == rank]
                assert sum(rows.size for send in sends for rows in send.ranges) == len(needed)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", PER_DOCUMENT])
def test_a_window_is_one_kernel_call_with_many_documents_too(layout):
    bounds = tuple(range(0, 641, 40))
    for each in plans_of(bounds, layout, 4, band=Band(0, 9)):
        assert each.calls == 1


CUT = ((33,), (5, 1, 20, 7), (1,) * 6, (2, 40, 3, 3, 1))


@pytest.mark.parametrize(
    ("world", "lengths", "mask", "strategy"),
    swept([1, 2, 3, 4], CUT, ["causal", "full", "window", "two-sided"], ["ring", "gather"]),
)
def test_documents_cut_one_by_one_are_exact(world, lengths, mask, strategy):
    case, exact = solved(sum(lengths), mask=mask, documents=Documents.from_lengths(lengths))
    assert_exact(run_loopback(case, PER_DOCUMENT, world, strategy, "math")[0], exact)


def moves_and_attention(packings: list[list[int]]):
    world = dist.get_world_size()
    mesh = line()
    for lengths in packings:
        documents = Documents.from_lengths(lengths)
        case = make_case(documents.length, documents=documents)
        places = {"documents": documents}
        for other in (Zigzag(1), Contiguous(1), Stripe(1), Shard(2), Replicate()):
            leaf = case.q.clone().requires_grad_()
            placed = redistribute(distribute_tensor(leaf, mesh, [other]), [Zigzag(1, per_document=True)], **places)
            tokens = Layout.parse(PER_DOCUMENT).tokens(documents.length, world, dist.get_rank(), documents.bounds[0])
            assert torch.equal(placed.to_local(), case.q[:, torch.tensor(tokens, dtype=torch.int64)])
            back = full_tensor(redistribute(placed, [other], **places))
            assert torch.equal(back, case.q)
            assert torch.equal(torch.autograd.grad(back, leaf, case.q)[0], case.q)
        for strategy in ("ring", "gather"):
            leaves = [x.clone().requires_grad_() for x in case.inputs]
            placed = [distribute_tensor(x, mesh, [Zigzag(1, per_document=True)], **places) for x in leaves]
            out = full_tensor(ring_attention(*placed, strategy=strategy, **places), **places)
            exact = case.exact()
            for a, b in zip((out, *torch.autograd.grad(out, leaves, case.dout)), (exact[0], *exact[2:]), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@some_or_every
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_tensors_move_to_and_from_documents_cut_one_by_one(pools, world, every):
    packings = [[4, 9, 1, 14, 3], [31], [1, 1]]
    pools.run(world, moves_and_attention, packings if every else [packings[world % 3]])


def batches():
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = line()
    documents = Documents.from_lengths([4, 9, 1, 14, 3])
    ids = torch.arange(2 * documents.length).view(2, -1)
    batch = {"input_ids": ids, "labels": ids, "position_ids": documents.position_ids()}
    cut = shard_batch(batch, mesh, Zigzag(1, per_document=True))
    tokens = torch.tensor(Layout.parse(PER_DOCUMENT).tokens(documents.length, world, rank, documents.bounds[0]))
    assert cut.documents == documents
    assert torch.equal(cut["input_ids"], ids[:, tokens])
    assert torch.equal(cut["position_ids"], documents.position_ids()[:, tokens])
    ends = torch.tensor([bound - 1 for bound in documents.bounds[0][1:]])
    wanted = torch.where(torch.isin(tokens, ends), -100, ids[:, tokens] + 1)
    assert torch.equal(cut["shift_labels"], wanted)
    alone = shard_batch({"input_ids": ids}, mesh, Zigzag(1, per_document=True))
    assert alone.documents == Documents.from_lengths([documents.length])


def test_a_batch_is_cut_document_by_document(pools):
    pools.run(2, batches)
    pools.run(3, batches)


def perturbed(placement, strategy: str, changes: slice):
    """Another document's output and gradients do not change by a bit, whichever of the documents in `changes` does."""
    mesh = line()
    documents = Documents.from_lengths([11, 3, 17, 6])
    case = make_case(documents.length, dtype=torch.float32, documents=documents)
    places = {"documents": documents} if placement.layout.cut else {}

    def results(*tensors):
        leaves = [x.clone().requires_grad_() for x in tensors]
        placed = [distribute_tensor(x, mesh, [placement], src_data_rank=None, **places) for x in leaves]
        out = full_tensor(ring_attention(*placed, documents=documents, strategy=strategy), **places)
        return out, *torch.autograd.grad(out, leaves, case.dout)

    before = results(*case.inputs)
    for a, b in list(itertools.pairwise(documents.bounds[0]))[changes]:
        changed = [x.clone() for x in case.inputs]
        for x in changed:
            x[:, a:b] = 3 * x[:, a:b] + 1
        keep = [t for t in range(documents.length) if not a <= t < b]
        for old, new in zip(before, results(*changed), strict=True):
            assert torch.equal(old[:, keep], new[:, keep])
            assert not torch.equal(old[:, a:b], new[:, a:b])


@some_or_every
@pytest.mark.parametrize("placement", [Contiguous(1), Zigzag(1), Stripe(1), Zigzag(1, per_document=True)])
@pytest.mark.parametrize("strategy", ["ring", "gather"])
def test_nothing_leaks_from_one_document_into_another(pools, placement, strategy, every):
    pools.run(3, perturbed, placement, strategy, slice(None) if every else slice(strategy == "gather", None, 2))


def refusals():
    mesh, x = line(), torch.zeros(2, 8, 2, 4)
    placement = Zigzag(1, per_document=True)
    cases = [
        (lambda: distribute_tensor(x, mesh, [placement]), ValueError, "pass documents= (one document: [0, 8])"),
        (lambda: distribute_tensor(x, mesh, [placement], documents=[0, 9]), ValueError, "documents end at token 9"),
        (
            lambda: distribute_tensor(x, mesh, [placement], documents=Documents(((0, 8), (0, 3, 8)))),
            ValueError,
            "one row of documents for the whole batch, found 2",
        ),
        (lambda: distribute_tensor(x, mesh, [Zigzag(1)], documents=[0, 8]), ValueError, "per_document=True) only"),
    ]
    placed = distribute_tensor(x, mesh, [placement], documents=[0, 3, 8])
    plain = distribute_tensor(x, mesh, [Zigzag(1)])
    cases += [
        (lambda: full_tensor(placed), ValueError, "pass documents="),
        (lambda: placed.full_tensor(), ValueError, "with documents="),
        (lambda: ring_attention(placed, placed, placed), ValueError, "one row for the whole batch, found None"),
        (lambda: ring_attention(placed, plain, plain, documents=[0, 3, 8]), ValueError, "Zigzag(1, per_document=True)"),
        (lambda: placed + plain, NotImplementedError, "Zigzag(1, per_document=True)"),
    ]
    for act, error, text in cases:
        with pytest.raises(error) as raised:
            act()
        assert text in str(raised.value), raised.value
    share = from_local(placed.to_local(), mesh, [placement], length=8)
    assert share.placements == (placement,)


def test_what_is_missing_is_told(pools):
    pools.run(2, refusals)


def test_documents_without_tokens_change_no_layout():
    for world in (2, 3, 4):
        for bounds, bare in (((0, 3, 3, 16), (0, 3, 16)), ((0, 0, 5, 5, 5, 40, 40), (0, 5, 40))):
            layout = Layout.parse(PER_DOCUMENT)
            for rank in range(world):
                assert layout.tokens(bare[-1], world, rank, bounds) == layout.tokens(bare[-1], world, rank, bare)


def different_documents():
    mesh, x = init_device_mesh("cpu", (2,), mesh_dim_names=("cp",)), torch.zeros(1, 17, 2, 4)
    documents = [0, 3, 6, 17] if dist.get_rank() else [0, 17]
    for act in (
        lambda: distribute_tensor(x, mesh, [Zigzag(1, per_document=True)], documents=documents),
        lambda: redistribute(distribute_tensor(x, mesh, [Contiguous(1)]), [Zigzag(1, per_document=True)], documents=documents),
    ):
        with pytest.raises(ValueError, match="pass different documents"):
            act()


def test_ranks_that_pass_different_documents_are_told(pools):
    pools.run(2, different_documents)
