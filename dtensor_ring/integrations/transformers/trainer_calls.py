"""Calls by a Trainer that counted labels without knowing of the plan: it was made before the plan was applied.

ring_plan, parallelize_module, Trainer(model)    reads accepts_loss_kwargs=False, and leaves the number of items out: right
Trainer(model), ring_plan, parallelize_module    counts each label once for each rank, and gets 1/ranks of the loss: refused
"""

from __future__ import annotations

import sys
from types import FrameType

_TRAINER = "transformers.trainer"


def refuse_counts_of_trainer() -> None:
    """Refuse a number of items that a Trainer passes, in the frames that called this.

    Raises:
        RuntimeError: the forward pass was called by `Trainer.compute_loss`.
    """
    if _TRAINER not in sys.modules:
        return
    # The model is given the same arguments by a training loop of one's own, where they are right: only the caller tells.
    code = sys.modules[_TRAINER].Trainer.compute_loss.__code__
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    if frame is not None:
        trainer = type(frame.f_locals["self"]).__name__
        raise RuntimeError(
            f"a {trainer} that was made before the plan was applied passes num_items_in_batch, in which each label counts once for "
            "each rank of a sequence: loss and gradients would be divided by the number of ranks. Apply the plan before the "
            f"{trainer} is made, or put RingTrainerMixin before it"
        )
