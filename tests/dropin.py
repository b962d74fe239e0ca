"""The drop-in functions called as their users call them: one rank's tensors of a family's layout in, whole results out."""

from __future__ import annotations

from unittest.mock import patch

import torch
import torch.distributed as dist
from helpers import Case, make_case, together

from dtensor_ring import functional
from dtensor_ring.functional import llama3, llama3_flash_attn_prepare_cu_seqlens, zigzag_llama3_flash_attn_prepare_cu_seqlens
from dtensor_ring.planning.documents import Documents
from dtensor_ring.planning.layout import Layout

BATCH = {"ring_flash_attn": "contiguous", "zigzag_ring_flash_attn": "zigzag", "stripe_flash_attn": "stripe"}
VARLEN = {"ring_flash_attn_varlen": "contiguous/even", "zigzag_ring_flash_attn_varlen": "zigzag/even"}
GATHERED = {"llama3_flash_attn_varlen": "contiguous", "zigzag_llama3_flash_attn_varlen": "zigzag"}
FAMILIES = BATCH | VARLEN | GATHERED


def bounds_of(family: str, length: int, world: int) -> tuple[int, ...] | None:
    if family in BATCH:
        return None
    step = 2 * world if family in VARLEN else 1
    inner = sorted({length // 3 // step * step, length // 2 // step * step})
    return (0, *(b for b in inner if 0 < b < length), length)


def call(family: str, variant: str, q, k, v, bounds, world: int, rank: int, causal: bool, stride: int | None = None, **options):
    """One of the functions on this rank's tensors, (B, S, H, D) for all families here."""
    func = getattr(functional, f"{family}_{variant}_func" if variant else f"{family}_func")
    packed = family not in BATCH
    whole = torch.tensor(bounds or (0,), dtype=torch.int32, device=q.device)
    q, k, v = (x[0] if packed else x for x in (q, k, v))
    if variant == "kvpacked":
        tensors = (q, torch.stack([k, v], -3))
    elif variant == "qkvpacked":
        tensors = (torch.stack([q, k, v], -3),)
    else:
        tensors = (q, k, v)
    if family in VARLEN:
        local = torch.tensor([b // world for b in bounds], dtype=torch.int32, device=q.device)
        tensors += (local, int(local.diff().max()))
    elif family == "llama3_flash_attn_varlen":
        cu_q, cu_k, max_q, max_k, k_slice = llama3_flash_attn_prepare_cu_seqlens(whole, causal, rank, world)
        tensors += (cu_q, cu_k, max_q, max_k, stride or 1, k_slice)
    elif family in GATHERED:
        tensors += (zigzag_llama3_flash_attn_prepare_cu_seqlens(whole, causal, rank, world), stride)
    out, lse, nothing = func(*tensors, causal=causal, return_attn_probs=True, **options)
    assert nothing is None
    return (out[None], lse[None]) if packed else (out, lse)


def on_ranks(family: str, variant: str, case: Case, *, at_once: int = 0, **options) -> tuple[torch.Tensor, ...]:
    """out, lse, dq, dk, dv, put together on every rank; heads are gathered together up to `at_once` bytes beyond the stride."""
    world, rank = dist.get_world_size(), dist.get_rank()
    bounds = None if case.documents is None else case.documents.bounds[0]
    layout = Layout.parse(FAMILIES[family])
    tokens = [layout.tokens(case.q.shape[1], world, r, bounds) for r in range(world)]
    mine = torch.tensor(tokens[rank], dtype=torch.int64, device=case.q.device)
    leaves = [x[:, mine].clone().requires_grad_() for x in case.inputs]
    with patch.object(llama3, "AT_ONCE", at_once):
        out, lse = call(family, variant, *leaves, bounds, world, rank, case.is_causal, window_size=case.window, **options)
    assert out.dtype == case.q.dtype
    assert lse.dtype == (torch.float64 if case.q.dtype == torch.float64 else torch.float32)
    grads = torch.autograd.grad(out, leaves, case.dout[:, mine].contiguous())
    return together((out, lse, *grads), FAMILIES[family], case.documents)


def family_case(family: str, world: int, length: int = 32, **options) -> Case:
    bounds = bounds_of(family, length, world)
    documents = None if bounds is None else Documents((bounds,))
    return make_case(length, batch=2 if family in BATCH else 1, documents=documents, **options)


def reference_case(family: str, device: str = "cpu", heads: int = 5) -> Case:
    """The shapes that ring-flash-attn tests itself on, which have five heads."""
    if family in BATCH:
        return make_case(3816, heads=(heads, heads), dim=128, batch=1, dtype=torch.bfloat16, device=device)
    bounds = (0, 128, 1248, 4240) if family.startswith("zigzag") else (0, 120, 1248, 4232)
    documents = Documents((bounds,))
    return make_case(bounds[-1], heads=(heads, heads), dim=128, batch=1, dtype=torch.bfloat16, documents=documents, device=device)
