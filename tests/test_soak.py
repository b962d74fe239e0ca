"""Hundreds of batches, no two packed alike, over two ranks: results stay right, no rank waits in vain, and nothing is left behind.

pytest -m "slow and not gpu" tests/test_soak.py                            400 batches over gloo, in half a minute
DTENSOR_RING_SOAK=1000 pytest -m "slow and not gpu" tests/test_soak.py     as many as you say, at least 400
pytest -m gpu tests/test_soak.py                                           1,000 batches over NCCL on two GPUs
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import soak
from pool import Pool
from soak import KINDS, SIZES, Held, Result

WARM_UP = {"cpu": 200, "cuda": 300}
MOST = 64  # values of a cache, which are full after the warm-up
# Of the host, for each batch: a quarter of the smallest tensor of a rank on CPUs, (1, 192, 2, 32) in float32.
RESIDENT = 192 * 2 * 32 * 4 // 4
# Kernels that are compiled, or loaded, late: the first of a shape that the warm-up did not have.
CODE = {"cpu": 0, "cuda": 32 << 20}


def judge(device: str, result: Result) -> None:
    """Raises AssertionError where a rank holds more than before, or results were wrong."""
    before, after, size = result.before, result.after, SIZES[device]
    # A call that leaves anything leaves an object or more. Half of one is for combinations of options that the warm-up lacked.
    assert after.objects - before.objects < result.batches / 2, f"{after.objects - before.objects} objects more"
    most = RESIDENT * result.batches + CODE[device]
    assert after.resident - before.resident < most, f"{(after.resident - before.resident) >> 10} KiB of the host more"
    # The least that a tensor takes is 512 bytes: one in eight batches.
    assert after.tensors - before.tensors < 512 * result.batches // 8, f"{after.tensors - before.tensors} bytes of tensors more"
    assert after.beside - before.beside <= CODE[device], f"{(after.beside - before.beside) >> 20} MiB beside tensors more"
    assert after.threads <= before.threads, f"{after.threads} threads, {before.threads} before"
    assert after.files <= before.files, f"{after.files} files, {before.files} before"
    assert set(result.kinds) == set(KINDS), "every kind of batch came"
    assert all(off <= size.sums for off in result.sums[:2]), f"sums are {result.sums[:2]} apart"
    assert result.sums[2] == 0, "ranks have one loss"
    assert result.compared >= 5
    assert result.one_process <= size.one_process, f"{result.one_process:.1e} from one process"


def run(device: str, batches: int, timeout: float) -> None:
    """In processes of their own: what other tests left behind may end, or grow, meanwhile."""
    pool = Pool(2, device)
    try:
        results = pool.run(soak.soak, device, WARM_UP[device], batches, MOST, timeout=timeout)
    finally:
        pool.close()
    for rank, result in enumerate(results):
        print(f"rank {rank}: {result}")
        judge(device, result)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_hundreds_of_packings_leave_nothing_behind():
    batches = max(400, int(os.environ.get("DTENSOR_RING_SOAK", "400")))
    run("cpu", batches, 60 + 0.2 * batches)


@pytest.mark.slow
@pytest.mark.gpu(devices=2)
def test_a_thousand_packings_over_nccl_leave_nothing_behind():
    run("cuda", 1000, 240)


FLAT = Held(1 << 30, 1 << 20, 1 << 29, 3000, 8, 30)
RESULT = Result(FLAT, FLAT, 200, [1e-7, 1e-7, 0.0], 1e-7, 12, dict.fromkeys(KINDS, 9), 30.0)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"objects": 200}, "200 objects more"),
        ({"resident": 200 * 49152}, "9600 KiB of the host more"),
        ({"tensors": 200 * 512}, "102400 bytes of tensors more"),
        ({"beside": 64 << 20}, "64 MiB beside tensors more"),
        ({"threads": 1}, "9 threads, 8 before"),
        ({"files": 1}, "31 files, 30 before"),
    ],
)
def test_one_thing_left_by_every_batch_is_found(more, text):
    judge("cpu", RESULT)
    after = replace(FLAT, **{name: getattr(FLAT, name) + count for name, count in more.items()})
    with pytest.raises(AssertionError, match=text):
        judge("cpu", replace(RESULT, after=after))


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"sums": [1e-7, 1e-2, 0.0]}, "sums are"),
        ({"sums": [1e-7, float("nan"), 0.0]}, "sums are"),
        ({"one_process": float("nan")}, "nan from one process"),
        ({"sums": [1e-7, 1e-7, 1e-9]}, "one loss"),
        ({"one_process": 1e-2}, "1.0e-02 from one process"),
        ({"kinds": dict.fromkeys(KINDS[1:], 9)}, "every kind of batch"),
    ],
)
def test_a_wrong_result_is_found(wrong, text):
    with pytest.raises(AssertionError, match=text):
        judge("cpu", replace(RESULT, **wrong))
