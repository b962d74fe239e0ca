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

from dtensor_ring._torch import resolve_group
from dtensor_ring.comm import AloneTransport, Transport, transport_of
from dtensor_ring.documents import Documents
from dtensor_ring.layout import Layout
from dtensor_ring.ops import execute
from dtensor_ring.ops.kernels import KERNELS, Options
from dtensor_ring.ops.mask import Band
from dtensor_ring.ops.merge import accumulate_dtype
from dtensor_ring.ops.schedule import Plan, Problem, plan
from dtensor_ring.placements import redistribute


@torch.library.custom_op("dtensor_ring::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor,
    q_length: int,
    k_length: int,
    scale: float,
    softcap: float,
    deterministic: bool,
    mask: str,
    layout: str,
    strategy: str,
    kernel: str,
    group: str,
) -> tuple[Tensor, Tensor]:
    """Out and lse of this rank's queries."""
    wire = _wire(group)
    todo = _plan(documents, q_length, k_length, mask, layout, strategy, wire)
    return execute.forward(todo, wire, KERNELS[kernel], _inner(q), _inner(k), _inner(v), Options(scale, softcap, deterministic))


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=accumulate_dtype(q.dtype))
    return q.new_empty((*q.shape[:3], v.shape[3])), lse


@torch.library.custom_op("dtensor_ring::attention_backward", mutates_args=())
def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    documents: Tensor,
    q_length: int,
    k_length: int,
    scale: float,
    softcap: float,
    deterministic: bool,
    mask: str,
    layout: str,
    strategy: str,
    kernel: str,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of this rank's shares."""
    wire = _wire(group)
    todo = _plan(documents, q_length, k_length, mask, layout, strategy, wire)
    inputs = dout.contiguous(), _inner(q), _inner(k), _inner(v), out, lse
    return execute.backward(todo, wire, KERNELS[kernel], *inputs, Options(scale, softcap, deterministic))


@attention_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_rest: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ANN401
    q, k, v, documents, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output, documents)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dout: Tensor, _dlse: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    q, k, v, out, lse, documents = ctx.saved_tensors
    if isinstance(dout, DTensor) and dout.placements != out.placements:
        dout = redistribute(dout, out.placements)
    grads = torch.ops.dtensor_ring.attention_backward(dout, q, k, v, out, lse, documents, *ctx.rest)
    return (*grads, None, *(None for _ in ctx.rest))


attention.register_autograd(_backward, setup_context=_setup_context)


def _inner(x: Tensor) -> Tensor:
    """Kernels need the last dim contiguous, no more."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _wire(group: str) -> Transport:
    return transport_of(resolve_group(group)) if group else AloneTransport()


def _plan(documents: Tensor, q_length: int, k_length: int, mask: str, layout: str, strategy: str, wire: Transport) -> Plan:
    found = Documents.unpack(documents)
    problem = Problem(Layout.parse(layout), Band.parse(mask), q_length, k_length, wire.world, strategy, found)
    return plan(problem, wire.rank)
