"""A group of one rank: nothing moves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from dtensor_ring.comm.transport import Message, Pending, Transport, TransportRequirements


class AloneTransport(Transport):
    """The transport of a group of one rank, and of a device without a group."""

    name: ClassVar[str] = "alone"

    def __init__(self, axis: str = "this group") -> None:
        super().__init__(0, 1, axis)

    @classmethod
    @override
    def refuses(cls, need: TransportRequirements) -> str | None:
        """Refuses groups of more than one rank."""
        return None if need.world == 1 else f"is for one rank, and the group has {need.world}"

    @classmethod
    @override
    def connect(cls, need: TransportRequirements) -> AloneTransport:
        """Make the end of the only rank."""
        return cls() if need.group is None else cls(f"process group {need.group.group_name!r}")

    @override
    def _exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending[None]:
        # A rank sends nothing to itself (`exchange` asserts it), so an exchange of one rank has no messages.
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
