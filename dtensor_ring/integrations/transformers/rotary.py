"""Rotary embeddings whose frequencies depend on how long the batch is: `dynamic` and `longrope`.

They take the longest position among those that they are given, and a rank is given its own tokens' positions only:

    a row of 16, Contiguous, 2 ranks    rank 0 sees 0..7, rank 1 sees 8..15    in one process 0..15
    the longest position                7             15                       15

So a rotary module of a parallelized model is given one position more, the longest of the whole batch, and what it makes of that one
is taken off again. Everything else, also what `dynamic` keeps from batch to batch, is the module's own doing.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dtensor_ring.planning.documents import Documents

_LAYER = re.compile(r"\.\d+(\.|$)")  # a module inside a list of layers has a number in its name


def reads_length(rope_type: str) -> bool:
    """Whether frequencies of this type depend on the longest position; transformers asks by the same words."""
    return "dynamic" in rope_type or rope_type == "longrope"


def length_rotaries(model: nn.Module) -> list[nn.Module]:
    """The rotary modules of a model whose frequencies depend on the longest position.

    Raises:
        NotImplementedError: one is inside a layer, where activation checkpointing may run it again in another batch's time.
    """
    modules: list[nn.Module] = []
    for name, module in model.named_modules():
        kinds = getattr(module, "rope_type", None)
        kinds = set(kinds.values()) if isinstance(kinds, Mapping) else {kinds}
        if not any(isinstance(kind, str) and reads_length(kind) for kind in kinds):
            continue
        if _LAYER.search(name):
            raise NotImplementedError(
                f"{name} has a rope type that depends on the length ({', '.join(sorted(map(str, kinds)))}) and runs inside a "
                "layer, where it does not know the whole batch: use a rope type that does not, such as yarn or llama3"
            )
        modules.append(module)
    return modules


def longest_position(batch: Mapping[str, Any], length: int, documents: Documents | None) -> int | Tensor:
    """The longest position of a whole batch, whose rows have `length` tokens; positions that are missing are those of the plan."""
    positions = batch.get("position_ids")
    if isinstance(positions, Tensor):
        return positions.max()
    if documents is None or batch.get("attention_mask") is not None:  # padding does not restart positions
        return length - 1
    return max(stop - start for row in documents.bounds for start, stop in pairwise(row)) - 1


class WholeLength:
    """Lets rotary modules see the longest position of the whole batch.

    Attributes:
        longest: that position in the batch of the forward pass under way; None outside of one, where modules do as without it.
    """

    def __init__(self, is_on: Callable[[], bool]) -> None:
        self.longest: int | Tensor | None = None
        self._is_on = is_on  # whether the model is parallelized now, and not paused

    def hook(self, module: nn.Module) -> list[RemovableHandle]:
        """Hook one rotary module; the handles undo it."""
        return [
            module.register_forward_pre_hook(self._add_position, with_kwargs=True),
            module.register_forward_hook(self._drop_position),
        ]

    def _add_position(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if self.longest is None:
            # As checkpointing does that is around more than layers: it runs again when other batches have come.
            if self._is_on():
                raise RuntimeError(
                    f"{type(module).__name__} has a rope type that depends on the length, and was run outside of the forward pass "
                    "of the parallelized model: call that model itself, and checkpoint its layers one by one, not a part with this "
                    "module"
                )
            return args, kwargs
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        positions: Tensor = given["position_ids"]
        last = torch.as_tensor(self.longest, dtype=positions.dtype, device=positions.device)
        # (B, S/W) or, with one position for each of several axes, (3, B, S/W): tokens are the last dim.
        given["position_ids"] = torch.cat([positions, last.expand(*positions.shape[:-1], 1)], dim=-1)
        return (), given

    def _drop_position(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:  # noqa: ANN401
        """Cosines and sines (..., S/W + 1, D) without those of the position that was added."""
        if self.longest is None:
            return output
        return tuple(part[..., :-1, :] for part in output) if isinstance(output, tuple) else output[..., :-1, :]
