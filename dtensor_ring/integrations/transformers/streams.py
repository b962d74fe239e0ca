"""Dropout outside of attention: random numbers of their own for every rank of the sequence axis.

Programs seed all ranks alike, so that weights begin equal. The masks of hidden dropout are then equal too, while tokens are not:

    equal seeds         rank 0: x0 x1 . x3    rank 1: x4 x5 . x7     tokens 2 and 6 always share their fate
    a stream a rank     rank 0: x0 x1 . x3    rank 1: x4 . x6 x7     independent, as of one process

During the model's forward pass the default generators stand at a state made of their state before and of the rank on the axis;
after it they stand one draw further than before, on every rank alike. Nothing is sent. Activation checkpointing keeps the state
that it finds in the forward pass (`preserve_rng_state`), so that what is computed again drops the same. Ranks of other axes that
hold one part of the sequence, such as those of tensor parallelism, have one stream, as they had before.
"""

from __future__ import annotations

import hashlib
from typing import Literal, get_args

import torch
from torch import Tensor, nn

Dropout = Literal["same", "per_rank"]


def check_dropout(dropout: Dropout) -> None:
    """Raises ValueError unless `dropout` is one of the choices."""
    if dropout not in get_args(Dropout):
        raise ValueError(
            f"dropout={dropout!r}: use 'per_rank' for masks outside of attention that differ from rank to rank, or 'same' for "
            "those that the seeds of the ranks give"
        )


def stream_seed(state: Tensor, rank: int) -> int:
    """The seed of a rank's stream: a hash (BLAKE2b) of a generator's state, uint8 on the CPU, and of the rank; below 2**63."""
    digest = hashlib.blake2b(state.numpy().tobytes() + rank.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # seeds of generators are signed


class RankStream:
    """The stream of one rank, entered before a forward pass and left after it.

    Attributes:
        rank: the place on the sequence axis, on which streams depend.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._after: list[tuple[torch.device, Tensor]] = []

    def enter(self, model: nn.Module) -> None:
        """Seed the default generators of the CPU and of the model's device, unless nothing in the model is in training mode."""
        if not any(part.training for part in model.modules()):
            return
        for device in _devices(model):
            before = _state(device)
            torch.rand(1, device=device)  # the next step begins elsewhere, or it would drop the same tokens
            self._after.append((device, _state(device)))
            _seed(device, stream_seed(before, self.rank))

    def leave(self) -> None:
        """Put the generators where they are equal on all ranks; nothing where no stream was entered."""
        while self._after:
            _restore(*self._after.pop())


def _devices(module: nn.Module) -> list[torch.device]:
    """The CPU, whose generator also seeds attention's dropout, and the device of the module's parameters."""
    own = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    return [torch.device("cpu")] if own.type in ("cpu", "meta") else [torch.device("cpu"), own]


def _state(device: torch.device) -> Tensor:
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


def _restore(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


def _seed(device: torch.device, seed: int) -> None:
    """Seeds the default generator of one device; `torch.manual_seed` would seed those of all."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        with torch.get_device_module(device).device(device):
            torch.get_device_module(device).manual_seed(seed)
