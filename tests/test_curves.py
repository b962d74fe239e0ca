"""What `make curves` and `benchmarks.bf16_curves` call equal, and what they do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from curves_report import ALONE, SFT, SFT_ALONE, Curve, around_table, compare, keep, kept, largest_gap, write_table

from benchmarks import bf16_curves

LOSSES, NORMS, BATCHES = [3.0, 2.9, 2.8], [5.0, 4.0, 4.5], [11, 12, 13]
REFERENCE = Curve(LOSSES, NORMS, BATCHES, 1.0, by_document=3.0 * (1 + 2e-7))


def with_last(values, factor):
    return [*values[:-1], values[-1] * factor]


def verdict(curve, optimizer="adamw", reference=REFERENCE):
    return compare({optimizer: {ALONE: reference, "other": curve}}, layers=2)[1]


@pytest.mark.parametrize(
    ("changed", "optimizer", "is_right"),
    [
        ({}, "adamw", True),
        ({"losses": with_last(LOSSES, 1 + 9e-6)}, "adamw", True),
        ({"losses": with_last(LOSSES, 1 + 1.1e-5)}, "adamw", False),
        ({"losses": with_last(LOSSES, 1 + 9e-7)}, "sgd", True),
        ({"losses": with_last(LOSSES, 1 - 1.1e-6)}, "sgd", False),
        ({"norms": with_last(NORMS, 1 + 9e-5)}, "sgd", True),
        ({"norms": [norm / 2 for norm in NORMS]}, "adamw", False),
        ({"losses": with_last(LOSSES, float("nan"))}, "adamw", False),
        ({"losses": LOSSES[:-1]}, "adamw", False),
        ({"batches": [11, 13, 12]}, "adamw", False),
    ],
)
def test_a_set_up_parts_where_a_loss_a_norm_or_a_batch_is_another(changed, optimizer, is_right):
    assert verdict(replace(REFERENCE, **changed), optimizer) is is_right


def test_one_process_parts_where_documents_by_themselves_have_another_loss():
    assert not verdict(REFERENCE, reference=replace(REFERENCE, by_document=3.0 * (1 + 2e-6)))


@pytest.mark.parametrize(("off", "over_ranks", "is_right"), [(5e-6, 5e-6, True), (5e-6, 0.0, False), (1.1e-5, 1.1e-5, False)])
def test_a_trainer_with_sums_of_its_own_is_compared_with_itself_in_one_process(off, over_ranks, is_right):
    alone, spread = (replace(REFERENCE, losses=[loss * (1 + gap) for loss in LOSSES]) for gap in (off, over_ranks))
    assert compare({"sgd": {ALONE: REFERENCE, SFT_ALONE: alone, SFT: spread}}, layers=2)[1] is is_right


def test_a_gap_is_the_largest_of_all_steps():
    assert largest_gap([2.0, 4.0], [1.0, 5.0]) == pytest.approx(1.0)


def test_curves_are_read_as_they_were_written_and_the_table_of_a_page_is_replaced(tmp_path):
    found = {"sgd": {ALONE: REFERENCE, "cp=2": replace(REFERENCE, seconds=2.5, by_document=None)}}
    keep(found, 7, tmp_path / "curves.json")
    assert kept(tmp_path / "curves.json") == (found, 7)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table -->\n<!-- end of table -->\nafter\n")
    write_table(page, "old")
    assert "<!-- table -->\nold\n<!--" in page.read_text()
    write_table(page, compare(found, 7)[0])
    text = page.read_text()
    assert "old" not in text
    assert "| cp=2 | SGD | 3.000000 | 2.800000 | 0.0e+00 (1e-06) | 0.0e+00 (1e-04) | 2 | ok |" in text
    assert (text.startswith("before\n"), text.endswith("after\n")) == (True, True)


def test_the_table_of_the_page_is_that_of_the_curves_kept_beside_it():
    docs = Path(__file__).parents[1] / "docs"
    before, after = around_table(docs / "curves.md")
    table = (docs / "curves.md").read_text().removeprefix(before).removesuffix(after).removesuffix("\n")
    is_kept = (docs / "curves.json").exists()
    assert (table, True) == (compare(*kept(docs / "curves.json")) if is_kept else ("", True))


def test_a_page_without_a_place_for_the_table_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- table -->\nno end\n")
    with pytest.raises(SystemExit, match="no place for the table"):
        around_table(page)


def test_bfloat16_curves_pass_within_the_noise_of_two_seeds_and_not_outside_it(tmp_path, capsys):
    options = SimpleNamespace(
        device="cpu", model="tiny", dtype="autocast", tokens=8, document=4, steps=20, lr=0.1, kernel=None, out=tmp_path
    )
    plain = [5 - 0.1 * step for step in range(20)]

    def report(shift, bump=0.0):
        ring = [loss + shift + bump * (step == 19) for step, loss in enumerate(plain)]
        runs = (bf16_curves.PLAIN, plain), (bf16_curves.OTHER_SEED, [loss + 0.1 for loss in plain]), (bf16_curves.RING, ring)
        return bf16_curves.report([bf16_curves.Curve(run.name, losses, 1.0) for run, losses in runs], options)

    assert report(0.09) == 0
    assert report(0.11) == 1
    assert report(0.0, bump=1.1) == 1  # the mean over all steps is small, that of the last ten is not
    assert "OUTSIDE" in capsys.readouterr().out
    assert (tmp_path / "bf16_curves.png").stat().st_size > 10_000
