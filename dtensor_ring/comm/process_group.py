"""Transfers over a torch process group: NCCL between GPUs, gloo between CPU processes."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from dtensor_ring._torch import all_gather_flat, reduce_scatter_flat
from dtensor_ring.comm.transport import Message, Pending, Transport

_REDUCE = {
    "sum": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.AVG,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
    "product": dist.ReduceOp.PRODUCT,
}
_transports: WeakKeyDictionary[dist.ProcessGroup, ProcessGroupTransport] = WeakKeyDictionary()


def transport_of(group: dist.ProcessGroup) -> ProcessGroupTransport:
    """The transport of a process group: one for each, kept as long as the group lives, with its traffic count."""
    if group not in _transports:
        _transports[group] = ProcessGroupTransport(group)
    return _transports[group]


class ProcessGroupTransport(Transport):
    """A transport over `torch.distributed`.

    On NCCL all messages of an exchange are issued as one group, and the first use makes every rank of the group meet once,
    which point-to-point transfers among some of the ranks need. The group is not kept alive: it ends with
    `destroy_process_group` as without us.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(dist.get_rank(group), dist.get_world_size(group))
        self._reference = ref(group)
        self._device = torch.device("cuda", torch.cuda.current_device()) if self._is_nccl() else torch.device("cpu")
        if self._is_nccl() and self.world > 1:
            dist.all_reduce(torch.zeros(1, device=self._device), group=group)

    @property
    def _group(self) -> dist.ProcessGroup:
        group = self._reference()
        if group is None:
            raise RuntimeError("the process group of this mesh axis was destroyed")
        return group

    def _is_nccl(self) -> bool:
        return "nccl" in dist.get_backend(self._group) and torch.cuda.is_available()

    @override
    def value_device(self) -> torch.device:
        """The GPU on NCCL, else the CPU."""
        return self._device

    @override
    def _exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending[None]:
        ops = [dist.P2POp(dist.isend, m.tensor, group=self._group, group_peer=m.rank) for m in sends]
        ops += [dist.P2POp(dist.irecv, m.tensor, group=self._group, group_peer=m.rank) for m in receives]
        if not ops:
            return Pending.ready(None)
        works = dist.batch_isend_irecv(ops)

        def finish() -> None:
            for work in works:
                work.wait()

        return Pending(finish)

    @override
    def _all_gather(self, tensor: Tensor) -> Pending[Tensor]:
        gathered = tensor.new_empty((self.world, *tensor.shape))
        work = all_gather_flat(gathered.view(-1), tensor.view(-1), group=self._group, async_op=True)
        return Pending(lambda: _after(work, gathered))

    @override
    def _reduce_scatter(self, tensor: Tensor) -> Pending[Tensor]:
        out = tensor.new_empty(tensor.shape[1:])
        work = reduce_scatter_flat(out.view(-1), tensor.view(-1), group=self._group, async_op=True)
        return Pending(lambda: _after(work, out))

    @override
    def _all_reduce(self, tensor: Tensor, op: str) -> Tensor:
        out = tensor.clone()
        if op == "avg" and not self._is_nccl():
            dist.all_reduce(out, op=dist.ReduceOp.SUM, group=self._group)
            return out / self.world
        dist.all_reduce(out, op=_REDUCE[op], group=self._group)
        return out


def _after(work: dist.Work | None, result: Tensor) -> Tensor:
    if work is not None:
        work.wait()
    return result
