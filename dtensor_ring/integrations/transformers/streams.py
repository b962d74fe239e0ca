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
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

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


class RankStreams:
    """The stream of one rank, entered and left by hooks on a model's root.

    Attributes:
        rank: the place on the sequence axis, on which streams depend.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        # One entry for each forward pass that is under way: a stack, since one may begin in another (a model inside a model).
        self._kept: list[list[tuple[torch.device, Tensor]]] = []

    def hook(self, module: nn.Module) -> list[RemovableHandle]:
        """Enter the stream before the module's forward and leave it after, also where forward raises.

        Register these after other hooks before forward: where one of those raises, no stream was entered.
        """
        return [
            module.register_forward_pre_hook(self._enter),
            module.register_forward_hook(self._leave, always_call=True),
        ]

    @torch.compiler.disable
    def _enter(self, module: nn.Module, _args: tuple[Any, ...]) -> None:
        # A model in evaluation draws nothing, and its generators stay as they are.
        devices = _devices(module) if any(part.training for part in module.modules()) else []
        after: list[tuple[torch.device, Tensor]] = []
        for device in devices:
            before = _state(device)
            torch.rand(1, device=device)  # the next step begins elsewhere, or it would drop the same tokens
            after.append((device, _state(device)))
            _seed(device, stream_seed(before, self.rank))
        self._kept.append(after)

    @torch.compiler.disable
    def _leave(self, _module: nn.Module, _args: tuple[Any, ...], _output: object) -> None:
        if self._kept:  # empty where a hook before ours refused the batch
            for device, state in self._kept.pop():
                _restore(device, state)


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
