"""Attention of other packages over the same ranks, to be measured beside ours: one small adapter each.

An adapter says why its package cannot be used here, in which of our layouts it has its shares for a case (none where it has no such
attention), and attends to this rank's share of them. Results are checked as ours are, so an adapter that calls its package wrongly
gets no time.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import accumulate
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases import Case

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # this rank's q_BSHD, k_BSHD, v_BSHD to its out_BSHD


def import_failure(modules: Sequence[str]) -> str:
    """Which of the modules cannot be imported, and why; empty if all can."""
    for module in modules:
        try:
            importlib.import_module(module)
        except (ImportError, OSError, RuntimeError, AttributeError) as failure:  # as beside a PyTorch too new for it
            return f"{module} cannot be imported: {type(failure).__name__}: {failure}"
    return ""


class Peer(ABC):
    """One package.

    Attributes:
        name: what tables call it.
        modules: what must be importable.
        needs_gpu: whether it runs on GPUs only.
    """

    name: ClassVar[str]
    modules: ClassVar[Sequence[str]]
    needs_gpu: ClassVar[bool] = True

    def missing(self, device: torch.device) -> str:
        """Why the package cannot be measured on a device; empty if it can."""
        if reason := import_failure(self.modules):
            return reason
        return "runs on GPUs only" if self.needs_gpu and device.type != "cuda" else ""

    @abstractmethod
    def layouts(self, case: Case, device: torch.device) -> Sequence[str]:
        """The layouts, as `Layout.parse` reads them, in which it computes a case."""

    @abstractmethod
    def session(self, case: Case, mesh: DeviceMesh) -> AbstractContextManager[Attend]:
        """What attends to this rank's share of a case in one of these layouts, as long as the block lasts."""


class RingFlashAttn(Peer):
    """The package that ours is a drop-in for: https://github.com/zhuzilin/ring-flash-attention."""

    name = "ring-flash-attn"
    modules = ("flash_attn", "ring_flash_attn")

    def layouts(self, case: Case, device: torch.device) -> Sequence[str]:
        """Its families by their layouts; packed documents must be divisible by twice the ranks."""
        if case.lengths:
            divisible = all(length % (2 * case.world) == 0 for length in case.lengths)
            return ["contiguous", *(["zigzag/even", "contiguous/even"] if divisible else [])]
        return {"causal": ["zigzag", "stripe:1", "contiguous"], "full": ["contiguous"]}.get(case.mask, [])

    @contextmanager
    def session(self, case: Case, mesh: DeviceMesh) -> Iterator[Attend]:
        """One function for each layout."""
        package: Any = importlib.import_module("ring_flash_attn")
        functions = {
            "zigzag": package.zigzag_ring_flash_attn_func,
            "stripe:1": package.stripe_flash_attn_func,
            "contiguous": package.ring_flash_attn_func,
            "zigzag/even": package.zigzag_ring_flash_attn_varlen_func,
            "contiguous/even": package.ring_flash_attn_varlen_func,
        }
        causal = case.mask == "causal"
        if not case.lengths:
            yield partial(functions[case.layout], causal=causal, group=mesh.get_group())
            return
        cu = _bounds(case, mesh)
        if case.layout == "contiguous":
            prepare = package.llama3_flash_attn_prepare_cu_seqlens
            cu_q, cu_k, most_q, most_k, part = prepare(cu, causal, mesh.get_local_rank(), mesh.size())
            extra = cu_q, cu_k, most_q, most_k, case.kv_heads, part
            func = partial(package.llama3_flash_attn_varlen_func, causal=causal, group=mesh.get_group())
        else:
            local = cu // mesh.size()
            extra = local, int(local.diff().max())
            func = partial(functions[case.layout], causal=causal, group=mesh.get_group())
        yield lambda q, k, v: func(q[0], k[0], v[0], *extra)[None]


@contextmanager
def attention_restored() -> Iterator[None]:
    """After the block PyTorch's attention is what it was: `context_parallel` leaves its own in place when an error ends it."""
    plain = functional.scaled_dot_product_attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = plain


class TorchContextParallel(Peer):
    """`torch.distributed.tensor.experimental.context_parallel`: one sequence, shared out as zigzag does where it is causal."""

    name = "torch context_parallel"
    modules = ("torch.distributed.tensor.experimental._attention",)

    def layouts(self, case: Case, device: torch.device) -> Sequence[str]:
        """One sequence in chunks of one size; with zigzag's shares it computes causal attention only."""
        if case.mask not in ("causal", "full") or case.lengths or case.length % (2 * case.world):
            return []
        return ["zigzag" if case.mask == "causal" else "contiguous"]

    @contextmanager
    def session(self, case: Case, mesh: DeviceMesh) -> Iterator[Attend]:
        """Inside of the context PyTorch's own attention is its ring; the buffer tells it the length."""
        package: Any = importlib.import_module(self.modules[0])
        buffer = torch.empty(case.length, device=mesh.device_type)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            # The context replaces the function in its module: a name imported from there would stay that of one rank.
            attention = functional.scaled_dot_product_attention
            return attention(q, k, v, is_causal=case.mask == "causal", enable_gqa=True).transpose(1, 2)

        balanced = package._cp_options.enable_load_balance
        package._cp_options.enable_load_balance = case.layout == "zigzag"
        context = package.context_parallel(mesh, buffers=[buffer], buffer_seq_dims=[0])
        try:
            with attention_restored(), context, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                yield attend
        finally:
            package._cp_options.enable_load_balance = balanced


class Ringmaster(Peer):
    """axolotl-ringmaster: on GPUs by the flash kernels that transformers finds, on CPUs by an explicit softmax."""

    name = "axolotl-ringmaster"
    modules = ("ringmaster.ring.p2p_attn", "ringmaster.ring.zigzag", "ringmaster.ring.distflash", "ringmaster.ring.loop")
    needs_gpu = False

    def missing(self, device: torch.device) -> str:
        """Where transformers finds no kernel it would compute whole scores on GPUs too, which is not what it is for."""
        reason = super().missing(device)
        if reason or device.type != "cuda":
            return reason
        ring: Any = importlib.import_module("ringmaster.ring.p2p_attn")
        return "" if ring._flash_ops() else "transformers finds no flash-attn for it"

    def layouts(self, case: Case, device: torch.device) -> Sequence[str]:
        """Contiguous shares of one size; zigzag where there is a flash kernel."""
        if case.mask not in ("causal", "full"):
            return []
        zigzag = device.type == "cuda" and case.mask == "causal" and not case.lengths and case.length % (2 * case.world) == 0
        return ["contiguous", *(["zigzag"] if zigzag else [])]

    @contextmanager
    def session(self, case: Case, mesh: DeviceMesh) -> Iterator[Attend]:
        """Its loops take (B, H, S, D) and return (B, S, H, D)."""
        loop: Any = importlib.import_module("ringmaster.ring.loop")
        options: dict[str, object] = {"group": mesh.get_group(), "scaling": case.head_dim**-0.5}
        if case.lengths:
            kernel = "flash_attention_2" if mesh.device_type == "cuda" else "math"
            cu, causal = _bounds(case, mesh), case.mask == "causal"
            func = partial(loop.varlen_ring_attention, cu_seqlens=cu, causal=causal, attn_implementation=kernel, **options)
        elif case.layout == "zigzag":
            func = partial(importlib.import_module("ringmaster.ring.zigzag").zigzag_ring_attention, **options)
        elif case.mask == "causal" and mesh.device_type == "cuda":
            func = partial(importlib.import_module("ringmaster.ring.distflash").distflash_attention, **options)
        else:
            ring: Any = importlib.import_module("ringmaster.ring.p2p_attn")
            func = partial(ring.ring_p2p_attention, causal=case.mask == "causal", **options)
        yield lambda q, k, v: func(*(x.transpose(1, 2) for x in (q, k, v)))


class Yunchang(Peer):
    """yunchang (long-context-attention): a ring, and in contiguous shares Ulysses where heads allow it."""

    name = "yunchang"
    modules = ("flash_attn", "yunchang")

    def layouts(self, case: Case, device: torch.device) -> Sequence[str]:
        """One sequence, causal or not."""
        if case.mask not in ("causal", "full") or case.lengths or case.length % (2 * case.world):
            return []
        ulysses = case.kv_heads % case.world == 0
        return [*(["zigzag"] if case.mask == "causal" else []), *(["contiguous"] if ulysses else [])]

    @contextmanager
    def session(self, case: Case, mesh: DeviceMesh) -> Iterator[Attend]:
        """Its module over groups that it makes: all ranks in the ring, or all in Ulysses."""
        package: Any = importlib.import_module("yunchang")
        ulysses = case.world if case.layout == "contiguous" else 1
        package.set_seq_parallel_pg(ulysses, case.world // ulysses, dist.get_rank(), dist.get_world_size())
        attention = package.LongContextAttention(ring_impl_type="basic" if ulysses > 1 else "zigzag")
        yield lambda q, k, v: attention(q, k, v, causal=case.mask == "causal")


PEERS: tuple[Peer, ...] = (RingFlashAttn(), TorchContextParallel(), Ringmaster(), Yunchang())


def _bounds(case: Case, mesh: DeviceMesh) -> Tensor:
    """Cumulative lengths of all documents, int32."""
    return torch.tensor([0, *accumulate(case.lengths)], dtype=torch.int32, device=mesh.device_type)
