"""What every call of attention checks of its arguments, and what it asks of a kernel; for DTensors and plain tensors alike."""

from __future__ import annotations

import torch
from torch import Tensor

from dtensor_ring.ops.kernels import Need


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ValueError or TypeError unless q (B, Sq, H, D), k (B, Sk, Hk, D), v (B, Sk, Hk, Dv) fit together."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"q, k and v must have shape (B, S, H, D), found {shapes}")
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ValueError(f"needed q (B, Sq, H, D), k (B, Sk, Hk, D), v (B, Sk, Hk, Dv), found {shapes}")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"query heads must be a multiple of key heads, found {q.shape[2]} and {k.shape[2]}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one dtype, found {q.dtype}, {k.dtype}, {v.dtype}")


def check_extras(q: Tensor, sinks: Tensor | None, softcap: float, dropout_p: float, alibi_slopes: Tensor | None) -> None:
    """Raises an error unless sinks are (H,), slopes (H,) or (B, H) in float32, and numbers in their range."""
    batch, _, heads, _ = q.shape
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p is a probability below 1, found {dropout_p}")
    if not softcap >= 0:
        raise ValueError(f"softcap bounds scores and is positive, or 0 for none, found {softcap}")
    if sinks is not None and tuple(sinks.shape) != (heads,):
        raise ValueError(f"sinks must have shape (H,) = ({heads},), found {tuple(sinks.shape)}")
    if alibi_slopes is None:
        return
    if tuple(alibi_slopes.shape) not in ((heads,), (batch, heads)):
        raise ValueError(f"alibi_slopes must have shape ({heads},) or ({batch}, {heads}), found {tuple(alibi_slopes.shape)}")
    if type(alibi_slopes) is not Tensor or alibi_slopes.dtype != torch.float32:
        raise TypeError(f"alibi_slopes must be a plain float32 tensor, found {type(alibi_slopes).__name__} {alibi_slopes.dtype}")
    if alibi_slopes.requires_grad:
        raise NotImplementedError("alibi_slopes get no gradient: pass alibi_slopes.detach()")


def need_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    *,
    mask: str,
    packed: bool,
    softcap: float,
    deterministic: bool,
    dropout_p: float,
) -> Need:
    """What a call asks of a kernel, ALiBi aside."""
    return Need(
        device=q.device.type,
        dtype=q.dtype,
        head_dim=q.shape[3],
        v_head_dim=v.shape[3],
        training=torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, sinks)),
        windowed=mask.startswith("window"),
        packed=packed,
        softcap=softcap,
        deterministic=deterministic,
        dropout=dropout_p > 0,
    )
