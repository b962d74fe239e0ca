"""Stages of "ring": every number of them is the same attention, with the same bytes, in fewer and larger kernel calls."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from helpers import LAYOUTS, assert_exact, assert_like_kernel, line, make_case, run_loopback, single_device, solved, some_or_every
from hypothesis import given
from hypothesis import strategies as s
from sweeps import swept

from dtensor_ring import Zigzag, from_local, ring_attention
from dtensor_ring.debug import traffic
from dtensor_ring.ops.call import AttentionCall
from dtensor_ring.planning.documents import Documents
from dtensor_ring.planning.layout import Layout
from dtensor_ring.planning.mask import Band
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.schedule import plan
from dtensor_ring.planning.stages import BUFFERED_TOKENS, buffered_shards, fewest_stages, stage_sizes


@given(s.integers(1, 300), s.data())
def test_stages_fetch_every_other_rank_once_and_never_shrink(others, data):
    stages = data.draw(s.integers(1, others))
    sizes = stage_sizes(others, stages)
    assert (len(sizes), sum(sizes)) == (stages, others)
    assert list(sizes) == sorted(sizes)
    assert min(sizes) >= 1


@given(s.integers(1, 300))
def test_no_stage_brings_more_than_can_travel_behind_twice_what_came_before(others):
    """From as many stages as doubling needs on; with fewer, the first is larger than one rank."""
    least = next(n for n in range(1, others + 1) if 2**n - 1 >= others)
    for stages in range(least, min(others, least + 8) + 1):
        sizes = stage_sizes(others, stages)
        assert sizes[0] == 1
        assert all(later <= 2 * earlier + 1 for earlier, later in pairwise(sizes)), sizes


@given(s.integers(2, 64), s.integers(1, 200_000))
def test_more_stages_never_hold_more_and_the_fewest_that_fit_are_taken(others, tokens):
    held = [buffered_shards(others, stages) for stages in range(1, others + 1)]
    assert held == sorted(held, reverse=True)
    stages = fewest_stages(others, tokens)
    assert stages == others or held[stages - 1] * tokens <= BUFFERED_TOKENS
    assert stages == 1 or held[stages - 2] * tokens > BUFFERED_TOKENS


@some_or_every
@pytest.mark.parametrize(("world", "layout", "mask"), swept([2, 3, 4, 5], LAYOUTS, ["causal", "full", "window"]))
def test_every_number_of_stages_is_exact(world, layout, mask, every):
    for i, length in enumerate((1, 7, 33, 64) if every else (7, 33)):
        case, exact = solved(length, mask=mask)
        for stages in range(1, world) if every else range(1 + (i + world) % 2, world, 2):
            assert_exact(run_loopback(case, layout, world, "ring", "math", stages)[0], exact)


@pytest.mark.parametrize(
    ("layout", "world", "mask", "stages"),
    swept(
        [*LAYOUTS, "zigzag/documents"],
        [3, 4],
        ["causal", "full", "window"],
        [1, 2],
        kept=lambda _layout, world, mask, _stages: (mask == "full") == (world == 3),
    ),
)
def test_packed_documents_are_exact_in_stages(layout, world, mask, stages):
    case, exact = solved(40, mask=mask, documents=Documents(((0, 5, 5, 6, 20, 37, 40),)))
    assert_exact(run_loopback(case, layout, world, "ring", "math", stages)[0], exact)


def test_a_dropout_mask_does_not_depend_on_the_stages():
    case = make_case(40)
    case.dropout_p = 0.3
    first, *others = [run_loopback(case, "zigzag", 4, "ring", "math", stages)[0] for stages in (1, 2, 3)]
    for other in others:
        assert_exact(other, first)


def test_fewer_stages_round_no_more_than_a_device_does():
    case, exact = solved(500, dim=32, dtype=torch.bfloat16)
    single = single_device(case, "torch_cpu")
    for stages in (1, 2, 3):
        assert_like_kernel(run_loopback(case, "zigzag", 4, "ring", "torch_cpu", stages)[0], single, exact)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world", [2, 4, 8])
def test_stages_fetch_the_same_keys_in_as_many_messages(layout, world):
    length = (24 if layout == "stripe:3" else 64) * world  # of stripes every few tokens are a tile of their own
    problem = AttentionProblem(Layout.parse(layout), Band.parse("causal"), length, length, world)
    rings = [plan(problem, rank) for rank in range(world)]
    for stages in range(1, world):
        staged = problem.staged(stages, 0)
        for ring, each in zip(rings, (plan(staged, rank) for rank in range(world)), strict=True):
            assert len(each.steps) == 1 + stages
            assert (each.cells, each.key_tokens_sent, each.messages) == (ring.cells, ring.key_tokens_sent, ring.messages)


@pytest.mark.parametrize("world", [2, 4, 8, 16])
def test_one_stage_of_zigzag_is_at_most_two_calls_beside_the_own_one(world):
    problem = AttentionProblem(Layout("zigzag"), Band.parse("causal"), 64 * world, 64 * world, world, stages=1)
    assert max(plan(problem, rank).calls for rank in range(world)) <= 3


def test_left_open_short_sequences_take_one_stage_and_long_ones_as_many_as_ranks():
    call = AttentionCall(Band.parse("causal"), 1.0, Layout("zigzag"))

    def stages(tokens: int, asked: AttentionCall = call, token_bytes: int = 4096) -> int:
        return asked.problem((8 * tokens, 8 * tokens), 8, None, token_bytes).transfers

    assert [stages(tokens) for tokens in (1024, 8192, 16384, 131072)] == [1, 1, 4, 7]
    # 8 stage buffers of one rank, two keys at a time and six of gradients, are the least; two more for the next stage's keys.
    least = 10 * 8192 * 4096
    asked = AttentionCall(Band.parse("causal"), 1.0, Layout("zigzag"), memory=least)
    assert stages(8192, asked) == 7
    asked = AttentionCall(Band.parse("causal"), 1.0, Layout("zigzag"), memory=100 * 8192 * 4096)
    assert stages(8192, asked) == 1
    asked = AttentionCall(Band.parse("causal"), 1.0, Layout("zigzag"), stages=99)
    assert stages(8192, asked) == 7
    # Stripes of several ranks join into no larger tiles.
    assert call.problem((64, 64), 8, None).transfers == 1
    assert AttentionCall(Band.parse("causal"), 1.0, Layout("stripe")).problem((64, 64), 8, None).transfers == 7


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"stages": 0}, ValueError, "stages is a number of transfers from 1 up, found 0"),
        ({"stages": 2.0}, TypeError, "stages is a whole number of transfers, found 2.0"),
        ({"stages": True}, TypeError, "stages is a whole number"),
        ({"memory": -1}, ValueError, "memory is a number of bytes from 1 up, found -1"),
        ({"memory": 10**9, "stages": 2}, ValueError, "pass one of them"),
        ({"stages": 2, "strategy": "gather"}, ValueError, "stages=2 is for strategy='ring', found strategy='gather'"),
        ({"memory": 10, "strategy": "ulysses"}, ValueError, "memory=10 is for strategy='ring'"),
    ],
)
def test_stages_that_do_not_fit_are_refused(arguments, error, text):
    x = torch.randn(1, 4, 2, 8)
    with pytest.raises(error, match=text):
        ring_attention(x, x, x, **arguments)


def attend_in_stages(options: list[dict[str, int]]):
    mesh = line()
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    q, k, v, dout = (torch.randn(2, 16, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2, 4))
    results = []
    for asked in options:
        local = [x.clone().requires_grad_() for x in (q, k, v)]
        before = traffic(mesh)
        out = ring_attention(*(from_local(x, mesh, [Zigzag(1)], length=64) for x in local), **asked).to_local()
        grads = torch.autograd.grad(out, local, dout)
        results.append(([out.detach(), *grads], traffic(mesh).since(before).bytes))
    return results


def test_processes_attend_alike_in_any_number_of_stages(pools):
    for results in pools.run(4, attend_in_stages, [{}, {"stages": 1}, {"stages": 2}, {"stages": 3}, {"memory": 1}]):
        (first, sent), *others = results
        for other, bytes_sent in others:
            assert bytes_sent == sent
            for a, b in zip(first, other, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
