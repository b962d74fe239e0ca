"""Whether all ranks that share a sequence make the same call, asked once for each new call signature."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from dtensor_ring._torch import is_tracing
from dtensor_ring.captures import check_not_capturing
from dtensor_ring.comm import Transport, transport_along, transport_of
from dtensor_ring.comm.rank_checks import is_agreed, meet, number_of, refused_together, remember
from dtensor_ring.ops.arguments import BSHD, Order
from dtensor_ring.placements import SequencePlacement
from dtensor_ring.planning.layout import Layout


def refused_by_all(*tensors: Tensor, order: Order = BSHD) -> AbstractContextManager[None]:
    """A block whose refusals on one rank are raised on all ranks that share the sequence of `tensors`, of dims in `order`."""
    # A compiler traces one rank by itself: other ranks may be anywhere, and a meeting must not become part of the graph.
    return nullcontext() if torch.compiler.is_compiling() else refused_together(partial(_meeting_places, tensors, order))


def refused_in_group(group: dist.ProcessGroup) -> AbstractContextManager[None]:
    """A block whose refusals on one rank are raised on all ranks of the group."""
    if torch.compiler.is_compiling():
        return nullcontext()
    return refused_together(lambda: [] if is_tracing() else [transport_of(group)])


def _meeting_places(tensors: Sequence[Tensor], order: Order) -> list[Transport]:
    """The mesh axis that holds the sequence of the first DTensor that says so; tensors may not fit together."""
    for tensor in () if is_tracing() else tensors:
        if isinstance(tensor, DTensor):
            for axis, placement in enumerate(tensor.placements):
                if isinstance(placement, SequencePlacement) or placement == Shard(order.sequence):
                    return [transport_along(tensor.device_mesh, axis)]
    return []


@dataclass(frozen=True)
class Facts:
    """What must be the same on all ranks, documents aside.

    Attributes:
        name: the function. Not the axis: what a rank calls its group in errors may be another name than on other ranks.
        layout: how tokens are spread over the ranks.
        shapes: global shapes (B, S, H, D) of q, k and v, one after the other.
        held: how many tokens of q and of k this rank holds.
        words: everything else that must be the same: dtype, mask, strategy, kernel, numbers.
    """

    name: str
    layout: Layout
    shapes: tuple[int, ...]
    held: tuple[int, int]
    words: tuple[str, ...]

    @cached_property
    def key(self) -> str:
        """All of it in one text. Agreements are kept by texts: tuples of numbers would be objects that stay for every call."""
        return f"{self.name}|{self.layout}|{self.shapes}|{self.held}|{'|'.join(self.words)}"


def check_agreement(transport: Transport, facts: Facts, documents: str) -> None:
    """Compare a call over a group; the host waits for a few integers of each rank. Agreement is remembered by the group.

    Ranks meet here when the signature is new to the group, which it is on all of its ranks or on none as long as they make the
    same calls: that ranks part after their first calls shows inside `check_every_call` only.

    Args:
        transport: the group.
        facts: what must be the same.
        documents: a text of the documents, different for different ones; "" for none.

    Raises:
        ValueError, TypeError, NotImplementedError: a rank refuses this call, on every rank.
        RuntimeError: ranks are in different calls, on every rank.
        RingCaptureError: the call is new, and a CUDA graph is being captured; on every rank that captures.
        ValueError: ranks differ, or a share does not hold the tokens that the layout gives its rank; on every rank.
    """
    # Two texts and not one: the first is worked out once for all calls like this one, while documents are new with every batch.
    call = facts.key, documents
    if not is_agreed(transport, call) and not is_tracing():  # fake tensors: nobody is there to compare with
        # On one rank too, where nothing is compared: what is captured there must not fail on two.
        check_not_capturing(
            f"{facts.name} over {transport.axis}: ranks compare a call that is new, for which the host waits",
            "make the same call once before capturing, forward and backward, with the same shapes, arguments and documents, and "
            "capture it outside of check_every_call",
        )
        _compare(transport, facts, documents or "no documents")
        remember(transport, call)


def _compare(transport: Transport, facts: Facts, documents: str) -> None:
    name, layout, shapes, words = facts.name, facts.layout, facts.shapes, (*facts.words, documents)
    # What can be explained in numbers (shapes, tokens) travels as it is; all else as one number, since a record has few places.
    number = number_of("|".join((str(layout), *words)))
    where = f"{name} over {transport.axis}"
    every = meet(transport, name, [*shapes, *facts.held, number])
    mine = every[transport.rank]
    # All ranks read the same table, so where one of them is wrong every one of them raises.
    for rank, (*its_shapes, q_tokens, k_tokens, its_number) in enumerate(every):
        if its_shapes != mine[:-3]:
            raise ValueError(
                f"{where}: rank {transport.rank} has q, k, v of global shapes {_three(mine)}, rank {rank} has {_three(its_shapes)}"
                ": every rank must hold its share of the same tensors"
            )
        if its_number != number:
            raise ValueError(
                f"{where}: rank {rank} calls with another layout, dtype, mask, strategy, kernel, number or documents than rank "
                f"{transport.rank}, which has {layout}, {', '.join(words)}: every rank must make the same call"
            )
        for tensor, length, held in (("q", shapes[1], q_tokens), ("k", shapes[5], k_tokens)):
            needed = layout.local_length(length, transport.world, rank)
            if held != needed:
                raise ValueError(
                    f"{where}: rank {rank} holds {held} tokens of {tensor}, but {layout} of length {length} gives it "
                    f"{needed}: make DTensors with dtensor_ring.from_local(..., length=), not DTensor.from_local"
                )


def _three(values: Sequence[int]) -> str:
    return ", ".join(str(tuple(values[i : i + 4])) for i in (0, 4, 8))
