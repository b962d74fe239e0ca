"""`RingPlan.paused`: a model as it is without its plan, for a while.

before, after    the root cuts the batch; attention is ours, over the ranks
in a pause       the root leaves the batch alone; attention is what the config asked for before the plan came
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from dtensor_ring.integrations.transformers.attention import KEYWORD


class Pause:
    """Whether a plan is paused, and whether its model is in the middle of a forward pass.

    Attributes:
        on: the plan is paused now.
    """

    def __init__(self, model: PreTrainedModel, enter: Callable[..., Any], leave: Callable[..., Any]) -> None:
        """For the plan whose hooks of the root are `enter`, before a forward pass, and `leave`, after it, both with keywords."""
        self._model, self._enter, self._leave = model, enter, leave
        self.on, self._is_running = False, False
        self._forget: Callable[[], None] = lambda: None

    def hook(self, forget: Callable[[], None]) -> list[RemovableHandle]:
        """Registers the plan's hooks of the root, which rest in a pause, and one that sees forward passes end.

        Args:
            forget: called after each forward pass, also one that raised.
        """
        self._forget = forget
        # They stay registered: put back after a pause, they would stand behind the hooks that FSDP2 has added since. Methods, and
        # no functions made here: those of a copied model must belong to the copy.
        return [
            self._model.register_forward_pre_hook(self._begun, with_kwargs=True),
            self._model.register_forward_hook(self._left, with_kwargs=True),
            self._model.register_forward_hook(self._ended, always_call=True),  # also where the forward pass raises
        ]

    @torch.compiler.disable
    def _begun(self, *call: Any) -> Any:  # noqa: ANN401
        self._is_running = True
        return None if self.on else self._enter(*call)

    @torch.compiler.disable
    def _left(self, *call: Any) -> Any:  # noqa: ANN401
        return None if self.on else self._leave(*call)

    @torch.compiler.disable
    def _ended(self, *_call: object) -> None:
        self._is_running = False
        self._forget()

    def check_over(self) -> None:
        """Raises RuntimeError in a pause."""
        if self.on:
            raise RuntimeError("the plan is paused, and its model gives whole outputs: leave `with plan.paused():` first")

    @contextmanager
    def begin(self, take_off: Callable[[], None], put_on: Callable[[], None], modules: Sequence[nn.Module]) -> Generator[None]:
        """The pause itself.

        Args:
            take_off: gives the model back what the plan has changed, but for hooks and marks.
            put_on: changes it again.
            modules: the attention modules that the plan has marked.
        """
        self.check_over()
        # Layers before this point have attended to keys of all ranks, those after it would attend to a part of the sequence.
        if self._is_running:
            raise RuntimeError(
                f"this {type(self._model).__name__} is in the middle of a forward pass, which began with its plan: call "
                "plan.paused() outside of the model, not in a hook or a module of it"
            )
        handles = [module.register_forward_pre_hook(_refuse_earlier_batches, with_kwargs=True) for module in modules]
        try:
            take_off()
            self.on = True
            yield
        finally:
            self.on = False
            for handle in handles:
                handle.remove()
            put_on()


def _refuse_earlier_batches(module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises RuntimeError for a layer that runs again on this rank's tokens of an earlier batch, as checkpointing does."""
    # Its attention is the model's own now, and would see a part of the sequence: other activations, and no error.
    if KEYWORD in kwargs:
        raise RuntimeError(
            f"{type(module).__name__} runs again, in paused(), on a batch from before: activation checkpointing does so in "
            "backward. Call backward() of that batch before the pause or after it"
        )
