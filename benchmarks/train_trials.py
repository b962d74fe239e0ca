"""Steps that may need more memory than there is: ranks agree that one failed, and go on with models made anew.

A step that raises leaves FSDP2 in the middle of its pass: layers whole, gradients under way, a callback that it takes for queued.
So models are made again after a failure, from the same seed. Where a step fails on one rank alone, the others wait for it in
collectives that nobody can end, and the run ends; `limit_memory` gives all ranks the same limit, so that they fail alike.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from benchmarks.timing import Call, Stopwatch
from benchmarks.train_models import Models

OUT_OF_MEMORY = "out of memory"
_KEPT_FREE = 2 << 30  # bytes of each GPU for what does not go through PyTorch's allocator: buffers of NCCL, libraries
# What other packages raise where they cannot train this model here.
_FAILURES = RuntimeError, ValueError, TypeError, AttributeError, ImportError, KeyError, AssertionError


class Trials:
    """Models, and calls with them that may fail.

    Attributes:
        models: as they were made last.
    """

    def __init__(self, make: Callable[[], Models], mesh: DeviceMesh, watch: Stopwatch) -> None:
        """Makes the models; a collective call, as all are where ranks measure together."""
        self._make, self._together = make, watch.together
        self._group: dist.ProcessGroup | None = None
        if self._together:
            # Ranks compare on the host: a GPU that waits for a rank which has failed would never come to it.
            self._group = mesh.get_group() if watch.device.type == "cpu" else dist.new_group(backend="gloo")
        self._world = mesh.size() if self._together else 1
        self._models: Models | None = make()

    @property
    def models(self) -> Models:
        """As they were made last."""
        assert self._models is not None, "models are there but while they are made anew"
        return self._models

    def attempt(self, call: Call, *, foreign: bool = False) -> str:
        """Make a call; why it failed on every rank, or nothing.

        Args:
            call: the same on every rank.
            foreign: it is another package's, whose errors are a reason too.

        Raises:
            RuntimeError: it failed on some of the ranks.
        """
        failure = _failure_of(call, foreign=foreign)
        failed = self._count(bool(failure))
        if failed == 0:
            return ""
        if failed < self._world:
            here = f"This rank: {failure}" if failure else "Not on this one"
            raise RuntimeError(f"a step failed on {failed} of {self._world} ranks, and the others wait for them. {here}")
        self._models = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._models = self._make()
        return failure

    def _count(self, failed: bool) -> int:
        """On how many ranks it did."""
        count = torch.tensor(int(failed))
        if self._together:
            dist.all_reduce(count, group=self._group)
        return int(count)


def _failure_of(call: Call, *, foreign: bool) -> str:
    """A function of its own: the error holds the frames of the call, and their tensors, until it returns."""
    try:
        call()
    except torch.OutOfMemoryError:
        return OUT_OF_MEMORY
    except _FAILURES as failure:
        if not foreign:
            raise
        return f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
    return ""


def limit_memory(device: torch.device) -> None:
    """Give PyTorch's allocator the same limit on all ranks: what is free on the fullest GPU, less 2 GiB. A collective call."""
    dist.barrier()  # so that NCCL has its buffers
    free, total = torch.cuda.mem_get_info(device)
    least = torch.tensor(free - _KEPT_FREE, device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    torch.cuda.set_per_process_memory_fraction(least.item() / total, device)
