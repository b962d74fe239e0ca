"""What one `Accelerator` does differently with a sequence axis: methods of that instance, which `undo` takes away again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.data import DataLoader

from dtensor_ring.integrations.accelerate.checks import check_data_loader
from dtensor_ring.integrations.accelerate.gradients import AveragedGradients, averaged_methods, refuse_steps_apart
from dtensor_ring.integrations.accelerate.loaders import batches_read, one_batch
from dtensor_ring.integrations.accelerate.metrics import gather_for_metrics
from dtensor_ring.integrations.accelerate.schedulers import step_with_batches
from dtensor_ring.integrations.transformers.attention import KEYWORD, RingBatch
from dtensor_ring.integrations.transformers.peft_models import unwrap
from dtensor_ring.integrations.transformers.plan import RingPlan

_ATTRIBUTE = "ring"  # of the accelerator, where its Ring is found


def ring_of(accelerator: Accelerator) -> Ring:
    """What an accelerator knows of its sequence axis: also where that has one rank.

    Raises:
        ValueError: it was made without a `RingParallelismConfig`, or its ring was undone.
    """
    ring = getattr(accelerator, _ATTRIBUTE, None)
    if not isinstance(ring, Ring):
        raise ValueError(
            "this accelerator has no sequence axis of ours: make it as Accelerator(parallelism_config=RingParallelismConfig(...)), "
            "before any other Accelerator of the process, whose settings all later ones take over"
        )
    return ring


class Ring:
    """The sequence axis of one accelerator, and the models, loaders and schedulers that it prepared.

    Attributes:
        mesh: the sequence axis, None where it has one rank.
        data: the data axes that have more than one rank, in the mesh's order.
        data_size: sequence axes that train side by side, each with a batch of its own.
        data_index: which of them this rank's one is.
        items: what the loss of a model is that is given `num_items_in_batch`: "whole", the sum over the batch / N on every rank, as
            in a process that holds the batch alone, or "part", this rank's part of it, which the caller scales.
    """

    def __init__(self, accelerator: Accelerator, plan: Callable[[nn.Module], RingPlan | None], *, ddp: bool) -> None:
        mesh = accelerator.torch_device_mesh
        self._accelerator, self._plan, self._ddp = accelerator, plan, ddp
        names = () if mesh is None else mesh.mesh_dim_names or ()
        self.mesh: DeviceMesh | None = mesh["cp"] if mesh is not None and "cp" in names else None
        self.data: tuple[DeviceMesh, ...] = ()
        if mesh is not None:
            self.data = tuple(mesh[name] for name in names if name in ("dp_replicate", "dp_shard"))
        self.data_size, self.data_index = 1, 0
        for axis in self.data:
            self.data_size, self.data_index = self.data_size * axis.size(), self.data_index * axis.size() + axis.get_local_rank()
        self.items: Literal["whole", "part"] = "whole"
        self._plans: WeakKeyDictionary[nn.Module, RingPlan | None] = WeakKeyDictionary()
        self._prepared: WeakSet[nn.Module] = WeakSet()  # with their wrappers, which Accelerate does not keep
        self._undo = ExitStack()

    def plan_of(self, model: nn.Module) -> RingPlan | None:
        """The plan of a model that was prepared, wrapped or not; None where every rank runs it on whole sequences.

        Raises:
            ValueError: this accelerator did not prepare the model, so that it is not known what its outputs hold.
        """
        if self.mesh is None:
            return None
        own = self._accelerator.unwrap_model(model, keep_fp32_wrapper=True, keep_torch_compile=False)
        if own not in self._plans:
            raise ValueError(
                f"this {type(own).__name__} was not prepared by this accelerator, or its ring was undone: pass what "
                "accelerator.prepare was given, or returned"
            )
        return self._plans[own]

    def gather(self, model: nn.Module, local_tensor: Tensor, dim: int = 1) -> Tensor:
        """All tokens of an output of a prepared model: `RingPlan.gather`, or the tensor itself where there is no plan."""
        plan = self.plan_of(model)
        return local_tensor if plan is None else plan.gather(local_tensor, dim)

    def sum_over_tokens(self, model: nn.Module, local_tensor: Tensor, dim: int = 1) -> Tensor:
        """The sum over all tokens of what was made of an output: `RingPlan.sum_over_tokens`, or a plain sum."""
        plan = self.plan_of(model)
        return local_tensor.sum(dim) if plan is None else plan.sum_over_tokens(local_tensor, dim)

    def install(self) -> None:
        """Give the accelerator its methods; called by `RingParallelismConfig`, once for each accelerator."""
        accelerator = self._accelerator
        setattr(accelerator, _ATTRIBUTE, self)
        self._undo.callback(accelerator.__dict__.pop, _ATTRIBUTE, None)
        if self.mesh is None:
            return
        if not self._ddp and accelerator.is_fsdp2:
            raise ValueError("ddp=False leaves models without a wrapper, and an FSDP plugin wraps them: leave one of the two out")
        gradients = None
        if not self._ddp:
            world = dist.group.WORLD
            assert world is not None, "a mesh with a sequence axis was made over the processes of this group"
            gradients = AveragedGradients(DeviceMesh.from_group(world, accelerator.device.type, mesh_dim_names=("dp_cp",)))
            self._undo.callback(gradients.undo)
            self._replace(averaged_methods(accelerator, gradients))
        self._replace({**self._model_methods(gradients), **self._data_methods(self.mesh)})

    def undo(self) -> None:
        """Give back the accelerator's own methods, and models, loaders and schedulers as they were before they were prepared."""
        self._undo.close()

    def parallelize(self, model: nn.Module) -> Callable[[], None] | None:
        """Apply the plan of a model, as `prepare` does, unless it has one. Returns what takes it back, None if nothing was done."""
        if self.mesh is None or model in self._plans or getattr(model, "_is_accelerate_prepared", False):
            return None
        plan = self._plan(model)
        handle = None
        if plan is not None:
            parallelize_module(model, self.mesh, plan)
            # On the model inside of adapters, which alone is told what the plan did to a batch.
            plan.is_made_whole = True
            handle = unwrap(model, unlisted=True).model.register_forward_hook(partial(self._whole_loss, plan), with_kwargs=True)
        self._plans[model] = plan

        def undo() -> None:
            self._plans.pop(model, None)
            if plan is not None and handle is not None:
                handle.remove()
                plan.undo()

        return undo

    def _replace(self, methods: dict[str, Callable[..., Any]]) -> None:
        """Set methods on the instance alone."""
        attributes = self._accelerator.__dict__
        for name, method in methods.items():
            if name in attributes:  # another's: it is put back
                self._undo.callback(setattr, self._accelerator, name, attributes[name])
            else:
                self._undo.callback(attributes.pop, name, None)
            setattr(self._accelerator, name, method)

    def _model_methods(self, gradients: AveragedGradients | None) -> dict[str, Callable[..., Any]]:
        accelerator = self._accelerator
        prepare, prepare_model = accelerator.prepare, accelerator.prepare_model
        prepare_optimizer: Any = accelerator.prepare_optimizer

        def prepare_together(*args: Any, **options: Any) -> Any:  # noqa: ANN401
            """As in Accelerate; FSDP2 models are parallelized before their parameters are sharded."""
            # What Accelerate refuses is refused after our plan was applied: it must not stay behind.
            with ExitStack() as refused:
                if accelerator.is_fsdp2:
                    for model in args:
                        if isinstance(model, nn.Module) and (undo := self.parallelize(model)) is not None:
                            refused.callback(undo)
                result = prepare(*args, **options)
                self._undo.push(refused.pop_all())
            return result

        def prepare_parallel_model(
            model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
        ) -> nn.Module:
            """As in Accelerate, with the plan of the model applied first."""
            with ExitStack() as refused:
                is_new = not getattr(model, "_is_accelerate_prepared", False)
                if (undo := self.parallelize(model)) is not None:
                    refused.callback(undo)
                # In evaluation mode Accelerate does all but wrap.
                prepared = prepare_model(model, device_placement, evaluation_mode or gradients is not None)
                if gradients is not None and is_new and not evaluation_mode:
                    gradients.watch(model)
                self._prepared.add(prepared)
                self._undo.push(refused.pop_all())
            return prepared

        def prepare_checked_optimizer(optimizer: torch.optim.Optimizer, device_placement: bool | None = None) -> Any:  # noqa: ANN401
            """As in Accelerate; a step with gradients that were not averaged is refused."""
            is_new = not getattr(optimizer, "_is_accelerate_prepared", False)
            prepared = prepare_optimizer(optimizer, device_placement)
            if is_new:
                self._undo.callback(refuse_steps_apart(prepared.optimizer, self._prepared).remove)
            return prepared

        return {
            "prepare": prepare_together,
            "prepare_model": prepare_parallel_model,
            "prepare_optimizer": prepare_checked_optimizer,
        }

    def _data_methods(self, mesh: DeviceMesh) -> dict[str, Callable[..., Any]]:
        accelerator = self._accelerator
        prepare_data_loader, skip = accelerator.prepare_data_loader, accelerator.skip_first_batches
        prepare_scheduler: Any = accelerator.prepare_scheduler

        def prepare_one_batch(
            data_loader: DataLoader[Any],
            device_placement: bool | None = None,
            slice_fn_for_dispatch: Callable[..., Any] | None = None,
        ) -> Any:  # noqa: ANN401
            """As in Accelerate; all ranks of the sequence axis get one batch."""
            if getattr(data_loader, "_is_accelerate_prepared", False):
                return prepare_data_loader(data_loader, device_placement, slice_fn_for_dispatch)
            check_data_loader(data_loader, accelerator)
            prepared = prepare_data_loader(data_loader, device_placement, slice_fn_for_dispatch)
            self._undo.callback(self._one_batch(prepared, mesh))
            return prepared

        def skip_one_batch(dataloader: Any, num_batches: int = 0) -> Any:  # noqa: ANN401
            """As in Accelerate, for loaders that it prepared; a dispatching one skips what all data ranks would have got."""
            skipped = skip(dataloader, num_batches * batches_read(dataloader, self.data_size))
            # Accelerate makes a new loader of what it reads from the old one, but for this.
            slice_fn = getattr(dataloader, "slice_fn", None)
            if slice_fn is not None:
                skipped.slice_fn = getattr(slice_fn, "slice_fn", slice_fn)
            if hasattr(skipped, "base_dataloader"):
                self._one_batch(skipped, mesh)
            return skipped

        def prepare_steps(scheduler: Any) -> Any:  # noqa: ANN401
            """As in Accelerate; the scheduler steps as often as batches are read side by side."""
            if getattr(scheduler, "_is_accelerate_prepared", False):
                return prepare_scheduler(scheduler)
            prepared = prepare_scheduler(scheduler)
            self._undo.callback(step_with_batches(prepared, self.data_size))
            return prepared

        def gather_once(input_data: Any, use_gather_object: bool = False) -> Any:  # noqa: ANN401
            """As in Accelerate, with the samples of a sequence axis once."""
            return gather_for_metrics(accelerator, mesh, self.data, input_data, as_objects=use_gather_object)

        return {
            "prepare_data_loader": prepare_one_batch,
            "skip_first_batches": skip_one_batch,
            "prepare_scheduler": prepare_steps,
            "gather_for_metrics": gather_once,
        }

    def _one_batch(self, loader: Any, mesh: DeviceMesh) -> Callable[[], None]:  # noqa: ANN401
        return one_batch(loader, mesh, self.data_size, self.data_index)

    # Not compiled, as the hooks of the plan: it communicates.
    @torch.compiler.disable
    def _whole_loss(self, plan: RingPlan, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:  # noqa: ANN401
        """Adds up the parts of a loss that the model was given a number of items for."""
        batch: RingBatch | None = kwargs.get(KEYWORD)  # None in a pause of the plan, where the loss is whole
        if self.items != "whole" or batch is None or not batch.has_part_of_loss:
            return output
        if isinstance(output, tuple):
            return (plan.sum_over_tokens(output[0][None], 0), *output[1:])
        output.loss = plan.sum_over_tokens(output.loss[None], 0)
        return output
