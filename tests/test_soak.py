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
# Bytes of the host for each batch: a quarter of the smallest tensor of a rank on CPUs, (1, 192, 2, 32) in float32.
RESIDENT = 192 * 2 * 32 * 4 // 4


def judge(device: str, result: Result) -> None:
    """Raises AssertionError where batches leave something behind, or results were wrong."""
    size = SIZES[device]
    # A call that leaves anything leaves an object or more. A quarter of one is for what is kept for each combination of options and
    # lengths: the warm-up lacks some, and they become fewer and fewer.
    assert result.growth("objects") <= result.batches / 4, f"{result.growth('objects')} objects more"
    assert result.growth("resident") < RESIDENT * result.batches, f"{result.growth('resident') >> 10} KiB of the host more"
    for name in ("tensors", "beside", "threads", "files"):
        assert result.growth(name) <= 0, f"{name}: {result.growth(name)} more"
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
RESULT = Result((FLAT,) * 4, 60, [1e-7, 1e-7, 0.0], 1e-7, 12, dict.fromkeys(KINDS, 9), 30.0)


def grown(name: str, by: int, thirds: tuple[int, ...]) -> Result:
    """A result after which something has grown in some of the thirds."""
    steps = [sum(third < place for third in thirds) for place in range(4)]
    return replace(RESULT, marks=tuple(replace(FLAT, **{name: getattr(FLAT, name) + by * step}) for step in steps))


@pytest.mark.parametrize(
    ("name", "by", "text"),
    [
        ("objects", 60, "60 objects more"),
        ("resident", 60 * 49152, "2880 KiB of the host more"),
        ("tensors", 512, "tensors: 512 more"),
        ("beside", 2 << 20, "beside: 2097152 more"),
        ("threads", 1, "threads: 1 more"),
        ("files", 1, "files: 1 more"),
    ],
)
def test_what_batches_leave_behind_is_found_and_what_comes_once_is_not(name, by, text):
    judge("cpu", grown(name, by, (1,)))
    with pytest.raises(AssertionError, match=text):
        judge("cpu", grown(name, by, (0, 1, 2)))


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
