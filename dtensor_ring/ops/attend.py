"""The differentiable attention of tensors and a prepared call: one autograd function over the operators.

    q, k, v DTensors     local tensors to the operator, out and lse wrapped as q is placed; gradients come back placed as q, k, v
    q, k, v plain        as they are

In eager mode an autograd function calls the operator on local tensors (past the dispatcher where nobody would see it), below
DTensor's dispatch, which keeps about a hundred objects for every new length and costs the host more than the operator. Compilers
cannot look below that dispatch: they trace the operator on DTensors, and its sharding rule says how the results are placed. Both
take placements from the functions of `dtensor_ring.ops.sharding`, so that a program gets the same DTensors compiled or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NoReturn, overload

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from typing_extensions import override

from dtensor_ring._torch import Version, dtensor_with, has_tangent, local_of, replicated, spec_of
from dtensor_ring.ops.operator import (
    NO_GRADIENT_OF_LSE,
    attention,
    attention_backward_here,
    attention_here,
    placed_as,
    refuse_second_gradient,
    without_gradient_of_lse,
)
from dtensor_ring.ops.prepare import Prepared
from dtensor_ring.ops.sharding import lse_placements, sink_gradient_placements, sink_placements
from dtensor_ring.placements import redistribute
from dtensor_ring.placements.redistribute import wrap


@overload
def attend(q: Tensor, k: Tensor, v: Tensor, prepared: Prepared, *, return_lse: Literal[True]) -> tuple[Tensor, Tensor]: ...


@overload
def attend(q: Tensor, k: Tensor, v: Tensor, prepared: Prepared, *, return_lse: bool) -> tuple[Tensor, Tensor | None]: ...


def attend(q: Tensor, k: Tensor, v: Tensor, prepared: Prepared, *, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Out (B, Sq, H, Dv), placed as q, and where asked lse (B, H, Sq), whose gradient is refused; q, k, v as they were prepared."""
    if torch.compiler.is_compiling():
        return _traced(q, k, v, prepared, return_lse)
    # Without gradients even an autograd function that records nothing would cost the host time.
    if torch.is_grad_enabled():
        return _Attention.apply(q, k, v, prepared.sinks, prepared, return_lse)
    if has_tangent((q, k, v, prepared.sinks)):  # with gradients on, the autograd function refuses it
        raise NotImplementedError("ring_attention has no forward-mode derivative: use torch.autograd.grad, which goes backward")
    out, lse, _ = attention_here(*_local((q, k, v, prepared.sinks)), *prepared[1:])
    return _placed(q, v, out, lse if return_lse else None)


def _local(inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if x is None else local_of(x) for x in inputs]


def _placed(q: Tensor, v: Tensor, out: Tensor, lse: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Out and lse as DTensors where q is one."""
    if not isinstance(q, DTensor):
        return out, lse
    mesh, placements = q.device_mesh, q.placements
    batch, length, heads, head_dim = q.shape
    shape = batch, length, heads, v.shape[3]
    # Out has the shape of q, and may share its spec, unless values have a head dim of their own.
    out = _wrapped_as(q, out) if shape[3] == head_dim else wrap(out, mesh, placements, shape)
    return out, None if lse is None else wrap(lse, mesh, lse_placements(placements), (batch, heads, length))


class _Attention(torch.autograd.Function):
    @staticmethod
    @override
    def forward(  # pyrefly: ignore[bad-override]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, prepared: Prepared, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        out, lse, replay = attention_here(*_local((q, k, v, sinks)), *prepared[1:])
        _, alibi, documents, *ctx.rest = prepared
        ctx.set_materialize_grads(False)  # a missing gradient of lse must stay None: zeros would look like one that is refused
        # The inputs as they were given: an in-place change of a DTensor counts in its own version, not in that of its local tensor.
        ctx.save_for_backward(q, k, v, sinks, alibi, out, lse, replay, documents)
        placed = _placed(q, v, out, lse if return_lse else None)
        # Of a DTensor that is returned, backward needs the local tensor alone. Saving the whole would send it through DTensor's
        # dispatch twice, which costs the host a sixth of a call; so what autograd would compare is compared here.
        ctx.returned = [Version.of(x) for x in placed if isinstance(x, DTensor)]
        return placed

    @staticmethod
    @override
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, dout: Tensor | None, dlse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if dlse is not None:
            raise NotImplementedError(NO_GRADIENT_OF_LSE)
        if dout is None:
            return (None,) * 6
        _check_unchanged(ctx.returned)
        q, k, v, sinks, *saved = ctx.saved_tensors
        inputs = q, k, v, sinks
        with torch.no_grad():
            grads = _gradients(dout, inputs, saved, ctx.rest)
        # Gradients depend on dout and on the inputs, so each of these must lead to the refusal. PyTorch's `once_differentiable`
        # asks dout alone, and drops the rest without a word.
        if torch.is_grad_enabled():
            grads = _DifferentiableOnce.apply(*grads, dout, *inputs)
        return *grads, None, None


def _gradients(
    dout: Tensor, inputs: Sequence[Tensor | None], saved: Sequence[Tensor], rest: Sequence[Any]
) -> tuple[Tensor | None, ...]:
    """dq, dk, dv and dsinks, placed as q, k, v and sinks are; from what `_Attention` saved."""
    q, k, v, sinks = inputs
    if isinstance(dout, DTensor):
        assert isinstance(q, DTensor), "out is placed as q"
        dout = local_of(placed_as(dout, q.placements, saved[-1]))
    dq, dk, dv, dsinks = attention_backward_here(dout, *_local(inputs), *saved, *rest)
    if isinstance(q, DTensor) and isinstance(k, DTensor) and isinstance(v, DTensor):
        dq, dk, dv = _wrapped_as(q, dq), _wrapped_as(k, dk), _wrapped_as(v, dv)
        if isinstance(sinks, DTensor):  # each rank has the part of its own queries
            part = wrap(dsinks, sinks.device_mesh, sink_gradient_placements(q.placements), sinks.shape)
            return dq, dk, dv, redistribute(part, sinks.placements)
    return dq, dk, dv, None if sinks is None else dsinks


class _DifferentiableOnce(torch.autograd.Function):
    """The gradients dq, dk, dv and dsinks as they are, refusing to be differentiated by what comes after them: dout and inputs."""

    @staticmethod
    @override
    def forward(ctx: Any, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        return tuple(None if x is None else x.detach() for x in tensors[:4])  # not the inputs: autograd would call view_as

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
        refuse_second_gradient()


def _check_unchanged(returned: Sequence[Version]) -> None:
    """Raises RuntimeError, as PyTorch does for tensors that it saved, if a result was changed in place before its gradient."""
    if any(version.has_changed() for version in returned):
        raise RuntimeError(
            "a tensor that ring_attention returned, and needs for its gradient, has been modified by an inplace operation: write "
            "out = out + x, not out += x, or change a clone"
        )


def _wrapped_as(x: DTensor, local: Tensor) -> DTensor:
    """A local tensor of the shape and dtype of x's as a DTensor of its placements."""
    spec = spec_of(x)
    # Making a spec costs the host more than all else about a DTensor, and a gradient mostly lies in memory as its tensor does.
    if local.stride() == local_of(x).stride():
        return dtensor_with(local, spec)
    return wrap(local, spec.mesh, spec.placements, x.shape)


def _traced(q: Tensor, k: Tensor, v: Tensor, prepared: Prepared, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """The operator as compilers trace it: on DTensors all tensors are DTensors."""
    sinks, alibi, documents, *rest = prepared
    if isinstance(q, DTensor):
        # The rule calls the gradient of sinks a partial sum. A DTensor of sinks wants the sum; a plain tensor, as any parameter
        # beside DTensors, wants this rank's part, which FSDP2 or DDP adds up.
        if isinstance(sinks, DTensor):
            sinks = _WholeGradient.apply(sinks)
        elif sinks is not None:
            sinks = _LocalPart.apply(sinks, q.device_mesh, sink_placements(q.placements), (q.shape[2],))
        alibi = None if alibi is None else replicated(alibi, q)
        documents = replicated(documents, q)
    out, lse, _ = attention(q, k, v, sinks, alibi, documents, *rest)
    return _RefusedGradient.apply(out, lse) if return_lse else (out, None)


class _RefusedGradient(torch.autograd.Function):
    """Out and lse as they are, in compiled code; a gradient of lse is refused when it is there.

    A graph that returns lse is given a gradient of it even if nothing uses lse: zeros then, so that only the values tell. The
    operator itself gives lse no gradient, which a graph would take for zeros.
    """

    @staticmethod
    @override
    def forward(ctx: Any, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:  # pyrefly: ignore[bad-override]
        return out.detach(), lse.detach()

    @staticmethod
    @override
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor, None]:  # pyrefly: ignore[bad-override]
        return without_gradient_of_lse(dout, dlse), None


class _LocalPart(torch.autograd.Function):
    """A plain tensor as a DTensor whose gradient stays this rank's part of the sum."""

    @staticmethod
    @override
    def forward(ctx: Any, local: Tensor, mesh: DeviceMesh, placements: Any, shape: Any) -> DTensor:  # pyrefly: ignore[bad-override]
        # Detached: a DTensor made of a tensor that requires a gradient would begin a graph of its own, but here this function gives
        # the result its gradient.
        return wrap(local.detach(), mesh, placements, shape)

    @staticmethod
    @override
    def backward(ctx: Any, grad: DTensor) -> tuple[Tensor, None, None, None]:  # pyrefly: ignore[bad-override]
        return local_of(grad), None, None, None


class _WholeGradient(torch.autograd.Function):
    """A DTensor whose gradient is summed over the ranks."""

    @staticmethod
    @override
    def forward(ctx: Any, tensor: DTensor) -> DTensor:  # pyrefly: ignore[bad-override]
        ctx.placements = tensor.placements
        return wrap(local_of(tensor), tensor.device_mesh, tensor.placements, tensor.shape)

    @staticmethod
    @override
    def backward(ctx: Any, grad: DTensor) -> DTensor:  # pyrefly: ignore[bad-override]
        return redistribute(grad, ctx.placements)
