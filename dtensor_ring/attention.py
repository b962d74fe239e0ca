"""`ring_attention`: attention on DTensors whose sequence dim is spread over a mesh axis."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from dtensor_ring._torch import local_of, replicated
from dtensor_ring.comm import transport_of
from dtensor_ring.documents import Documents
from dtensor_ring.layout import Layout
from dtensor_ring.ops.kernels import Need, choose_kernel
from dtensor_ring.ops.library import attention
from dtensor_ring.ops.mask import mask_text
from dtensor_ring.ops.sharding import attention_axis
from dtensor_ring.placements.redistribute import axis_name


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    alibi_slopes: Tensor | None = None,
    documents: Documents | Tensor | Sequence[int] | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    strategy: str | None = None,
    kernel: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention of a sequence spread over the ranks of a mesh axis.

        mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("dp", "cp"))
        q, k, v = (distribute_tensor(x, mesh, [Shard(0), Zigzag(1)]) for x in (q, k, v))
        out = ring_attention(q, k, v)                 # a DTensor placed as q, differentiable

    Shapes are global, those of the DTensors: q (B, Sq, H, D), k (B, Sk, Hk, D), v (B, Sk, Hk, Dv) with H a multiple of Hk;
    out is (B, Sq, H, Dv) in the dtype of q, placed as q. Keys and values travel, never repeated for grouped heads; see
    `dtensor_ring.ops.schedule` for who sends what. Plain tensors, and DTensors without a sequence axis, run the kernel of one
    device. Block results are merged by their log-sum-exp as in "Ring Attention with Blockwise Transformers" (Liu et al., 2023)
    and "FlashAttention-2" (Dao, 2023).

    Args:
        q: queries.
        k: keys, placed as q.
        v: values, placed as q.
        is_causal: a query sees keys up to its own position, bottom-right aligned: queries count from Sk - Sq.
        scale: multiplies q.k; None is D ** -0.5.
        window: (L, R), a query at p sees keys p-L <= t <= p+R; -1 is unbounded. Hugging Face's `sliding_window=w` is (w-1, 0).
        softcap: c > 0 bounds scores to c * tanh(score / c).
        sinks: not supported yet.
        dropout_p: not supported yet.
        alibi_slopes: not supported yet.
        documents: bounds of packed documents, a `Documents` or a cu_seqlens; a query sees keys of its own document only.
        deterministic: gradients are bitwise the same from run to run.
        return_lse: also return lse (B, H, Sq), float32 (float64 for float64), placed as q is; it carries no gradient.
        strategy: "ring" (memory bounded, one rank's keys at a time) or "gather" (all keys at once, no merging); None chooses.
        kernel: a name in `dtensor_ring.ops.kernels.KERNELS`; None is the first that does not refuse.

    Returns:
        out, or (out, lse) with `return_lse`.

    Raises:
        TypeError: DTensors mixed with plain tensors, or dtypes that differ.
        ValueError: shapes, placements, window or documents that do not fit, or ranks that do not agree; on every rank.
        NotImplementedError: an argument not supported yet, or no kernel does what is asked; the text has each kernel's reason.
    """
    _refuse_unsupported(sinks, dropout_p, alibi_slopes)
    _check_tensors(q, k, v)
    mask = mask_text(is_causal, window)
    where = _where(q, k, v)
    found = _documents(documents, q, k)
    need = Need(
        device=q.device.type,
        dtype=q.dtype,
        head_dim=q.shape[3],
        v_head_dim=v.shape[3],
        training=torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad),
        windowed=mask.startswith("window"),
        packed=found is not None,
        softcap=softcap,
        deterministic=deterministic,
    )
    chosen = choose_kernel(kernel, need).name
    way = choose_strategy(strategy)
    if where.axis is not None:
        _agree(where, q, k, v, (mask, way, chosen, found.digest if found is not None else ""))
    bounds = _bounds_tensor(found, q)
    factor = q.shape[3] ** -0.5 if scale is None else float(scale)
    options = factor, float(softcap), deterministic, mask, str(where.layout), way, chosen, where.group
    out, lse = attention(q, k, v, bounds, q.shape[1], k.shape[1], *options)
    return (out, lse) if return_lse else out


def choose_strategy(strategy: str | None) -> str:
    """The strategy for None: "ring", whose memory does not grow with the ranks and which hides the first transfer.

    Raises:
        ValueError: no such strategy.
        NotImplementedError: "ulysses".
    """
    if strategy == "ulysses":
        raise NotImplementedError("strategy='ulysses' is not supported yet: use 'ring' or 'gather'")
    if strategy not in (None, "ring", "gather"):
        raise ValueError(f"unknown strategy {strategy!r}: use 'ring', 'gather' or None")
    return strategy or "ring"


def _refuse_unsupported(sinks: Tensor | None, dropout_p: float, alibi_slopes: Tensor | None) -> None:
    asked = {"sinks": sinks is not None, "dropout_p": dropout_p != 0.0, "alibi_slopes": alibi_slopes is not None}
    for name, is_asked in asked.items():
        if is_asked:
            raise NotImplementedError(f"ring_attention does not support {name} yet: leave it at its default")


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    kinds = {name: isinstance(x, DTensor) for name, x in (("q", q), ("k", k), ("v", v))}
    if len(set(kinds.values())) > 1:
        plain = [name for name, is_dtensor in kinds.items() if not is_dtensor]
        raise TypeError(
            f"q, k and v must all be DTensors or all plain tensors; plain: {', '.join(plain)}. See dtensor_ring.from_local"
        )
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"q, k and v must have shape (B, S, H, D), found {shapes}")
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ValueError(f"needed q (B, Sq, H, D), k (B, Sk, Hk, D), v (B, Sk, Hk, Dv), found {shapes}")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"query heads must be a multiple of key heads, found {q.shape[2]} and {k.shape[2]}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one dtype, found {q.dtype}, {k.dtype}, {v.dtype}")


class _Where(NamedTuple):
    """Over which mesh axis and group attention runs; no axis: on this rank alone."""

    mesh: DeviceMesh | None = None
    axis: int | None = None
    layout: Layout = Layout("contiguous")
    group: str = ""


def _where(q: Tensor, k: Tensor, v: Tensor) -> _Where:
    if not (isinstance(q, DTensor) and isinstance(k, DTensor) and isinstance(v, DTensor)):
        return _Where()
    mesh = q.device_mesh
    if k.device_mesh != mesh or v.device_mesh != mesh:
        raise ValueError(f"q, k and v must lie on one mesh, found {mesh}, {k.device_mesh} and {v.device_mesh}")
    axis, layout = attention_axis(mesh, q.placements, k.placements, v.placements, q.shape, k.shape)
    return _Where(mesh, axis, layout, "" if axis is None else mesh.get_group(axis).group_name)


def _documents(documents: Documents | Tensor | Sequence[int] | None, q: Tensor, k: Tensor) -> Documents | None:
    if documents is None:
        return None
    if torch.compiler.is_compiling():
        if not isinstance(documents, Documents):
            raise TypeError("inside torch.compile documents must be a Documents, made outside of the compiled function")
        return documents
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"documents need queries and keys of one length, found {q.shape[1]} and {k.shape[1]}")
    found = Documents.of(documents, q.shape[1])
    if found.rows not in (1, q.shape[0]):
        raise ValueError(
            f"documents have {found.rows} rows, but the batch has {q.shape[0]}: give one row, or one for each batch row"
        )
    return found


def _bounds_tensor(documents: Documents | None, q: Tensor) -> Tensor:
    """The operator's documents argument: the rows of bounds that this rank's part of the batch needs."""
    if documents is None:
        packed = torch.empty(0, dtype=torch.int64)
    elif documents.rows > 1 and isinstance(q, DTensor):
        packed = documents.select(*_batch_rows(q)).packed
    else:
        packed = documents.packed
    return replicated(packed, q) if isinstance(q, DTensor) else packed


def _batch_rows(q: DTensor) -> tuple[int, int]:
    """First and last batch row of this rank's share under `Shard(0)`, which splits as torch.chunk does."""
    rows, mesh = range(q.shape[0]), q.device_mesh
    for i, placement in enumerate(q.placements):
        if placement == Shard(0):
            size = -(-len(rows) // mesh.size(i))
            rows = rows[mesh.get_local_rank(i) * size :][:size]
    return rows.start, rows.stop


def _agree(where: _Where, q: Tensor, k: Tensor, v: Tensor, words: tuple[str, ...]) -> None:
    """Check once for each new call signature that all ranks of the sequence axis make the same call with fitting shares."""
    if torch.compiler.is_compiling():
        return
    assert where.mesh is not None and where.axis is not None, "only on a sequence axis"
    assert isinstance(q, DTensor) and isinstance(k, DTensor) and isinstance(v, DTensor), "only DTensors have an axis"
    shares = tuple(tuple(local_of(x).shape) for x in (q, k, v))
    signature = (*q.shape, *k.shape, *v.shape), shares, (str(q.dtype), *words)
    _compare(where.mesh, where.axis, where.layout, signature)  # pyrefly: ignore[bad-argument-type]  hashable since ever


@lru_cache(maxsize=512)
def _compare(
    mesh: DeviceMesh,
    axis: int,
    layout: Layout,
    signature: tuple[tuple[int, ...], tuple[tuple[int, ...], ...], tuple[str, ...]],
) -> None:
    """Raises on every rank, and so is not cached, when ranks differ."""
    shape, shares, words = signature
    wire = transport_of(mesh.get_group(axis))
    number = int.from_bytes(hashlib.blake2b("|".join(words).encode(), digest_size=7).digest(), "big")
    every = wire.gather_values([*shape, shares[0][1], shares[1][1], number])
    named = f"ring_attention over mesh axis {axis_name(mesh, axis)}"
    for rank, (*its_shape, q_rows, k_rows, its_words) in enumerate(every):
        mine = every[wire.rank]
        if its_shape != mine[:-3]:
            raise ValueError(
                f"{named}: rank {wire.rank} has q, k, v of global shapes {_three(mine)}, rank {rank} has {_three(its_shape)}: "
                "every rank must hold its share of the same tensors"
            )
        if its_words != mine[-1]:
            raise ValueError(
                f"{named}: rank {rank} calls with another dtype, mask, strategy, kernel or documents than rank {wire.rank}, "
                f"which has {words}: every rank must make the same call"
            )
        for name, length, rows in (("q", shape[1], q_rows), ("k", shape[5], k_rows)):
            needed = layout.local_length(length, wire.world, rank)
            if rows != needed:
                raise ValueError(
                    f"{named}: rank {rank} holds {rows} tokens of {name}, but {layout} of length {length} gives it "
                    f"{needed}: make DTensors with dtensor_ring.from_local(..., length=), not DTensor.from_local"
                )


def _three(values: Sequence[int]) -> str:
    return ", ".join(str(tuple(values[i : i + 4])) for i in (0, 4, 8))
