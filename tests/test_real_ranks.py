"""The benchmark of real ranks: cases, other packages beside ours, and what is refused a time."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from helpers import line
from pool import free_port
from torch.nn import functional

from benchmarks import attention
from benchmarks import cases as suite
from benchmarks.attention import attention_of, placement_of
from benchmarks.peers import PEERS, Peer, TorchContextParallel
from benchmarks.record import load
from dtensor_ring.ops.kernels import KERNELS
from dtensor_ring.planning.layout import Layout

CPU = torch.device("cpu")
SIZES = "--device cpu --tokens 64 --heads 4 --kv-heads 2 --head-dim 16 --check-tokens 32 --window 20 --rounds 1 --block 0"


class SameInAnotherLayout(Peer):
    """Another package, as far as the benchmark can tell."""

    name = "same"
    modules = ("torch",)
    needs_gpu = False
    factor = 1.0

    def layouts(self, case, device):
        return [] if case.lengths else ["contiguous", "stripe:1"]

    @contextmanager
    def session(self, case, mesh):
        attend = attention_of(case, KERNELS["math"], mesh)
        yield lambda q, k, v: self.factor * attend(q, k, v)


class Wrong(SameInAnotherLayout):
    name = "wrong"
    factor = 1.1


class Raising(SameInAnotherLayout):
    name = "raising"

    @contextmanager
    def session(self, case, mesh):
        raise ValueError("not on these ranks")
        yield


class Absent(SameInAnotherLayout):
    name = "absent"
    modules = ("torch", "no_such_package_at_all")


class OnGpus(SameInAnotherLayout):
    name = "on gpus"
    needs_gpu = True


def measured(arguments: str):
    """Rows and printed text of this rank."""
    options = attention.parser().parse_args([*SIZES.split(), *arguments.split()])
    printed = StringIO()
    stand_ins = (SameInAnotherLayout(), Wrong(), Raising(), Absent(), OnGpus())
    with redirect_stdout(printed), patch.object(attention, "PEERS", stand_ins):
        return attention.run(options, line(), CPU), printed.getvalue()


def all_kinds_of_cases():
    rows, _ = measured("--cases batch full window lists --dtype float32")
    assert [row.case for row in rows] == ["causal", "not causal", "window 20", "list 1", "list 2", "list 3", "list 4"]
    assert all(not row.wrong and row.who == "dtensor_ring" for row in rows), [row.wrong for row in rows]
    assert all(min(*row.ms, *row.ratio, *row.tflops) > 0 for row in rows)
    causal, full = rows[:2]
    keys_and_values = 2 * 64 * 2 * 16 * 4 / 2**20  # of one rank, in MiB
    # The first rank needs both chunks of the second, which needs one of the first's. Keys go out in both passes, and for what came
    # gradients go back: of the second rank 1 + 1 + 1/2.
    assert causal.sent == pytest.approx(2.5 * keys_and_values)
    assert full.sent == pytest.approx(3 * keys_and_values)


def peers_and_reasons():
    rows, printed = measured("--cases batch lists --layouts zigzag --strategies ring gather --peers")
    mine = [(row.case, row.strategy) for row in rows if row.who == "dtensor_ring"]
    assert mine == [(case, how) for case in ("causal", "list 1", "list 2", "list 3", "list 4") for how in ("ring/1", "gather")]
    theirs = {(row.who, row.layout): row for row in rows if row.who != "dtensor_ring"}
    assert len(theirs) == len(rows) - len(mine) == 6  # once a case, not once a strategy
    for layout in ("contiguous", "stripe:1"):
        assert not theirs["same", layout].wrong
        assert min(theirs["same", layout].ms) > 0
        assert theirs["wrong", layout].wrong.startswith("out ")
        assert theirs["raising", layout].wrong == "ValueError: not on these ranks"
        assert theirs["wrong", layout].ms == theirs["raising", layout].ms == (0.0, 0.0)
    if line().get_local_rank() == 0:
        assert "absent                 left out: no_such_package_at_all cannot be imported: ModuleNotFoundError" in printed
        assert "on gpus                left out: runs on GPUs only" in printed
        assert printed.count("WRONG") == 4
    else:
        assert not printed


class OnCpu(TorchContextParallel):
    needs_gpu = False


def torch_context_parallel():
    from cpu_context_parallel import cpu_ring

    calls: list[int] = []
    options = attention.parser().parse_args([*SIZES.split(), "--dtype", "float32", "--peers"])
    with redirect_stdout(StringIO()), patch.object(attention, "PEERS", (OnCpu(),)), cpu_ring(calls):
        rows = attention.run(options, line(), CPU)
    assert [(row.who, row.wrong) for row in rows] == [("dtensor_ring", ""), ("torch context_parallel", "")]
    assert calls


def test_pytorch_s_context_parallel_attends_over_the_ranks(pools):
    pools.run(2, torch_context_parallel)


def test_every_kind_of_case_is_checked_and_timed_on_real_ranks(pools):
    pools.run(2, all_kinds_of_cases)


def test_other_packages_are_measured_beside_ours_or_left_out_with_a_reason(pools):
    pools.run(2, peers_and_reasons)


@pytest.mark.slow
def test_torchrun_starts_it_and_rank_0_saves(tmp_path):
    path, root = tmp_path / "run.json", Path(attention.__file__).parents[1]
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    command = [*start, "-m", "benchmarks.attention", *SIZES.split(), "--json", str(path)]
    ended = subprocess.run(command, cwd=root, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True)
    run = load(path)
    assert (run["benchmark"], run["devices"], run["device"]) == ("attention", 2, "CPU")
    assert [row["who"] for row in run["rows"]] == ["dtensor_ring"]
    assert ended.stdout.count("causal") == 1


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "zigzag/documents", "stripe:1", "stripe:16"])
def test_a_layout_s_text_names_its_placement(layout):
    assert str(placement_of(layout).layout) == str(Layout.parse(layout))


def test_a_layout_without_a_placement_is_refused():
    with pytest.raises(ValueError, match="no placement of ours has the layout 'zigzag/even'"):
        placement_of("zigzag/even")


def test_other_packages_are_asked_for_by_name():
    names = [peer.name for peer in PEERS]
    for asked, found in ("", []), ("--peers", names), ("--peers yunchang ring-flash-attn", ["yunchang", "ring-flash-attn"]):
        assert [peer.name for peer in attention.peers_asked_for(attention.parser().parse_args(asked.split()).peers)] == found
    with pytest.raises(
        ValueError, match="there is no ringmaster among ring-flash-attn, torch context_parallel, axolotl-ringmaster"
    ):
        attention.peers_asked_for(["ringmaster", "yunchang"])


def test_packages_that_need_gpus_or_are_absent_say_so():
    reasons = {peer.name: peer.missing(CPU) for peer in PEERS}
    assert reasons["torch context_parallel"] == "runs on GPUs only"
    assert "flash_attn" in reasons["ring-flash-attn"] or reasons["ring-flash-attn"] == "runs on GPUs only"
    assert "flash_attn" in reasons["yunchang"] or reasons["yunchang"] == "runs on GPUs only"


def test_without_a_flash_kernel_ringmaster_is_left_out_on_gpus():
    ringmaster = next(peer for peer in PEERS if peer.name == "axolotl-ringmaster")
    for found, reason in ((None, "transformers finds no flash-attn for it"), (("forward", "backward"), "")):
        ring = SimpleNamespace(_flash_ops=lambda found=found: found)
        with patch.dict(sys.modules, dict.fromkeys(ringmaster.modules, ring)):
            assert ringmaster.missing(torch.device("cuda")) == reason
            assert ringmaster.missing(CPU) == ""


@pytest.mark.parametrize(("case", "layout"), [(suite.batch(2), "zigzag"), (suite.full(2), "contiguous")], ids=["causal", "full"])
def test_what_context_parallel_puts_in_place_of_attention_is_called_and_taken_away(case, layout):
    peer = next(peer for peer in PEERS if peer.name == "torch context_parallel")
    package, original = importlib.import_module(peer.modules[0]), functional.scaled_dot_product_attention
    seen = []

    def attention(q, k, v, **options):
        seen.append((tuple(q.shape), options["is_causal"], package._cp_options.enable_load_balance))
        return q

    @contextmanager
    def context_parallel(mesh, buffers, buffer_seq_dims):
        assert (buffers[0].shape[0], buffer_seq_dims) == (case.length, [0])
        functional.scaled_dot_product_attention = attention  # and stays, where the block raises
        yield

    q, mesh, fail = torch.randn(1, 4, 3, 8), SimpleNamespace(device_type="cpu"), ValueError("in the block")
    with (  # noqa: PT012
        patch.object(package, "context_parallel", context_parallel),
        pytest.raises(ValueError, match="in the block"),
        peer.session(replace(case, layout=layout), mesh) as attend,
    ):
        assert torch.equal(attend(q, q, q), q)
        raise fail
    assert seen == [((1, 3, 4, 8), layout == "zigzag", layout == "zigzag")]
    assert functional.scaled_dot_product_attention is original
    assert package._cp_options.enable_load_balance


def test_packages_have_layouts_for_what_they_can_compute():
    by_name = {peer.name: peer for peer in PEERS}

    def layouts(name, case):
        return list(by_name[name].layouts(case, torch.device("cuda")))

    causal, full, window = suite.batch(8), suite.full(8), suite.window(8)
    assert layouts("ring-flash-attn", causal) == ["zigzag", "stripe:1", "contiguous"]
    assert layouts("torch context_parallel", causal) == ["zigzag"]
    assert layouts("torch context_parallel", full) == ["contiguous"]
    assert layouts("axolotl-ringmaster", causal) == ["contiguous", "zigzag"]
    assert layouts("yunchang", causal) == ["zigzag", "contiguous"]
    assert layouts("yunchang", replace(causal, kv_heads=4)) == ["zigzag"]
    assert all(layouts(name, window) == [] for name in by_name)
    packed, odd = next(suite.lists(8)), replace(causal, lengths=(13, 65523))
    assert layouts("ring-flash-attn", packed) == ["contiguous", "zigzag/even", "contiguous/even"]
    assert layouts("ring-flash-attn", odd) == ["contiguous"]
    assert layouts("torch context_parallel", packed) == []
