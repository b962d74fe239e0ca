"""Batches of sequences: `ring_flash_attn`, `zigzag_ring_flash_attn` and `stripe_flash_attn`, each also kvpacked and qkvpacked.

per rank    q (B, S/W, H, D), k and v (B, S/W, Hk, D)  ->  out (B, S/W, H, D), lse (B, H, S/W) float32
sent        as the ring plan of the layout says: each rank the keys that others need, once forward, once backward, and
            their gradients back
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from dtensor_ring.functional.call import Output, Settings, answer, attend
from dtensor_ring.functional.variants import Function, packed_variants, refusing_together
from dtensor_ring.planning.layout import Layout


def _family(name: str, layout: Layout, holds: str, chunks: int) -> tuple[Function, Function, Function]:
    # The families differ in their layout only. Arguments stay written out, by name and place those of the functions replaced.
    @refusing_together
    def func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> Output:
        settings = Settings(dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, group)
        if not q.dim() == k.dim() == v.dim() == 4:
            raise ValueError(f"{name}_func: q, k, v must be (B, S/W, H, D), found {q.dim()}, {k.dim()} and {v.dim()} dims")
        # Only the local length is known here: the global one follows from it where every rank holds chunks of one length.
        for argument, x in (("q", q), ("k", k)):
            if settings.world > 1 and x.shape[1] % chunks:
                raise ValueError(
                    f"{name}_func: every rank holds {chunks} chunks of one length, but {argument} has {x.shape[1]} tokens: S must "
                    f"be divisible by {chunks} * {settings.world}; dtensor_ring.ring_attention takes any length"
                )
        return answer(*attend(q, k, v, settings, layout), settings)

    # Named after where users import it from: otherwise pickle, help() and tracebacks would name this closure.
    func.__name__ = func.__qualname__ = f"{name}_func"
    func.__module__ = "dtensor_ring.functional"
    func.__doc__ = (
        f"Attention of sequences spread over the ranks of `group`; this rank holds {holds}.\n\n"
        "q is (B, S/W, H, D), k and v are (B, S/W, Hk, D), as many tokens on every rank. Returns out (B, S/W, H, D), or with\n"
        "`return_attn_probs` (out, lse (B, H, S/W) float32, None). Arguments as `flash_attn.flash_attn_func`; see\n"
        "`dtensor_ring.functional.call.Settings`.\n\n"
        "Raises:\n"
        "    ValueError: shapes that do not fit together, or a local length that the layout does not allow.\n"
        "    NotImplementedError: no kernel does what is asked; the text has each one's reason."
    )
    return func, *packed_variants(func, name)


ring_flash_attn_func, ring_flash_attn_kvpacked_func, ring_flash_attn_qkvpacked_func = _family(
    "ring_flash_attn", Layout("contiguous"), "chunk r of W", 1
)
zigzag_ring_flash_attn_func, zigzag_ring_flash_attn_kvpacked_func, zigzag_ring_flash_attn_qkvpacked_func = _family(
    "zigzag_ring_flash_attn", Layout("zigzag"), "chunks r and 2W-1-r of 2W, one after the other", 2
)
stripe_flash_attn_func, stripe_flash_attn_kvpacked_func, stripe_flash_attn_qkvpacked_func = _family(
    "stripe_flash_attn", Layout("stripe"), "the tokens t with t % W == r", 1
)
