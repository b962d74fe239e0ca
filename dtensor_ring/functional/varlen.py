"""Packed documents, every one spread over all ranks: `ring_flash_attn_varlen` and `zigzag_ring_flash_attn_varlen`.

per rank    q (T/W, H, D), k and v (T/W, Hk, D): this rank's part of each document, one after another
            cu_seqlens: cumulative lengths of those parts, the same on every rank
returns     out (T/W, H, D), lse (H, T/W) float32
"""

from __future__ import annotations

from itertools import pairwise

import torch.distributed as dist
from torch import Tensor

from dtensor_ring.cache import cached
from dtensor_ring.functional.call import Output, Settings, answer, attend
from dtensor_ring.functional.lengths import check_tokens, host_lengths
from dtensor_ring.functional.variants import Function, packed_variants, refusing_together
from dtensor_ring.planning.documents import Documents
from dtensor_ring.planning.layout import Layout


def _held(documents: Documents, local_bounds: tuple[int, ...], world: int) -> int:
    return documents.nbytes + 40 * len(local_bounds)


@cached("documents of varlen functions", most_bytes=4 << 20, most_entries=32, size=_held)
def _whole_documents(local_bounds: tuple[int, ...], world: int) -> Documents:
    # Every rank has an equal part of each document, so whole documents are W times as long.
    return Documents((tuple(world * bound for bound in local_bounds),))


def _family(name: str, layout: Layout, holds: str, chunks: int) -> tuple[Function, Function, Function]:
    @refusing_together
    def func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
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
        if not q.dim() == k.dim() == v.dim() == 3:
            raise ValueError(f"{name}_func: q, k, v must be (T/W, H, D), found {q.dim()}, {k.dim()} and {v.dim()} dims")
        bounds = host_lengths("cu_seqlens", cu_seqlens)
        check_tokens(f"{name}_func", "cu_seqlens", bounds, q.shape[0], int(max_seqlen))
        # The whole documents are worked out from this rank's parts, which is possible where all ranks' parts are equal.
        for document, (a, b) in enumerate(pairwise(bounds)):
            if settings.world > 1 and (b - a) % chunks:
                raise ValueError(
                    f"{name}_func: this rank holds {chunks} chunks of one length of every document, but {b - a} tokens of "
                    f"document {document}: every document's length must be divisible by {chunks} * {settings.world}; "
                    "dtensor_ring.ring_attention takes any lengths"
                )
        documents = _whole_documents(bounds, settings.world)
        out, lse = attend(q[None], k[None], v[None], settings, layout, documents=documents)
        return answer(out[0], lse[0], settings)

    func.__name__ = func.__qualname__ = f"{name}_func"
    func.__module__ = "dtensor_ring.functional"
    func.__doc__ = (
        f"Attention of packed documents spread over the ranks of `group`; of each document this rank holds {holds}.\n\n"
        "q is (T/W, H, D), k and v are (T/W, Hk, D). `cu_seqlens` (int32) are cumulative lengths of this rank's parts, the same\n"
        "on every rank, `max_seqlen` is the longest part. Returns out (T/W, H, D), or with `return_attn_probs`\n"
        "(out, lse (H, T/W) float32, None). Other arguments as `flash_attn.flash_attn_varlen_func`.\n\n"
        "Raises:\n"
        "    TypeError: cu_seqlens are not one-dimensional integers.\n"
        "    ValueError: shapes or lengths that do not fit, or a part that the layout does not allow.\n"
        "    NotImplementedError: no kernel does what is asked; the text has each one's reason."
    )
    return func, *packed_variants(func, name)


ring_flash_attn_varlen_func, ring_flash_attn_varlen_kvpacked_func, ring_flash_attn_varlen_qkvpacked_func = _family(
    "ring_flash_attn_varlen", Layout("contiguous", cut="even"), "chunk r of W", 1
)
(
    zigzag_ring_flash_attn_varlen_func,
    zigzag_ring_flash_attn_varlen_kvpacked_func,
    zigzag_ring_flash_attn_varlen_qkvpacked_func,
) = _family("zigzag_ring_flash_attn_varlen", Layout("zigzag", cut="even"), "chunks r and 2W-1-r of 2W", 2)
