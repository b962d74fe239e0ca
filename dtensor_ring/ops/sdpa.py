"""`F.scaled_dot_product_attention` on DTensors that lie in our placements, by the operators of `ring_attention`.

    q, k, v = (distribute_tensor(x, mesh, [Shard(0), Zigzag(2)]) for x in (q, k, v))       # (B, H, S, D)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)         # placed as q, differentiable

    per rank    q_BHSD (B, H, Sq/W, D), k_BHSD, v_BHSD (B, Hk, Sk/W, D) -> out (B, H, Sq/W, D), lse (B, H, Sq/W); who sends what
                is in `dtensor_ring.ops.executors.plan_executor`

PyTorch chooses a backend from dtype, global shapes and arguments, and calls its op, in backward the op's partner with the saved
out and lse. For these ops a rule is registered with `torch.library.register_torch_dispatch`: it is asked before DTensor's own
dispatch and its handlers, those of PyTorch's `context_parallel` too, and answers NotImplemented, which lets them go on as ever,
where no placement is ours. Flash backends run the ring; the others, whose masks and saved tensors are not those of a ring,
refuse. The math backend is no op of its own: the rules of single ops refuse it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.distributed.tensor import DTensor

from dtensor_ring._torch import local_of
from dtensor_ring.ops.agree import refused_by_all
from dtensor_ring.ops.arguments import BHSD, Arguments
from dtensor_ring.ops.operator import attention, attention_backward
from dtensor_ring.ops.place import place_of
from dtensor_ring.ops.prepare import Inputs, Prepared, prepare
from dtensor_ring.placements import redistribute
from dtensor_ring.placements.placement import holds_sequence
from dtensor_ring.placements.redistribute import wrap

aten = torch.ops.aten

_NAME = "F.scaled_dot_product_attention"
_MASKS = "attn_mask is not supported over a sequence axis: use documents= or window= of dtensor_ring.ring_attention"


def flash_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[DTensor, DTensor]:
    """`aten::_scaled_dot_product_flash_attention_for_cpu`: out and lse."""
    with _refused_by_all(q, k, v):
        _refuse_extras(attn_mask, dropout_p)
        qkv, prepared = _prepared_forward(q, k, v, _Asked(0.0, is_causal, scale))
    return _forward(qkv, prepared)[:2]


def flash_cpu_backward(
    dout: DTensor,
    q: DTensor,
    k: DTensor,
    v: DTensor,
    out: DTensor,
    lse: DTensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[DTensor, DTensor, DTensor]:
    """Its backward op: dq, dk, dv."""
    with _refused_by_all(q, k, v):
        _refuse_extras(attn_mask, dropout_p)
        prepared = _prepared(q, k, v, _Asked(0.0, is_causal, scale))
    return _backward((q, k, v), dout, out, lse, torch.empty(0, dtype=torch.int64), prepared)


def flash_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[DTensor, DTensor, None, None, int, int, Tensor, Tensor, Tensor]:
    """`aten::_scaled_dot_product_flash_attention`: out, lse, and the replay in the place of the generator's state."""
    with _refused_by_all(q, k, v):
        if return_debug_mask:
            raise NotImplementedError(f"{_NAME}: return_debug_mask is not supported over a sequence axis")
        qkv, prepared = _prepared_forward(q, k, v, _Asked(dropout_p, is_causal, scale))
    out, lse, replay = _forward(qkv, prepared)
    # PyTorch takes the lengths for those of the longest sequences; what follows is only ever handed to the backward below.
    return out, lse, None, None, q.shape[2], k.shape[2], replay, replay.new_empty(0), local_of(out).new_empty(0)


def flash_cuda_backward(
    dout: DTensor,
    q: DTensor,
    k: DTensor,
    v: DTensor,
    out: DTensor,
    lse: DTensor,
    _q_bounds: Tensor | None,
    _k_bounds: Tensor | None,
    _q_length: int,
    _k_length: int,
    dropout_p: float,
    is_causal: bool,
    replay: Tensor,
    _unused: Tensor,
    *,
    scale: float | None = None,
) -> tuple[DTensor, DTensor, DTensor]:
    """Its backward op: dq, dk, dv. The forward op makes no bounds, and the lengths are those of q and k."""
    with _refused_by_all(q, k, v):
        prepared = _prepared(q, k, v, _Asked(dropout_p, is_causal, scale))
    return _backward((q, k, v), dout, out, lse, replay, prepared)


def refuse(backend: str, q: Tensor, *rest: Any, **options: Any) -> NoReturn:  # noqa: ANN401
    """The op of a backend that cannot run over a sequence axis."""
    with _refused_by_all(q, *rest):
        raise NotImplementedError(
            f"{_NAME}: PyTorch chose its {backend} backend for q of {q.dtype}, head dim {q.shape[-1]}, but over a sequence axis "
            "only flash attention runs. Use `with sdpa_kernel(SDPBackend.FLASH_ATTENTION)`, which takes float16 or bfloat16 on "
            "GPUs and no attn_mask, or call dtensor_ring.ring_attention on (B, S, H, D), which takes any dtype, documents= and "
            "window="
        )


# What is wrong is raised on all ranks before any computes. Not what goes wrong in a kernel: its rank would come to a meeting while
# the others wait for keys.
_refused_by_all = partial(refused_by_all, order=BHSD)


def _refuse_extras(attn_mask: Tensor | None, dropout_p: float) -> None:
    if attn_mask is not None:
        raise NotImplementedError(f"{_NAME}: {_MASKS}")
    if dropout_p:
        raise NotImplementedError(
            f"{_NAME}: flash attention on CPUs has no dropout, found dropout_p={dropout_p}: use dtensor_ring.ring_attention"
        )


class _Asked(NamedTuple):
    """The arguments of PyTorch's function that are no tensors."""

    dropout_p: float
    is_causal: bool
    scale: float | None


_QKV = tuple[DTensor, DTensor, DTensor]


def _prepared_forward(q: Tensor, k: Tensor, v: Tensor, asked: _Asked) -> tuple[_QKV, Prepared]:
    """q, k and v as they are, checked, and the operator's arguments."""
    if not (isinstance(q, DTensor) and isinstance(k, DTensor) and isinstance(v, DTensor)):
        plain = ", ".join(name for name, x in (("q", q), ("k", k), ("v", v)) if not isinstance(x, DTensor))
        raise TypeError(f"{_NAME}: q, k and v must all be DTensors, plain: {plain}. See dtensor_ring.from_local")
    if asked.is_causal and q.shape[2] != k.shape[2]:
        raise NotImplementedError(
            f"{_NAME}: is_causal with {q.shape[2]} queries and {k.shape[2]} keys is not supported over a sequence axis, as PyTorch "
            "counts queries from the first key: dtensor_ring.ring_attention counts them so that the last query sees the last key"
        )
    return (q, k, v), _prepared(q, k, v, asked)


def _forward(qkv: _QKV, prepared: Prepared) -> tuple[DTensor, DTensor, Tensor]:
    """Out and lse as DTensors, and the replay."""
    q, _, v = qkv
    # PyTorch's order of dims is ours with two swapped, and kernels take any strides but the last: a view does, nothing is copied.
    out, lse, replay = attention(*_bshd(*qkv), *prepared)
    wrapped = wrap(out.transpose(1, 2), q.device_mesh, q.placements, (*q.shape[:3], v.shape[3]))
    return wrapped, wrap(lse, q.device_mesh, q.placements, q.shape[:3]), replay


def _backward(
    qkv: _QKV, dout: DTensor, out: DTensor, lse: DTensor, replay: Tensor, prepared: Prepared
) -> tuple[DTensor, DTensor, DTensor]:
    """dq, dk, dv, placed as q, k and v."""
    # Autograd hands over whatever the loss made of out, and the ring reads gradients as it reads queries.
    if dout.placements != out.placements:
        dout = redistribute(dout, out.placements)
    sinks, alibi, *rest = prepared
    # The lse is (B, H, S) in either order of dims.
    grads = attention_backward(*_bshd(dout, *qkv), sinks, alibi, *_bshd(out), local_of(lse), replay, *rest)
    dq, dk, dv = (wrap(grad.transpose(1, 2), x.device_mesh, x.placements, x.shape) for grad, x in zip(grads[:3], qkv, strict=True))
    return dq, dk, dv


def _prepared(q: DTensor, k: DTensor, v: DTensor, asked: _Asked) -> Prepared:
    """The operator's arguments, the same in both passes.

    PyTorch calls the backward op by itself, without what the forward op prepared, so the call is prepared again. `training` is
    True in both: the two must come to the same kernel, and only then it does not depend on whether gradients are wanted.
    """
    place = place_of(q, k, v, BHSD)
    assert place.group, "one of the placements is ours, which the check lets pass on the sequence only"
    if place.layout.cut:
        raise NotImplementedError(
            f"{_NAME} takes no documents, which {place.layout} needs: use dtensor_ring.ring_attention(documents=)"
        )
    deterministic = torch.are_deterministic_algorithms_enabled()
    arguments = Arguments(asked.is_causal, scale=asked.scale, dropout_p=float(asked.dropout_p), deterministic=deterministic)
    return prepare(Inputs(*_bshd(q, k, v)), arguments, place, _NAME, training=True)


def _bshd(*tensors: DTensor) -> list[Tensor]:
    return [local_of(x).transpose(1, 2) for x in tensors]


def _register(op: OpOverload, act: Callable[..., object]) -> None:
    """Let `act` carry out the op on DTensors if a placement of one of them is ours; NotImplemented lets DTensor go on as ever."""

    def rule(_cls: type, _op: OpOverload, _types: Sequence[type], args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, DTensor)]
        # Asked of gradients and saved tensors too: backward ops are called with those of the forward pass, and one in our
        # placements is enough to make PyTorch's own rule wrong.
        if not any(holds_sequence(x.placements) for x in tensors):
            return NotImplemented
        return act(*args, **kwargs)

    torch.library.register_torch_dispatch(op, DTensor, rule)


def register() -> None:
    """Let DTensors in our placements go through the backends of PyTorch's attention: flash attention runs, the others refuse."""
    for op, act in {
        aten._scaled_dot_product_flash_attention_for_cpu: flash_cpu,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: flash_cpu_backward,
        aten._scaled_dot_product_flash_attention: flash_cuda,
        aten._scaled_dot_product_flash_attention_backward: flash_cuda_backward,
        aten._scaled_dot_product_efficient_attention: partial(refuse, "memory-efficient"),
        aten._scaled_dot_product_cudnn_attention: partial(refuse, "cuDNN"),
        aten._scaled_dot_product_fused_attention_overrideable: partial(refuse, "overrideable"),
    }.items():
        _register(op.default, act)
