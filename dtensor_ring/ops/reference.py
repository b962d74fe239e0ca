"""Attention written down: quadratic, in float64 or float32, the yardstick of every test and of the documentation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dtensor_ring.ops.dtypes import accumulate_dtype
from dtensor_ring.planning.documents import Documents


def reference_attention(
    q_BSHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    documents: Documents | None = None,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Out (B, Sq, H, Dv) and lse (B, H, Sq) of whole sequences on one device, differentiable; arguments as `ring_attention`.

    `kept` (B, H, Sq, Sk) is what dropout leaves of each weight: 0, or 1 / (1 - p).
    """
    work = accumulate_dtype(q_BSHD.dtype)
    q, k, v = (x.to(work).transpose(1, 2) for x in (q_BSHD, k_BSHD, v_BSHD))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    position = torch.arange(q.shape[2], device=q.device)[:, None] + k.shape[2] - q.shape[2]
    distance = position - torch.arange(k.shape[2], device=q.device)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(work)[..., None, None] * distance.abs()
    left, right = window[0], 0 if is_causal else window[1]
    seen = torch.ones_like(distance, dtype=torch.bool)[None]
    seen = seen & (distance <= left) if left >= 0 else seen
    seen = seen & (distance >= -right) if right >= 0 else seen
    if documents is not None:
        # Tokens are in one document where position in the document minus position is the same: minus the place of its first token.
        starts = (documents.position_ids().to(q.device) - torch.arange(documents.length, device=q.device))[:, None]
        seen = seen & (starts.transpose(1, 2) == starts)
    scores = scores.masked_fill(~seen[:, None], -math.inf)
    lse = torch.logsumexp(scores, -1)
    lse = lse if sinks is None else torch.logaddexp(lse, sinks.to(work)[:, None])
    # A query that sees nothing has scores and lse -inf; with 0 in place of its lse its weights are 0 and not NaN.
    p = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
    return ((p if kept is None else p * kept) @ v).transpose(1, 2), lse
