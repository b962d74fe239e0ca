"""`gather_for_metrics` where a sequence axis has one batch: its samples come once, from its first rank.

4 processes, 2 axes     ranks 0 1 hold samples a b      ranks 2 3 hold samples c d
gathered, everywhere    a b c d
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import recursively_apply
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dtensor_ring.comm import Transport, transport_along
from dtensor_ring.comm.rank_checks import checksum, meet_on_axes, number_of

_CLOSE = 1e-3  # relative; kernels that add up in any order differ by far less, and other tokens by far more


def gather_for_metrics(
    accelerator: Accelerator,
    cp: DeviceMesh,
    data: Sequence[DeviceMesh],
    values: Any,  # noqa: ANN401
    *,
    as_objects: bool = False,
) -> Any:  # noqa: ANN401
    """The values of all samples of this step, each once, without what Accelerate added to even out the last batch.

    Args:
        accelerator: what prepared the data loader.
        cp: the sequence axis, whose ranks hold the same values.
        data: the data axes, in the mesh's order.
        values: as in Accelerate: tensors with samples in dim 0, nested as they may be, or anything else.
        as_objects: gather as objects, also tensors.

    Raises:
        ValueError: the ranks of a sequence axis hold different values, such as each rank's own logits; on every rank of the mesh.
    """
    tensors: list[Tensor] = []
    try:
        recursively_apply(tensors.append, values, error_on_other_type=True)
        as_objects = as_objects or not tensors
    except TypeError:
        as_objects = True
    _check_alike(tensors, cp, data)
    rows = accelerator.gradient_state.remainder if accelerator.gradient_state.end_of_dataloader else -1
    if as_objects:
        gathered = _gather_objects(values, data)
        return gathered[:rows] if rows > 0 else gathered
    whole = recursively_apply(_gather_tensor, values, data)
    return recursively_apply(_first, whole, rows) if rows > 0 else whole


def _first(tensor: Tensor, rows: int) -> Tensor:
    return tensor[:rows]


def _gather_tensor(tensor: Tensor, data: Sequence[DeviceMesh]) -> Tensor:
    rows = (tensor.clone()[None] if tensor.ndim == 0 else tensor).contiguous()
    for axis in reversed(data):  # the last one first: samples come in the order of ranks
        parts = [torch.empty_like(rows) for _ in range(axis.size())]
        dist.all_gather(parts, rows, axis.get_group())
        rows = torch.cat(parts)
    return rows


def _gather_objects(values: Any, data: Sequence[DeviceMesh]) -> Any:  # noqa: ANN401
    for axis in reversed(data):
        parts: list[Any] = [None] * axis.size()
        dist.all_gather_object(parts, values, axis.get_group())
        values = [value for part in parts for value in part]
    return values


def _check_alike(tensors: list[Tensor], cp: DeviceMesh, data: Sequence[DeviceMesh]) -> None:
    """Raises ValueError on every rank of the mesh unless all ranks of each sequence axis hold the same values."""
    transport = transport_along(cp)
    shapes = "|".join(f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in tensors)
    whole = sum(checksum(tensor) for tensor in tensors if not tensor.is_floating_point()) % (1 << 61)
    mine = [number_of(shapes), whole]

    def judge(axis: int, records: list[list[int]]) -> None:
        if axis:  # of other samples: its ranks are only told what is refused
            return
        if any(theirs != mine for theirs in records) or not _floats_are_close(tensors, transport):
            raise ValueError(
                f"gather_for_metrics: the ranks of {transport.axis} hold different values ({shapes or 'objects'}), and those of "
                "one would be taken for all: outputs of a model hold each rank's own tokens. Gather these first, with "
                "ring_of(accelerator).gather(model, logits), or compute values that all ranks have"
            )

    meet_on_axes([transport, *map(transport_along, data)], "gather_for_metrics", mine, judge)


def _floats_are_close(tensors: list[Tensor], transport: Transport) -> bool:
    """Whether floating-point values have about the same sums on every rank, which all ask with tensors of the same shapes."""
    floats = [tensor.detach().double() for tensor in tensors if tensor.is_floating_point()]
    if not floats:
        return True
    # Sums, not bits: what ranks compute alike may differ in the last bits on GPUs.
    sums = torch.stack([part.nan_to_num(3.0, 1.0, 2.0) for x in floats for part in (x.sum(), x.abs().sum())])
    every = transport.all_gather(sums.to(transport.value_device())).wait()
    return bool(((every - every[:1]).abs() <= _CLOSE * every[:1].abs()).all())
