"""Packed documents, the packed row spread over the ranks: `llama3_flash_attn_varlen` and `zigzag_llama3_flash_attn_varlen`.

    documents a (5), b (7), 2 ranks     llama3                 zigzag llama3 (chunks r and 2W-1-r of 2W)
    a a a a a b b b b b b b             rank 0: a a a a a b    rank 0: a a a | b b b
                                        rank 1: b b b b b b    rank 1: a a b | b b b

Keys are gathered, not passed around ("The Llama 3 Herd of Models", 2024, section 3.3.2): every rank attends with one call, or two
for zigzag, and nothing is merged. `heads_k_stride` key heads are gathered at a time, which bounds memory: those of one group while
those of the next travel. In eager mode a group is larger where its keys and values over all ranks take no more than 64 MiB: a
collective for each head costs the host more than short sequences take the GPU.

    per rank    q (T/W, H, D), k and v (T/W, Hk, D)  ->  out (T/W, H, D), lse (H, T/W) float32
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from dtensor_ring.cache import cached
from dtensor_ring.functional.call import Output, Settings, answer, attend
from dtensor_ring.functional.lengths import check_tokens, host_lengths, remember
from dtensor_ring.functional.variants import packed_variants, refusing_together
from dtensor_ring.planning.documents import Documents, Slices
from dtensor_ring.planning.layout import Layout


def llama3_flash_attn_prepare_cu_seqlens(
    cu_seqlens: Tensor, causal: bool, rank: int, world_size: int
) -> tuple[Tensor, Tensor, int, int, slice]:
    """What `llama3_flash_attn_varlen_func` needs to know of packed documents, once a batch.

    Args:
        cu_seqlens: cumulative lengths of all documents, over all ranks; 1-D integers.
        causal: whether attention is causal: then no key after this rank's last query is needed.
        rank: this rank of the group.
        world_size: ranks in the group.

    Returns:
        cu_seqlens_q and cu_seqlens_k (on the device and of the dtype of `cu_seqlens`), max_seqlen_q, max_seqlen_k, and the slice
        of the whole row's keys that this rank's queries see.

    Raises:
        ValueError: the last bound is not divisible by the number of ranks.
    """
    # Here, once a batch, lengths come to the host: the layers find them remembered.
    bounds = host_lengths("cu_seqlens", cu_seqlens)
    _check_total("llama3_flash_attn_prepare_cu_seqlens", bounds[-1], world_size, 1)
    share = bounds[-1] // world_size
    first, last = rank * share, (rank + 1) * share
    # a document without tokens counts for the rank in whose share it lies
    parts = [(a, b) for a, b in pairwise(bounds) if a < last and (b > first or a == b == first)]
    cu_q = [0] + [min(b, last) - first for _, b in parts]
    k_start = parts[0][0] if parts else first
    ends = [b for _, b in parts]
    # Causal queries see no key after this rank's last token, so the last document's keys end there.
    if causal and ends:
        ends[-1] = last
    # Keys count from the first document that this rank has a part of: it needs them from that document's beginning on.
    cu_k = [0] + [end - k_start for end in ends]
    k_stop = ends[-1] if ends else first
    q_tensor, k_tensor = (torch.tensor(values, dtype=cu_seqlens.dtype, device=cu_seqlens.device) for values in (cu_q, cu_k))
    # The host has just made these values: remembered, no layer has to read them back from the GPU.
    remember(q_tensor, tuple(cu_q))
    remember(k_tensor, tuple(cu_k))
    return q_tensor, k_tensor, _longest(cu_q), _longest(cu_k), slice(k_start, k_stop)


@refusing_together
def llama3_flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    heads_k_stride: int,
    local_k_slice: slice,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Output:
    """Attention of packed documents; this rank holds tokens [rT/W, (r+1)T/W) of the packed row, wherever documents end.

    q is (T/W, H, D), k and v are (T/W, Hk, D). The arguments from `cu_seqlens_q` to `local_k_slice` are what
    `llama3_flash_attn_prepare_cu_seqlens` returns, with `heads_k_stride`, the number of key heads that are gathered at a time (a
    multiple of it, but for compiled code, where the keys and values of so many over all ranks take no more than 64 MiB). Returns
    out (T/W, H, D), or with `return_attn_probs` (out, lse (H, T/W) float32, None). Other arguments as
    `flash_attn.flash_attn_varlen_func`.

    Each rank sends its keys and values to all others, and in backward receives their gradients, summed in float32.

    Raises:
        TypeError: cumulative lengths are not one-dimensional integers.
        ValueError: shapes or lengths that do not fit, or key heads that `heads_k_stride` does not divide.
        NotImplementedError: no kernel does what is asked; the text has each one's reason.
    """
    settings = Settings(dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, group)
    name = "llama3_flash_attn_varlen_func"
    _check_shapes(name, q, k, v)
    bounds_q, bounds_k = host_lengths("cu_seqlens_q", cu_seqlens_q), host_lengths("cu_seqlens_k", cu_seqlens_k)
    check_tokens(name, "cu_seqlens_q", bounds_q, q.shape[0], int(max_seqlen_q))
    # A caller may make the slice by hand, with open or negative ends.
    start, stop, _ = local_k_slice.indices(settings.world * k.shape[0])
    check_tokens(name, "cu_seqlens_k", bounds_k, stop - start, int(max_seqlen_k))
    slices = _slices(bounds_q, bounds_k, start)
    out, lse = attend_by_heads(q, k, v, settings, Layout("contiguous"), slices, heads_k_stride)
    return answer(out, lse, settings)


llama3_flash_attn_varlen_kvpacked_func, llama3_flash_attn_varlen_qkvpacked_func = packed_variants(
    llama3_flash_attn_varlen_func, "llama3_flash_attn_varlen"
)


@dataclass(frozen=True, slots=True)
class ZigzagPrepared:
    """What `zigzag_llama3_flash_attn_varlen_func` takes as `prepared=`.

    Attributes:
        documents: bounds of all documents in the packed row.
        causal: whether attention is causal.
        rank: this rank of the group.
        world_size: ranks in the group.
        tokens: chunks [start, stop) of the packed row that this rank holds, in the order it stores them.
    """

    documents: Documents
    causal: bool
    rank: int
    world_size: int
    tokens: tuple[tuple[int, int], ...]


def zigzag_llama3_flash_attn_prepare_cu_seqlens(cu_seqlens: Tensor, causal: bool, rank: int, world_size: int) -> ZigzagPrepared:
    """What `zigzag_llama3_flash_attn_varlen_func` needs to know of packed documents, once a batch; arguments as for llama3.

    Raises:
        ValueError: the last bound is not divisible by 2 * world_size.
    """
    bounds = host_lengths("cu_seqlens", cu_seqlens)
    _check_total("zigzag_llama3_flash_attn_prepare_cu_seqlens", bounds[-1], world_size, 2)
    runs = Layout("zigzag").runs(bounds[-1], world_size, rank)
    return ZigzagPrepared(Documents((bounds,)), causal, rank, world_size, tuple((run.start, run.start + run.count) for run in runs))


@refusing_together
def zigzag_llama3_flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prepared: ZigzagPrepared,
    heads_k_stride: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Output:
    """As `llama3_flash_attn_varlen_func`, balanced: this rank holds chunks r and 2W-1-r of 2W of the packed row.

    Only keys that some query of another rank sees are sent. `prepared` comes from `zigzag_llama3_flash_attn_prepare_cu_seqlens`;
    `heads_k_stride` None gathers all key heads at once.

    Raises:
        ValueError: shapes that do not fit `prepared`, or `prepared` made for another rank, group or mask.
        NotImplementedError: no kernel does what is asked; the text has each one's reason.
    """
    settings = Settings(dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, group)
    name = "zigzag_llama3_flash_attn_varlen_func"
    stride = k.shape[1] if heads_k_stride is None else heads_k_stride
    _check_shapes(name, q, k, v)
    # What was prepared for another rank or mask would fit by shape, and give wrong numbers.
    here = dist.get_rank(settings.process_group), settings.world, causal, settings.world * q.shape[0]
    made = prepared.rank, prepared.world_size, prepared.causal, prepared.documents.length
    if here != made:
        raise ValueError(
            f"{name}: prepared for (rank, world_size, causal, tokens) = {made}, called with {here}: prepare once a batch"
        )
    out, lse = attend_by_heads(q, k, v, settings, Layout("zigzag"), prepared.documents, stride)
    return answer(out, lse, settings)


zigzag_llama3_flash_attn_varlen_kvpacked_func, zigzag_llama3_flash_attn_varlen_qkvpacked_func = packed_variants(
    zigzag_llama3_flash_attn_varlen_func, "zigzag_llama3_flash_attn_varlen"
)


def attend_by_heads(
    q: Tensor, k: Tensor, v: Tensor, settings: Settings, layout: Layout, documents: Documents | Slices, stride: int
) -> tuple[Tensor, Tensor]:
    """Attention of `stride` key heads and their queries at a time, or more where that takes little memory.

    Returns out (T/W, H, Dv) and lse (H, T/W).

    Raises:
        ValueError: `stride` does not divide the key heads.
    """
    if stride < 1 or k.shape[1] % stride:
        raise ValueError(f"heads_k_stride must divide the {k.shape[1]} key heads, found {stride}")
    if not torch.compiler.is_compiling():  # where lengths are symbols
        tokens = documents.length if isinstance(documents, Documents) else settings.world * k.shape[0]
        stride = _at_a_time(stride, k.shape[1], tokens * (k.shape[2] + v.shape[2]) * k.dtype.itemsize)
    # A packed row is one batch row.
    out, lse = attend(q[None], k[None], v[None], settings, layout, "gather", documents, kv_head_group_size=stride)
    return out[0], lse[0]


AT_ONCE = 64 << 20  # bytes of gathered keys and values: no more than what a layer keeps of 8k tokens of queries


def _at_a_time(stride: int, heads: int, head_bytes: int) -> int:
    """The largest multiple of `stride` that divides `heads` and whose heads stay within `AT_ONCE`; `stride` where none does.

    The same on every rank, since `head_bytes` are those of one head over all ranks.
    """
    multiples = [count for count in range(stride, heads + 1, stride) if not heads % count and count * head_bytes <= AT_ONCE]
    return max(multiples, default=stride)


def _held(slices: Slices, *_bounds: object) -> int:
    return slices.nbytes  # the arguments are parts of the value


# Every layer passes the same lengths: one value for all of them is checked once, and found by plans that are kept for it.
@cached("slices of llama3 functions", most_bytes=2 << 20, most_entries=32, size=_held)
def _slices(bounds_q: tuple[int, ...], bounds_k: tuple[int, ...], k_start: int) -> Slices:
    return Slices(bounds_q, bounds_k, k_start)


def _longest(bounds: list[int]) -> int:
    return max((b - a for a, b in pairwise(bounds)), default=0)


def _check_total(name: str, total: int, world: int, chunks: int) -> None:
    if total % (chunks * world):
        needed = f"{chunks} * {world}" if chunks > 1 else str(world)
        raise ValueError(
            f"{name}: {total} tokens over {world} ranks: the number must be divisible by {needed} (add a document of padding); "
            "dtensor_ring.ring_attention takes any number"
        )


def _check_shapes(name: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    if not q.dim() == k.dim() == v.dim() == 3:
        raise ValueError(f"{name}: q, k, v must be (T/W, H, D), found {q.dim()}, {k.dim()} and {v.dim()} dims")
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"{name}: a rank holds as many queries as keys, found {q.shape[0]} and {k.shape[0]}")
