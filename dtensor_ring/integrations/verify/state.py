"""What `verify` must leave as it found it, and what ranks tell one another."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dtensor_ring._torch import local_of

T = TypeVar("T")
Name = TypeVar("Name", bound=Hashable)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is in evaluation mode and without gradients; afterwards it is as before.

    Gradients, buffers, generators of random numbers and plain attributes of modules (such as `training`, or the longest row that a
    rotary embedding has seen) come back.
    """
    plain = [(module, {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float))}) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone()) for module in model.modules() for name, buffer in module.named_buffers(recurse=False)
    ]
    gradients = [(parameter, parameter.grad) for parameter in parameters_of(model).values()]
    devices = sorted({p.device.index for p, _ in gradients if p.device.type == "cuda" and p.device.index is not None})
    with torch.random.fork_rng(devices):
        try:
            model.eval()
            for parameter, _ in gradients:
                parameter.grad = None
            yield
        finally:
            for parameter, (_, gradient) in zip(parameters_of(model).values(), gradients, strict=True):
                parameter.grad = gradient
            for module, values in plain:
                for name, value in values.items():
                    if getattr(module, name, None) is not value:
                        setattr(module, name, value)
            with torch.no_grad():
                for module, name, buffer, value in buffers:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)
                    setattr(module, name, buffer)


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by name; FSDP2's as the shards that the optimizer holds."""
    # After a forward pass without backward the root of FSDP2 stays gathered, and its parameters would be copies that nobody keeps.
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return dict(model.named_parameters())


@contextmanager
def nudged(model: nn.Module, unit: float, seed: int) -> Iterator[None]:
    """Inside the block every weight is larger or smaller by `unit` times itself, by the flip of a coin.

    Ranks that hold the same weights flip the same coins. Afterwards the weights are, bit by bit, what they were.
    """
    weights = [local_of(parameter) for parameter in parameters_of(model).values() if parameter.is_floating_point()]
    before = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for i, weight in enumerate(weights):
            coins = torch.Generator(weight.device).manual_seed(1000 * seed + i)
            heads = torch.empty(weight.shape, device=weight.device).bernoulli_(0.5, generator=coins)
            weight.add_(weight * ((2 * heads - 1) * unit).to(weight.dtype))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)


class Ranks:
    """Tells values to all ranks that must come to one verdict: those of the mesh axis, and those that hold parts of the weights.

    Attributes:
        mesh: the axis that holds the sequence.
        rank: this rank on it.
        reduced: names of parameters whose gradients FSDP2 reduces over ranks of this axis.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh) -> None:
        self.mesh, self.rank = mesh, mesh.get_local_rank()
        peers = set(mesh.mesh.flatten().tolist())
        groups = {mesh.get_group().group_name: mesh.get_group()}
        self.reduced: set[str] = set()
        for name, parameter in parameters_of(model).items():
            if not isinstance(parameter, DTensor):
                continue
            spread = parameter.device_mesh
            if len(peers & set(spread.mesh.flatten().tolist())) > 1:
                self.reduced.add(name)
            for axis in range(spread.ndim):
                group = spread.get_group(axis)
                groups[group.group_name] = group
        self._groups = list(groups.values())

    def tell(self, value: T) -> list[tuple[int, T]]:
        """Every rank's value with its place on the axis, in one order on all ranks. Every rank calls it."""
        known: dict[int, tuple[int, T]] = {dist.get_rank(): (self.rank, value)}
        for group in self._groups:
            answers: list[Any] = [None] * group.size()
            dist.all_gather_object(answers, known, group=group)
            known = {rank: one for answer in answers for rank, one in answer.items()}
        return [known[rank] for rank in sorted(known)]

    def on_axis(self, value: T) -> list[T]:
        """The value of every rank of the sequence axis alone, which has one batch, in the order of the axis."""
        answers: list[Any] = [None] * self.mesh.size()
        dist.all_gather_object(answers, value, group=self.mesh.get_group())
        return answers

    def most(self, values: Mapping[Name, tuple[float, ...]]) -> dict[Name, tuple[float, ...]]:
        """The largest of every number over all ranks, by name; a rank need not have every name."""
        largest: dict[Name, tuple[float, ...]] = {}
        for _, theirs in self.tell(dict(values)):
            for name, numbers in theirs.items():
                known = largest.get(name, numbers)
                largest[name] = tuple(_larger(a, b) for a, b in zip(known, numbers, strict=True))
        return largest


def _larger(a: float, b: float) -> float:
    return a if math.isnan(a) or a >= b else b


def global_norm(gradients: Mapping[str, Tensor]) -> float:
    """The norm of all gradients together. Over sharded ones every rank calls it."""
    norms = [torch.linalg.vector_norm(gradient, dtype=_wide(gradient)) for gradient in gradients.values()]
    whole = [float(norm.full_tensor() if isinstance(norm, DTensor) else norm) for norm in norms]
    return sum(norm * norm for norm in whole) ** 0.5


def _wide(gradient: Tensor) -> torch.dtype:
    return torch.float64 if gradient.dtype == torch.float64 else torch.float32
