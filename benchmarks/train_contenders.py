"""Who trains the model of `benchmarks.train_step`: this library, plain attention, and other packages, one small adapter each.

A contender says why it cannot be measured here, and gives the sum of the losses of this rank's tokens. Its losses and gradients are
compared with those of plain attention on the whole sequence before it is timed, so an adapter that calls its package wrongly gets
no time.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.peers import attention_restored, import_failure
from benchmarks.train_models import Models, Recomputed

Loss = Callable[[], Tensor]  # the sum of the losses of this rank's tokens


class Contender(ABC):
    """One way to train.

    Attributes:
        key: what the command line calls it.
        name: what tables call it.
        kernel: of its attention, for tables.
        modules: what must be importable.
        shares: ranks share one sequence; else each has tokens of its own.
    """

    key: ClassVar[str]
    name: ClassVar[str]
    kernel: ClassVar[str] = "default"
    modules: ClassVar[Sequence[str]] = ()
    shares: ClassVar[bool] = True

    def missing(self, device: torch.device) -> str:
        """Why it cannot be measured on a device; empty if it can."""
        return import_failure(self.modules)

    def refuses(self, length: int, world: int) -> str:
        """Why it cannot train on a sequence of so many tokens; empty if it can."""
        return ""

    def recomputed(self, layers: bool) -> Recomputed | None:
        """What it computes again in backward where layers are to be, or are not; None if it has nothing to show there."""
        return "layers" if layers else ""

    @abstractmethod
    def session(self, models: Models, ids: Tensor, labels: Tensor) -> AbstractContextManager[Loss]:
        """What gives the loss, of ids and labels (1, S) of the whole sequence; forward and backward belong into the block."""


class Plain(Contender):
    """PyTorch's own attention on all tokens that it is given: each rank by itself."""

    key, name, kernel, shares = "plain", "plain SDPA", "sdpa", False

    @contextmanager
    def session(self, models: Models, ids: Tensor, labels: Tensor) -> Iterator[Loss]:
        """The model as it is without a plan."""
        with models.without_plan():
            yield partial(models.plain, ids, labels)


class Ring(Contender):
    """This library."""

    key, name = "ring_plan", "ring_plan"

    @contextmanager
    def session(self, models: Models, ids: Tensor, labels: Tensor) -> Iterator[Loss]:
        """The plan cuts the batch by itself; labels are shifted already."""
        yield partial(models.ours, ids, models.plan.cut(labels))


class RingSaved(Ring):
    """This library, with attention left out of what is computed again."""

    key, name = "save_attention", "ring_plan, save_attention"

    def recomputed(self, layers: bool) -> Recomputed | None:
        """Without checkpointing it would be `Ring` once more."""
        return "layers but attention" if layers else None


class TorchContextParallel(Contender):
    """PyTorch's `context_parallel` with what it does by default: zigzag shares, keys of all ranks gathered."""

    key, name, kernel = "torch", "torch context_parallel", "sdpa"
    modules = ("torch.distributed.tensor.experimental",)

    def missing(self, device: torch.device) -> str:
        """Its ring knows the kernels of GPUs alone."""
        return super().missing(device) or ("" if device.type == "cuda" else "its ring has kernels for GPUs only")

    def refuses(self, length: int, world: int) -> str:
        """Two chunks of one size for every rank."""
        return "" if length % (2 * world) == 0 else f"{length} tokens are not divisible by {2 * world}"

    @contextmanager
    def session(self, models: Models, ids: Tensor, labels: Tensor) -> Iterator[Loss]:
        """The context cuts its buffers in place, so each session has its own."""
        from torch.distributed.tensor.experimental import context_parallel

        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        buffers = [ids.clone(), labels.clone(), positions]
        cut = context_parallel(models.mesh, buffers=buffers, buffer_seq_dims=[1, 1, 1], no_restore_buffers=set(buffers))
        with models.without_plan(), models.attention(_without_mask()), attention_restored(), cut:
            yield partial(models.plain, *buffers)


class RingFlashAttn(Contender):
    """ring-flash-attn's adapter for Hugging Face models, which gathers keys head by head: contiguous shares."""

    key, name, kernel = "ring-flash-attn", "ring-flash-attn, HF adapter", "flash_attn"
    modules = ("flash_attn", "ring_flash_attn")

    def missing(self, device: torch.device) -> str:
        """Flash attention's kernels are for GPUs."""
        return super().missing(device) or ("" if device.type == "cuda" else "runs on GPUs only")

    @contextmanager
    def session(self, models: Models, ids: Tensor, labels: Tensor) -> Iterator[Loss]:
        """One document over all ranks; each has a part of ids, labels and positions."""
        package: Any = importlib.import_module("ring_flash_attn")
        group, rank, length = models.mesh.get_group(), models.mesh.get_local_rank(), ids.shape[1]
        _substitute(group)
        package.update_ring_flash_attn_params(torch.tensor([0, length], dtype=torch.int32, device=ids.device), group)
        positions = torch.arange(length, device=ids.device)[None]
        mine = (x.chunk(models.mesh.size(), 1)[rank] for x in (ids, labels, positions))
        with models.without_plan(), models.attention("flash_attention_2"):
            yield partial(models.plain, *mine)


CONTENDERS: tuple[Contender, ...] = (Plain(), Ring(), RingSaved(), TorchContextParallel(), RingFlashAttn())


@cache
def _without_mask() -> str:
    """The name of transformers' SDPA without the mask that it makes where positions jump, which it takes for packed documents."""
    AttentionInterface.register("sdpa_without_mask", sdpa_attention_forward)
    return "sdpa_without_mask"


@cache
def _substitute(group: dist.ProcessGroup) -> None:
    """Put the adapter in place of transformers' flash attention: once, since it does not find its way a second time."""
    importlib.import_module("ring_flash_attn").substitute_hf_flash_attn(group, heads_k_stride=1)
