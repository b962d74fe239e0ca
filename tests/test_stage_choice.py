"""In how many stages ring fetches keys where it is left open: by a model of the machine, within memory, the same on every rank."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from helpers import line, refused, some_or_every
from hypothesis import given
from hypothesis import strategies as s

from benchmarks.cases import long_tail
from dtensor_ring import Zigzag, from_local, ring_attention
from dtensor_ring.comm import transport_of
from dtensor_ring.comm.loopback import LoopbackTransport
from dtensor_ring.debug import traffic
from dtensor_ring.ops import operator
from dtensor_ring.ops.call import AttentionCall
from dtensor_ring.planning import schedule, stage_choice
from dtensor_ring.planning import totals as totals_module
from dtensor_ring.planning.cost_model import KernelSpeed, Link, Speed
from dtensor_ring.planning.costs import AttentionShape
from dtensor_ring.planning.devices import KNOWN, LINKS
from dtensor_ring.planning.documents import Documents, Slices
from dtensor_ring.planning.layout import Layout
from dtensor_ring.planning.mask import Band
from dtensor_ring.planning.predict import Predictor
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.stage_choice import _most_far, candidates, choose_stages, shares_of, staged_times
from dtensor_ring.planning.stages import BUFFERED_TOKENS, buffered_shards
from dtensor_ring.planning.totals import totals

MEASURED = json.loads((Path(__file__).parent / "data" / "measured.json").read_text())
H100 = KNOWN["h100"]


def problem_of(world: int, tokens: int = 8192, layout: str = "zigzag", mask: str = "causal", lengths=()) -> AttentionProblem:
    documents = Documents.from_lengths(lengths) if lengths else None
    length = world * tokens
    return AttentionProblem(Layout.parse(layout), Band.parse(mask), length, length, world, documents=documents)


def predictor(gigabytes: float = 200, host: int = 0) -> Predictor:
    return Predictor(H100, "torch_flash", AttentionShape(), Link(gigabytes * 1e9, min(gigabytes, 45) * 1e9, 20e-6, host))


@pytest.mark.parametrize("row", MEASURED["grid"], ids=lambda row: f"{row['link']}")
def test_the_stages_chosen_are_within_3_percent_of_the_fastest_measured(row):
    chosen = choose_stages(problem_of(row["world"], row["tokens"]), predictor(row["link"])).transfers
    for direction in (0, 1):
        best = max(ratios[direction] for ratios in row["ratio"].values())
        assert row["ratio"][str(chosen)][direction] >= 0.97 * best


def test_fast_links_take_one_stage_and_slow_ones_a_few():
    def chosen(world: int, gigabytes: float) -> int:
        return choose_stages(problem_of(world), predictor(gigabytes)).transfers

    assert [chosen(world, 200) for world in (2, 4, 8)] == [1, 1, 1]
    assert chosen(8, 45) in (2, 3)
    assert 5 <= choose_stages(problem_of(16, 4096), predictor(45)).transfers <= 7  # of 1, 2, 3 and 5, 5 was measured fastest


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("mask", ["causal", "full"])
def test_choosing_without_plans_is_within_3_percent_of_choosing_by_them(layout, mask):
    for world, tokens, gigabytes in ((4, 8192, 45), (8, 8192, 200), (8, 1024, 45), (8, 16384, 45), (8, 8192, 20)):
        problem, by = problem_of(world, tokens, layout, mask), predictor(gigabytes)
        exact = {}
        for stages in {*candidates(problem.staged().transfers, world - 1)}:
            times = [by.rank(problem.staged(stages), rank) for rank in range(world)]
            exact[stages] = max(t.forward for t in times), max(t.both for t in times)
        best = [min(times[i] for times in exact.values()) for i in (0, 1)]
        losses = {stages: max(a / b for a, b in zip(times, best, strict=True)) for stages, times in exact.items()}
        chosen = choose_stages(problem, by).transfers
        assert losses[chosen] <= 1.03 * min(losses.values()), (world, tokens, gigabytes, chosen, losses)


@given(
    s.integers(2, 80),
    s.sampled_from([512, 4096, 8192, 40000]),
    s.sampled_from([5, 45, 200]),
    s.sampled_from([0, 4, 8]),
    s.sampled_from(["zigzag", "contiguous", "stripe", "zigzag/documents"]),
    s.sampled_from([10**4, BUFFERED_TOKENS, 10**7]),
)
def test_the_choice_stays_within_memory_and_names_as_many_stages_as_there_are(world, tokens, gigabytes, host, layout, most):
    lengths = [world * tokens // 4, world * tokens - world * tokens // 4] if "documents" in layout else ()
    problem = problem_of(world, tokens, layout, lengths=lengths)
    fewest, chosen = problem.staged(0, most), choose_stages(problem, predictor(gigabytes, host), most)
    assert fewest.transfers <= chosen.transfers <= world - 1
    assert replace(chosen, stages=0) == problem
    if chosen.transfers < world - 1:
        assert buffered_shards(world - 1, chosen.transfers) * tokens <= most


@given(s.integers(2, 40), s.integers(1, 4))
def test_faster_links_are_never_predicted_slower_and_hosts_never_faster(world, stages):
    problem, stages = problem_of(world), min(stages, world - 1)
    (share,) = shares_of(problem)
    times = [staged_times(problem, share, by, stages).both for by in (predictor(400), predictor(100), predictor(20))]
    assert times == sorted(times)
    assert staged_times(problem, share, predictor(100, 2), stages).both >= times[1]
    # Both kinds of link work at once: where they are equally fast, hosts cost nothing.
    alike = replace(predictor(), link=Link(100e9, 100e9, 20e-6, 2))
    assert staged_times(problem, share, alike, stages).both <= times[1]


@given(s.sampled_from([(4, 2), (6, 3), (8, 4), (12, 4), (16, 8)]), s.data())
def test_a_stage_fetches_from_other_hosts_as_much_as_at_the_worst_place_in_a_host(sizes, data):
    (world, host), begin = sizes, data.draw(s.integers(1, sizes[0] - 1))
    distances = range(begin, data.draw(s.integers(begin, world - 1)) + 1)
    far = [sum((rank - distance) % world // host != rank // host for distance in distances) for rank in range(world)]
    assert _most_far(world, Link(2e11, 5e10, 0.0, host), distances) == max(far)


@pytest.mark.parametrize("stages", [1, 3, 7])
def test_stages_fetch_the_keys_of_every_other_rank_once(stages):
    problem, fetched = problem_of(8), []
    with patch.object(stage_choice, "_seconds", lambda *args: fetched.extend(args[-1]) or 0.0):
        staged_times(problem, shares_of(problem)[0], predictor(), stages)
    assert fetched == list(range(1, 8))


@pytest.mark.parametrize("world", [2, 8, 64])
def test_the_share_of_one_sequence_is_that_of_its_totals(world):
    for layout, mask in (("zigzag", "causal"), ("contiguous", "causal"), ("zigzag", "full"), ("stripe", "causal")):
        problem = problem_of(world, 1024, layout, mask)
        (share,), counted = shares_of(problem), totals(problem)
        assert share.own + sum(share.other) == pytest.approx(max(counted.scores), rel=0.01)
        assert sum(share.keys) == max(counted.fetched)
        assert len(share.keys) == len(share.other) == world - 1


@pytest.mark.parametrize("mask", ["causal", "full"])
@pytest.mark.parametrize("seed", [1, 2])
def test_the_shares_of_documents_dealt_out_are_those_of_the_plans(mask, seed):
    """Of every rank of a few, those that fetch the most first: the keys of each other rank, and the scores with them."""
    for world in (2, 8):
        problem = problem_of(world, 4096, "zigzag/documents", mask, long_tail(seed, 4096 * world)).staged(world - 1)
        plans = [schedule.plan(problem, rank) for rank in range(world)]
        # Step s has the keys of the s-th rank before.
        found = [([step.key_count for step in each.steps[1:]], [step.cells for step in each.steps]) for each in plans]
        found.sort(key=lambda each: -sum(each[0]))
        shares = shares_of(problem)
        assert len(shares) == world
        for share, (keys, cells) in zip(shares, found, strict=True):
            assert list(share.keys) == keys
            assert [share.own, *share.other] == pytest.approx(cells, rel=0.01)


@some_or_every
@pytest.mark.parametrize("kernel", ["torch_flash", "flash_attn_4"])
@pytest.mark.parametrize(("world", "gigabytes"), [(4, 45), (8, 45), (8, 200)])
def test_choosing_for_documents_is_within_8_percent_of_choosing_by_plans(world, gigabytes, kernel, every):
    """Where all keys that a rank needs come in one stage, others hide nothing."""
    lists = ([1024, 29696, 2048], [16384, 16384], [12416, 12800, 6400, 640, 512])
    packings = [[length * world // 4 for length in each] for each in lists]
    by = replace(predictor(gigabytes), kernel=kernel)
    for lengths in (*packings, *(long_tail(seed, 8192 * world) for seed in (range(1, 13) if every else (2, 3)))):
        problem = problem_of(world, 8192, "zigzag/documents", lengths=lengths)
        exact = {}
        for stages in candidates(1, world - 1):
            times = [by.rank(problem.staged(stages), rank) for rank in range(world)]
            exact[stages] = max(t.forward for t in times), max(t.both for t in times)
        best = [min(times[i] for times in exact.values()) for i in (0, 1)]
        losses = {stages: max(a / b for a, b in zip(times, best, strict=True)) for stages, times in exact.items()}
        chosen = choose_stages(problem, by).transfers
        assert losses[chosen] <= 1.08 * min(losses.values()), (lengths, chosen, losses)


def test_packed_batches_fetch_less_and_compute_more_of_it_alone():
    whole, short = problem_of(8), problem_of(8, lengths=[1024] * 64)
    many = problem_of(8, lengths=[64] * 1024)
    (of_whole,), (of_short,), (of_many,) = map(shares_of, (whole, short, many))
    assert sum(of_short.keys) < sum(of_whole.keys) / 8
    assert of_short.own > 20 * of_short.other[0]
    assert of_many.own + sum(of_many.other) == pytest.approx(1024 * 64 * 65 / 2 / 8, rel=0.05)


def test_candidates_begin_with_the_fewest_and_end_with_one_for_each_other_rank():
    assert candidates(1, 1) == [1]
    assert candidates(1, 7) == [1, 2, 3, 4, 5, 6, 7]
    for fewest, others in ((1, 63), (13, 63), (173, 1023), (7, 7)):
        counts = candidates(fewest, others)
        assert (counts[0], counts[-1]) == (fewest, others)
        assert counts == sorted(set(counts))
        assert len(counts) <= 24


@pytest.mark.parametrize("layout", ["zigzag", "contiguous", "zigzag/documents"])
def test_choosing_makes_no_plan_and_no_step(layout):
    problem = problem_of(64, layout=layout, lengths=[1024] * 512 if "documents" in layout else ())
    with (
        patch.object(schedule, "Steps", side_effect=AssertionError),
        patch.object(totals_module, "plan", side_effect=AssertionError),
    ):
        assert choose_stages(problem, predictor(200, host=8)).transfers >= problem.staged().transfers


def test_what_has_no_stages_to_choose_or_no_link_keeps_the_fewest():
    slow = predictor(5)
    for tokens in (0, 1):
        assert choose_stages(problem_of(8, tokens), slow).staged() == problem_of(8, tokens).staged()
    assert choose_stages(problem_of(8), replace(slow, link=None)) == problem_of(8).staged()
    for problem in (problem_of(8, layout="stripe"), problem_of(1), problem_of(2), problem_of(8, mask="window:100,0")):
        assert choose_stages(problem, slow) == problem.staged()
    gather = replace(problem_of(8), strategy="gather")
    assert choose_stages(gather, slow) == gather.staged()
    # Ranks that know their own documents only could not choose alike.
    slices = replace(problem_of(8), documents=Slices((0, 8192), (0, 8192), 0))
    assert choose_stages(slices, slow) == slices.staged()


def test_a_call_chooses_where_it_is_left_open_and_nowhere_else():
    call = AttentionCall(Band.parse("causal"), 1.0, Layout("zigzag"))
    shape, link = AttentionShape(), replace(LINKS["h100"], near=45e9)

    def stages(asked: AttentionCall, link: Link | None = link) -> int:
        problem = asked.problem((65536, 65536), 8, None, shape.kv_numbers * shape.itemsize)
        return asked.by_speed(problem, "torch_flash", shape, link).transfers

    assert stages(call) in (2, 3)
    assert stages(call, LINKS["h100"]) == 1
    assert stages(call, None) == 1
    assert stages(call, replace(link, device="")) == 1
    assert stages(replace(call, stages=1)) == 1
    assert stages(replace(call, dropout_p=0.1)) == 1
    assert stages(replace(call, memory=1)) == 7
    mine = replace(H100, link=Link(10e9, 10e9, 20e-6))
    assert stages(replace(call, cost_model=mine.text)) > 3
    assert stages(replace(call, cost_model=mine.text), None) > 3
    again = replace(call, cost_model=mine.text)
    assert AttentionCall.parse(str(again)) == again
    # A few key heads at a time are attentions of their own, whose keys come sooner but compute less.
    assert stages(replace(call, kv_head_group_size=1)) >= 1


def test_links_are_not_known_of_threads_of_one_rank_and_of_processes_on_cpus(pools):
    assert transport_of(None).known_link is None
    assert LoopbackTransport.run(2, lambda transport: transport.known_link) == [None, None]
    assert pools.run(2, links_of_ranks) == [(None, LINKS["h100"], None)] * 2


def links_of_ranks():
    transport = transport_of(line().get_group(0))
    return transport.known_link, transport._ask_link("NVIDIA H100 80GB HBM3"), transport._ask_link("a card")


# Of 256 tokens a rank, computing on keys takes about as long as fetching them: each stage hides behind the one before.
SLOW = replace(
    H100,
    kernels=(("math", KernelSpeed(*[Speed(0.0, 0.0, 0.0, 0.0, 1e5)] * 2)),),
    multiprocessors=1,
    link=Link(3e7, 3e7, 0.0),
    step=0.0,
    host_forward=0.0,
    host_backward=0.0,
)
QUICK = replace(H100, link=Link(1e12, 1e12, 0.0))


def attend(models):
    mesh = line()
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    q, k, v, dout = (torch.randn(1, 256, heads, 8, generator=generator) for heads in (4, 2, 2, 4))
    results = []
    for model in models:
        local = [x.clone().requires_grad_() for x in (q, k, v)]
        before = traffic(mesh)
        with patch.object(operator, "_executor", wraps=operator._executor) as made:
            out = ring_attention(*(from_local(x, mesh, [Zigzag(1)], length=1024) for x in local), cost_model=model).to_local()
            grads = torch.autograd.grad(out, local, dout)
        stages = [each.args[0].problem.transfers for each in made.call_args_list]
        results.append(([out.detach(), *grads], traffic(mesh).since(before).bytes, stages))
    return results


def test_processes_attend_alike_in_the_stages_that_a_model_chooses(pools):
    for results in pools.run(4, attend, [None, QUICK, SLOW]):
        # Forward and backward, on every rank.
        assert [stages for _, _, stages in results] == [[1, 1], [1, 1], [3, 3]]
        (first, sent, _), *others = results
        for other, also_sent, _ in others:
            assert also_sent == sent
            for a, b in zip(first, other, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def attend_by_models_that_differ():
    mesh = line()
    q, k, v = (from_local(torch.randn(1, 16, heads, 8), mesh, [Zigzag(1)], length=32) for heads in (4, 2, 2))
    model = QUICK if torch.distributed.get_rank() else SLOW
    refused(lambda: ring_attention(q, k, v, cost_model=model), ValueError, "every rank must make the same call", "cost model ")
    refused(lambda: ring_attention(q, k, v, cost_model="mine"), TypeError, "CostModel.load(path)")
    return True


def test_ranks_with_other_models_refuse_the_call_together(pools):
    assert pools.run(2, attend_by_models_that_differ) == [True, True]


def test_a_model_is_a_constant_of_compiled_code():
    def act(x):
        return ring_attention(x, x, x, strategy="local", cost_model=QUICK)

    x = torch.randn(1, 16, 2, 8)
    torch.testing.assert_close(torch.compile(act, backend="eager", fullgraph=True)(x), act(x))
