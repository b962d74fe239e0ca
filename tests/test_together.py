"""Ranks fail together: what one rank refuses all are told of, and who waits in vain says for whom, where and in what."""

from __future__ import annotations

import datetime
import os
import re
import signal
import time
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import grid, line
from models import make_batch, make_model
from pool import Pool
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module

from dtensor_ring import (
    Contiguous,
    Zigzag,
    distribute_tensor,
    from_local,
    full_tensor,
    ring_attention,
    ring_plan,
    shard_batch,
)
from dtensor_ring.comm import ProcessGroupTransport, SilentRankError, rank_checks, transport_along, transport_of
from dtensor_ring.comm.rank_checks import meet
from dtensor_ring.debug import traffic
from dtensor_ring.functional import ring_flash_attn_func, zigzag_ring_flash_attn_func, zigzag_ring_flash_attn_qkvpacked_func
from dtensor_ring.ops import sdpa

SECONDS = 4


def axis(seconds: float = SECONDS) -> DeviceMesh:
    """A mesh of one axis whose transfers time out soon."""
    dist.barrier()
    group = dist.new_group(timeout=datetime.timedelta(seconds=seconds))
    return DeviceMesh.from_group(group, "cpu", mesh_dim_names=("cp",))


def placed(mesh: DeviceMesh, length: int, requires_grad: bool = False):
    x = torch.randn(1, length, 6, 8, generator=torch.Generator().manual_seed(length))
    shares = distribute_tensor(x, mesh, [Zigzag(1)], src_data_rank=None).to_local()
    return from_local(shares.detach().requires_grad_(requires_grad), mesh, [Zigzag(1)], length=length)


def _ids(wrong: bool) -> dict[str, object]:
    ids = torch.zeros(1, 12, dtype=torch.int64)
    return {"input_ids": ids, "labels": [1, 2] if wrong else ids}


def _stock_attention(mesh: DeviceMesh, wrong: bool):
    x = distribute_tensor(torch.randn(1, 6, 12, 8), mesh, [Zigzag(2)], src_data_rank=None)
    return F.scaled_dot_product_attention(x, x, x, is_causal=not wrong, dropout_p=0.0, scale=float("nan") if wrong else None)


def _parallel_model(mesh: DeviceMesh, wrong: bool):
    model = make_model("llama")
    parallelize_module(model, mesh, ring_plan(model))
    return model(**make_batch(13), **({"use_cache": True} if wrong else {}))


# Each is new to all ranks, or the others would not meet the one that refuses it: hence lengths of their own.
CALLS = {
    "placements": (lambda m, wrong: distribute_tensor(torch.ones(12), m, [Contiguous(0) if wrong else Zigzag(0)]), None),
    "batch placements": (lambda m, wrong: shard_batch(_ids(False), m, Contiguous(1) if wrong else Zigzag(1)), None),
    "a length of text": (
        lambda m, wrong: from_local(torch.ones(4, 2), m, [Zigzag(0)], length="12" if wrong else 12),
        "tokens of the whole sequence, found '12'",
    ),
    "sources": (
        lambda m, wrong: distribute_tensor(torch.ones(13), m, [Zigzag(0)], src_data_rank=1 if wrong else 0),
        None,
    ),
    "no tensor": (lambda m, wrong: from_local([1.0] if wrong else torch.ones(4, 2), m, [Zigzag(0)], length=12), "no attribute"),
    "a huge scale": (lambda m, wrong: ring_attention(*[placed(m, 16)] * 3, scale=10**400 if wrong else 1.0), "too large"),
    "sinks": (lambda m, wrong: ring_attention(*[placed(m, 17)] * 3, sinks=None if wrong else torch.zeros(6)), None),
    "placement": (lambda m, wrong: shard_batch(_ids(False), m, Zigzag(0 if wrong else 1)), "is cut in dim 1"),
    "window": (lambda m, wrong: ring_attention(*[placed(m, 12)] * 3, window=(-5, 0) if wrong else (-1, -1)), "a side is a number"),
    "kernel": (lambda m, wrong: ring_attention(*[placed(m, 13)] * 3, kernel="cuda" if wrong else None), "unknown kernel 'cuda'"),
    "scale": (lambda m, wrong: ring_attention(*[placed(m, 12)] * 3, scale=float("nan") if wrong else 1.0), "a finite number"),
    "dtypes": (
        lambda m, wrong: ring_attention(placed(m, 14), placed(m, 14), placed(m, 14).double() if wrong else placed(m, 14)),
        "one dtype",
    ),
    "mixed": (
        lambda m, wrong: ring_attention(*[placed(m, 15)] * 2, torch.ones(1) if wrong else placed(m, 15)),
        "all plain tensors",
    ),
    "from_local": (lambda m, wrong: from_local(torch.ones(4, 2), m, [Zigzag(7 if wrong else 0)], length=12), "of 2 dims"),
    "distribute": (lambda m, wrong: distribute_tensor(torch.ones(12), m, [Zigzag(5 if wrong else 0)]), "of 1 dims"),
    "source": (
        lambda m, wrong: distribute_tensor(torch.ones(12), m, [Zigzag(0)], src_data_rank=9 if wrong else 0),
        "=9 is no rank",
    ),
    "documents": (
        lambda m, wrong: distribute_tensor(
            torch.ones(12), m, [Zigzag(0, per_document=True)], src_data_rank=None, documents=[0, 5, 13 if wrong else 12]
        ),
        "documents end at token 13",
    ),
    "sdpa": (_stock_attention, "a finite number"),
    "drop-in": (
        lambda m, wrong: ring_flash_attn_func(*[torch.ones(1, 4, 2, 8)] * 3, softmax_scale=float("inf") if wrong else 1.0),
        "a finite number",
    ),
    "drop-in chunks": (
        lambda m, wrong: zigzag_ring_flash_attn_func(
            *[torch.ones(1, 5 if wrong else 4, 2, 8)] * 3, causal=True, group=m.get_group()
        ),
        "holds 2 chunks of one length, but q has 5 tokens",
    ),
    "drop-in packed": (
        lambda m, wrong: zigzag_ring_flash_attn_qkvpacked_func(torch.ones(1, 4, 2 if wrong else 3, 2, 8), group=m.get_group()),
        "qkv must have shape",
    ),
    "shard_batch": (lambda m, wrong: shard_batch(_ids(wrong), m), "labels must be a tensor"),
    "model": (_parallel_model, "generation"),
}


def refusal(name: str) -> tuple[str, str, float]:
    """One rank passes something wrong: what each rank raises, and how soon; and the group works on."""
    mesh, rank = line(), dist.get_rank()
    call, text = CALLS[name]
    start = time.monotonic()
    with pytest.raises((ValueError, TypeError, NotImplementedError, RuntimeError, AttributeError, OverflowError)) as failure:
        call(mesh, rank == 1)
    seconds = time.monotonic() - start
    assert not isinstance(failure.value, SilentRankError)
    assert text in str(failure.value) if text else re.search("every rank|the same", str(failure.value))
    assert meet(transport_along(mesh), "afterwards", [rank]) == [[0], [1], [2]]
    call(mesh, False)
    return type(failure.value).__name__, str(failure.value), seconds


@pytest.mark.parametrize("name", CALLS)
def test_what_one_rank_refuses_every_rank_raises_before_any_waits(pools, name):
    answers = pools.run(3, refusal, name, timeout=60)
    foreseen = not {kind for kind, _, _ in answers} & {"AttributeError", "OverflowError"}
    assert len({kind for kind, _, _ in answers}) == (1 if foreseen else 2), "others see a RuntimeError where nobody foresaw it"
    for rank, (_, text, seconds) in enumerate(answers):
        if CALLS[name][1] is not None:  # the others are told; otherwise all compare, and see that they differ
            assert ("rank 1 of " in text and "refuses this call" in text) == (rank != 1)
        assert seconds < 20, "nobody waits for a timeout of the group, which is 30 minutes"


def different_calls():
    mesh = line()
    rank, share = dist.get_rank(), torch.ones(1, 4, 2, 8)
    wanted = r"rank \d of mesh axis 'cp' is in: .*Rank \d is in: .*the same calls in the same order"
    batch = {"input_ids": torch.zeros(1, 12, dtype=torch.int64)}
    with pytest.raises(RuntimeError, match=wanted):
        from_local(share, mesh, [Zigzag(1)], length=12) if rank == 0 else shard_batch(batch, mesh)
    x = distribute_tensor(torch.arange(24.0).view(12, 2), mesh, [Zigzag(0)], src_data_rank=None)
    with pytest.raises(RuntimeError, match=wanted):
        full_tensor(x) if rank == 0 else transport_along(mesh).all_reduce(torch.ones(3))
    assert torch.equal(full_tensor(x), torch.arange(24.0).view(12, 2))


def test_ranks_in_different_calls_are_told_which(pools):
    pools.run(3, different_calls)


def parted_sizes(strategy: str) -> tuple[str, str]:
    """All ranks know two calls; then rank 0 makes the one and the others the other."""
    mesh = axis()
    for length in (12, 24):
        ring_attention(*[placed(mesh, length)] * 3, strategy=strategy)
    lengths = {length: placed(mesh, length) for length in (12, 24)}
    mine = lengths[12 if dist.get_rank() == 0 else 24]
    with pytest.raises(RuntimeError) as failure:
        ring_attention(mine, mine, mine, strategy=strategy)
    return type(failure.value).__name__, str(failure.value)


@pytest.mark.parametrize("strategy", ["ring", "gather", "ulysses"])
def test_sizes_that_part_after_both_calls_are_known_raise_and_kill_no_rank(pools, strategy):
    answers = pools.run(3, parted_sizes, strategy, timeout=60)
    for rank, (kind, text) in enumerate(answers):
        other = 24 if rank == 0 else 12
        assert kind == ("RuntimeError" if strategy == "gather" else "SilentRankError")
        assert f"rank {rank} of mesh axis 'cp'" in text
        assert f"{12 if rank == 0 else 24} tokens over 3 ranks" in text
        if rank == 0 or strategy == "gather":
            assert f"{other} tokens over 3 ranks" in text


def left_alone(strategy: str, direction: str, how: str) -> tuple[str, float]:
    """Rank 2 is killed, or late, before one pass: what the others raise, and how soon."""
    mesh, options = axis(), {"stages": 2} if strategy == "ring" else {}
    x = placed(mesh, 24, requires_grad=True)
    out = ring_attention(x, x, x, strategy=strategy, **options)
    dist.barrier()
    start = time.monotonic()
    if dist.get_rank() == 2:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(SECONDS + 5)
        return "", 0.0
    with pytest.raises(SilentRankError) as failure:
        ring_attention(x, x, x, strategy=strategy, **options) if direction == "forward" else out.to_local().sum().backward()
    return str(failure.value), time.monotonic() - start


@pytest.mark.parametrize(
    ("strategy", "direction", "how"),
    [
        ("ring", "forward", "killed"),
        ("ring", "backward", "late"),
        ("gather", "backward", "killed"),
        ("ulysses", "forward", "late"),
    ],
)
def test_a_rank_that_is_gone_or_late_is_named_with_axis_call_pass_and_step(strategy, direction, how):
    pool = Pool(3)
    try:
        answers = pool.run(left_alone, strategy, direction, how, timeout=60, lost=frozenset({2} if how == "killed" else ()))
    finally:
        pool.close()
    for rank, (text, seconds) in enumerate(answers[:2]):
        assert f"attention ({strategy}, zigzag, causal, 24 tokens over 3 ranks), {direction}" in text
        assert f"rank {rank} of mesh axis 'cp' waited" in text
        assert ("step " in text) == (strategy != "ulysses")
        assert "Rank 2 says nothing" in text or "The group's store does not answer" in text
        assert seconds < SECONDS + 5


def late_refusal() -> tuple[str, str]:
    """The call is known to all; then rank 1 refuses its arguments while the others go on and wait."""
    mesh = axis()
    x = placed(mesh, 24)
    ring_attention(x, x, x)
    with pytest.raises((ValueError, SilentRankError)) as failure:
        ring_attention(x, x, x, window=(-5, 0) if dist.get_rank() == 1 else (-1, -1))
    return type(failure.value).__name__, str(failure.value)


def test_a_late_refusal_shows_its_own_error_and_leaves_no_rank_waiting(pools):
    answers = pools.run(3, late_refusal, timeout=60)
    assert answers[1][0] == "ValueError"
    for rank in (0, 2):
        assert answers[rank][0] == "SilentRankError"
        assert "for rank 1. Rank 1 says nothing" in answers[rank][1]


class _AsOnGpus(ProcessGroupTransport):
    """Behaves as on NCCL, where the first exchange begins with a meeting, over gloo."""

    meetings = 0

    def _is_nccl(self) -> bool:
        return True

    def value_device(self) -> torch.device:
        return torch.device("cpu")


def one_rank_alone_asks_for_traffic():
    mesh = axis()
    if dist.get_rank() == 0:
        assert traffic(mesh).bytes == 0
        assert _AsOnGpus(mesh.get_group(0)).traffic.messages == 0
    dist.barrier()
    transport, calls, stock = _AsOnGpus(mesh.get_group(0)), [], dist.all_reduce
    dist.all_reduce = lambda *args, **options: (calls.append(1), stock(*args, **options))[1]
    try:
        for _ in range(2):
            transport.exchange([], []).wait()
    finally:
        dist.all_reduce = stock
    assert len(calls) == 1, "the first exchange of a group meets, no other"


def test_one_rank_alone_may_ask_for_a_group_s_traffic(pools):
    pools.run(2, one_rank_alone_asks_for_traffic, timeout=30)


def two_axes():
    with patch.object(rank_checks, "_PATIENCE", 1.0):
        told_on_both_axes(grid(), dist.get_rank() == 3)


def told_on_both_axes(mesh: DeviceMesh, wrong: bool):
    with pytest.raises(ValueError, match=r"src_data_rank=5 is no rank|refuses this call"):
        distribute_tensor(torch.ones(4, 4), mesh, [Replicate(), Contiguous(0)], src_data_rank=5 if wrong else 0)
    dist.barrier()
    if mesh.get_local_rank("dp") == 1:  # where it cannot be told which axis holds the sequence, every axis is told
        with pytest.raises(ValueError, match=r"exactly one mesh axis must hold the sequence"):
            from_local(torch.ones(2, 4), mesh, [Replicate(), Replicate() if wrong else Contiguous(0)], length=4)


def documents_on_two_axes():
    """One rank of a mesh of two axes has other documents, or wrong ones: all learn of it, and the next call is right."""
    mesh = grid()
    placements, wrong = [Replicate(), Zigzag(0, per_document=True)], dist.get_rank() == 3
    for other in ([0, 3, 8], [0, 2, 9]):
        with pytest.raises(ValueError, match=r"pass different documents|documents end at token 9|refuses this call"):
            distribute_tensor(torch.ones(8), mesh, placements, src_data_rank=None, documents=other if wrong else [0, 2, 8])
        dist.barrier()
    distribute_tensor(torch.ones(8), mesh, placements, src_data_rank=None, documents=[0, 2, 8])


def test_documents_that_differ_on_two_axes_leave_no_rank_waiting(pools):
    pools.run(4, documents_on_two_axes, timeout=60)


def a_late_rank(*unknown: str) -> list[str]:
    """Rank 0 comes after rank 1 has refused all calls, and waits no more; it still learns why each was refused."""
    mesh = axis(30)
    x = placed(mesh, 18)
    texts = []
    with patch.object(rank_checks, "_PATIENCE", 0.2):
        if dist.get_rank() == 0:
            time.sleep(2)
        for kernel in unknown:
            with pytest.raises(ValueError, match="unknown kernel") as failure:
                ring_attention(x, x, x, kernel=kernel if dist.get_rank() else None)
            texts.append(str(failure.value))
    return texts


def test_a_rank_that_comes_late_learns_what_another_has_refused():
    pool = Pool(2)
    try:
        answers = pool.run(a_late_rank, "cuda", "rocm", timeout=60)
    finally:
        pool.close()
    for late, refusing, name in zip(*answers, ("cuda", "rocm"), strict=True):
        assert f"rank 1 of mesh axis 'cp' refuses this call: unknown kernel '{name}'" in late
        assert refusing.startswith(f"unknown kernel '{name}'")


def test_what_is_refused_on_one_axis_is_refused_on_the_others(pools):
    pools.run(4, two_axes, timeout=60)


def test_a_group_without_a_name_is_called_by_its_own(pools):
    pools.run(2, unnamed_group)


def unnamed_group():
    group = dist.new_group([0, 1])
    assert transport_of(group).axis == f"process group {group.group_name!r}"
    assert transport_along(DeviceMesh.from_group(group, "cpu")).axis == "mesh axis 0"


def stock_attention_beside_heads():
    """One rank refuses PyTorch's attention on (B, H, S, D) where another axis splits heads, in the dim that is ours for tokens."""
    mesh, wrong = grid("tp", "cp", rows=1), dist.get_rank() == 1
    x = distribute_tensor(torch.randn(1, 2, 10, 8), mesh, [Shard(1), Zigzag(2)], src_data_rank=None)
    with pytest.raises(ValueError, match=r"a finite number" if wrong else r"rank 1 of mesh axis 'cp' refuses this call"):
        F.scaled_dot_product_attention(x, x, x, is_causal=True, scale=float("nan") if wrong else None)
    failures = []
    with pytest.MonkeyPatch.context() as patch:  # what a kernel raises is raised, and no meeting is offered
        patch.setattr(ProcessGroupTransport, "offer_values", lambda *_: failures.append(1))
        patch.setattr(sdpa, "attention", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            F.scaled_dot_product_attention(x, x, x, is_causal=True)
    assert not failures
    F.scaled_dot_product_attention(x, x, x, is_causal=True)


def test_a_refusal_of_stock_attention_goes_to_the_ranks_that_share_the_sequence(pools):
    pools.run(2, stock_attention_beside_heads, timeout=60)


def names_of_a_group():
    """One rank alone makes a DTensor over a group, which sends nothing, after all have called a function over it."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=20))
    mesh, share = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("cp",)), torch.ones(1, 4, 2, 8)
    for _ in range(2):
        ring_flash_attn_func(share, share, share, group=group)
        if dist.get_rank() == 0:
            distribute_tensor(torch.ones(1, 8), mesh, [Zigzag(1)], src_data_rank=None)
    ring_flash_attn_func(share, share, share, group=group, softmax_scale=2.0)  # a call that is new to all, who meet


def test_what_a_rank_calls_its_group_in_errors_is_not_compared(pools):
    pools.run(2, names_of_a_group, timeout=60)
