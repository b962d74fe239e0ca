"""What a user can do with the wheel and PyTorch alone, on two gloo ranks, against attention written down here.

python smoke.py        # from a folder that does not hold the package
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import dtensor_ring
from dtensor_ring import Contiguous, Documents, Stripe, Zigzag, distribute_tensor, full_tensor, ring_attention
from dtensor_ring.functional import (
    zigzag_llama3_flash_attn_prepare_cu_seqlens,
    zigzag_llama3_flash_attn_varlen_func,
    zigzag_ring_flash_attn_func,
)

WORLD, LENGTH, BOUNDS = 2, 28, (0, 5, 17, 28)


def weights(q: Tensor, k: Tensor, window: int | None = None, bounds: tuple[int, ...] = ()) -> Tensor:
    """Causal attention weights (B, H, S, S) in the dtype of q, one head of k for each of q."""
    token = torch.arange(q.shape[1])
    seen = token[:, None] >= token
    if window is not None:
        seen &= token[:, None] - token <= window
    document = torch.bucketize(token, torch.tensor(bounds[1:]), right=True) if bounds else torch.zeros_like(token)
    seen &= document[:, None] == document
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)


def naive(q: Tensor, k: Tensor, v: Tensor, window: int | None = None, bounds: tuple[int, ...] = ()) -> Tensor:
    return torch.einsum("bhqk,bkhd->bqhd", weights(q, k, window, bounds), v)


def tensors(heads: int = 2, dim: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, LENGTH, heads, dim, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(4)]


def check_placed(mesh, placement, **arguments) -> None:
    """Out and gradients of whole tensors that are spread over the ranks."""
    *inputs, dout = tensors()
    window, bounds = arguments.get("window", (None, 0))[0], arguments.get("documents", Documents(((0, LENGTH),))).bounds[0]
    wanted = naive(*inputs, window, bounds)
    out = full_tensor(ring_attention(*(distribute_tensor(x, mesh, [placement]) for x in inputs), **arguments))
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(torch.autograd.grad(out, inputs, dout), torch.autograd.grad(wanted, inputs, dout))


def check_dropout(mesh) -> None:
    """With one-hot values out is what dropout left of the weights, which backward must see again."""
    q, k, *_ = tensors(heads=1)
    v = torch.eye(LENGTH, dtype=torch.float64)[None, :, None].requires_grad_()
    torch.manual_seed(7)
    out = full_tensor(ring_attention(*(distribute_tensor(x, mesh, [Zigzag(1)]) for x in (q, k, v)), dropout_p=0.4))
    left, whole = out[0, :, 0], weights(q, k)[0, 0]
    kept = left != 0
    assert 0.4 < kept[whole != 0].double().mean() < 0.8, "about 0.6 of the weights are kept"
    torch.testing.assert_close(left[kept], whole[kept] / 0.6)
    dout = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (dv,) = torch.autograd.grad(out, v, dout)
    torch.testing.assert_close(dv[0, :, 0], left.T @ dout[0, :, 0])


def check_dropin(rank: int) -> None:
    """Functions of ring-flash-attn, on this rank's chunks r and 2W-1-r of 2W."""
    *inputs, _ = (x.detach() for x in tensors())
    chunk = LENGTH // (2 * WORLD)
    mine = [slice(chunk * i, chunk * (i + 1)) for i in (rank, 2 * WORLD - 1 - rank)]
    local = [torch.cat([x[:, part] for part in mine], 1) for x in inputs]
    wanted = naive(*inputs)
    torch.testing.assert_close(zigzag_ring_flash_attn_func(*local, causal=True), torch.cat([wanted[:, part] for part in mine], 1))
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32)
    prepared = zigzag_llama3_flash_attn_prepare_cu_seqlens(cu_seqlens, causal=True, rank=rank, world_size=WORLD)
    assert [slice(*tokens) for tokens in prepared.tokens] == mine
    out = zigzag_llama3_flash_attn_varlen_func(*(x[0] for x in local), prepared, causal=True)
    torch.testing.assert_close(out, torch.cat([naive(*inputs, None, BOUNDS)[0, part] for part in mine]))


def run(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("cp",))
    documents = Documents.from_cu_seqlens(BOUNDS)
    for placement in (Contiguous(1), Zigzag(1), Stripe(1)):
        check_placed(mesh, placement)
        check_placed(mesh, placement, documents=documents)
        check_placed(mesh, placement, window=(6, 0))
        check_placed(mesh, placement, documents=documents, window=(6, 0), strategy="gather")
    check_dropout(mesh)
    check_dropin(rank)
    assert "numpy" not in sys.modules
    dist.destroy_process_group()


def main() -> None:
    for package in ("numpy", "transformers"):
        assert importlib.util.find_spec(package) is None, f"{package} is installed: this is to run with PyTorch alone"
    assert "site-packages" in dtensor_ring.__file__, f"not the wheel: {dtensor_ring.__file__}"
    names: dict[str, object] = {}
    exec("from dtensor_ring import *", names)
    try:
        names["ring_plan"](None)
    except ImportError as error:
        assert "pip install 'dtensor-ring[transformers]'" in str(error), error
    else:
        raise AssertionError("ring_plan without transformers raised nothing")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, args=(os.path.join(folder, "store"),), nprocs=WORLD)
    print("the wheel alone: plain, packed, windowed, dropout and drop-in calls are exact")


if __name__ == "__main__":
    main()
