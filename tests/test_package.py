from __future__ import annotations

import ast
import fnmatch
import re
from pathlib import Path

import programs
import pytest

import dtensor_ring


def test_every_public_name_is_there():
    for name in dtensor_ring.__all__:
        assert getattr(dtensor_ring, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'ring_plans'"):
        _ = dtensor_ring.ring_plans


def test_importing_needs_neither_transformers_nor_accelerate():
    code = "import sys, dtensor_ring; print(sorted({'transformers', 'accelerate', 'flash_attn'} & set(sys.modules)))"
    assert programs.check(code).strip() == "[]"


# Fails unless the operator that models are compiled with is there.
REGISTERED = (
    "import sys, torch, dtensor_ring; torch.ops.dtensor_ring.attention; print(sorted(sys.modules['dtensor_ring'].__dict__))"
)


@pytest.mark.parametrize("arguments", [[], ["-m", "dtensor_ring"]])
def test_importing_registers_the_operators(tmp_path, arguments):
    """Also where a program of the user's, run as a module, has the words of our command line among its own arguments."""
    (tmp_path / "users_program.py").write_text(REGISTERED)
    started = ["python", "-m", "users_program", *arguments]
    code = 'import runpy; runpy.run_module("users_program", run_name="__main__", alter_sys=True)'
    printed = programs.check(code, ["users_program", *arguments], orig_argv=started, path=[str(tmp_path), str(programs.ROOT)])
    assert set(dtensor_ring.__all__) - {"ring_plan", "RingPlan", "RingTrainerMixin", "verify"} <= set(eval(printed))


def test_the_command_line_has_every_public_name_without_importing_any():
    """The process of `python -m dtensor_ring` as the package finds it when it is imported."""
    code = f"""
{programs.WITHOUT_TORCH}
import dtensor_ring
assert "torch" not in sys.modules
{programs.WITH_TORCH}
names = [getattr(dtensor_ring, name).__name__ for name in dtensor_ring.__all__]
import torch
torch.ops.dtensor_ring.attention
print(names)
"""
    assert eval(programs.check(code, ["-m", "plan"], orig_argv=["python", "-m", "dtensor_ring", "plan"])) == dtensor_ring.__all__


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
