"""Tables and pictures are those of the files of results, and nothing else."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks import markdown, plot, record, targets
from benchmarks.record import RESULTS, load, save
from benchmarks.report import DOCUMENTS, TABLES, all_runs, judged, rendered

ROW = {
    "case": "causal",
    "layout": "zigzag",
    "strategy": "ring/1",
    "world": 8,
    "tokens": 8192,
    "heads": "32:8",
    "kernel": "torch_flash",
    "link": "200 GB/s copy_engine",
    "strict": False,
    "target": "zigzag, W=8, 200 GB/s",
    "ms": [13.5, 51.25],
    "ratio": [1.0411, 1.0289],
    "tflops": [325.4, 310.6],
    "host": [0.5, 1.25],
    "peak": 812.4,
    "launches": 30,
    "calls": 4,
    "shortly": {str(rank): [13.0, 51.0] for rank in range(8)},
    "fully": 2,
    "wrong": "",
}
RUN = {"benchmark": "emulate", "date": "2026-01-31", "device": "Some GPU", "torch": "2.11.0", "packages": {}, "emulated": True}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_the_tables_of_documents_are_those_of_the_results(path):
    text = path.read_text()
    assert "<!-- results: " in text
    assert rendered(text, all_runs()) == text, "run `python -m benchmarks.report`"


def test_the_results_are_small_and_no_document_lacks_a_table():
    assert all(path.stat().st_size < 100_000 for path in RESULTS.glob("*.json"))
    named = {name for path in DOCUMENTS for name in re.findall(r"<!-- results: (\w+) -->", path.read_text())}
    assert named == set(TABLES)


def test_only_what_lies_between_comments_is_replaced():
    text = "before\n<!-- results: emulated -->\nold\n<!-- end -->\nafter\n"
    once = rendered(text, [{**RUN, "rows": [ROW]}])
    assert once.startswith("before\n<!-- results: emulated -->\n")
    assert once.endswith("\n<!-- end -->\nafter\n")
    assert "old" not in once
    assert "**Emulated** on one Some GPU, PyTorch 2.11.0, 2026-01-31." in once
    assert (
        "| causal | zigzag | ring/1 | 8 | 8192 | 32:8 | torch_flash | 200 GB/s copy_engine | 1.041; 1.029 | 13.50; 51.25 |" in once
    )
    assert rendered(once, [{**RUN, "rows": [ROW]}]) == once
    with pytest.raises(KeyError, match="no_such"):
        rendered("<!-- results: no_such -->\n<!-- end -->", [])


def test_a_target_is_met_within_a_hundredth_by_the_worst_of_its_cases():
    tails = [{**ROW, "target": "long tails, packed", "ratio": pair} for pair in ([0.88, 0.95], [0.95, 0.92], [0.871, 0.96])]
    found = {(target.name, target.family): (target, pair) for target, pair in judged({**RUN, "rows": [ROW, *tails]})}
    assert {target.benchmark for target, _ in found.values()} == {"emulate"}
    target, pair = found["long tails, packed", "FA2"]
    assert pair == (0.871, 0.92)
    assert target.met(0.871, target.fwd)
    assert not target.met(0.869, target.fwd)
    assert found["long tails, packed", "FA4"][1] is None
    wrong = {**ROW, "wrong": "out is off"}
    assert all(pair is None for _, pair in judged({**RUN, "rows": [wrong]}))
    lines = TABLES["targets"]([{**RUN, "rows": [ROW]}]).splitlines()
    assert "| zigzag, W=8, 200 GB/s | FA2 | at least 1.05 | 1.041, met | at least 1.04 | 1.029, **missed** |" in lines


def test_a_target_that_one_run_has_is_not_missing_in_another():
    other = {**ROW, "kernel": "flash_attn_4"}
    runs = [{**RUN, "rows": [ROW]}, {**RUN, "rows": [other]}]
    of_runs = [part for part in TABLES["targets"](runs).split("\n\n") if part.startswith("|")]
    assert [part.count("| zigzag, W=8, 200 GB/s | FA2 |") for part in of_runs] == [1, 0]
    assert [part.count("| zigzag, W=8, 200 GB/s | FA4 |") for part in of_runs] == [0, 1]
    assert all("| zigzag, W=8, 200 GB/s | cuDNN | at least 0.93 | not measured |" in part for part in of_runs)


def test_the_readme_has_ours_beside_the_fastest_other_package():
    ours = {**ROW, "who": "dtensor_ring", "link": "nccl", "ms": [3.0, 9.0]}
    others = [{**ours, "who": who, "layout": "contiguous", "ms": [4.0, ms], "ratio": [0.5, ms / 20], "wrong": wrong}
              for who, ms, wrong in (("a", 13.0, ""), ("b", 12.0, ""), ("c", 1.0, "out is off"))]  # fmt: skip
    text = TABLES["short"](
        [{**RUN, "benchmark": "attention", "rows": [ours, *others, {**others[0], "case": "list 1", "ms": [1, 1]}]}]
    )
    assert text.splitlines()[-1].endswith("| nccl | 1.04 | 1.03 | b, contiguous | 0.50 | 0.60 |")
    assert len(text.splitlines()) == 5


def test_the_best_kernel_counts_where_any_may_be_taken():
    name = "zigzag, W=8, 64:8 heads"
    rows = [
        {**ROW, "target": name, "kernel": kernel, "tflops": pair} for kernel, pair in (("a", [661.0, 500.0]), ("b", [600.0, 574.9]))
    ]
    target, pair = next((t, p) for t, p in judged({**RUN, "rows": rows}) if t.name == name)
    assert pair == (661.0, 574.9)
    assert target.met(661.0, target.fwd)
    assert not target.met(574.9, target.both)


def test_of_several_cases_of_the_best_kernel_the_worst_counts():
    name = targets.MODEL
    pairs = (("a", [1.0, 0.97]), ("a", [0.98, 1.01]), ("b", [0.9, 0.9]))
    rows = [{"target": name, "kernel": kernel, "ratio": pair} for kernel, pair in pairs]
    assert [(target.name, pair) for target, pair in judged({**RUN, "benchmark": "train_step", "rows": rows})] == [
        (name, (0.98, 0.97))
    ]


def test_of_a_cost_the_largest_counts_and_must_not_exceed_the_target():
    rows = [{"target": targets.LAYER, "kernel": "torch_flash", "over_ms": pair} for pair in ([0.1, 0.41], [0.15, 0.2])]
    [(target, pair)] = judged({**RUN, "benchmark": "host_cost", "rows": rows})
    assert pair == (0.15, 0.41)
    assert target.met(0.15, target.fwd)
    assert not target.met(0.41, target.both)


TRAINED = {
    "model": "llama-3.1-8b", "attention": "ring_plan", "kernel": "default", "layers": 32, "recomputed": True, "world": 2,
    "tokens": 65536, "emulated": False, "sharded": True, "target": "", "ms": [6100.04, 30200.0], "ratio": None,
    "tokens_per_second": 2170.1, "mfu": 0.3214, "peak_gib": 58.04, "wrong": "",
}  # fmt: skip


def test_a_training_step_on_real_ranks_has_others_beside_it_and_what_did_not_fit():
    other = {**TRAINED, "attention": "torch", "ratio": [1.2, 1.31]}
    too_long = {**other, "tokens": 131072, "wrong": "out of memory", "ms": [0.0, 0.0], "ratio": None, "mfu": None, "peak_gib": 70.0}
    run = {
        **RUN,
        "benchmark": "train_step",
        "emulated": False,
        "devices": 2,
        "note": "Left out: x: y.",
        "rows": [TRAINED, other, too_long],
    }
    lines = TABLES["train"]([run]).splitlines()
    assert lines[0] == "2 x Some GPU, PyTorch 2.11.0, 2026-01-31. Left out: x: y."
    assert lines[2].endswith("| peak GiB | its time over ring_plan's: forward; step |")
    assert lines[4:] == [
        "| llama-3.1-8b | ring_plan | 32, FSDP2, recomputed | 2 | 65536 | 6100.0; 30200.0 | 2170 | 32.1% | 58.0 |  |",
        "| llama-3.1-8b | torch | 32, FSDP2, recomputed | 2 | 65536 | 6100.0; 30200.0 | 2170 | 32.1% | 58.0 | 1.200; 1.310 |",
        "| llama-3.1-8b | torch | 32, FSDP2, recomputed | 2 | 131072 | out of memory |  |  |  |  |",
    ]
    alone = {key: value for key, value in TRAINED.items() if key not in ("sharded", "wrong")} | {"world": 1, "ratio": [0.99, 1.0]}
    one_gpu = TABLES["train"]([{**run, "devices": 1, "rows": [alone]}]).splitlines()  # as earlier runs were saved
    assert one_gpu[2].endswith("| plain SDPA's time over it: forward; step |")
    assert one_gpu[4].startswith("| llama-3.1-8b | ring_plan | 32, recomputed | 1 | 65536 |")


def test_a_run_is_read_as_it_was_saved_to_five_digits(tmp_path):
    path = tmp_path / "deeper" / "run.json"
    save(path, RUN, [ROW, {"ms": (1.234567, 2), "many": {"a": 123456.789}}])
    assert load(path) == {**RUN, "rows": [ROW, {"ms": [1.2346, 2], "many": {"a": 123460.0}}]}
    assert all_runs(path.parent) == [load(path)]
    assert json.loads(path.read_text())["device"] == "Some GPU"


def test_facts_name_device_and_versions():
    import torch

    known = record.facts("emulate", torch.device("cpu"), preset="quick")
    assert known["device"] == "CPU"
    assert known["torch"] == torch.__version__
    assert known["preset"] == "quick"
    assert set(known) >= {"date", "python", "dtensor_ring", "packages"}
    assert set(markdown._NAMED) <= set(record._PACKAGES), "a headline names what no run records"


def test_a_picture_has_a_bar_for_every_row_and_a_mark_for_every_target(tmp_path):
    pytest.importorskip("matplotlib")
    other = {**ROW, "case": "not causal", "target": ""}
    assert len({label for label, _ in plot.ratios({**RUN, "rows": [ROW, other, {**ROW, "strategy": "gather"}]})}) == 3
    run = {**RUN, "rows": [ROW, other, {**ROW, "case": "broken", "wrong": "out"}]}
    assert [label.split(",")[0] for label, _ in plot.ratios(run)] == ["causal", "not causal"]
    assert [goal for _, goal in plot.aims(run)] == [(1.05, 1.04)]
    plot.draw([run, run], ["before", "after"], tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no row has a ratio"):
        plot.draw([{**RUN, "rows": []}], ["empty"], tmp_path / "none.png")


def test_of_many_packings_the_worst_and_the_median_are_shown():
    pairs = ([1.5, 1.2], [0.98, 1.3], [1.1, 0.97])
    rows = [{"case": "p", "documents": 3, "kernel": "a", "target": targets.LAYOUTS, "ratio": pair, "wrong": ""} for pair in pairs]
    rows.append({"case": "host", "documents": 32, "kernel": "a", "target": targets.STAGE, "over_ms": [0.1, 0.25]})
    lines = TABLES["layouts"]([{**RUN, "benchmark": "layouts", "rows": rows}]).splitlines()[-3:]
    assert lines == [
        "| plain zigzag's time over per document's, worst of 3 | a | 0.980 | 0.970 |",
        "| plain zigzag's time over per document's, median of 3 | a | 1.100 | 1.200 |",
        "| host's time of a stage, ms, documents: 32 | a | 0.100 | 0.250 |",
    ]
