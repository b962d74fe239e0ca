"""`ring_attention`: attention on DTensors whose sequence dim is spread over a mesh axis."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeVar, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from typing_extensions import override

from dtensor_ring._torch import local_of, replicated
from dtensor_ring.comm import axis_name, several_ranks, transport_along
from dtensor_ring.documents import Documents, packed_of
from dtensor_ring.layout import Layout
from dtensor_ring.ops import sdpa  # noqa: F401  F.scaled_dot_product_attention on our placements
from dtensor_ring.ops.agree import check_agreement, refused_by_all
from dtensor_ring.ops.arguments import Strategy, check_extras, check_tensors, choose_strategy, factor_of, need_of
from dtensor_ring.ops.kernels import KernelName, choose_kernel
from dtensor_ring.ops.library import attention
from dtensor_ring.ops.mask import Band, mask_text
from dtensor_ring.ops.schedule import Problem, ends_together
from dtensor_ring.ops.sharding import attention_axis, share_of, sink_placements
from dtensor_ring.ops.ulysses import refuses
from dtensor_ring.placements import redistribute
from dtensor_ring.placements.redistribute import wrap

T = TypeVar("T", Tensor, DTensor)


# A DTensor in is a DTensor out. Each overload has all arguments, so that editors show them.
@overload
def ring_attention(
    q: T,
    k: T,
    v: T,
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
    return_lse: Literal[False] = False,
    strategy: Strategy | None = None,
    kernel: KernelName | None = None,
) -> T: ...


@overload
def ring_attention(
    q: T,
    k: T,
    v: T,
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
    return_lse: Literal[True],
    strategy: Strategy | None = None,
    kernel: KernelName | None = None,
) -> tuple[T, T]: ...


@overload
def ring_attention(
    q: T,
    k: T,
    v: T,
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
    return_lse: bool,
    strategy: Strategy | None = None,
    kernel: KernelName | None = None,
) -> T | tuple[T, T]: ...


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
    strategy: Strategy | None = None,
    kernel: KernelName | None = None,
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
        sinks: (H,), a learnable score of each head that every query also sees, with no value (gpt-oss). A plain tensor beside
            DTensors gets this rank's part of its gradient, as a parameter does; a DTensor the whole.
        dropout_p: probability of dropping an attention weight, replayed exactly in backward. Kernels for GPUs draw the mask from
            the CUDA generator; `math` hashes positions, so that with the same seed on every rank the mask does not depend on W.
        alibi_slopes: (H,) or (B, H), float32: a score loses slope * distance (Press et al., 2022); no gradient.
        documents: bounds of packed documents, a `Documents` or a cu_seqlens; a query sees keys of its own document only.
        deterministic: gradients are bitwise the same from run to run.
        return_lse: also return lse (B, H, Sq), float32 (float64 for float64), placed as q is; a gradient of it is refused.
        strategy: "ring" (memory bounded, one rank's keys at a time), "gather" (all keys at once, no merging) or "ulysses" (heads
            instead of tokens on each rank; as many ranks as heads allow); None is "ring", or "gather" for ALiBi where only that
            lets flash kernels measure distances. "local", for plain tensors, says that this rank holds whole sequences; without
            it they warn where a process group of several ranks is up.
        kernel: a name in `dtensor_ring.ops.kernels.KERNELS`; None is the first that does not refuse.

    Returns:
        out, or (out, lse) with `return_lse`.

    Raises:
        TypeError: DTensors mixed with plain tensors, or dtypes that differ.
        ValueError: shapes, placements, window, numbers or documents that do not fit; or ranks that do not agree. What is wrong
            on one rank is raised on every rank at the first call of a kind; ranks that part later wait for one another in vain,
            and say so when the group's timeout ends.
        NotImplementedError: no kernel does what is asked; the text has each kernel's reason.
    """
    if strategy != "local" and not isinstance(q, DTensor):
        _warn_if_alone()
    with refused_by_all(q, k, v):
        _check_kinds(q, k, v)
        check_tensors(q, k, v)
        check_extras(q, sinks, softcap, dropout_p, alibi_slopes)
        factor = factor_of(scale, q.shape[3])
        mask = mask_text(is_causal, window)
        where = _where(q, k, v)
        found = _documents(documents, q, k)
        if where.layout.cut and (found is None or found.rows != 1):
            raise ValueError(
                f"q is laid out document by document ({where.layout}): pass documents=, one row for the whole batch, found {found}"
            )
        softcap, dropout_p = float(softcap), float(dropout_p)
        need = need_of(q, k, v, sinks, softcap=softcap, deterministic=deterministic, dropout_p=dropout_p)
        if alibi_slopes is None:
            way = choose_strategy(strategy)
        else:
            way, alignment = _choose_for_alibi(strategy, where, mask, q, k, found)
            need = replace(need, alibi=alignment)
        _check_strategy(way, where, q, k)
        chosen = choose_kernel(kernel, need).name
        extras = _placed_sinks(sinks, q), _placed_slopes(alibi_slopes, q), _placed_bounds(found, q)
    if where.mesh is not None and where.axis is not None and not torch.compiler.is_compiling():
        transport = transport_along(where.mesh, where.axis)
        name = f"ring_attention over {transport.axis}"
        numbers = f"scale {factor}, softcap {softcap}, dropout_p {dropout_p}, deterministic {deterministic}"
        beside = f"{'no ' if sinks is None else ''}sinks, {'no ' if alibi_slopes is None else ''}ALiBi"
        words = str(q.dtype), f"mask {mask}", way, chosen, numbers, beside, str(found or "no documents")
        assert isinstance(q, DTensor) and isinstance(k, DTensor), "tensors on a mesh are DTensors"
        rows = local_of(q).shape[1], local_of(k).shape[1]
        check_agreement(transport, name, where.layout, (*q.shape, *k.shape, *v.shape), rows, words)
    origin = (share_of(q, 0).start, share_of(q, 2).start) if dropout_p and isinstance(q, DTensor) else (0, 0)
    options = factor, softcap, dropout_p, deterministic, mask, str(where.layout), way, chosen, 0, where.group
    out, lse, _ = attention(q, k, v, *extras, q.shape[1], k.shape[1], *origin, *options)
    if return_lse and out.requires_grad and not torch.compiler.is_compiling():
        lse = _NoGradient.apply(lse, out)
    return (out, lse) if return_lse else out


def _warn_if_alone() -> None:
    """Warn of plain tensors in a program of several ranks: the call is right only where each rank holds whole sequences."""
    if torch.compiler.is_compiling() or not several_ranks():
        return
    warnings.warn(
        f"ring_attention got plain tensors in a program of {dist.get_world_size()} ranks: this rank attends to its own tokens "
        "alone. Over a spread sequence, make DTensors with dtensor_ring.from_local; where this rank holds whole sequences, say so "
        "with strategy='local'",
        stacklevel=3,
    )


def choose_for_alibi(strategy: str | None, problem: Problem) -> tuple[str, Literal["aligned", "shifted"]]:
    """The strategy, and whether blocks are "aligned" so that flash kernels measure ALiBi distances rightly, or "shifted"."""
    if strategy == "ulysses":
        problem = replace(problem, world=1)
    for way in ("ring", "gather") if strategy in (None, "local") else (choose_strategy(strategy),):
        if ends_together(replace(problem, strategy=way)):
            return way, "aligned"
    return choose_strategy(strategy), "shifted"


def _choose_for_alibi(
    strategy: str | None, where: _Where, mask: str, q: Tensor, k: Tensor, documents: Documents | None
) -> tuple[str, Literal["aligned", "shifted"]]:
    world = 1 if where.mesh is None or where.axis is None else where.mesh.size(where.axis)
    if torch.compiler.is_compiling():  # lengths are symbols, which no plan can be made of
        return choose_strategy(strategy), "aligned" if world == 1 and not mask.startswith("window") else "shifted"
    problem = Problem(where.layout, Band.parse(mask), q.shape[1], k.shape[1], world, "ring", documents)
    return choose_for_alibi(strategy, problem)


def _check_strategy(strategy: str, where: _Where, q: Tensor, k: Tensor) -> None:
    if where.mesh is None or where.axis is None:
        return
    mesh, axis = where.mesh, where.axis
    if strategy == "local":
        raise ValueError(
            f"strategy='local' attends to this rank's tokens alone, but mesh axis {axis_name(mesh, axis)} holds the sequence as "
            f"{where.layout}: leave strategy out, or pass x.to_local()"
        )
    if strategy != "ulysses":
        return
    heads, kv_heads = (len(range(x.shape[2])[share_of(x, 2)]) if isinstance(x, DTensor) else x.shape[2] for x in (q, k))
    reason = refuses(mesh.size(axis), heads, kv_heads)
    if reason is not None:
        raise ValueError(f"mesh axis {axis_name(mesh, axis)}: {reason}")


def _check_kinds(q: Tensor, k: Tensor, v: Tensor) -> None:
    kinds = {name: isinstance(x, DTensor) for name, x in (("q", q), ("k", k), ("v", v))}
    if len(set(kinds.values())) > 1:
        plain = ", ".join(name for name, is_dtensor in kinds.items() if not is_dtensor)
        raise TypeError(f"q, k and v must all be DTensors or all plain tensors; plain: {plain}. See dtensor_ring.from_local")


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
    if torch.compiler.is_compiling() and not isinstance(documents, Documents):
        raise TypeError("inside torch.compile documents must be a Documents, made outside of the compiled function")
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"documents need queries and keys of one length, found {q.shape[1]} and {k.shape[1]}")
    found = Documents.of(documents, q.shape[1])
    if found.rows not in (1, q.shape[0]):
        raise ValueError(
            f"documents have {found.rows} rows, but the batch has {q.shape[0]}: give one row, or one for each batch row"
        )
    return found


def _placed_bounds(documents: Documents | None, q: Tensor) -> Tensor:
    """The operator's documents argument: the rows of bounds that this rank's part of the batch needs."""
    if documents is not None and documents.rows > 1 and isinstance(q, DTensor):
        rows = share_of(q, 0)
        documents = documents.select(rows.start, rows.stop) if rows.start < rows.stop else documents.select(0, 1)
    packed = packed_of(documents)
    return replicated(packed, q) if isinstance(q, DTensor) else packed


def _placed_slopes(slopes: Tensor | None, q: Tensor) -> Tensor | None:
    """The slopes of this rank's heads and batch rows."""
    if slopes is None or not isinstance(q, DTensor):
        return slopes
    mine = slopes[..., share_of(q, 2)]
    return replicated(mine if mine.dim() == 1 else mine[share_of(q, 0)], q)


def _placed_sinks(sinks: Tensor | None, q: Tensor) -> Tensor | None:
    """The sinks of this rank's heads, as a DTensor beside DTensors."""
    if sinks is None or not isinstance(q, DTensor):
        if isinstance(sinks, DTensor):
            raise TypeError("sinks are a DTensor, but q, k and v are plain tensors")
        return sinks
    needed = sink_placements(q.placements)
    if not isinstance(sinks, DTensor):
        return _LocalPart.apply(sinks[share_of(q, 2)], q.device_mesh, needed, tuple(sinks.shape))
    if sinks.device_mesh != q.device_mesh or sinks.placements != needed:
        raise ValueError(
            f"sinks are placed {sinks.placements} on {sinks.device_mesh}, beside q they must be {needed} on {q.device_mesh}"
        )
    return _WholeGradient.apply(sinks)


class _NoGradient(torch.autograd.Function):
    """The lse beside an output that has a gradient: a gradient of its own is refused, not dropped in silence."""

    @staticmethod
    @override
    def forward(ctx: Any, lse: Tensor, out: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        if isinstance(lse, DTensor):
            return wrap(local_of(lse), lse.device_mesh, lse.placements, lse.shape)
        return lse.view_as(lse)

    @staticmethod
    @override
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:  # pyrefly: ignore[bad-override]
        raise NotImplementedError("the lse of ring_attention has no gradient: use lse.detach(), or compute the term from scores")


class _LocalPart(torch.autograd.Function):
    """A plain tensor as a DTensor whose gradient stays this rank's part of the sum."""

    @staticmethod
    @override
    def forward(ctx: Any, local: Tensor, mesh: DeviceMesh, placements: Any, shape: Any) -> DTensor:  # pyrefly: ignore[bad-override]
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
