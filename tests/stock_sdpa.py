"""What PyTorch's attention does on DTensors of its own placements and under its context_parallel, written down by two ranks.

    python stock_sdpa.py FOLDER [every]      without dtensor_ring

Ranks that have imported dtensor_ring call `write_down` themselves.
"""

from __future__ import annotations

import itertools
import multiprocessing
import sys
import warnings

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import context_parallel
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

CALLS = {
    "flash_attention": (0.0, True),
    "flash_attention_for_cpu": (0.0, True),
    "efficient_attention": (None, True, 0.0, True),
    "cudnn_attention": (None, True, 0.0, True),
    "fused_attention_overrideable": (None, 0.0, True),
}


def parts(x):
    return (str(x.placements), x.to_local().detach()) if isinstance(x, DTensor) else ("plain", x.detach())


def attend(op, tensors, *options):
    """Placements and local values of the output, and of the gradients if they are wanted; or the error."""
    try:
        out = op(*tensors, *options)
        out = out[0] if isinstance(out, tuple) else out
        grads = torch.autograd.grad(out.sum(), tensors) if tensors[0].requires_grad else ()
        return [parts(x) for x in (out, *grads)]
    except Exception as failure:
        return f"{type(failure).__name__}: {failure}"


def write_down(folder: str, kind: str, every: bool) -> None:
    """Save in the folder what this rank sees of every call; `kind` is a part of the file's name.

    PyTorch takes half a minute to work out how its flash attention for CPUs places what it returns: without `every` only calls are
    made that do not come so far.
    """
    assert ("dtensor_ring" in sys.modules) == (kind == "ours")
    warnings.filterwarnings("ignore")  # PyTorch's own, of its experimental function
    mesh, found = init_device_mesh("cpu", (2,)), []
    torch.manual_seed(0)
    for placement, grad in itertools.product((Shard(0), Shard(1), Shard(2), Replicate()), (False, True)):
        x = [distribute_tensor(torch.randn(2, 2, 8, 16), mesh, [placement]).requires_grad_(grad) for _ in range(3)]
        for name, options in CALLS.items():
            found.append(attend(getattr(torch.ops.aten, f"_scaled_dot_product_{name}"), x, *options))
        backends = (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH) if every else ()
        for backend, is_causal in itertools.product(backends, (False, True)):
            with sdpa_kernel(backend):
                found.append(attend(F.scaled_dot_product_attention, x, None, 0.0, is_causal))
    for backend, is_causal, grad in itertools.product((SDPBackend.FLASH_ATTENTION, SDPBackend.MATH), (False, True), (False, True)):
        if not every and (backend, is_causal) == (SDPBackend.FLASH_ATTENTION, False):
            continue
        x = [torch.randn(2, 2, 8, 16) for _ in range(3)]
        with context_parallel(mesh, buffers=x, buffer_seq_dims=[2] * 3), torch.set_grad_enabled(grad), sdpa_kernel(backend):
            leaves = [y.clone().requires_grad_(grad) for y in x]
            found.append(attend(F.scaled_dot_product_attention, leaves, None, 0.0, is_causal))
    torch.save(found, f"{folder}/{kind}{dist.get_rank()}.pt")


def rank_of_two(rank: int, folder: str, every: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    write_down(folder, "stock", every)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    forked = multiprocessing.get_context("fork")  # PyTorch is imported once for both
    ranks = [forked.Process(target=rank_of_two, args=(rank, sys.argv[1], "every" in sys.argv)) for rank in range(2)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join()
    sys.exit(any(each.exitcode for each in ranks))
