"""Weights that every rank of a sequence axis holds whole: their gradients averaged, and a check that they are still the same.

    each rank    the loss of the whole batch, and W times its tokens' part of the gradient (`ring_plan`, without num_items_in_batch)
    averaged     the gradient that one process would have; FSDP2 and DDP over the sequence axis do it, plain loops forget it

Forgetting is silent: the loss is right at every step, while each rank's weights follow its own tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dtensor_ring._renamed import renamed
from dtensor_ring._torch import local_of
from dtensor_ring.comm import Transport, axis_name, transport_along
from dtensor_ring.comm.rank_checks import checksum, meet, number_of, refused_together

_BUCKET = 1 << 25  # elements that travel at a time: 128 MiB of float32
_SHOWN = 5  # names of parameters in an error


@renamed(mesh="device_mesh")
def average_gradients(model: nn.Module | Iterable[nn.Parameter], device_mesh: DeviceMesh) -> None:
    """Average the gradients of weights that every rank of a mesh axis holds, in place: between `backward` and `step`.

        loss = model(input_ids=ids, labels=ids).loss          # a model under ring_plan, no num_items_in_batch
        loss.backward()
        average_gradients(model, mesh["cp"])
        optimizer.step()

    For plain parameters, and for FSDP2's over other axes, whose shards lie alike on all ranks of this one. FSDP2 and DDP over the
    sequence axis average by themselves. A gradient that some ranks lack (an expert that got no token) counts as zeros there.
    With `num_items_in_batch`, whose loss is a rank's part, multiply the loss by the size of the axis first.

    Each rank sends, as an all-reduce in float32 (float64 for float64), 4 bytes an element times 2 (W-1)/W.

    Args:
        model: a module, or parameters.
        device_mesh: the mesh axis to average over, such as `mesh["cp"]`.

    Raises:
        ValueError: the mesh has more than one axis; ranks hold other parameters; or a parameter lies on a mesh that holds several
            ranks of this axis: its gradient is reduced there. On every rank, before a gradient is changed.
        NotImplementedError: a sparse gradient.
    """
    transport, parameters = _replicated(model, device_mesh, "average_gradients")
    # Before the first transfer and on all ranks: a rank that raised between two buckets would leave the others waiting, with some
    # gradients averaged and others not.
    with refused_together(lambda: [transport]):
        for name, parameter in parameters:
            if parameter.grad is not None and parameter.grad.layout != torch.strided:
                raise NotImplementedError(f"average_gradients: the gradient of {name} is {parameter.grad.layout}, not dense")
    _check_alike(parameters, transport, "average_gradients")
    if not parameters or transport.world == 1:
        return
    has = torch.tensor([float(p.grad is not None) for _, p in parameters], device=transport.value_device())
    with transport.during("average_gradients"):
        # Which gradients exist is known on each rank for itself only, and buckets must hold the same ones everywhere.
        wanted = transport.all_reduce(has, "max").tolist()
        # A gradient that this rank lacks and another has is made, of zeros: both must travel in the same bucket.
        gradients = [_gradient(parameter) for (_, parameter), any_rank in zip(parameters, wanted, strict=True) if any_rank]
        for bucket in _buckets(gradients):
            _average(bucket, transport)


@renamed(mesh="device_mesh")
def check_replicas(model: nn.Module | Iterable[nn.Parameter], device_mesh: DeviceMesh) -> None:
    """Find weights that are not the same on all ranks of a mesh axis, bit by bit: gradients were not averaged, or seeds differ.

    For the parameters that `average_gradients` takes; FSDP2's over this axis, which differ by design, are left out, and so are
    buffers. Reads every parameter once and sends 8 bytes for each; the host waits. Call it after the first steps of a run, and now
    and then.

    Args:
        model: a module, or parameters.
        device_mesh: the mesh axis, such as `mesh["cp"]`.

    Raises:
        ValueError: the mesh has more than one axis, or parameters differ; the text names them. On every rank.
    """
    transport, parameters = _replicated(model, device_mesh, "check_replicas", skip_reduced=True)
    _check_alike(parameters, transport, "check_replicas")
    sums = torch.tensor([checksum(local_of(p)) for _, p in parameters], dtype=torch.int64, device=transport.value_device())
    with transport.during("check_replicas"):
        every = transport.all_gather(sums).wait()
    apart = [name for (name, _), same in zip(parameters, (every == every[:1]).all(0).tolist(), strict=True) if not same]
    if apart:
        listed = ", ".join(apart[:_SHOWN]) + (f" and {len(apart) - _SHOWN} more" if len(apart) > _SHOWN else "")
        raise ValueError(
            f"{len(apart)} of {len(parameters)} parameters differ between the ranks of {transport.axis}: {listed}. Average "
            "gradients over this axis in every step (fully_shard, DDP, or dtensor_ring.average_gradients), and start from "
            "the same weights: the same seed, or a checkpoint"
        )


def _replicated(
    model: nn.Module | Iterable[nn.Parameter], mesh: DeviceMesh, call: str, *, skip_reduced: bool = False
) -> tuple[Transport, list[tuple[str, nn.Parameter]]]:
    """The group of the axis, and the parameters with names that each of its ranks should hold alike."""
    if mesh.ndim != 1:
        raise ValueError(f"{call} works over one mesh axis, such as mesh['cp'], found {mesh.ndim} axes")
    transport = transport_along(mesh)
    with refused_together(lambda: [transport]):
        named = (
            list(model.named_parameters())
            if isinstance(model, nn.Module)
            else [(f"parameter {i}", parameter) for i, parameter in enumerate(model)]
        )
        # By ranks and not by names of axes: a parameter may lie on another mesh of the same ranks.
        peers = set(mesh.mesh.flatten().tolist())
        reduced = [n for n, p in named if isinstance(p, DTensor) and len(peers & set(p.device_mesh.mesh.flatten().tolist())) > 1]
        if reduced and not skip_reduced:
            raise ValueError(
                f"{call}: {reduced[0]} and {len(reduced) - 1} other parameters lie on a mesh that holds ranks of mesh axis "
                f"{axis_name(mesh, 0)} too, where FSDP2 or tensor parallelism reduces gradients already: leave these parameters out"
            )
    left_out = set(reduced)
    return transport, [(name, parameter) for name, parameter in named if name not in left_out]


def _check_alike(parameters: Sequence[tuple[str, nn.Parameter]], transport: Transport, call: str) -> None:
    """Raises ValueError on every rank unless all hold parameters of the same names, shapes and dtypes."""
    # Buckets are filled by order, size and dtype, so ranks that differ in one of them would average gradients of different weights.
    text = "|".join(f"{name} {local_of(p).dtype} {tuple(local_of(p).shape)} {p.requires_grad}" for name, p in parameters)
    number = number_of(text)
    for rank, (count, its_number) in enumerate(meet(transport, call, [len(parameters), number])):
        if (count, its_number) != (len(parameters), number):
            raise ValueError(
                f"{call}: ranks {transport.rank} and {rank} of {transport.axis} hold {len(parameters)} and {count} parameters of "
                "other names, shapes or dtypes, or others are frozen: every rank holds the same model"
            )


def _gradient(parameter: nn.Parameter) -> Tensor:
    """The gradient, or rather its local tensor; zeros where this rank has none and another does."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return local_of(parameter.grad)


def _buckets(gradients: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Gradients of one device and dtype, so many that they travel as one message of a good size."""
    # In the order of parameters, which is the same on all ranks: each bucket must meet its like.
    buckets: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    sizes: Counter[tuple[torch.device, torch.dtype]] = Counter()
    for gradient in gradients:
        kind = gradient.device, gradient.dtype
        buckets.setdefault(kind, []).append(gradient)
        sizes[kind] += gradient.numel()
        if sizes[kind] >= _BUCKET:
            del sizes[kind]
            yield buckets.pop(kind)
    yield from buckets.values()


def _average(bucket: Sequence[Tensor], transport: Transport) -> None:
    # A mean over many ranks in 16 bits would lose the small gradients.
    wide = torch.promote_types(bucket[0].dtype, torch.float32)
    flat = torch.cat([gradient.flatten().to(wide) for gradient in bucket])
    # NCCL moves what lies on GPUs alone, and gradients that FSDP2 has offloaded lie on the CPU.
    mean = transport.all_reduce(flat if flat.is_cuda else flat.to(transport.value_device()), "avg")
    for gradient, part in zip(bucket, mean.split([gradient.numel() for gradient in bucket]), strict=True):
        gradient.copy_(part.view(gradient.shape))
