"""Laws that need real GPUs: flash kernels, NCCL, the fused merge. Run with `pytest -m gpu` on a machine with two GPUs."""

from __future__ import annotations

import itertools
import json
import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import PLACEMENTS, assert_like_kernel, error_ratios, line, make_case, over_ranks, share, single_device
from torch.distributed.tensor import Replicate, Shard

from dtensor_ring import (
    Contiguous,
    Documents,
    Stripe,
    Zigzag,
    distribute_tensor,
    from_local,
    full_tensor,
    redistribute,
    ring_attention,
)
from dtensor_ring.ops.call import AttentionCall
from dtensor_ring.ops.executors.merge import merge_
from dtensor_ring.ops.executors.parts import OutputPart
from dtensor_ring.ops.kernels import KERNELS, Block, KernelRequirements, Saved, SoftmaxParams, VarlenMetadata, VarlenSegment
from dtensor_ring.ops.reference import reference_attention
from dtensor_ring.planning.layout import Layout
from dtensor_ring.planning.mask import Band

pytestmark = pytest.mark.gpu
LAYOUTS = ("contiguous", "zigzag", "stripe")


def note(name: str, values: object) -> None:
    """Measured figures for the record, where a folder is named for them."""
    folder = os.environ.get("DTENSOR_RING_TEST_NOTES")
    if folder:
        with (Path(folder) / "notes.jsonl").open("a") as file:
            file.write(json.dumps([name, values]) + "\n")


def attend(layout: str, strategy: str, dtype: str, mask: str, documents: Documents | None, heads: tuple[int, int], length: int):
    case = make_case(
        length, heads=heads, dim=128, dtype=getattr(torch, dtype), mask=mask, documents=documents, device="cuda", batch=1
    )
    results = over_ranks(case, layout, strategy=strategy, kernel="torch_flash")
    single = single_device(case, "torch_flash")
    exact = case.exact()
    ratios = error_ratios(results, single, exact)
    assert_like_kernel(results, single, exact)
    return ratios


COMBINATIONS = [
    *itertools.product(LAYOUTS, ("ring", "gather"), ("bfloat16", "float16"), ("causal",), (None,)),
    *itertools.product(LAYOUTS, ("ring", "gather"), ("bfloat16",), ("full", "window", "two-sided"), (None,)),
    *itertools.product(LAYOUTS, ("ring", "gather"), ("bfloat16",), ("causal", "window"), ((400, 7, 1, 700, 940),)),
]


@pytest.mark.parametrize(("layout", "strategy", "dtype", "mask", "lengths"), COMBINATIONS)
def test_two_gpus_are_as_exact_as_one(pools, layout, strategy, dtype, mask, lengths):
    documents = None if lengths is None else Documents.from_lengths(lengths)
    ratios = pools.run(2, attend, layout, strategy, dtype, mask, documents, (4, 2), 2048, device="cuda")[0]
    note(f"{layout} {strategy} {dtype} {mask} {lengths}", ratios)


@pytest.mark.parametrize(("heads", "length"), [((8, 8), 1000), ((4, 1), 1001), ((6, 2), 33), ((4, 2), 7), ((4, 2), 1)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_heads_and_odd_lengths(pools, layout, heads, length):
    pools.run(2, attend, layout, "ring", "bfloat16", "causal", None, heads, length, device="cuda")


def gather_is_bit_equal(layout: str, mask: str):
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = line("cuda")
    # chunks of 2048 tokens are whole blocks of the kernel, and 16 heads fill the GPU, so that it does not split keys
    case = make_case(8192, heads=(16, 4), dim=128, dtype=torch.bfloat16, mask=mask, device="cuda", batch=1)
    placed = [distribute_tensor(x, mesh, [PLACEMENTS[layout]], src_data_rank=None) for x in case.inputs]
    out = ring_attention(*placed, is_causal=case.is_causal, strategy="gather", kernel="torch_flash")
    alone = ring_attention(*case.inputs, is_causal=case.is_causal, strategy="local", kernel="torch_flash")
    assert torch.equal(out.to_local(), share(alone, layout, world, rank))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_gather_is_bit_equal_to_one_gpu_for_chunks_of_whole_kernel_blocks(pools, layout):
    pools.run(2, gather_is_bit_equal, layout, "causal", device="cuda")


def move_between_placements():
    mesh = line("cuda")
    x = torch.arange(3 * 13 * 4, dtype=torch.float32, device="cuda").view(3, 13, 4)
    placements = [Zigzag(1), Contiguous(1), Stripe(1, block=2), Shard(1), Shard(2), Replicate()]
    for a, b in itertools.product(placements, placements):
        leaf = x.clone().requires_grad_()
        moved = redistribute(distribute_tensor(leaf, mesh, [a]), [b])
        back = full_tensor(moved)
        assert torch.equal(back, x), (a, b)
        (grad,) = torch.autograd.grad(back, leaf, x)
        assert torch.equal(grad, x), (a, b)


def test_redistribution_over_nccl_is_a_permutation(pools):
    pools.run(2, move_between_placements, device="cuda")


def no_host_sync_in_attention():
    mesh = line("cuda")
    case = make_case(512, dim=64, dtype=torch.bfloat16, device="cuda")
    placed = [distribute_tensor(x, mesh, [Zigzag(1)], src_data_rank=None).requires_grad_() for x in case.inputs]
    documents = Documents.from_lengths([100, 200, 212])

    def both():
        out = ring_attention(*placed, documents=documents)
        torch.autograd.grad(out, placed, torch.ones_like(out))

    both()
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        both()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def peak_memory_of_the_ring():
    world, tokens, heads, kv_heads, dim = dist.get_world_size(), 4096, 16, 4, 128
    mesh = line("cuda")
    q, dout = (torch.randn(1, tokens, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.randn(1, tokens, kv_heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    kernel, block = KERNELS["torch_flash"], Block((-1, 0), SoftmaxParams(dim**-0.5))

    def peak(body):
        body()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        result = body()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - held

    def ring():
        with torch.no_grad():
            placed = [from_local(x, mesh, [Zigzag(1)], length=world * tokens, run_check=False) for x in (q, k, v)]
            return ring_attention(*placed, kernel="torch_flash", return_lse=True)

    out, lse = (x.to_local() for x in ring())
    none = torch.empty(0, dtype=torch.int64)
    call = AttentionCall(Band.parse("causal"), dim**-0.5, Layout("zigzag"), kernel="torch_flash", training=True)
    arguments = none, (world * tokens, world * tokens), (0, 0), str(call), mesh.get_group().group_name
    backward = torch.ops.dtensor_ring.attention_backward
    kv, q_bytes, lse_bytes = k.nbytes + v.nbytes, q.nbytes, lse.nbytes
    kernel_backward = peak(lambda: kernel.backward(Saved(q, k, v, out, lse), dout, block)) - q_bytes - kv
    forward = peak(ring)
    both = peak(lambda: backward(dout, q, k, v, None, None, out, lse, none, *arguments))
    slack = 8 << 20
    assert forward <= 2 * kv + q_bytes + 2 * q_bytes + 2 * lse_bytes + slack
    assert both <= 2 * kv + 4 * kv + 2 * q_bytes + q_bytes + kv + kernel_backward + slack
    return {"forward MiB": forward / 2**20, "backward MiB": both / 2**20, "kernel workspace MiB": kernel_backward / 2**20}


def test_memory_of_the_ring_stays_within_its_bound(pools):
    note("peak memory", pools.run(2, peak_memory_of_the_ring, device="cuda")[0])


def test_a_layer_never_waits_for_the_gpu(pools):
    pools.run(2, no_host_sync_in_attention, device="cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [64, 128, 80])
def test_fused_merge_equals_the_plain_one(dtype, dim):
    generator = torch.Generator("cuda").manual_seed(0)
    out, block = (torch.randn(2, 37, 5, dim, device="cuda", generator=generator).to(dtype) for _ in range(2))
    lse, block_lse = (torch.randn(2, 5, 37, device="cuda", generator=generator) * 3 for _ in range(2))
    lse[:, :, :3] = -torch.inf
    block_lse[:, :, 2:6] = -torch.inf
    out[:, :3], block[:, 2:6] = 0, 0
    plain_out, plain_lse = out.cpu().clone(), lse.cpu().clone()
    merge_(plain_out, plain_lse, [OutputPart(0, block.cpu(), block_lse.cpu())])
    merge_(out, lse, [OutputPart(0, block, block_lse)])
    assert not out.isnan().any()
    torch.testing.assert_close(lse.cpu(), plain_lse, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.cpu().float(), plain_out.float(), rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (100, 0), (50, 30)])
@pytest.mark.parametrize("shape", [(300, 300), (200, 500)])
def test_flash_kernel_windows_are_bottom_right(window, shape):
    kernel = KERNELS["torch_flash"]
    case = make_case(shape[0], k_length=shape[1], dim=128, dtype=torch.bfloat16, device="cuda")
    out, lse = kernel.forward(*case.inputs, Block(window, SoftmaxParams(128**-0.5)))
    exact, exact_lse = reference_attention(*case.inputs, is_causal=False, window=window)
    torch.testing.assert_close(out.float(), exact, rtol=0, atol=2e-2)
    torch.testing.assert_close(lse, exact_lse, rtol=0, atol=1e-3)


def test_packed_rows_without_keys_are_empty_and_keys_without_queries_get_no_gradient():
    kernel, softmax = KERNELS["torch_flash"], SoftmaxParams(128**-0.5)
    assert kernel.refuses(KernelRequirements("cuda", torch.bfloat16, 128, 128, training=True)) is None
    case = make_case(64, k_length=96, dim=128, batch=1, dtype=torch.bfloat16, device="cuda")
    q, k, v, dout = (x[0] for x in (*case.inputs, case.dout))
    varlen = VarlenMetadata.of([VarlenSegment(8, 24, 4, 30), VarlenSegment(24, 50, 40, 90)], 64, 96, q.device)
    block = Block((-1, 0), softmax, varlen)
    out, lse = kernel.forward(q, k, v, block)
    assert (out[:8] == 0).all()
    assert (out[50:] == 0).all()
    assert (lse[:, :8] == -torch.inf).all()
    dq, dk, dv = kernel.backward(Saved(q, k, v, out, lse), dout, block)
    for start, stop in ((0, 4), (30, 40), (90, 96)):
        assert (dk[start:stop] == 0).all()
        assert (dv[start:stop] == 0).all()
    assert (dq[:8] == 0).all()
    assert (dq[50:] == 0).all()
    for queries, keys in ((slice(8, 24), slice(4, 30)), (slice(24, 50), slice(40, 90))):
        alone, _ = kernel.forward(q[None, queries], k[None, keys], v[None, keys], Block((-1, 0), softmax))
        assert torch.equal(alone[0], out[queries])
