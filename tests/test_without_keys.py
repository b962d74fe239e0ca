"""The lse of tokens without keys: -inf, whatever a flash kernel gave, and NaN where sums are NaN."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path

import programs
import pytest
import torch
from without_keys_cases import CASES, made

from dtensor_ring.ops.kernels.flash import without_keys


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_tokens_without_keys_get_minus_infinity_and_no_other_token_changes(shape, dtype):
    out, lse = made(shape, dtype)
    found, first = without_keys(out, lse), out[..., 0].T
    none = lse == math.inf
    assert torch.equal(found[~none], lse[~none])
    assert (found[none & ~first.isnan()] == -math.inf).all()
    assert found[none & first.isnan()].isnan().all()


@pytest.mark.skipif(
    find_spec("triton") is None, reason="needs Triton, whose interpreter runs the kernel on CPUs: pip install triton"
)
def test_triton_s_kernel_gives_the_same_bits_under_the_interpreter():
    script = str(Path(__file__).parent / "interpreted_without_keys.py")
    code = 'import runpy, sys; runpy.run_path(sys.argv[0], run_name="__main__")'
    programs.check(code, [script], path=[str(Path(script).parent), str(programs.ROOT)])


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_triton_s_kernel_gives_the_same_bits_on_a_gpu(shape, dtype):
    wanted = without_keys(*made(shape, dtype))
    for _ in range(2):  # compiled, and launched again
        found = without_keys(*made(shape, dtype, "cuda")).cpu()
        assert torch.equal(found.isnan(), wanted.isnan())
        assert torch.equal(found.nan_to_num(7.0), wanted.nan_to_num(7.0))
