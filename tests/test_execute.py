"""Plans carried out by threads: exact in float64, within the invariants in 16 bits, sending what the plan says."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch
from helpers import (
    LAYOUTS,
    assert_exact,
    assert_like_kernel,
    make_case,
    rms,
    run_loopback,
    single_device,
    solved,
    some_or_every,
)
from sweeps import swept

from dtensor_ring.ops.kernels.math import MathKernel
from dtensor_ring.planning.documents import Documents
from dtensor_ring.planning.schedule import plan

STRATEGIES = ("ring", "gather")


@some_or_every
@pytest.mark.parametrize(
    ("world", "layout", "strategy", "mask"), swept([1, 2, 3, 4], LAYOUTS, STRATEGIES, ["causal", "full", "window"])
)
def test_out_lse_and_gradients_are_exact_at_every_length(world, layout, strategy, mask, every):
    """Both kernels with both numbers of heads at each length; or each length with one of both, another one in other worlds."""
    cells = list(itertools.product((1, 2, 7, 16, 33), ((4, 2), (3, 1)), ("math", "torch_cpu")))
    for length, heads, kernel in cells if every else (cells[4 * i + (i + world) % 4] for i in range(len(cells) // 4)):
        case, exact = solved(length, heads=heads, mask=mask)
        assert_exact(run_loopback(case, layout, world, strategy, kernel)[0], exact)


@pytest.mark.parametrize(
    ("world", "layout", "strategy", "mask"), swept([2, 3, 4], LAYOUTS, STRATEGIES, ["causal", "full", "two-sided"])
)
def test_a_thousand_tokens_are_exact(world, layout, strategy, mask):
    case, exact = solved(1000, heads=(3, 1) if mask == "full" else (4, 2), mask=mask, batch=1)
    assert_exact(run_loopback(case, layout, world, strategy, "torch_cpu")[0], exact)


def test_a_packed_call_has_tokens_from_its_first_segment_to_its_last_alone(monkeypatch):
    """In one batch row; in several, which are one after the other in memory, it has all of them."""
    documents, got = Documents.from_lengths([1, 14, 1, 46, 49]), {"forward": set(), "backward": set()}
    forward, backward = MathKernel.forward, MathKernel.backward

    def seen_forward(kernel, q, k, v, block):
        got["forward"].add((len(q), len(k)) if block.varlen else (q.shape[1], k.shape[1]))
        return forward(kernel, q, k, v, block)

    def seen_backward(kernel, saved, dout, block):
        assert len(dout) == len(saved.q) == len(saved.out)
        got["backward"].add((len(saved.q), len(saved.k)) if block.varlen else (saved.q.shape[1], saved.k.shape[1]))
        return backward(kernel, saved, dout, block)

    monkeypatch.setattr(MathKernel, "forward", seen_forward)
    monkeypatch.setattr(MathKernel, "backward", seen_backward)
    for batch in (1, 2):
        case, exact = solved(documents.length, documents=documents, batch=batch)
        for each in got.values():
            each.clear()
        assert_exact(run_loopback(case, "zigzag", 4, "ring", "math")[0], exact)
        problem, wanted, packed = case.problem("zigzag", 4, "ring"), set(), 0
        for rank in range(4):
            for step in plan(problem, rank).steps:
                for call in step.calls:
                    (q0, q1), (k0, k1) = call.queries, call.keys
                    whole = batch * problem.q_local(rank), batch * step.key_count
                    is_packed = len(call.segments) > 1
                    wanted.add((q1 - q0, k1 - k0) if batch == 1 or not is_packed else whole)
                    packed += is_packed and (q1 - q0, k1 - k0) != (problem.q_local(rank), step.key_count)
        assert packed >= 2  # the case has what this is about
        assert got == {"forward": wanted, "backward": wanted}


@pytest.mark.parametrize("world", [5, 8])
def test_ranks_that_exchange_nothing_in_a_step_wait_for_their_transfers_in_the_order_of_the_others(world):
    for length, mask in itertools.product((2, 3, world - 1), ("causal", "full")):
        case, exact = solved(length, mask=mask)
        assert_exact(run_loopback(case, "zigzag", world, "ring", "math")[0], exact)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_eight_ranks_are_exact(layout, strategy):
    for length, mask in itertools.product((1, 7, 16, 33, 1000), ("causal", "full", "window", "two-sided")):
        case, exact = solved(length, mask=mask)
        assert_exact(run_loopback(case, layout, 8, strategy, "torch_cpu")[0], exact)


@pytest.mark.parametrize(
    ("world", "layout", "strategy", "mask", "rows"), swept([2, 4], LAYOUTS, STRATEGIES, ["causal", "full", "window"], [1, 2])
)
def test_packed_documents_are_exact(world, layout, strategy, mask, rows):
    bounds = ((0, 5, 5, 6, 20, 37, 40), (0, 1, 12, 39, 40))[:rows]
    case, exact = solved(40, mask=mask, documents=Documents(bounds))
    assert_exact(run_loopback(case, layout, world, strategy, "math")[0], exact)


@pytest.mark.parametrize(
    ("layout", "strategy", "lengths", "mask"),
    swept(LAYOUTS, STRATEGIES, [(7, 30), (30, 7), (5, 5)], ["causal", "full", "window"]),
)
def test_queries_and_keys_of_two_lengths_are_aligned_bottom_right(layout, strategy, lengths, mask):
    case, exact = solved(lengths[0], k_length=lengths[1], mask=mask)
    assert_exact(run_loopback(case, layout, 3, strategy, "math")[0], exact)


def test_a_softcap_and_a_value_dim_of_its_own_reach_the_kernel():
    case = make_case(23, softcap=2.0, v_dim=5)
    assert_exact(run_loopback(case, "zigzag", 3, "ring", "math")[0], case.exact())


@cache
def of_one_device(dtype: torch.dtype):
    return single_device(solved(500, dim=32, dtype=dtype)[0], "torch_cpu")


@pytest.mark.parametrize(
    ("world", "dtype", "layout", "strategy"),
    swept([2, 3, 4], [torch.bfloat16, torch.float16, torch.float32], LAYOUTS, STRATEGIES),
    ids=str,
)
def test_errors_stay_near_those_of_one_device(world, layout, strategy, dtype):
    case, exact = solved(500, dim=32, dtype=dtype)
    found = run_loopback(case, layout, world, strategy, "torch_cpu")[0]
    if dtype == torch.float32:
        assert_exact(found, exact, tolerance=2e-5)
    else:
        assert_like_kernel(found, of_one_device(dtype), exact)
    assert all(x.dtype == (torch.float32 if i == 1 else dtype) for i, x in enumerate(found))


@pytest.mark.parametrize("layout", ["zigzag", "stripe"])
def test_eight_ranks_round_little_more_than_two(layout):
    case = make_case(512, dim=32, dtype=torch.bfloat16, batch=1)
    exact = case.exact()
    two, eight = (run_loopback(case, layout, world, "ring", "torch_cpu")[0] for world in (2, 8))
    for index in (0, 2, 3, 4):
        assert rms(eight[index] - exact[index]) <= 1.1 * rms(two[index] - exact[index])


@pytest.mark.parametrize(
    ("world", "layout", "strategy", "mask", "packed"),
    swept([2, 3, 4], LAYOUTS, STRATEGIES, ["causal", "window"], [False, True]),
)
def test_a_rank_sends_the_bytes_of_its_plan_and_gets_gradients_back_for_them(world, layout, strategy, mask, packed):
    documents = Documents.from_lengths([10, 3, 40, 7]) if packed else None
    case = make_case(60, mask=mask, documents=documents, dtype=torch.bfloat16)
    problem = case.problem(layout, world, strategy)
    _, sent = run_loopback(case, layout, world, strategy, "torch_cpu")
    plans = [plan(problem, rank) for rank in range(world)]
    row = 2 * case.k.shape[2] * (8 + 8)  # batch rows x key heads x (D + Dv)
    for each, (forward, total) in zip(plans, sent, strict=True):
        assert forward == each.key_tokens_sent * row * 2
        if problem.collective:
            largest = max(problem.k_local(rank) for rank in range(world))
            returned = (world - 1) * largest * row * 4
        else:
            returned = sum(
                rows.size * row * (4 if step.sums else 2) for step in each.steps for rows in step.keys if rows.owner != each.rank
            )
        assert total - forward == forward + returned


def test_gradients_that_one_call_made_travel_unwidened_and_sums_in_float32():
    case = make_case(64, dtype=torch.bfloat16)
    problem = case.problem("zigzag", 4, "ring")
    assert not any(step.sums for rank in range(4) for step in plan(problem, rank).steps)
    blocks = case.problem("stripe:3", 4, "ring")
    assert any(step.sums for rank in range(4) for step in plan(blocks, rank).steps)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_results_are_bitwise_the_same_from_run_to_run(strategy):
    case = make_case(100, dtype=torch.bfloat16)
    first, second = (run_loopback(case, "zigzag", 4, strategy, "torch_cpu")[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_documents_do_not_leak():
    documents = Documents.from_lengths([9, 14, 2, 15])
    case = make_case(40, documents=documents, dtype=torch.bfloat16)
    before = run_loopback(case, "zigzag", 4, "ring", "torch_cpu")[0]
    for x in (*case.inputs, case.dout):
        x[:, 9:23] = torch.randn_like(x[:, 9:23])
    after = run_loopback(case, "zigzag", 4, "ring", "torch_cpu")[0]
    others = torch.tensor([*range(9), *range(23, 40)])
    for index in (0, 2, 3, 4):
        assert torch.equal(before[index][:, others], after[index][:, others])
        assert not torch.equal(before[index][:, 9:23], after[index][:, 9:23])


def test_the_memory_of_ranks_without_tokens_is_harmless():
    case = make_case(3)
    assert_exact(run_loopback(case, "zigzag", 4, "ring", "torch_cpu")[0], case.exact())
    assert_exact(run_loopback(case, "stripe", 4, "gather", "torch_cpu")[0], case.exact())
