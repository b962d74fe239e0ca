"""Schedulers of Accelerate, which step once for each process, with a sequence axis: once for each batch that is read at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate.scheduler import AcceleratedScheduler


def step_with_batches(scheduler: AcceleratedScheduler, data: int) -> Callable[[], None]:
    """Make a prepared scheduler step `data` times a training step, or once where batches are split; returns what undoes it.

    Accelerate steps as many times as there are processes: a scheduler is written for one process, which would have read as many
    batches meanwhile. The ranks of a sequence axis read one.
    """
    before = scheduler.split_batches
    if before:
        return lambda: None
    scheduler.split_batches = True  # then a step of Accelerate's is one step
    step = scheduler.step

    def step_for_each_batch(*args: Any, **options: Any) -> None:  # noqa: ANN401
        if not scheduler.step_with_optimizer or not scheduler.gradient_state.sync_gradients:
            step(*args, **options)
            return
        inner = scheduler.scheduler
        for _ in range(data):
            # OneCycleLR raises after its last step, which an incomplete last batch may ask for.
            if inner._step_count <= getattr(inner, "total_steps", inner._step_count):
                step(*args, **options)

    scheduler.__dict__["step"] = step_for_each_batch

    def undo() -> None:
        scheduler.split_batches = before
        scheduler.__dict__.pop("step", None)

    return undo
