"""Errors and times of the package ring-flash-attn and of dtensor_ring.functional, on the same inputs in the same processes.

    pip install ring-flash-attn flash-attn
    torchrun --nproc-per-node 2 -m benchmarks.against_ring_flash_attn

Errors are rms (and largest) differences to attention in float64 of out, lse, dq, dk, dv over all ranks; "kernel" is flash-attn on
one device. The shapes are those that ring-flash-attn tests itself on, and its benchmark's. Exit status 1 if an error of ours is
larger in rms than theirs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys

import ring_flash_attn
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.timing import Call, Effort, Stopwatch
from dtensor_ring import functional, ring_attention
from dtensor_ring.planning.documents import Documents
from dtensor_ring.planning.layout import Layout

FAMILIES = {
    "ring_flash_attn": "contiguous",
    "zigzag_ring_flash_attn": "zigzag",
    "stripe_flash_attn": "stripe",
    "ring_flash_attn_varlen": "contiguous/even",
    "zigzag_ring_flash_attn_varlen": "zigzag/even",
    "llama3_flash_attn_varlen": "contiguous",
    "zigzag_llama3_flash_attn_varlen": "zigzag",
}
NAMES = ("out", "lse", "dq", "dk", "dv")


def main() -> int:
    """Print a table; exit status 1 if ours is worse anywhere."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16"])
    parser.add_argument("--tokens", type=int, default=8192, help="tokens per rank when timing; 0 leaves timing out")
    options = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    worse = sum(compare(family, dtype, heads) for dtype in options.dtypes for family in FAMILIES for heads in ((5, 5), (8, 2)))
    if options.tokens:
        for family in FAMILIES:
            race(family, options.tokens)
    dist.barrier()
    dist.destroy_process_group()
    return int(worse > 0)


def bounds_of(family: str, world: int) -> tuple[int, ...] | None:
    """Document bounds of the reference's own tests, made divisible."""
    if "varlen" not in family:
        return None
    return (0, 128, 1248, 4240) if "zigzag" in family else (0, 120, 1248, 4232)


def call(module: object, family: str, q: Tensor, k: Tensor, v: Tensor, bounds: tuple[int, ...] | None) -> tuple[Tensor, Tensor]:
    """Out and lse of one implementation, causal."""
    world, rank = dist.get_world_size(), dist.get_rank()
    func = getattr(module, f"{family}_func")
    if bounds is None:
        return func(q, k, v, causal=True, return_attn_probs=True)[:2]
    q, k, v = q[0], k[0], v[0]
    cu = torch.tensor(bounds, dtype=torch.int32, device=q.device)
    if family.startswith("zigzag_llama3"):
        out, lse, _ = func(
            q,
            k,
            v,
            functional.zigzag_llama3_flash_attn_prepare_cu_seqlens(cu, True, rank, world),
            causal=True,
            return_attn_probs=True,
        )
    elif family.startswith("llama3"):
        cu_q, cu_k, max_q, max_k, part = module.llama3_flash_attn_prepare_cu_seqlens(cu, True, rank, world)
        out, lse, _ = func(q, k, v, cu_q, cu_k, max_q, max_k, 1, part, causal=True, return_attn_probs=True)
    else:
        local = cu // world
        out, lse, _ = func(q, k, v, local, int(local.diff().max()), causal=True, return_attn_probs=True)
    return out[None], lse.reshape(1, q.shape[1], -1) if lse.dim() == 2 else lse


def compare(family: str, dtype: str, heads: tuple[int, int]) -> int:
    """Errors side by side; how many of ours are larger."""
    world, rank, bounds = dist.get_world_size(), dist.get_rank(), bounds_of(family, dist.get_world_size())
    length = 3816 if bounds is None else bounds[-1]
    torch.manual_seed(0)
    shapes = [(1, length, h, 128) for h in (heads[0], heads[1], heads[1], heads[0])]
    q, k, v, dout = (torch.randn(shape, device="cuda", dtype=getattr(torch, dtype)) for shape in shapes)
    documents = None if bounds is None else Documents((bounds,))
    exact = whole(q, k, v, dout, documents, torch.float64, "math")
    single = whole(q, k, v, dout, documents, q.dtype, "flash_attn_2")
    tokens = torch.tensor(Layout.parse(FAMILIES[family]).tokens(length, world, rank, bounds), device="cuda")
    errors = {"kernel": [difference(a, b) for a, b in zip(single, exact, strict=True)]}
    for name, module in (("theirs", ring_flash_attn), ("ours", functional)):
        if not hasattr(module, f"{family}_func"):
            continue
        leaves = [x[:, tokens].contiguous().requires_grad_() for x in (q, k, v)]
        try:
            out, lse = call(module, family, *leaves, bounds)
            grads = torch.autograd.grad(out, leaves, dout[:, tokens].contiguous())
        except (RuntimeError, ValueError, AssertionError, TypeError) as failure:
            if rank == 0:
                print(f"{family} {dtype} {heads[0]}:{heads[1]} {name} fails: {type(failure).__name__}: {str(failure)[:120]}")
            continue
        parts = out.detach(), lse, *grads
        errors[name] = [difference(part, share(x, tokens, i)) for i, (part, x) in enumerate(zip(parts, exact, strict=True))]
    if rank == 0:
        print(f"{family}, {dtype}, heads {heads[0]}:{heads[1]}, {length} tokens")
        for name, found in errors.items():
            print(
                f"  {name:<7}"
                + "".join(f"{part:>4} {mean:.2e} ({most:.1e})" for part, (mean, most) in zip(NAMES, found, strict=True))
            )
    theirs, ours = errors.get("theirs"), errors.get("ours")
    if theirs is None or ours is None:
        return int(ours is None)
    return sum(a[0] > 1.001 * b[0] for a, b in zip(ours, theirs, strict=True))


def whole(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, documents: Documents | None, dtype: torch.dtype, kernel: str
) -> list[Tensor]:
    """Everything on one device."""
    leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    out, lse = ring_attention(*leaves, documents=documents, kernel=kernel, return_lse=True)
    return [out.detach(), lse, *torch.autograd.grad(out, leaves, dout.to(dtype))]


def share(x: Tensor, tokens: Tensor, index: int) -> Tensor:
    """This rank's tokens: dim 2 of lse, else dim 1."""
    return x.index_select(2 if index == 1 else 1, tokens)


def difference(found: Tensor, wanted: Tensor) -> tuple[float, float]:
    """Rms and largest difference over all ranks."""
    gap = found.double() - wanted.double()
    sums = torch.stack([gap.square().sum(), torch.tensor(float(gap.numel()), device=gap.device, dtype=torch.float64)])
    most = gap.abs().max()
    dist.all_reduce(sums)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return (sums[0] / sums[1]).sqrt().item(), most.item()


def race(family: str, tokens: int) -> None:
    """Forward and backward of both in turns; the slowest rank counts."""
    world, rank = dist.get_world_size(), dist.get_rank()
    bounds = None if "varlen" not in family else tuple(tokens * world * i // 8 for i in range(9))
    shapes = [(1, tokens, h, 128) for h in (32, 8, 8, 32)]
    q, k, v, dout = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    calls: dict[str, Call] = {}
    for name, module in (("theirs", ring_flash_attn), ("ours", functional)):
        if hasattr(module, f"{family}_func"):
            calls[name] = lambda module=module: torch.autograd.grad(call(module, family, *leaves, bounds)[0], leaves, dout)
    watch = Stopwatch(q.device, Effort(rounds=5, block=40.0), together=True)
    spent = dict(zip(calls, watch.in_turns(list(calls.values())), strict=True))
    if rank == 0:
        print(f"{family:<34}" + "  ".join(f"{name} {statistics.median(values):.3f} ms" for name, values in spent.items()))


if __name__ == "__main__":
    sys.exit(main())
