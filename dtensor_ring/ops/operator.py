"""The operators `dtensor_ring::attention` and `dtensor_ring::attention_backward`: fakes, autograd and the way to an executor.

    per rank    q_BSHD (B, Sq/W, H, D), k_BSHD (B, Sk/W, Hk, D), v_BSHD (B, Sk/W, Hk, Dv) -> out (B, Sq/W, H, Dv), lse (B, H, Sq/W)

Everything an operator needs beside tensors are ints and strings: a plan is looked up from them. Lengths are global. Documents
are an int64 CPU tensor (`Documents.packed`), whose values neither DTensor's caches nor compiled graphs depend on. With an empty
`group` the operator is attention of one device. Operators take no defaults: DTensor's dispatch drops arguments equal to one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dtensor_ring._torch import local_of, resolve_group
from dtensor_ring.comm import AloneTransport, Transport, transport_of
from dtensor_ring.documents import Documents
from dtensor_ring.layout import Layout
from dtensor_ring.ops import heads
from dtensor_ring.ops.execute import Executor
from dtensor_ring.ops.kernels import KERNELS, Options
from dtensor_ring.ops.mask import Band
from dtensor_ring.ops.merge import accumulate_dtype
from dtensor_ring.ops.schedule import Problem, plan
from dtensor_ring.ops.ulysses import UlyssesExecutor
from dtensor_ring.placements import SequencePlacement, redistribute


@torch.library.custom_op("dtensor_ring::attention", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    alibi: Tensor | None,
    documents: Tensor,
    q_length: int,
    k_length: int,
    first_row: int,
    first_head: int,
    scale: float,
    softcap: float,
    dropout_p: float,
    deterministic: bool,
    mask: str,
    layout: str,
    strategy: str,
    kernel: str,
    heads_at_once: int,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Out and lse of this rank's queries, and the seed of its dropout masks (1,), on the CPU; empty without dropout."""
    options = Options(scale, softcap, deterministic, dropout_p)
    problem = documents, q_length, k_length, mask, layout, strategy
    seed = torch.randint(1 << 62, (int(dropout_p > 0),))
    executor = _executor(*problem, kernel, group, options, sinks, alibi, (first_row, first_head))
    with torch.autocast(q.device.type, enabled=False):
        return *heads.forward(executor, _inner(q), _inner(k), _inner(v), heads_at_once, _value(seed)), seed


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=accumulate_dtype(q.dtype))
    return q.new_empty((*q.shape[:3], v.shape[3])), lse, torch.empty(int(rest[9] > 0), dtype=torch.int64)


@torch.library.custom_op("dtensor_ring::attention_backward", mutates_args=())
def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    alibi: Tensor | None,
    out: Tensor,
    lse: Tensor,
    seed: Tensor,
    documents: Tensor,
    q_length: int,
    k_length: int,
    first_row: int,
    first_head: int,
    scale: float,
    softcap: float,
    dropout_p: float,
    deterministic: bool,
    mask: str,
    layout: str,
    strategy: str,
    kernel: str,
    heads_at_once: int,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv of this rank's shares, and its part of dsinks, empty without sinks."""
    options = Options(scale, softcap, deterministic, dropout_p)
    problem = documents, q_length, k_length, mask, layout, strategy
    executor = _executor(*problem, kernel, group, options, sinks, alibi, (first_row, first_head))
    with torch.autocast(q.device.type, enabled=False):
        tensors = dout.contiguous(), _inner(q), _inner(k), _inner(v), out, lse
        dq, dk, dv, dsinks = heads.backward(executor, *tensors, heads_at_once, _value(seed))
    return dq, dk, dv, q.new_empty(0) if dsinks is None else dsinks


@attention_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *_rest: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
    dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:  # noqa: ANN401
    q, k, v, sinks, alibi, documents, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, sinks, alibi, *output, documents)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, dout: Tensor, *_others: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    q, k, v, sinks, alibi, out, lse, seed, documents = ctx.saved_tensors
    if isinstance(dout, DTensor) and dout.placements != out.placements:
        dout = redistribute(dout, out.placements, documents=_cutting(documents, out))
    tensors = dout, q, k, v, sinks, alibi, out, lse, seed, documents
    dq, dk, dv, dsinks = torch.ops.dtensor_ring.attention_backward(*tensors, *ctx.rest)
    return dq, dk, dv, None if sinks is None else dsinks, None, None, *(None for _ in ctx.rest)


attention.register_autograd(_backward, setup_context=_setup_context)


def _value(seed: Tensor) -> int:
    return int(seed[0]) if seed.numel() else 0


def _inner(x: Tensor) -> Tensor:
    """Kernels need the last dim contiguous, no more."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _cutting(documents: Tensor, out: DTensor) -> Documents | None:
    """The documents, if tokens are laid out by them."""
    if not any(isinstance(p, SequencePlacement) and p.layout.cut for p in out.placements):
        return None
    found = Documents.unpack(local_of(documents) if isinstance(documents, DTensor) else documents)
    assert isinstance(found, Documents), "checked before the forward pass"
    return found


def _executor(
    documents: Tensor,
    q_length: int,
    k_length: int,
    mask: str,
    layout: str,
    strategy: str,
    kernel: str,
    group: str,
    options: Options,
    sinks: Tensor | None,
    alibi: Tensor | None,
    origin: tuple[int, int],
) -> Executor | UlyssesExecutor:
    wire: Transport = transport_of(resolve_group(group)) if group else AloneTransport()
    found = Documents.unpack(documents)
    problem = Problem(Layout.parse(layout), Band.parse(mask), q_length, k_length, wire.world, strategy, found)
    if strategy == "ulysses":
        return UlyssesExecutor(problem, wire, KERNELS[kernel], options, sinks, alibi, origin)
    return Executor(plan(problem, wire.rank), wire, KERNELS[kernel], options, sinks, alibi, origin)
