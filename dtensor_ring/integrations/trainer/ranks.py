"""Which ranks of a Trainer share sequences, and an Accelerator that knows it.

    four processes, cp_size=2     ranks 0 1       ranks 2 3
    batches                       one for both    another for both
    loss and gradients            whole on both   whole on both; DDP and FSDP2 average over all four
    predictions gathered          once            once

Trainer sees four data-parallel processes, of which two have the same batch. Averages come out right by themselves; what is to be
counted once (batches, predictions) is told to the trainer's own Accelerator here. Accelerate's classes and globals stay as they
are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.data import DataLoader

from dtensor_ring.comm import transport_along

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True, slots=True)
class TrainerRanks:
    """The place of this process among all, which stand in the order (dp, cp).

    Attributes:
        mesh: the axis of this process's neighbours, who share its sequences.
        cp_size: how many they are.
        dp_size: how many batches are different.
        dp_rank: which of them this process has.
    """

    mesh: DeviceMesh
    cp_size: int
    dp_size: int
    dp_rank: int

    @staticmethod
    def of(accelerator: Accelerator, cp_size: int) -> TrainerRanks:
        """The ranks of an accelerator, with those of its own mesh where it has an axis "cp"."""
        dp_size = accelerator.num_processes // cp_size
        theirs = accelerator.torch_device_mesh
        if theirs is None or "cp" not in (theirs.mesh_dim_names or ()):
            theirs = init_device_mesh(accelerator.device.type, (dp_size, cp_size), mesh_dim_names=("dp", "cp"))
        return TrainerRanks(theirs["cp"], cp_size, dp_size, accelerator.process_index // cp_size)

    def once(self, gathered: torch.Tensor) -> torch.Tensor:
        """Of a tensor gathered over all processes in dim 0, the parts of one rank of each group that shares sequences."""
        return gathered.unflatten(0, (self.dp_size, self.cp_size, -1))[:, 0].flatten(0, 1)

    def same(self, value: object) -> Any:  # noqa: ANN401
        """The object that the first rank of the axis has, on every rank of it."""
        box = [value]
        dist.broadcast_object_list(box, group=self.mesh.get_group(), group_src=0)
        return box[0]

    def synchronize_rng(self) -> None:
        """Gives PyTorch's generator on the host the state that it has on the first rank of the axis."""
        torch.set_rng_state(self.same(torch.get_rng_state()))

    @property
    def is_first(self) -> bool:
        """Whether this is the first rank of its axis."""
        return transport_along(self.mesh).rank == 0


def share_batches(accelerator: Accelerator, ranks: TrainerRanks) -> Callable[[], None]:
    """Makes an accelerator give one batch to all ranks of the axis, and gather each sample once; returns what undoes it.

    Data loaders that it prepared before stay as they were.
    """
    changed = {
        "prepare_data_loader": _data_loader_for(accelerator, ranks),
        "gather_for_metrics": _gather_once_for(accelerator, ranks),
        # Accelerate's own context parallelism, which ParallelismConfig(cp_size=) asks for: it would cut batches a second time, and
        # its hooks take the mask from attention.
        "_prepare_cp": _as_they_are,
    }
    for name, function in changed.items():
        setattr(accelerator, name, function)

    def undo() -> None:
        for name in changed:
            delattr(accelerator, name)

    return undo


def _as_they_are(*objects: object) -> tuple[object, ...]:
    return objects


def _data_loader_for(accelerator: Accelerator, ranks: TrainerRanks) -> Callable[..., DataLoader[Any]]:
    from accelerate.data_loader import prepare_data_loader

    def prepare(
        data_loader: DataLoader[Any],
        device_placement: bool | None = None,
        slice_fn_for_dispatch: Callable[..., Any] | None = None,
    ) -> DataLoader[Any]:
        if getattr(data_loader, "_is_accelerate_prepared", False):
            return type(accelerator).prepare_data_loader(accelerator, data_loader)
        if slice_fn_for_dispatch is not None:
            raise ValueError("slice_fn_for_dispatch is not supported: every process reads its batches itself; leave it out")
        prepared = prepare_data_loader(
            data_loader,
            accelerator.device,
            num_processes=ranks.dp_size,
            process_index=ranks.dp_rank,
            split_batches=accelerator.split_batches,
            put_on_device=accelerator.device_placement if device_placement is None else device_placement,
            rng_types=list(accelerator.rng_types or []),
            # Batches dispatched by the first process are cut into as many slices as there are processes.
            dispatch_batches=False,
            even_batches=accelerator.even_batches,
            use_seedable_sampler=accelerator.use_seedable_sampler,
            data_seed=accelerator.dataloader_config.data_seed,
            non_blocking=accelerator.non_blocking,
            use_stateful_dataloader=accelerator.use_stateful_dataloader,
        )
        accelerator._dataloaders.append(prepared)
        return prepared

    return prepare


def _gather_once_for(accelerator: Accelerator, ranks: TrainerRanks) -> Callable[..., Any]:
    from accelerate.utils import gather_object
    from accelerate.utils.operations import recursively_apply

    def gather_for_metrics(input_data: Any, use_gather_object: bool = False) -> Any:  # noqa: ANN401
        """As Accelerate's, of one rank of each axis: all samples in order, without those that fill the last batch up."""
        if use_gather_object or not _all_tensors(input_data):
            # `gather_object` joins lists that may have any length, so the others bring none.
            mine = input_data if ranks.is_first else input_data[:0]
            gathered = gather_object(mine)
            keep = _without_filling(accelerator)
            return gathered if keep is None else gathered[:keep]
        gathered = recursively_apply(ranks.once, accelerator.gather(input_data))
        keep = _without_filling(accelerator)
        return gathered if keep is None else recursively_apply(partial(_first, keep), gathered)

    return gather_for_metrics


def _first(count: int, tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:count]


def _without_filling(accelerator: Accelerator) -> int | None:
    """How many samples of a last batch are no copies that fill it up; None for all."""
    state = accelerator.gradient_state
    return state.remainder if state.end_of_dataloader and state.remainder > 0 else None


def _all_tensors(data: object) -> bool:
    if isinstance(data, (tuple, list)):
        return all(_all_tensors(part) for part in data)
    return all(_all_tensors(part) for part in data.values()) if isinstance(data, dict) else isinstance(data, torch.Tensor)
