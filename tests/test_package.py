from __future__ import annotations

import ast
import fnmatch
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dtensor_ring
from dtensor_ring.__main__ import main
from dtensor_ring.debug import draw
from dtensor_ring.documents import Documents
from dtensor_ring.layout import Layout
from dtensor_ring.ops.mask import Band
from dtensor_ring.ops.schedule import Problem, plan


def test_every_public_name_is_there():
    for name in dtensor_ring.__all__:
        assert getattr(dtensor_ring, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'ring_plans'"):
        _ = dtensor_ring.ring_plans


def test_importing_needs_neither_transformers_nor_accelerate():
    code = "import sys, dtensor_ring; print(sorted({'transformers', 'accelerate', 'flash_attn'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_plan_draws_who_does_what(capsys):
    assert main(["plan", "--layout", "zigzag", "--world", "4", "--length", "64"]) == 0
    text = capsys.readouterr().out
    assert "rank 1: 8..15 | 48..55" in text
    assert "step 0: own keys [0, 16)" in text
    assert "balance (mean work / most loaded rank): 1.0000" in text
    for rank in range(4):
        assert f"rank {rank}: 520 scores in 4 calls" in text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--layout", "stripe:2", "--world", "2", "--length", "9"], "rank 1: 2..7 2 in 4"),
        (["--full", "--length", "8"], "zigzag, full, 8 tokens"),
        (["--window", "3", "0", "--length", "64"], "halo: the keys around each chunk"),
        (["--documents", "10,20,34"], "Documents(3 in 1 row of 64 tokens"),
        (["--strategy", "gather"], "its keys to every rank"),
        (["--length", "0"], "sends 0 key rows"),
        (["--world", "1"], "sends nothing"),
        (["--length", "100000", "--world", "8"], "balance"),
    ],
)
def test_every_option_of_plan(capsys, arguments, text):
    assert main(["plan", *arguments]) == 0
    assert text in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--documents", "3,4"], "documents end at token 7, but the sequence has 64 tokens"),
        (["--layout", "snake"], "unknown layout 'snake'"),
        (["--world", "0"], "at least one rank"),
        (["--window", "-5", "0"], "a side is a number of tokens"),
    ],
)
def test_plan_says_what_is_wrong(capsys, arguments, text):
    with pytest.raises(SystemExit):
        main(["plan", *arguments])
    assert text in capsys.readouterr().err


def test_the_kernel_table_in_the_docs_is_the_one_the_code_prints(capsys):
    assert main(["kernels"]) == 0
    text = (Path(dtensor_ring.__file__).parents[1] / "docs" / "kernels.md").read_text()
    assert text.split("<!-- kernels: begin -->")[1].split("<!-- kernels: end -->")[0].strip() == capsys.readouterr().out.strip()


@given(
    st.sampled_from(["contiguous", "zigzag", "stripe", "stripe:2"]),
    st.integers(1, 32),
    st.integers(1, 4),
    st.sampled_from(["ring", "gather"]),
)
def test_the_picture_shows_the_step_of_every_score(layout, length, world, strategy):
    problem = Problem(
        Layout.parse(layout),
        Band(0, None),
        length,
        length,
        world,
        strategy,
        Documents.from_lengths([length // 2, length - length // 2]),
    )
    lines = draw(problem).split("queries down, keys across)\n")[1].split("\n")[:length]
    cells = [line.split() for line in lines]
    for p in range(length):
        for t in range(length):
            same = (p < length // 2) == (t < length // 2)
            assert (cells[p][t] != ".") == (t <= p and same)
    if strategy == "ring":
        for rank in range(world):
            for p in problem.layout.tokens(length, world, rank):
                for index, step in enumerate(plan(problem, rank).steps):
                    held = {
                        problem.layout.tokens(length, world, rows.source)[i]
                        for rows in step.keys
                        for i in range(rows.start, rows.stop)
                    }
                    assert all(cells[p][t] in (".", str(index)) for t in held)


FEATURES = (Path(__file__).parents[1] / "docs" / "features.md").read_text()
TESTS = Path(__file__).parent


def test_every_test_that_the_features_page_names_is_there():
    named = re.findall(r"`(test_[^`]*)`", FEATURES)
    assert len(named) > 40
    for each in named:
        file, _, pattern = each.partition("::")
        tree = ast.parse((TESTS / file).read_text())
        tests = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
        assert fnmatch.filter(tests, pattern), f"{each}: {file} has no such test"


def test_every_feature_names_the_tests_that_prove_it():
    rows = [line for line in FEATURES.split("## Refused")[0].splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 20
    for row in rows:
        feature, _, proofs = row.strip("| ").split(" | ")
        assert re.fullmatch(r"(`test_\w+\.py::test_[\w*]+`(, )?)+", proofs), (
            f"{feature}: name tests as `file.py::test`, found {proofs}"
        )
