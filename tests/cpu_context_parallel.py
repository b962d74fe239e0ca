"""PyTorch's context_parallel on CPU ranks: its own ring, given the kernel that a CPU has, which it does not know of.

The ring's loops, shares and merging are PyTorch's; only the operators that it dispatches, and heads that share keys, stand here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental._context_parallel import _attention as theirs

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def cpu_ring(calls: list[int]) -> AbstractContextManager[object]:
    """Inside, context_parallel runs on a CPU; `calls` gets a number for each of its kernel's forward calls."""

    def forward(query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool, scale: float | None = None):
        calls.append(query.shape[2])
        heads = query.shape[1]
        return _FORWARD(query, _repeated(key, heads), _repeated(value, heads), dropout_p, is_causal, scale=scale)

    # The arguments are those of PyTorch's operator.
    def backward(grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, scale=None):
        heads, groups = query.shape[1], key.shape[1]
        whole = query, _repeated(key, heads), _repeated(value, heads), out, logsumexp
        dq, dk, dv = _BACKWARD(grad_out, *whole, dropout_p, is_causal, scale=scale)
        return dq, *(grad.unflatten(1, (groups, heads // groups)).sum(2) for grad in (dk, dv))

    def on_forward(_op: object, args: tuple[Any, ...], options: dict[str, Any]):
        mesh, (q, k, v, dropout_p, is_causal) = args[0].device_mesh, (*map(_local, args), 0.0, False)[:5]
        named = {"query": q, "key": k, "value": v, "dropout_p": dropout_p, "is_causal": is_causal, "scale": options.get("scale")}
        return _placed(theirs._templated_ring_attention(mesh.get_group(), 2, forward, **named)[:2], mesh)

    def on_backward(_op: object, args: tuple[Any, ...], options: dict[str, Any]):
        mesh, names = args[0].device_mesh, ("grad_out", "query", "key", "value", "out", "logsumexp", "dropout_p", "is_causal")
        named = dict(zip(names, map(_local, args), strict=False)) | {"grad_out_name": "grad_out", "scale": options.get("scale")}
        return _placed(theirs._templated_ring_attention_backward(mesh.get_group(), 2, backward, **named)[:3], mesh)

    handlers: dict[object, Callable[..., Any]] = {_FORWARD.default: on_forward, _BACKWARD.default: on_backward}
    return patch.dict(theirs.custom_ops, handlers)


def _local(x: Any):
    return x.to_local() if isinstance(x, DTensor) else x


def _placed(parts: Any, mesh: Any):
    return tuple(DTensor.from_local(part, mesh, [Shard(2)], run_check=False) for part in parts)


def _repeated(x: Tensor, heads: int):
    return x.repeat_interleave(heads // x.shape[1], 1)
