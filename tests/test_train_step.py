"""The benchmark of a training step: all contenders compute the same before they are timed, and FLOPs are counted by formula."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from helpers import line
from pool import free_port

from benchmarks import train_step
from benchmarks.links import EmulatedTransport
from benchmarks.record import load
from benchmarks.report import TABLES
from benchmarks.train_contenders import CONTENDERS, Contender, RingFlashAttn, TorchContextParallel
from benchmarks.train_models import Llama, flops_a_token, make_model
from benchmarks.train_step import parser
from benchmarks.train_trials import OUT_OF_MEMORY
from dtensor_ring.integrations.transformers import RingPlan
from dtensor_ring.losses import chunked

CPU = torch.device("cpu")
SIZES = "--model tiny --layers 2 --device cpu --dtype float32 --rounds 1 --block 0 --check-tokens 24"
TINY = SIZES.split()
EVERYONE = ("plain SDPA", "ring_plan", "ring_plan, save_attention")


class OnCpu(TorchContextParallel):
    """With kernels that it does not know of."""

    def missing(self, device):
        return ""


class WithoutPositions(OnCpu):
    """Every rank counts positions from 0."""

    name = "no positions"

    @contextmanager
    def session(self, models, ids, labels):
        with super().session(models, ids, labels) as loss:
            yield partial(loss.func, *loss.args[:2])


class Greedy(Contender):
    """As plain attention, until a layer's backward pass needs more memory than there is."""

    key, name, modules, shares = "greedy", "greedy", ("torch",), False
    most = 24

    @contextmanager
    def session(self, models, ids, labels):
        def fail(*_):
            raise torch.OutOfMemoryError("for a test")

        too_many = ids.shape[1] > self.most
        with models.without_plan():
            layer = models.plain.model.layers[0].mlp
            handle = layer.register_full_backward_hook(fail) if too_many else None
            yield partial(models.plain, ids, labels)
            if handle:
                handle.remove()


class GreedyOnOneRank(Greedy):
    """Rank 1 fails after the last collective of its pass."""

    @contextmanager
    def session(self, models, ids, labels):
        with models.without_plan():
            yield partial(models.plain, ids, labels)
        if ids.shape[1] > self.most and line().get_local_rank() == 1:
            raise torch.OutOfMemoryError("for a test")


def raced(mesh, *arguments: str):
    with redirect_stdout(StringIO()) as printed:
        rows, wrong = train_step.run(parser().parse_args([*TINY, *arguments]), mesh, CPU)
    return rows, wrong, printed.getvalue()


def raced_against(contender: Contender, *arguments: str):
    """Over two ranks, sharded, beside one more contender."""
    everyone = (*(each for each in CONTENDERS if not each.modules), contender)
    with patch.object(train_step, "CONTENDERS", everyone):
        return raced(line(), "--fsdp", *arguments)


def steps_on_real_ranks(*how: str):
    rows, wrong, printed = raced(line(), *how, "--tokens", "20", "40", "--recompute-past", "20")
    assert not wrong
    assert [(row.attention, row.world, row.tokens, row.recomputed) for row in rows] == [
        ("plain SDPA", 1, 20, False),
        ("ring_plan", 2, 20, False),
        ("plain SDPA", 1, 40, True),
        ("ring_plan", 2, 40, True),
        ("ring_plan, save_attention", 2, 40, True),
    ]
    for row in rows:
        assert min(row.ms) > 0
        assert row.tokens_per_second == pytest.approx(row.tokens / row.ms[1] * 1e3)
        assert not row.emulated
        assert row.sharded == bool(how)
        assert row.mfu is None  # of a CPU no peak is known
        assert (row.ratio is not None) == (row.attention == EVERYONE[2])
    assert printed.count("ring_plan") == 3 * (line().get_local_rank() == 0)
    assert ("left out: ring-flash-attn, HF adapter: flash_attn cannot be imported" in printed) == (line().get_local_rank() == 0)


def labels_of_other_tokens(*how: str):
    cut = RingPlan.cut
    with patch.object(RingPlan, "cut", lambda plan, labels: cut(plan, labels).roll(1, 1)):
        rows, wrong, printed = raced(line(), *how, "--tokens", "20")
    assert not rows
    assert wrong.startswith("ring_plan: WRONG: loss ")
    assert ("WRONG" in printed) == (line().get_local_rank() == 0)


def gradients_that_are_added_up():
    average = train_step.Models.average
    with patch.object(train_step.Models, "average", lambda models: average(models) or [g.mul_(2) for g in models.gradients()]):
        _, wrong, _ = raced(line(), "--tokens", "20")
    assert "differs by 1 of its norm" in wrong


def torch_context_parallel(contender: Contender, *how: str):
    from cpu_context_parallel import cpu_ring  # private names of PyTorch, which other tests do without

    calls: list[int] = []
    with cpu_ring(calls):
        rows, wrong, printed = raced_against(contender, *how, "--tokens", "24", "--recompute-past", "8")
    assert not wrong
    assert calls
    return rows, printed


def torch_trains_alike():
    rows, _ = torch_context_parallel(OnCpu())
    assert [row.attention for row in rows] == [*EVERYONE, "torch context_parallel"]
    assert min(*rows[-1].ratio, *rows[-1].ms) > 0
    assert rows[-1].ratio[1] == pytest.approx(rows[-1].ms[1] / rows[1].ms[1])


def positions_that_are_wrong():
    rows, printed = torch_context_parallel(WithoutPositions())
    assert [row.attention for row in rows] == [*EVERYONE]
    assert ("no positions: WRONG: loss " in printed) == (line().get_local_rank() == 0)


def memory_that_ends():
    rows, wrong, _ = raced_against(Greedy(), "--tokens", "12", "48", "20", "60", "--recompute-past", "40", "--check-tokens", "8")
    assert not wrong
    found = [(row.tokens, row.wrong, row.ms[1] > 0) for row in rows if row.attention == "greedy"]
    # The last one is not tried.
    assert found == [(12, "", True), (48, OUT_OF_MEMORY, False), (20, "", True), (60, OUT_OF_MEMORY, False)]
    assert all(row.ms[1] > 0 for row in rows if row.attention != "greedy")


def memory_that_ends_on_one_rank():
    here = "This rank: out of memory" if line().get_local_rank() == 1 else "Not on this one"
    with pytest.raises(RuntimeError, match=f"failed on 1 of 2 ranks, and the others wait for them. {here}"):
        raced_against(GreedyOnOneRank(), "--tokens", "48", "--check-tokens", "8")


@pytest.mark.parametrize("how", [(), ("--fsdp",)], ids=["whole", "sharded"])
def test_a_step_under_ring_plan_is_that_of_plain_attention_and_is_timed_beside_it(pools, how):
    pools.run(2, steps_on_real_ranks, *how)


@pytest.mark.parametrize("how", [(), ("--fsdp",)], ids=["whole", "sharded"])
def test_a_step_that_computes_something_else_gets_no_time(pools, how):
    pools.run(2, labels_of_other_tokens, *how)


def test_gradients_are_those_of_one_process(pools):
    pools.run(2, gradients_that_are_added_up)


def test_pytorch_s_context_parallel_trains_the_same_model(pools):
    pools.run(2, torch_trains_alike)


def test_a_contender_with_wrong_positions_gets_no_time(pools):
    pools.run(2, positions_that_are_wrong)


def test_out_of_memory_is_a_row_and_the_run_goes_on(pools):
    pools.run(2, memory_that_ends)


def test_out_of_memory_on_one_rank_ends_the_run_on_all(pools):
    pools.run(2, memory_that_ends_on_one_rank)


def test_the_adapter_of_ring_flash_attn_is_called_with_contiguous_shares(monkeypatch):
    """Its package stands in here, on rank 1 of 2: what it is told, and what the model is given."""
    from unittest.mock import MagicMock

    package, models = MagicMock(), MagicMock()
    models.mesh.size.return_value, models.mesh.get_local_rank.return_value = 2, 1
    monkeypatch.setitem(sys.modules, "ring_flash_attn", package)
    ids, labels = torch.arange(8)[None] + 100, torch.arange(8)[None] + 101
    for _ in range(2):
        with RingFlashAttn().session(models, ids, labels) as loss:
            loss()
    (mine, targets, positions), _ = models.plain.call_args
    assert (mine.tolist(), targets.tolist(), positions.tolist()) == ([[104, 105, 106, 107]], [[105, 106, 107, 108]], [[4, 5, 6, 7]])
    (bounds, group), _ = package.update_ring_flash_attn_params.call_args
    assert (bounds.tolist(), bounds.dtype, group) == ([0, 8], torch.int32, models.mesh.get_group())
    package.substitute_hf_flash_attn.assert_called_once_with(models.mesh.get_group(), heads_k_stride=1)
    models.attention.assert_called_with("flash_attention_2")


def test_weights_have_the_dtype_asked_for_and_rotary_frequencies_float32():
    options = parser().parse_args([*TINY, "--dtype", "bfloat16"])
    model = make_model(options, CPU)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.slow
def test_torchrun_starts_it_and_rank_0_saves_what_the_report_reads(tmp_path):
    path, root = tmp_path / "run.json", Path(train_step.__file__).parents[1]
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    command = [*start, "-m", "benchmarks.train_step", *TINY, "--fsdp", "--tokens", "24", "--json", str(path)]
    ended = subprocess.run(command, cwd=root, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True)
    run = load(path)
    assert (run["benchmark"], run["devices"], run["device"]) == ("train_step", 2, "CPU")
    assert "Left out: torch context_parallel: its ring has kernels for GPUs only; ring-flash-attn" in run["note"]
    assert [row["attention"] for row in run["rows"]] == ["plain SDPA", "ring_plan"]
    assert ended.stdout.count("\nring_plan") == 1
    assert "| tiny | ring_plan | 2, FSDP2 | 2 | 24 |" in TABLES["train"]([run])


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
    assert [row.attention for row in rows] == [*EVERYONE[:2]]
    assert set(sent) == {2}


def test_model_flops_are_those_of_the_weights_and_of_half_the_keys():
    model = make_model(parser().parse_args(TINY), CPU)
    assert isinstance(model, Llama)
    hidden, between, vocabulary, kv = 64, 128, 256, 2 * 16
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * between + 2 * hidden  # norms too: they are multiplied with
    weights = 2 * layer + hidden + vocabulary * hidden
    assert flops_a_token(model, 1000) == 6 * weights + 6 * 2 * 64 * 1000


def test_the_loss_in_pieces_is_that_of_all_logits(monkeypatch):
    monkeypatch.setattr(chunked, "chunk_tokens", lambda *_: 5)
    model = make_model(parser().parse_args(TINY), CPU)
    text = torch.randint(0, 256, (1, 18))
    hidden = model.model(input_ids=text[:, :-1], use_cache=False).last_hidden_state
    whole = torch.nn.functional.cross_entropy(model.lm_head(hidden)[0], text[0, 1:], reduction="sum")
    torch.testing.assert_close(model(text[:, :-1], text[:, 1:]), whole)
