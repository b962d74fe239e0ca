"""`ring_attention`: attention on DTensors whose sequence dim is spread over a mesh axis."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal, TypeVar, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from dtensor_ring.comm import several_ranks
from dtensor_ring.ops.agree import refused_by_all
from dtensor_ring.ops.arguments import Arguments, Strategy, text_of_model
from dtensor_ring.ops.attend import attend
from dtensor_ring.ops.kernels import KernelName
from dtensor_ring.ops.place import Place, place_alone, place_of
from dtensor_ring.ops.prepare import Inputs, prepare
from dtensor_ring.planning.cost_model import CostModel
from dtensor_ring.planning.documents import Documents

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
    stages: int | None = None,
    memory: int | None = None,
    cost_model: CostModel | None = None,
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
    stages: int | None = None,
    memory: int | None = None,
    cost_model: CostModel | None = None,
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
    stages: int | None = None,
    memory: int | None = None,
    cost_model: CostModel | None = None,
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
    stages: int | None = None,
    memory: int | None = None,
    cost_model: CostModel | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention of a sequence spread over the ranks of a mesh axis; CAUSAL unless you say is_causal=False.

        mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("dp", "cp"))
        q, k, v = (distribute_tensor(x, mesh, [Shard(0), Zigzag(1)]) for x in (q, k, v))
        out = ring_attention(q, k, v)                 # a DTensor placed as q, differentiable

    Shapes are global, those of the DTensors: q (B, Sq, H, D), k (B, Sk, Hk, D), v (B, Sk, Hk, Dv) with H a multiple of Hk;
    out is (B, Sq, H, Dv) in the dtype of q, placed as q. Keys and values travel, never repeated for grouped heads; see
    `dtensor_ring.planning.schedule` for who sends what. Plain tensors, and DTensors without a sequence axis, run the kernel of one
    device. Block results are merged by their log-sum-exp as in "Ring Attention with Blockwise Transformers" (Liu et al., 2023)
    and "FlashAttention-2" (Dao, 2023).

    Args:
        q: queries.
        k: keys, placed as q.
        v: values, placed as q.
        is_causal: a query sees keys up to its own position. This is the default, unlike in PyTorch's
            `F.scaled_dot_product_attention`: pass is_causal=False for attention in both directions. With two lengths it is
            aligned bottom-right, as in flash-attn and unlike in PyTorch: queries count from Sk - Sq.
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
        return_lse: also return lse (B, H, Sq), float32 (float64 for float64), placed as q is; a gradient of it is refused. What
            torch.compile compiles should return lse.detach(): only the values of its gradient tell there, for which the host waits.
        strategy: "ring" (memory bounded, some ranks' keys at a time), "gather" (all keys at once, no merging) or "ulysses" (heads
            instead of tokens on each rank; as many ranks as heads allow); None is "ring", or "gather" for ALiBi where only that
            lets flash kernels measure distances. "local", for plain tensors, says that this rank holds whole sequences; without
            it they warn where a process group of several ranks is up.
        kernel: a name in `dtensor_ring.ops.kernels.KERNELS`; None is the first that does not refuse; fast
            ones stand first.
        stages: transfers in which "ring" fetches the other ranks' keys, from 1 on; more than W - 1 are W - 1. One
            transfer is hidden behind the rank's own keys and needs the fewest merges; W - 1 need the least memory.
        memory: bytes that the buffers of stages may take in a backward pass; of the stages that stay within, the
            fastest by `cost_model` are chosen, or W - 1. None is the keys and values of 512k tokens: 2 GiB for 8 key heads of 128
            in bfloat16. Never read off the device, since ranks must choose alike. Pass one of `stages` and `memory`.
        cost_model: figures of the machine, by which the stages are chosen, the same on every rank; None is those of H100, H200 or
            A100 where all ranks have such a GPU and exchange over NCCL, and elsewhere the fewest stages that `memory` allows.

    Returns:
        out, or (out, lse) with `return_lse`.

    Raises:
        TypeError: DTensors mixed with plain tensors, or dtypes that differ.
        ValueError: shapes, placements, window, numbers or documents that do not fit; or ranks that do not agree. What is wrong
            on one rank is raised on every rank at the first call of a kind; ranks that part later wait for one another in vain,
            and say so when the group's timeout ends.
        NotImplementedError: no kernel does what is asked; the text has each kernel's reason.
    """
    # What is refused up to the comparison of ranks is told to all of them. After it they are in transfers, where nobody listens.
    inputs = Inputs(q, k, v, sinks, alibi_slopes, documents)
    asked = Arguments(
        is_causal, window, scale, softcap, dropout_p, deterministic, strategy, kernel, 0, stages, memory, text_of_model(cost_model)
    )
    with refused_by_all(q, k, v):
        prepared = prepare(inputs, asked, _place(q, k, v, strategy), "ring_attention")
    out, lse = attend(q, k, v, prepared, return_lse=return_lse)
    return out if lse is None or not return_lse else (out, lse)


def _place(q: Tensor, k: Tensor, v: Tensor, strategy: Strategy | None) -> Place:
    """Where the attention of three tensors happens: DTensors say it by their placements, plain tensors hold whole sequences."""
    # A plain tensor has no layout: nothing says whether it holds a whole sequence or a share, so it is taken for whole.
    if isinstance(q, DTensor) and isinstance(k, DTensor) and isinstance(v, DTensor):
        return place_of(q, k, v)
    _check_kinds(q, k, v)
    if strategy != "local":
        _warn_if_alone()
    return place_alone(q, k, v)


def _warn_if_alone() -> None:
    """Warn of plain tensors in a program of several ranks: the call is right only where each rank holds whole sequences."""
    # Shares passed as plain tensors give finite numbers and a falling loss: this warning is all that would tell.
    if torch.compiler.is_compiling() or not several_ranks():
        return
    warnings.warn(
        f"ring_attention got plain tensors in a program of {dist.get_world_size()} ranks: this rank attends to its own tokens "
        "alone. Over a spread sequence, make DTensors with dtensor_ring.from_local; where this rank holds whole sequences, say so "
        "with strategy='local'",
        stacklevel=4,
    )


def _check_kinds(q: Tensor, k: Tensor, v: Tensor) -> None:
    # A plain tensor among DTensors would have to be a share, of whose layout and length nothing is known.
    kinds = {name: isinstance(x, DTensor) for name, x in (("q", q), ("k", k), ("v", v))}
    if len(set(kinds.values())) > 1:
        plain = ", ".join(name for name, is_dtensor in kinds.items() if not is_dtensor)
        raise TypeError(f"q, k and v must all be DTensors or all plain tensors; plain: {plain}. See dtensor_ring.from_local")
