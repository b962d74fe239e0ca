"""What is otherwise during a forward pass of a parallelized model: random streams, and the length that rotary modules read.

    the plan's hook before forward    cuts the batch, which may be refused; then `enter`
    forward                           dropout draws from the rank's stream, rotary modules know the whole batch's length
    after it, also where it raised    `leave`: generators and modules are as outside of the plan

Outside of such a pass, as in a pause of the plan, nothing is changed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from dtensor_ring.integrations.transformers.attention import NAME
from dtensor_ring.integrations.transformers.rotary import WholeLength, length_rotaries
from dtensor_ring.integrations.transformers.streams import Dropout, RankStream, check_dropout


class Surroundings:
    """The surroundings of one model's forward passes under one plan.

    Raises:
        ValueError: `dropout` is no such choice.
        NotImplementedError: a rotary module that depends on the length is inside a layer.
    """

    def __init__(self, model: PreTrainedModel, dropout: Dropout) -> None:
        check_dropout(dropout)
        self._model, self._dropout = model, dropout
        self._rotaries = length_rotaries(model)
        self._length = WholeLength(lambda: model.config._attn_implementation == NAME)
        self._stream: RankStream | None = None

    @property
    def text(self) -> str:
        """For `RingPlan.describe`."""
        return {"same": "as the ranks' seeds say", "per_rank": "outside of attention from a stream of each rank's own"}[
            self._dropout
        ]

    def hook(self, mesh: DeviceMesh) -> list[RemovableHandle]:
        """Hook into the model for one mesh axis, after the plan's own hooks; the handles undo it."""
        # One rank alone drops what it drops without a plan.
        self._stream = RankStream(mesh.get_local_rank()) if self._dropout == "per_rank" and mesh.size() > 1 else None
        if self._stream is None and not self._rotaries:
            return []
        handles = [self._model.register_forward_hook(self._leave, always_call=True)]
        return handles + [handle for module in self._rotaries for handle in self._length.hook(module)]

    def enter(self, longest: int | Tensor) -> None:
        """Begin a forward pass on a batch whose longest position is given; the last that is done before it."""
        self._length.longest = longest
        if self._stream is not None:
            self._stream.enter(self._model)

    @torch.compiler.disable
    def _leave(self, _module: nn.Module, _args: object, _output: object) -> None:
        self._length.longest = None
        if self._stream is not None:
            self._stream.leave()
