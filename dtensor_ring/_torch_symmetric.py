"""The private PyTorch names of symmetric memory, apart from the others in `_torch` since one transport alone uses them."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def lacks_symmetric_memory() -> str | None:
    """Why this PyTorch has no symmetric memory over CUDA, as a sentence, or None.

    `torch.distributed._symmetric_memory` is private as a whole (since 2.5; the functions below are the same in 2.11 and 2.13). Its
    import is left to those who use it. Gone once the module has a public name.
    """
    try:
        from torch.distributed import _symmetric_memory as symmetric
    except ImportError:
        return f"needs torch.distributed._symmetric_memory, which torch {torch.__version__} does not have"
    backend = symmetric.get_backend(torch.device("cuda")) if hasattr(symmetric, "get_backend") else None
    if backend not in (None, "CUDA"):
        return f"needs symmetric memory of backend 'CUDA', and this program has set {backend!r}"
    return None


def symmetric_buffer(nbytes: int, device: torch.device) -> Tensor:
    """A buffer of bytes that other processes can map once all have called `map_symmetric`; freed with the tensor.

    `symmetric_memory.empty` takes it from a pool since 2.12, which keeps what is freed; this takes and frees it at once.
    """
    return torch._C._distributed_c10d._SymmetricMemory.empty_strided_p2p((nbytes,), (1,), torch.uint8, device)


def map_symmetric(buffer: Tensor, group: dist.ProcessGroup) -> tuple[object, list[int], list[Tensor]]:
    """Map the buffers of all ranks of a group into this process; every rank makes this call, with buffers of one size.

    Returns what keeps the memory of others mapped, the address of each rank's buffer, and each rank's buffer as a tensor, which
    must not be used once the first is gone.

    Raises:
        RuntimeError: a rank did not come, or its memory cannot be mapped here.
    """
    from torch.distributed import _symmetric_memory as symmetric

    handle: Any = symmetric.rendezvous(buffer, group)
    views = [handle.get_buffer(rank, (buffer.numel(),), torch.uint8) for rank in range(group.size())]
    return handle, list(handle.buffer_ptrs), views


def never_free(value: object) -> None:
    """Keep an object until the process has ended, without running what its end would run."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))
