"""The Hugging Face adapter of `ring-flash-attn`, drop-in: one call replaces flash attention in every model of the process.

    handle = substitute_hf_flash_attn(group, heads_k_stride=1)
    update_ring_flash_attn_params(cu_seqlens, group)                  # once a batch; or handle.update(cu_seqlens)
    model(input_ids=torch.chunk(ids, W, dim=1)[rank], position_ids=torch.chunk(positions, W, dim=1)[rank])
    handle.undo()

This is the one place that changes a registry of another package and keeps state between calls, since that is what the functions it
stands in for do; the state belongs to the process group and ends with it. New programs use `ring_plan`, which touches nothing but
the model it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available

from dtensor_ring.functional.call import Settings
from dtensor_ring.functional.lengths import host_lengths
from dtensor_ring.functional.llama3 import attend_by_heads
from dtensor_ring.integrations.transformers.layer_call import read_layer_call
from dtensor_ring.planning.documents import Documents
from dtensor_ring.planning.layout import Layout


@dataclass(slots=True)
class _State:
    """What a process group's adapter knows: key heads gathered at a time, and the documents of the present batch."""

    heads_k_stride: int
    documents: Documents | None = None


# Attention finds its state by the group: two models over two groups do not share one, and a destroyed group leaves none behind.
_states: WeakKeyDictionary[dist.ProcessGroup, _State] = WeakKeyDictionary()


class AdapterHandle:
    """The substitution: give it the documents of each batch, and take it back.

    Made by `substitute_hf_flash_attn`.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = ref(group)  # a handle that is kept must not keep the group alive
        self._attend = _attention_function(group)

    def update(self, cu_seqlens: Tensor) -> None:
        """As `update_ring_flash_attn_params` for this group."""
        group = self._group()
        if group is None:
            raise RuntimeError("the process group was destroyed")
        update_ring_flash_attn_params(cu_seqlens, group)

    def undo(self) -> None:
        """Put back what was replaced, or the substitution before this one; a second call does nothing."""
        if self not in _active:
            return
        group = self._group()
        _active.remove(self)
        if group is not None and not any(handle._group() is group for handle in _active):
            _states.pop(group, None)
        _install()


_active: list[AdapterHandle] = []
# The local entry that a registry had under each name, None for none. transformers looks there first and at its stock functions
# next, so a substitution is taken back by removing its entry, not by registering the stock function over it.
_replaced: dict[tuple[str, str], Callable[..., object] | None] = {}


def _install() -> None:
    """Register the last substitution that was not undone, or what was there before the first."""
    registries = {"attention": ALL_ATTENTION_FUNCTIONS, "mask": ALL_MASK_ATTENTION_FUNCTIONS}
    if _active and not _replaced:
        names = ["flash_attention_2"] if is_flash_attn_2_available() else ["flash_attention_2", "eager"]
        _replaced.update({(key, name): registries[key]._local_mapping.get(name) for key in registries for name in names})
    # Substitutions may be undone in any order, so what is registered follows from the list of those that are left, and what was
    # there before the first is remembered once.
    for (key, name), before in _replaced.items():
        ours = _active[-1]._attend if _active and key == "attention" else _mask if _active else before
        if ours is None:
            registries[key]._local_mapping.pop(name, None)
        else:
            registries[key][name] = ours
    if not _active:
        _replaced.clear()


def substitute_hf_flash_attn(process_group: dist.ProcessGroup, heads_k_stride: int) -> AdapterHandle:
    """Make every model with `attn_implementation="flash_attention_2"` attend over the ranks of `process_group`.

    Each rank gives the model its chunk, as `torch.chunk(..., dim=1)` cuts it, of one packed row and of its position ids, without
    which every rank's tokens would count from 0. Where flash-attn is not installed transformers refuses that name when a model is
    created; there models are created with "eager", and this call switches those. The last substitution counts.

    Args:
        process_group: the ranks that share the packed row.
        heads_k_stride: key heads gathered at a time, or a multiple where that takes little memory, as in the llama3 functions;
            must divide the model's key heads.

    Returns:
        A handle with `update(cu_seqlens)` and `undo()`.

    Raises:
        TypeError: not a process group.
        ValueError: `heads_k_stride` is not positive.
    """
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f"substitute_hf_flash_attn takes a process group, found {process_group!r}: pass torch.distributed.group.WORLD"
        )
    if heads_k_stride < 1:
        raise ValueError(f"heads_k_stride is a number of key heads, found {heads_k_stride}")
    _states[process_group] = _State(heads_k_stride)
    handle = AdapterHandle(process_group)
    _active.append(handle)
    _install()
    return handle


def update_ring_flash_attn_params(cu_seqlens: Tensor, process_group: dist.ProcessGroup) -> None:
    """Gives the documents of the next batch to attention: cumulative lengths over all ranks, 1-D integers.

    Raises:
        RuntimeError: `substitute_hf_flash_attn` was not called for this group.
        ValueError: cu_seqlens do not start at 0, or decrease.
    """
    state = _states.get(process_group)
    if state is None:
        raise RuntimeError("call substitute_hf_flash_attn(process_group, heads_k_stride) first")
    state.documents = Documents((host_lengths("cu_seqlens", cu_seqlens),))


def _attention_function(process_group: dist.ProcessGroup) -> Callable[..., tuple[Tensor, None]]:
    reference = ref(process_group)  # the registry of transformers holds this function for as long as the process lives

    def attend(module: nn.Module, *tensors: Any, **keywords: Any) -> tuple[Tensor, None]:  # noqa: ANN401
        """Attention of this rank's queries (B=1, H, S/W, D) over the packed row; `read_layer_call` has the arguments."""
        group = reference()
        state = None if group is None else _states.get(group)
        if group is None or state is None or state.documents is None:
            raise RuntimeError("call update_ring_flash_attn_params(cu_seqlens, process_group) before the model, once a batch")
        layer = read_layer_call(module, *tensors, **keywords)
        if layer.mask is not None:
            raise NotImplementedError("attention masks are not supported: pack documents without padding")
        if layer.q.shape[0] != 1:
            raise ValueError(f"a packed row is one batch row, found {layer.q.shape[0]}")
        settings = Settings(
            dropout_p=layer.dropout_p,
            softmax_scale=layer.scale,
            causal=layer.is_causal,
            window_size=layer.window,
            group=group,
            softcap=layer.softcap,
            sinks=layer.sinks,
        )
        # Tokens and documents come by different calls, and documents of the batch before would fit many a batch by shape.
        _check_share(layer.q.shape[1], state.documents.length, group)
        q, k, v = layer.q[0], layer.k[0], layer.v[0]
        out, _ = attend_by_heads(q, k, v, settings, Layout("contiguous"), state.documents, state.heads_k_stride)
        return out[None], None

    return attend


def _check_share(tokens: int, length: int, group: dist.ProcessGroup) -> None:
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    needed = Layout("contiguous").local_length(length, world, rank)
    if tokens != needed:
        raise ValueError(
            f"rank {rank} of {world} has {tokens} tokens, but documents of {length} tokens give it {needed}: cut the packed row "
            "with torch.chunk(..., dim=1), to a length that the number of ranks divides, and pass cu_seqlens of the whole row"
        )


def _mask(*_shapes: object, attention_mask: Tensor | None = None, **_mask: object) -> Tensor | None:
    """Documents say what a query sees; a padding mask goes on to the attention function, which refuses it."""
    return None if attention_mask is None or bool(torch.all(attention_mask)) else attention_mask
