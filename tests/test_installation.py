"""What users meet who install the package: with PyTorch alone, with an optional package missing, under a type checker."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_overloads

import programs
import pytest
import torch

import dtensor_ring
from dtensor_ring import from_local, ring_attention, ring_plan
from dtensor_ring.comm import TRANSPORTS, TransportName
from dtensor_ring.debug import kernel_table
from dtensor_ring.ops.arguments import Strategy, check_strategy_name
from dtensor_ring.ops.kernels import KERNELS, KernelName, KernelRequirements

WITHOUT_NUMPY = """
import os, tempfile
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from dtensor_ring import Documents, Zigzag, distribute_tensor, full_tensor, ring_attention, shard_batch
from dtensor_ring.functional import zigzag_llama3_flash_attn_prepare_cu_seqlens, zigzag_llama3_flash_attn_varlen_func
from dtensor_ring.ops.reference import reference_attention

try:
    torch.zeros(1).numpy()
except RuntimeError as error:
    print(error)
dist.init_process_group("gloo", init_method="file://" + os.path.join(tempfile.mkdtemp(), "store"), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("cp",))
torch.manual_seed(0)
x, documents = torch.randn(1, 24, 2, 8, dtype=torch.float64), Documents.from_lengths([5, 12, 7])
exact = reference_attention(x, x, x, documents=documents)[0]
placed = distribute_tensor(x, mesh, [Zigzag(1)])
torch.testing.assert_close(full_tensor(ring_attention(placed, placed, placed, documents=documents)), exact)
torch.testing.assert_close(ring_attention(x, x, x, documents=torch.tensor([0, 5, 17, 24])), exact)
batch = shard_batch({"input_ids": torch.ones(1, 24, dtype=torch.int64), "cu_seq_lens_q": [0, 5, 17, 24]}, mesh)
assert batch.documents == documents

cu_seqlens, (q, k, v) = torch.tensor([0, 5, 17, 24], dtype=torch.int32), (x[0], x[0], x[0])
prepared = zigzag_llama3_flash_attn_prepare_cu_seqlens(cu_seqlens, causal=True, rank=0, world_size=1)
q, k, v = (torch.cat([x[start:stop] for start, stop in prepared.tokens]) for x in (q, k, v))
torch.testing.assert_close(zigzag_llama3_flash_attn_varlen_func(q, k, v, prepared, causal=True), exact[0])
dist.destroy_process_group()
print("exact")
"""


def test_packed_documents_need_no_numpy():
    code = 'import sys; sys.modules["numpy"] = None\n' + WITHOUT_NUMPY  # before PyTorch, which looks for it when it is imported
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Numpy is not available\nexact\n"


def test_importing_brings_no_module_that_pytorch_does_not():
    code = "import sys, torch, torch.distributed.tensor; before = set(sys.modules); import dtensor_ring; "
    ours = "[name for name in sorted(set(sys.modules) - before) if name.split('.')[0] != 'dtensor_ring']"
    brought, every = programs.check(f"{code}print(*{ours}); print(*sys.modules)").splitlines()
    assert not [name for name in brought.split() if name not in sys.stdlib_module_names]
    assert "torch._dynamo" not in every.split()


USES = [
    ("from dtensor_ring import *", "ring_plan(None)"),
    ("from dtensor_ring import ring_plan", "ring_plan(None)"),
    ("import dtensor_ring", "dtensor_ring.ring_plan(None)"),
    ("import dtensor_ring", "dtensor_ring.RingPlan.gather"),
    ("from dtensor_ring.functional import *", "substitute_hf_flash_attn(None, 1)"),
    ("import dtensor_ring.functional as f", "f.update_ring_flash_attn_params(None, None)"),
    ("", "from dtensor_ring.integrations.transformers import ring_plan"),
    ("", "import dtensor_ring.integrations.transformers.adapter"),
]
WITHOUT_TRANSFORMERS = """
import json, sys, types
sys.modules["transformers"] = None
import dtensor_ring, dtensor_ring.functional, torch

def error_of(imports, use):
    names = {}
    exec(imports, names)
    try:
        exec(use, names)
    except ImportError as error:
        return f"{type(error).__name__}: {error}"

missing = [error_of(*use) for use in USES]
lacking = []
for module in (dtensor_ring, dtensor_ring.functional):
    names = {}
    exec(f"from {module.__name__} import *", names)
    lacking += [name for name in module.__all__ if name not in names]
exec("from dtensor_ring import *", names)
x = torch.ones(1, 4, 1, 8)
torch.testing.assert_close(names["ring_attention"](x, x, x), x)
assert not isinstance(3, names["RingPlan"])
sys.modules["transformers"] = types.ModuleType("transformers")
print(json.dumps({"missing": missing, "lacking": lacking, "old": error_of(*USES[2])}))
"""


@pytest.fixture(scope="module")
def without_transformers():
    return json.loads(programs.check(f"USES = {USES!r}\n{WITHOUT_TRANSFORMERS}"))


@pytest.mark.parametrize("case", range(len(USES)), ids=["; ".join(use).lstrip("; ") for use in USES])
def test_what_needs_transformers_says_how_to_install_it(without_transformers, case):
    text = without_transformers["missing"][case]
    assert text is not None
    assert text.startswith("MissingExtraError: ")
    assert "needs transformers 5.0 or newer" in text
    assert text.endswith("pip install 'dtensor-ring[transformers]'")


def test_an_extra_that_an_error_names_is_one_of_the_package():
    root = Path(dtensor_ring.__file__).parents[1]
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    texts = [path.read_text() for path in root.glob("dtensor_ring/**/*.py")]
    named = [extra for text in texts for extra in re.findall(r'MissingExtraError\.of\("(\w+)"', text)]
    assert named
    assert set(named) <= set(extras)


def test_a_star_import_without_transformers_has_every_name(without_transformers):
    assert without_transformers["lacking"] == []


def test_a_transformers_that_is_too_old_is_told_with_the_reason(without_transformers):
    assert "needs transformers 5.0 or newer, found: cannot import name" in without_transformers["old"]


def test_from_local_without_a_length_says_why_it_is_needed():
    with pytest.raises(TypeError, match=r"from_local needs length=, the number of tokens of the whole sequence"):
        from_local(torch.ones(1, 3, 2, 4), None, [])


def test_the_package_says_that_it_is_typed():
    assert (Path(dtensor_ring.__file__).parent / "py.typed").exists()


def test_overloads_of_ring_attention_have_its_arguments_and_defaults():
    whole = inspect.signature(ring_attention)
    overloads = get_overloads(ring_attention)
    assert len(overloads) == 3
    for overload in overloads:
        signature = inspect.signature(overload)
        assert list(signature.parameters) == list(whole.parameters)
        for name, parameter in signature.parameters.items():
            assert parameter.kind == whole.parameters[name].kind
            if name != "return_lse":
                assert parameter.default == whole.parameters[name].default
                if name not in "qkv":
                    assert parameter.annotation == whole.parameters[name].annotation


def test_literal_types_name_what_the_code_accepts():
    assert get_args(KernelName) == tuple(KERNELS)
    assert get_args(TransportName) == tuple(TRANSPORTS)
    for strategy in get_args(Strategy):
        check_strategy_name(strategy)
    with pytest.raises(ValueError, match=", ".join(repr(strategy) for strategy in get_args(Strategy))):
        check_strategy_name("rings")
    for function in (ring_attention, ring_plan):
        parameters = inspect.signature(function).parameters
        assert (parameters["strategy"].annotation, parameters["kernel"].annotation) == ("Strategy | None", "KernelName | None")


def test_values_for_annotations_are_public():
    assert {"RingPlan", "ShardedBatch"} <= set(dtensor_ring.__all__)
    from dtensor_ring.data.batch import ShardedBatch
    from dtensor_ring.integrations.transformers.plan import RingPlan

    assert dtensor_ring.RingPlan is RingPlan
    assert dtensor_ring.ShardedBatch is ShardedBatch


class _Watched:
    """A need that writes down which of its fields a kernel reads."""

    def __init__(self, need: KernelRequirements) -> None:
        self.need, self.read = need, set()

    def __getattr__(self, name: str):
        self.read.add(name)
        return getattr(self.need, name)


def test_kernels_judge_every_field_of_a_need():
    read = set()
    for kernel in KERNELS.values():
        sizes = {"rows": 1, "heads": 1, "tokens": 1, "grain": 1}
        watched = _Watched(KernelRequirements("cpu", torch.bfloat16, 64, 64, training=True, deterministic=True, **sizes))
        kernel.lacks(watched)
        kernel.unavailable(watched)
        kernel.unasked(watched)
        read |= watched.read
    assert {field.name for field in fields(KernelRequirements)} <= read


def test_the_kernel_table_has_no_row_that_asks_for_nothing():
    rows = [line.split(" | ")[0] for line in kernel_table().splitlines() if line.startswith("| ")]
    assert "| window" not in rows
    assert "| packed documents" not in rows
