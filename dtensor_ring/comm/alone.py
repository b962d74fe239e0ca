"""A group of one rank: nothing moves."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from typing_extensions import override

from dtensor_ring.comm.transport import Message, Pending, Transport


class AloneTransport(Transport):
    """The transport of a single device."""

    def __init__(self) -> None:
        super().__init__(0, 1)

    @override
    def _exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending[None]:
        return Pending.ready(None)

    @override
    def _all_gather(self, tensor: Tensor) -> Pending[Tensor]:
        return Pending.ready(tensor[None])

    @override
    def _reduce_scatter(self, tensor: Tensor) -> Pending[Tensor]:
        return Pending.ready(tensor[0])

    @override
    def _all_reduce(self, tensor: Tensor, op: str) -> Tensor:
        return tensor
