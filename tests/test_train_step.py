"""The benchmark of a training step: both models compute the same before they are timed, and FLOPs are counted by formula."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from helpers import line

from benchmarks import train_step
from benchmarks.links import EmulatedTransport
from benchmarks.train_step import Race, Trainer, flops_a_token, make_model, parser

CPU = torch.device("cpu")
SIZES = "--model tiny --layers 2 --device cpu --dtype float32 --rounds 1 --block 0 --check-tokens 24"
TINY = SIZES.split()


def raced(mesh, *arguments: str):
    with redirect_stdout(StringIO()) as printed:
        rows, wrong = train_step.run(parser().parse_args([*TINY, *arguments]), mesh, CPU)
    return rows, wrong, printed.getvalue()


def steps_on_real_ranks():
    rows, wrong, printed = raced(line(), "--tokens", "20", "40", "--recompute-past", "20")
    assert not wrong
    assert [(row.attention, row.world, row.tokens, row.recomputed) for row in rows] == [
        ("plain SDPA", 1, 20, False),
        ("ring_plan", 2, 20, False),
        ("plain SDPA", 1, 40, True),
        ("ring_plan", 2, 40, True),
    ]
    for row in rows:
        assert min(row.ms) > 0
        assert row.tokens_per_second == pytest.approx(row.tokens / row.ms[1] * 1e3)
        assert not row.emulated
        assert row.mfu is None  # of a CPU no peak is known
    assert printed.count("ring_plan") == 2 * (line().get_local_rank() == 0)


def labels_of_other_tokens():
    mine = Race.share
    with patch.object(Race, "share", lambda race, labels: mine(race, labels).roll(1, 1)):
        rows, wrong, printed = raced(line(), "--tokens", "20")
    assert not rows
    assert wrong.startswith("loss ")
    assert ("WRONG" in printed) == (line().get_local_rank() == 0)


def test_a_step_under_ring_plan_is_that_of_plain_attention_and_is_timed_beside_it(pools):
    pools.run(2, steps_on_real_ranks)


def test_a_step_that_computes_something_else_gets_no_time(pools):
    pools.run(2, labels_of_other_tokens)


def test_one_rank_of_many_trains_over_an_emulated_link():
    options = parser().parse_args([*TINY, "--emulate", "4", "--rank", "2"])
    mesh = train_step.axis_of(options, CPU)
    sent = []
    exchange = EmulatedTransport.exchange
    try:
        with patch.object(EmulatedTransport, "exchange", lambda *args: sent.append(args[0].rank) or exchange(*args)):
            rows, wrong, printed = raced(mesh, "--emulate", "4", "--rank", "2", "--tokens", "16")
    finally:
        dist.destroy_process_group()
    assert not wrong
    assert (rows[1].world, rows[1].emulated, rows[0].emulated) == (4, True, False)
    assert "ring_plan emulated" in printed
    assert set(sent) == {2}


def test_model_flops_are_those_of_the_weights_and_of_half_the_keys():
    model = make_model(parser().parse_args(TINY), CPU)
    assert isinstance(model, Trainer)
    hidden, between, vocabulary, kv = 64, 128, 256, 2 * 16
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * between + 2 * hidden  # norms too: they are multiplied with
    weights = 2 * layer + hidden + vocabulary * hidden
    assert flops_a_token(model, 1000) == 6 * weights + 6 * 2 * 64 * 1000


def test_the_loss_in_pieces_is_that_of_all_logits(monkeypatch):
    monkeypatch.setattr(train_step, "PIECE", 5)
    model = make_model(parser().parse_args(TINY), CPU)
    text = torch.randint(0, 256, (1, 18))
    hidden = model.body(input_ids=text[:, :-1], use_cache=False).last_hidden_state
    whole = torch.nn.functional.cross_entropy(model.head(hidden)[0], text[0, 1:], reduction="sum")
    torch.testing.assert_close(model(text[:, :-1], text[:, 1:]), whole)
