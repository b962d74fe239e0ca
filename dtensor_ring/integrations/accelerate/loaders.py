"""One batch for all ranks of a sequence axis, from a data loader that Accelerate has prepared.

    map-style, iterable      the first rank of each axis reads, and sends each batch to the others of its axis
    dispatched               process 0 reads for all, as ever; what is dealt out is dealt to axes instead of processes

Accelerate shares samples out over the data axes already. But whether ranks that read the same samples get the same batch depends
on generators, collators and datasets: a batch that was sent is the same.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import DataLoaderAdapter, DataLoaderDispatcher
from accelerate.utils import send_to_device
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import IterableDataset
from typing_extensions import override

from dtensor_ring.comm import transport_along
from dtensor_ring.comm.rank_checks import REFUSALS, meet, refused_together

_CALL = "the next batch of a data loader"
Undo = Callable[[], None]


def one_batch(loader: DataLoaderAdapter, mesh: DeviceMesh, data: int, index: int) -> Undo:
    """Make a prepared loader give every rank of a sequence axis the same batches, in place.

    Args:
        loader: what `accelerator.prepare` or `skip_first_batches` returned.
        mesh: the sequence axis.
        data: sequence axes that read side by side.
        index: which of them this one is.

    Returns:
        A function that makes the loader what it was.
    """
    if isinstance(loader, DataLoaderDispatcher):
        dispatcher: Any = loader
        before = dispatcher.state, dispatcher.slice_fn
        axis_rank = mesh.get_local_rank()
        # Accelerate takes the index for two things: 0 is the one process that reads, and the index says which slice a process
        # gets. So ranks after the first of their axis have indices past all slices, of which `_slice_of_axis` makes the axis's.
        dispatcher.state = _Place(data, index + data * axis_rank, before[0].device)
        dispatcher.slice_fn = _SliceOfAxis(before[1], data)

        def undo_dispatcher() -> None:
            dispatcher.state, dispatcher.slice_fn = before

        return undo_dispatcher
    read = loader.base_dataloader
    loader.base_dataloader = _SentBatches(read, mesh)

    def undo() -> None:
        loader.base_dataloader = read

    return undo


def batches_read(loader: DataLoaderAdapter, data: int) -> int:
    """How many batches `skip_first_batches` of Accelerate has to be told for each one that is to be skipped.

    A dispatching loader over a sampler reads a batch for each data rank at a time, and is skipped by batches read; all others are
    skipped by batches that a rank gets.
    """
    reads_all = isinstance(loader, DataLoaderDispatcher) and not loader.split_batches
    return data if reads_all and not isinstance(loader.dataset, IterableDataset) else 1


@dataclass(frozen=True)
class _Place:
    """What a dispatching loader asks the state of Accelerate."""

    num_processes: int
    process_index: int
    device: torch.device


@dataclass(frozen=True)
class _SliceOfAxis:
    """Takes the slice of a batch that this rank's sequence axis gets."""

    slice_fn: Callable[..., Any]
    data: int

    def __call__(self, batch: object, rows: slice, process_index: int, num_processes: int) -> object:
        index = process_index % self.data
        # Rows from 0 on are asked for by every process alike (to complete the last batch), or by the first one.
        if rows.start:
            size = rows.stop - rows.start
            rows = slice(index * size, (index + 1) * size)
        return self.slice_fn(batch, rows, process_index=index, num_processes=num_processes)


class _SentBatches:
    """A data loader whose batches come from the first rank of a sequence axis; the loader itself in all else."""

    def __init__(self, loader: Any, mesh: DeviceMesh) -> None:  # noqa: ANN401
        self._loader, self._mesh = loader, mesh

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        if name == "_loader":  # before __init__, as in copies
            raise AttributeError(name)
        return getattr(self._loader, name)

    @property
    @override
    def __class__(self) -> type:  # pyrefly: ignore[bad-override]
        return type(self._loader)  # Accelerate tells loaders by isinstance

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[object]:
        # Other ranks do not even ask their loader, whose workers would read what nobody uses.
        batches = iter(self._loader) if self._mesh.get_local_rank() == 0 else None
        while (sent := self._next(batches)) is not None:
            yield sent[0]

    def _next(self, batches: Iterator[object] | None) -> tuple[object] | None:
        """The next batch, None at the end: read and sent by the first rank, received by the others."""
        transport = transport_along(self._mesh)
        sent: tuple[object] | None = None
        packed = torch.empty(0, dtype=torch.uint8)
        # Whatever a dataset raises is told to the ranks that wait for its batch.
        with refused_together(lambda: [transport]), _as_refusal():
            if batches is not None and (sent := _read(batches)) is not None:
                packed = _packed(sent[0])
        # Met over, not only sent: a rank that left its loop early is in another call, and all ranks say so.
        (size,) = meet(transport, _CALL, [packed.numel() if sent is not None else -1])[0]
        if size < 0:
            return None
        place = transport.value_device()
        packed = packed.to(place) if batches is not None else torch.empty(size, dtype=torch.uint8, device=place)
        with transport.during(_CALL):
            dist.broadcast(packed, dist.get_global_rank(self._mesh.get_group(), 0), self._mesh.get_group())
        return sent if batches is not None else (_unpacked(packed),)


@contextmanager
def _as_refusal() -> Iterator[None]:
    """Turns exceptions that other ranks are not sent, such as OSError or a data set's own, into one that they are."""
    try:
        yield
    except REFUSALS:
        raise
    except Exception as failure:
        raise RuntimeError(f"a data loader could not read or send its next batch: {failure!r}") from failure


def _read(batches: Iterator[object]) -> tuple[object] | None:
    return next(((batch,) for batch in batches), None)


def _packed(batch: object) -> Tensor:
    file = io.BytesIO()
    # Tensors on a GPU would be unpacked on the sender's, which is not the receiver's.
    torch.save(send_to_device(batch, torch.device("cpu")), file)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def _unpacked(packed: Tensor) -> object:
    return torch.load(io.BytesIO(packed.cpu().numpy().tobytes()), weights_only=False)
