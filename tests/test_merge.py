from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers import make_case

from dtensor_ring.ops.executors.merge import GradSum, OutputSum, merge_
from dtensor_ring.ops.reference import reference_attention


def blocks(dtype=torch.float64):
    """Out and lse of two halves of the keys, and of all of them."""
    case = make_case(10, mask="full", dtype=dtype)
    halves = [reference_attention(case.q, case.k[:, s], case.v[:, s], is_causal=False) for s in (slice(0, 4), slice(4, 10))]
    return halves, reference_attention(*case.inputs, is_causal=False)


def test_merging_two_halves_of_the_keys_gives_attention_over_all_of_them():
    (first, second), (out, lse) = blocks()
    merge_(*first, *second)
    torch.testing.assert_close(first[0], out, rtol=0, atol=1e-14)
    torch.testing.assert_close(first[1], lse, rtol=0, atol=1e-14)


def test_merging_does_not_depend_on_the_order():
    (first, second), _ = blocks()
    swapped = [x.clone() for x in second]
    merge_(*swapped, *[x.clone() for x in first])
    merge_(*first, *second)
    for a, b in zip(first, swapped, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


@pytest.mark.parametrize("empty", ["first", "second", "both"])
def test_rows_without_keys_merge_without_nan(empty):
    ((out, lse), (block, block_lse)), _ = blocks()
    out, block = out.contiguous(), block.contiguous()
    if empty != "second":
        out[:, :3], lse[:, :, :3] = 0, -math.inf
    if empty != "first":
        block[:, :3], block_lse[:, :, :3] = 0, -math.inf
    before = {"first": block, "second": out, "both": torch.zeros_like(out)}[empty][:, :3].clone()
    before_lse = {"first": block_lse, "second": lse, "both": torch.full_like(lse, -math.inf)}[empty][:, :, :3].clone()
    merge_(out, lse, block, block_lse)
    assert torch.equal(out[:, :3], before)
    assert torch.equal(lse[:, :, :3], before_lse)
    assert not out.isnan().any()


def test_far_apart_lse_does_not_overflow():
    out, block = torch.ones(1, 1, 1, 2), torch.full((1, 1, 1, 2), 5.0)
    lse, block_lse = torch.full((1, 1, 1), -1e4), torch.full((1, 1, 1), 1e4)
    merge_(out, lse, block, block_lse)
    assert out.flatten().tolist() == [5.0, 5.0]
    assert lse.item() == 1e4


def test_two_contributions_are_rounded_once():
    (first, second), _ = blocks(torch.float32)
    parts = [(out.bfloat16(), lse) for out, lse in (first, second)]
    total = OutputSum(torch.empty(2, 10, 4, 8, dtype=torch.bfloat16), 8, parts=2)
    for out, lse in parts:
        total.add(0, 10, out.clone(), lse.clone())
    wide_out, wide_lse = parts[0][0].float(), parts[0][1].clone()
    merge_(wide_out, wide_lse, parts[1][0].float(), parts[1][1])
    assert torch.equal(total.result()[0], wide_out.bfloat16())


def test_rows_with_no_block_stay_empty():
    out, lse = OutputSum(torch.empty(2, 10, 4, 8, dtype=torch.bfloat16), 6, parts=0).result()
    assert out.shape == (2, 10, 4, 6)
    assert out.dtype == torch.bfloat16
    assert (out == 0).all()
    assert lse.dtype == torch.float32
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_add_up_in_float32_whatever_the_order(parts, dtype):
    like = torch.empty(2, 10, 3, 4, dtype=dtype)
    pieces = [(i % 4, torch.randn(2, 10 - i % 4 if i else 10, 3, 4).to(dtype)) for i in range(parts)]
    exact = torch.zeros(2, 10, 3, 4, dtype=torch.float64)
    for start, piece in pieces:
        exact[:, start : start + piece.shape[1]] += piece.double()
    for order in (pieces, pieces[::-1]):
        total = GradSum(like, parts)
        for start, piece in order:
            total.add(start, piece.clone())
        result = total.result(dtype)
        assert result.dtype == dtype
        assert (result.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


def test_no_gradient_is_zero():
    assert torch.equal(GradSum(torch.ones(1, 2, 1, 1), 0).result(), torch.zeros(1, 2, 1, 1))


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """What both merges make of the same blocks, the fused one under Triton's interpreter."""
    if find_spec("triton") is None:
        pytest.skip("needs Triton, whose interpreter runs the kernel on CPUs: pip install triton")
    script, file = Path(__file__).parent / "interpreted_merge.py", tmp_path_factory.mktemp("merge") / "results.pt"
    environment = os.environ | {"PYTHONPATH": str(script.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script), str(file)], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(file)


DTYPES = ("float32", "bfloat16", "float16", "bfloat16 into float32")
SHAPES = [(2, 37, 5, 80), (1, 16, 1, 64), (1, 1, 1, 1), (3, 7, 2, 24), (1, 5, 3, 128), (2, 0, 2, 8)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_triton_kernel_merges_as_the_portable_code_does(interpreted, dtype, shape):
    """Rows without keys in either or both blocks, head dims that are no power of two, and nothing written outside."""
    case = interpreted[dtype, shape]
    assert case["outside"].all(), "what lies around the tensors was written to, or NaN was left inside"
    assert case["out"].shape == case["plain out"].shape == shape
    eps = torch.finfo(case["out"].dtype).eps
    torch.testing.assert_close(case["lse"], case["plain lse"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(case["out"].float(), case["plain out"].float(), rtol=eps, atol=1e-6)
    assert (case["lse"][:, :, 2:3] == -math.inf).all()


def test_the_cases_of_the_triton_kernel_are_those_that_the_interpreter_ran(interpreted):
    assert set(interpreted) == set(itertools.product(DTYPES, SHAPES))
