"""The plans of a trainer: one for each model that it runs, applied, paused and undone together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.distributed.tensor.parallel import parallelize_module
from transformers import PreTrainedModel

from dtensor_ring.integrations.trainer.outputs import whole_outputs
from dtensor_ring.integrations.trainer.ranks import TrainerRanks
from dtensor_ring.integrations.transformers.peft_models import is_peft
from dtensor_ring.integrations.transformers.plan import RingPlan

PlanMaker = Callable[[PreTrainedModel | nn.Module], RingPlan]


@dataclass(slots=True)
class _Planned:
    """A model under a plan, and what undoes the hooks on its outputs."""

    model: PreTrainedModel
    plan: RingPlan
    undo_outputs: Callable[[], None]

    def undo(self) -> None:
        self.undo_outputs()
        self.plan.undo()


@dataclass(slots=True)
class TrainerRing:
    """What a trainer over several ranks a sequence has: its ranks, and its models under plans.

    Attributes:
        ranks: which ranks share sequences.
        make_plan: makes a plan for a model.
        copies: how often the trainer counts each label of a batch.
        undo_accelerator: gives the accelerator back as it was.
        undo_trainer: what gives back the trainer's own functions.
    """

    ranks: TrainerRanks
    make_plan: PlanMaker
    copies: int
    undo_accelerator: Callable[[], None]
    undo_trainer: list[Callable[[], None]] = field(default_factory=list)
    _planned: list[_Planned] = field(default_factory=list)

    def apply(self, models: list[nn.Module]) -> None:
        """Plans these models, those that are planned already aside; undoes plans of others, such as of an earlier trial."""
        bases = [base_model(model) for model in models]
        for planned in [p for p in self._planned if not any(p.model is base for base in bases)]:
            planned.undo()
            self._planned.remove(planned)
        for model, base in zip(models, bases, strict=True):
            if not any(p.model is base for p in self._planned):
                self._planned.append(self._plan(model, base))

    def _plan(self, model: nn.Module, base: Any) -> _Planned:  # noqa: ANN401
        # With adapters, which are asked whether they reach other tokens; all of this hangs on the model inside.
        plan = self.make_plan(_unwrapped(model))
        if not isinstance(plan, RingPlan):
            raise TypeError(f"make_plan must return a RingPlan, as ring_plan does, found {type(plan).__name__}")
        parallelize_module(base, self.ranks.mesh, plan)
        plan.is_made_whole = True
        return _Planned(base, plan, whole_outputs(base, plan, self.copies))

    def plan_of(self, model: nn.Module) -> RingPlan:
        """The plan of a model."""
        base = base_model(model)
        return next(p.plan for p in self._planned if p.model is base)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside the block all models are whole on every rank, for generation."""
        with ExitStack() as stack:
            for planned in self._planned:
                stack.enter_context(planned.plan.paused())
            yield

    def undo(self) -> None:
        """Gives models and accelerator back as they were."""
        for planned in self._planned:
            planned.undo()
        self._planned.clear()
        self.undo_accelerator()
        while self.undo_trainer:
            self.undo_trainer.pop()()


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model inside wrappers of DDP, torch.compile and PEFT."""
    inner = _unwrapped(model)
    return inner.get_base_model() if is_peft(inner) else inner


def _unwrapped(model: nn.Module) -> Any:  # noqa: ANN401
    from accelerate.utils import extract_model_from_parallel

    return extract_model_from_parallel(model, keep_torch_compile=False)
