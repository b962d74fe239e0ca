"""Gradients that are averaged before an optimizer steps: by a wrapper, which is checked, or by `AveragedGradients`.

Models without a wrapper have weights that start alike, and gradients are averaged where Accelerate would synchronize them:

    accelerator.backward(loss)            averages, if this is the last micro-batch of a step
    accelerator.clip_grad_norm_(...)      averages first, if anything was added since
    optimizer.step()                      the same: also for `loss.backward()`, which Accelerate does not see

The average of an average over the same ranks is itself, so that averaging once too often changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from dtensor_ring.replicas import average_gradients


class AveragedGradients:
    """Averages the gradients of watched models over all ranks of a mesh axis before anything reads them."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self._mesh = mesh
        self._models: list[nn.Module] = []
        self._handles: list[RemovableHandle] = []
        self._is_added = False

    def watch(self, model: nn.Module) -> None:
        """Send the weights of the axis's first rank to the others, as DDP does, and average this model's gradients from now on."""
        group = self._mesh.get_group()
        first = dist.get_global_rank(group, 0)
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor, first, group)
        self._models.append(model)
        hooks = [p.register_post_accumulate_grad_hook(self._added) for p in model.parameters() if p.requires_grad]
        self._handles.extend(hooks)

    def step_with(self, optimizer: torch.optim.Optimizer) -> None:
        """Average before this optimizer steps, if that was not done."""
        self._handles.append(optimizer.register_step_pre_hook(lambda *_: self.average()))

    def average(self) -> None:
        """Average what was added since the last time; every rank calls it."""
        if not self._is_added:
            return
        self._is_added = False
        for model in self._models:
            average_gradients(model, self._mesh)

    def undo(self) -> None:
        """Watch no model and no optimizer any more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._models.clear()

    def _added(self, _: Tensor) -> None:
        self._is_added = True


def refuse_steps_apart(optimizer: torch.optim.Optimizer, wrapped: Iterable[nn.Module]) -> RemovableHandle:
    """Make an optimizer refuse to step while DDP is told not to synchronize gradients, as LocalSGD does.

    Such a step uses this rank's tokens alone, and much too large: no average of weights afterwards makes up for it.

    Raises (from `optimizer.step`, on every rank):
        RuntimeError: a model in `wrapped` is inside of its `no_sync`.
    """

    def check(*_: object) -> None:
        for model in wrapped:
            if isinstance(model, DistributedDataParallel) and not model.require_backward_grad_sync:
                raise RuntimeError(
                    "an optimizer steps inside of no_sync, where each rank of a sequence axis has the gradients of its own tokens "
                    "only: step outside of it, with accelerator.accumulate(model); LocalSGD cannot be used with a sequence axis"
                )

    return optimizer.register_step_pre_hook(check)


def averaged_methods(accelerator: Accelerator, gradients: AveragedGradients) -> dict[str, Callable[..., Any]]:
    """Methods for an accelerator, by name, that average gradients in `backward` and before clipping."""
    backward, clip_norm, clip_value = accelerator.backward, accelerator.clip_grad_norm_, accelerator.clip_grad_value_
    prepare_optimizer: Any = accelerator.prepare_optimizer

    def averaged_backward(loss: Tensor, **options: Any) -> None:  # noqa: ANN401
        backward(loss, **options)
        if accelerator.sync_gradients:
            gradients.average()

    def averaged_clip_norm(parameters: Any, max_norm: float, norm_type: float = 2) -> Tensor | None:  # noqa: ANN401
        gradients.average()
        return clip_norm(parameters, max_norm, norm_type)

    def averaged_clip_value(parameters: Any, clip_value_: float) -> None:  # noqa: ANN401
        gradients.average()
        clip_value(parameters, clip_value_)

    def averaged_optimizer(optimizer: torch.optim.Optimizer, device_placement: bool | None = None) -> Any:  # noqa: ANN401
        prepared = prepare_optimizer(optimizer, device_placement)
        gradients.step_with(prepared.optimizer)
        return prepared

    return {
        "backward": averaged_backward,
        "clip_grad_norm_": averaged_clip_norm,
        "clip_grad_value_": averaged_clip_value,
        "prepare_optimizer": averaged_optimizer,
    }
