"""What the flash-attention kernels have in common: one dense and one varlen call, aligned bottom-right, 16-bit tensors.

Each adapter says how its package is called, in its own order of arguments; callers see `Kernel` and never branch.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from dtensor_ring._torch import constant_when_compiled
from dtensor_ring.ops.kernels.base import Kernel, KernelRequirements, PositionContext, Result, SoftmaxParams, VarlenMetadata


class Bounds(NamedTuple):
    """The varlen arguments: cumulative lengths, int32 on the device, and the longest sequence of each."""

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int

    @staticmethod
    def keywords(bounds: Bounds | None) -> dict[str, Any]:
        """As the packages name them; none for a dense call."""
        if bounds is None:
            return {}
        return dict(zip(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), bounds, strict=True))


class Side(NamedTuple):
    """A window in the terms of flash-attn: causal, or left and right, -1 for unbounded."""

    is_causal: bool
    left: int
    right: int

    @classmethod
    def of(cls, window: tuple[int, int]) -> Side:
        """Causal where it is just that."""
        left, right = window
        return cls(True, -1, -1) if window == (-1, 0) else cls(False, left, right)

    def keywords(self) -> dict[str, Any]:
        """As flash-attn 2 and 3 name them; a causal call looks 0 tokens ahead."""
        right = 0 if self.is_causal else self.right
        return {"causal": self.is_causal, "window_size_left": self.left, "window_size_right": right}


def lacks_gpu(need: KernelRequirements, smallest_capability: tuple[int, int] = (8, 0)) -> str | None:
    """Why kernels for GPUs of a compute capability cannot run here, or None."""
    if need.device != "cuda":
        return f"runs on CUDA tensors, found {need.device}"
    of_gpu = capability()
    if of_gpu < smallest_capability:
        needed = ".".join(map(str, smallest_capability))
        return f"needs compute capability {needed}, this GPU has {'.'.join(map(str, of_gpu))}"
    return None


def capability() -> tuple[int, int]:
    """The compute capability of the current GPU."""
    return _capability(torch.cuda.current_device())


@cache
def _capability(device: int) -> tuple[int, int]:
    # asked for on every call of attention: PyTorch works it out anew each time, which takes longer than launching a kernel
    return torch.cuda.get_device_capability(device)


def lacks_tensors(need: KernelRequirements, largest_head_dim: int = 256) -> str | None:
    """Why flash kernels cannot take tensors of this dtype and head dim, or None."""
    if need.dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, found {need.dtype}"
    if need.head_dim % 8 or need.head_dim > largest_head_dim:
        return f"needs a head dim that is a multiple of 8 up to {largest_head_dim}, found {need.head_dim}"
    if need.head_dim != need.v_head_dim:
        return f"needs one head dim for q, k and v, found {need.head_dim} and {need.v_head_dim}"
    return None


@constant_when_compiled
def load(module: str, package: str, needs: tuple[str, ...]) -> ModuleType | str:
    """A module with the functions it `needs`, or why `package` cannot be used."""
    return _loaded(module, package, needs)


@cache
def _loaded(module: str, package: str, needs: tuple[str, ...]) -> ModuleType | str:
    try:
        found = import_module(module)
    except ModuleNotFoundError as failure:
        return f"the package {package} is not installed (no module {failure.name!r})"
    except (ImportError, OSError, RuntimeError) as failure:
        return f"the installed {package} does not load: {failure}"
    missing = [name for name in needs if not hasattr(found, name)]
    return f"the installed {package} has no {' and no '.join(missing)}: another version is needed" if missing else found


@contextmanager
def _drawing(like: Tensor, options: SoftmaxParams, extras: PositionContext | None) -> Iterator[None]:
    """The device's generator at the start of this call's seed, and afterwards as it was: dropout masks come from nowhere else."""
    if not options.dropout_p or extras is None:
        yield
        return
    generator = torch.cuda.default_generators[like.device.index]
    state = generator.get_state()
    generator.manual_seed(extras.seed)
    try:
        yield
    finally:
        generator.set_state(state)


def drawn(like: Tensor, options: SoftmaxParams, extras: PositionContext | None) -> Tensor | None:
    """The generator's state as the forward call found it: seed and offset (2,) int64 on the device; None without dropout."""
    if not options.dropout_p or extras is None:
        return None
    state = torch.zeros(2, dtype=torch.int64, device=like.device)
    state[0].fill_(extras.seed)
    return state


class FlashKernel(Kernel):
    """A kernel with a dense and a varlen call; out and gradients come back in the input dtype, lse in float32."""

    hashes_positions: ClassVar[bool] = False

    @abstractmethod
    def call_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bounds: Bounds | None,
        window: tuple[int, int],
        options: SoftmaxParams,
        extras: PositionContext | None,
    ) -> Result:
        """The package's forward: (B, S, H, D) tensors without bounds, (T, H, D) with them; lse (B, H, S) or (H, T)."""

    @abstractmethod
    def call_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        bounds: Bounds | None,
        window: tuple[int, int],
        options: SoftmaxParams,
        extras: PositionContext | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The package's backward."""

    @override
    def forward(
        self,
        q_BSHD: Tensor,
        k_BSHD: Tensor,
        v_BSHD: Tensor,
        window: tuple[int, int],
        options: SoftmaxParams,
        extras: PositionContext | None = None,
    ) -> Result:
        """One dense call."""
        with _drawing(q_BSHD, options, extras):
            return self.call_forward(q_BSHD, k_BSHD, v_BSHD, None, window, options, extras)

    @override
    def backward(
        self,
        dout_BSHD: Tensor,
        q_BSHD: Tensor,
        k_BSHD: Tensor,
        v_BSHD: Tensor,
        out_BSHD: Tensor,
        lse_BHS: Tensor,
        window: tuple[int, int],
        options: SoftmaxParams,
        extras: PositionContext | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One dense call."""
        tensors = dout_BSHD, q_BSHD, k_BSHD, v_BSHD, out_BSHD, lse_BHS.contiguous()
        return self.call_backward(*tensors, None, window, options, extras)

    @override
    def forward_packed(
        self,
        q_THD: Tensor,
        k_THD: Tensor,
        v_THD: Tensor,
        packing: VarlenMetadata,
        window: tuple[int, int],
        options: SoftmaxParams,
        extras: PositionContext | None = None,
    ) -> Result:
        """One varlen call; rows without keys, whose lse the kernels give as +inf or -inf, get -inf."""
        bounds = Bounds(packing.cu_q, packing.cu_k, packing.max_q, packing.max_k)
        with _drawing(q_THD, options, extras):
            found = self.call_forward(q_THD, k_THD, v_THD, bounds, window, options, extras)
        return found._replace(lse=found.lse.masked_fill(found.lse == math.inf, -math.inf))

    @override
    def backward_packed(
        self,
        dout_THD: Tensor,
        q_THD: Tensor,
        k_THD: Tensor,
        v_THD: Tensor,
        out_THD: Tensor,
        lse_HT: Tensor,
        packing: VarlenMetadata,
        window: tuple[int, int],
        options: SoftmaxParams,
        extras: PositionContext | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One varlen call; keys without queries get gradients 0."""
        bounds = Bounds(packing.cu_q, packing.cu_k, packing.max_q, packing.max_k)
        tensors = dout_THD, q_THD, k_THD, v_THD, out_THD, lse_HT.contiguous()
        return self.call_backward(*tensors, bounds, window, options, extras)
