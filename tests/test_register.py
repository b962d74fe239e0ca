"""What importing the package registers: all of it in one place, once, and nothing for the command line."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import programs
import pytest
import torch
from torch.distributed.tensor import DTensor

import dtensor_ring
from dtensor_ring import _register

PACKAGE = Path(dtensor_ring.__file__).parent


def registered() -> list[object]:
    """What PyTorch holds of ours."""
    propagator = DTensor._op_dispatcher.sharding_propagator
    return [
        torch.ops.dtensor_ring.attention.default,
        torch.ops.dtensor_ring.attention_backward.default,
        torch.ops.dtensor_ring.replicated.default,
        propagator.propagate_op_sharding_non_cached,
        propagator.propagate_op_sharding,
        dict(propagator.op_to_rules),
        DTensor.apply_,
        DTensor.share_memory_,
        sorted(map(str, torch.serialization.get_safe_globals())),
    ]


def test_importing_or_registering_again_changes_nothing():
    before = registered()
    _register.register()
    importlib.reload(dtensor_ring)
    assert registered() == before


FORKED = """
import importlib, io, multiprocessing, os
import torch
import dtensor_ring
from dtensor_ring import Zigzag, _register, ring_attention

torch.set_num_threads(1)
x = torch.randn(1, 8, 2, 8, dtype=torch.float64)
wanted = ring_attention(x, x, x)
child = os.fork()
if not child:
    importlib.reload(dtensor_ring)
    _register.register()
    file = io.BytesIO()
    torch.save(Zigzag(1), file)
    file.seek(0)
    right = torch.equal(ring_attention(x, x, x), wanted) and torch.load(file, weights_only=True) == Zigzag(1)
    os._exit(0 if right else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_registers_nothing_twice():
    programs.check(FORKED, strict=True)


def test_the_plan_command_registers_nothing_and_needs_no_torch():
    code = """
import sys
sys.argv, sys.orig_argv = ["-m", "plan"], ["python", "-m", "dtensor_ring", "plan"]
from dtensor_ring.__main__ import main
assert main(["plan"]) == 0
assert not {"torch", "dtensor_ring._register"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)


def acts(statement: ast.stmt) -> bool:
    """Whether a statement of a module does something but define names, when the module is imported."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return any(ast.unparse(each).startswith(("torch.", "dist.")) for each in statement.decorator_list)
    if isinstance(statement, ast.Expr):
        return not isinstance(statement.value, ast.Constant)
    return isinstance(statement, (ast.For, ast.While, ast.With, ast.Delete))


def test_no_other_module_does_anything_when_it_is_imported():
    modules = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    assert len(modules) > 50
    for path in modules:
        acting = [ast.unparse(each) for each in ast.parse(path.read_text()).body if acts(each)]
        assert not acting, f"{path.relative_to(PACKAGE)}: {acting}"


def test_every_register_of_a_module_is_called_in_the_one_place():
    modules = {
        str(path.relative_to(PACKAGE).with_suffix(""))
        for path in PACKAGE.rglob("*.py")
        for each in ast.parse(path.read_text()).body
        if isinstance(each, ast.FunctionDef) and each.name == "register" and path.stem != "_register"
    }
    modules.remove("integrations/transformers/attention")  # changes transformers, and only where a model is parallelized
    listed = [line.split()[0] for line in _register.__doc__.splitlines() if line.startswith("    ")]
    assert modules == set(listed)
    called = [line.strip().removesuffix(".register()") for line in Path(_register.__file__).read_text().splitlines()[-7:]]
    assert called == [module.split("/")[-1] for module in listed]
