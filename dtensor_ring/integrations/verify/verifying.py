"""`verify`: a user's own model and batch under a plan, beside the same model and batch in one process.

found = verify(model, batch, mesh["cp"], placement=Zigzag(1))
print(found)                  # a table of what was compared, and the first module where the two part
found.raise_if_wrong()

on every rank    the whole model and the whole batch run twice: as the plan spreads them, and alone
compared         this rank's tokens of every module, forward and backward; then loss, logits and gradients
agreed           the largest differences of all ranks, so that all come to the same verdict
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import parallelize_module
from transformers import PreTrainedModel

from dtensor_ring.comm import axis_name, transport_along
from dtensor_ring.comm.rank_checks import meet, refused_together
from dtensor_ring.data.batch import check_mesh
from dtensor_ring.integrations.transformers.ask import ring_plan
from dtensor_ring.integrations.transformers.attention import NAME
from dtensor_ring.integrations.transformers.plan import RingPlan
from dtensor_ring.integrations.transformers.token_loss import labels_are_unshifted
from dtensor_ring.integrations.verify.batches import Case, with_labels
from dtensor_ring.integrations.verify.rows import Verifier
from dtensor_ring.integrations.verify.state import Ranks, unchanged
from dtensor_ring.ops.arguments import Strategy
from dtensor_ring.placements import SequencePlacement
from dtensor_ring.tools.verification import Verification


def verify(
    model: PreTrainedModel,
    batch: Mapping[str, object],
    device_mesh: DeviceMesh,
    *,
    placement: SequencePlacement | None = None,
    strategy: Strategy | None = None,
    plan: RingPlan | None = None,
    edge_cases: bool = True,
) -> Verification:
    """Run a model and a batch under a plan and in one process, and compare what comes out, and every module on the way.

        found = verify(model, {"input_ids": ids, "labels": labels}, mesh["cp"])
        print(found)
        found.raise_if_wrong()

    Every rank of the axis calls it with the whole model and the same whole batch, small enough for one rank to run it alone: a
    few rows of a hundred tokens a rank show what a long sequence would. It runs on GPUs or, over gloo, on CPUs. One process runs
    packed documents each by itself, and padded rows with their mask.

    Compared are: the weights of all ranks; which tokens, positions and labels each rank got, and how many labels count; the
    layout of each attention; outputs of all modules, their gradients, loss, logits, each parameter's gradient and the norm of
    all, averaged over the axis unless FSDP2 has done it. With `edge_cases` also: the loss where `num_items_in_batch` is given;
    that logits stay, bit by bit, when another document (or padding, or row) becomes another one; and loss and gradients of a
    batch in which the first rank has no label that counts, and of one in which ranks hold padding only.

    **Tolerances.** What only moves data must be equal. Other differences, relative to the largest value in one process, may be
    8 times the model's own error, and that is the larger of two. First, how far one process moves when every weight grows or
    shrinks by one unit in its last place, by the flip of a coin (two such runs; one for edge cases). Second, one unit in the last
    place of the largest value (of loss and norm, which are averages: that unit over the square root of the labels that count, and
    at least float32's). The unit is that of the coarsest dtype that weights or outputs have, so bfloat16's under autocast, and at
    least float32's, in which transformers computes norms, softmax and losses of float64 models all the same. Where experts route
    tokens, logits of other documents may move by the tolerance of logits, since an expert's matrix product rounds otherwise with
    other tokens beside. In bfloat16 a router's near-ties may flip, and part tokens of a model that is right: float32 settles it.

    The model is run in evaluation mode, without dropout, and without compiled code. Weights, gradients, buffers, training flags and
    generators of random numbers are as before, and so is the plan: one that is applied stays so, any other is undone.

    Memory: beside one training step of the whole batch, the weights and gradients twice, and the outputs of all modules for this
    rank's tokens twice.

    Args:
        model: a transformers model that `ring_plan` takes, plain or with FSDP2's weights, with the same weights on every rank.
        batch: arguments of the model: `input_ids` or `inputs_embeds`, and what else it is trained with. Without `labels` the tokens
            are their own; a model without a loss is compared by a sum of its outputs with random weights.
        device_mesh: the mesh axis that holds the sequence, such as `mesh["cp"]`.
        placement: for the plan that is made, as in `ring_plan`.
        strategy: for the plan that is made, as in `ring_plan`.
        plan: a plan of this model, applied or not, in place of one that is made here.
        edge_cases: also run the batches made of this one.

    Returns:
        A `Verification`, the same on every rank: `ok`, `rows`, `first_difference`, `raise_if_wrong()`; it prints as a table.

    Raises:
        ValueError: the mesh has more than one axis; a plan and arguments for one, or a plan of another model or mesh; the model is
            parallelized and its plan not given; no label counts; data-parallel ranks of FSDP2 have batches of different kinds; or
            the batch is one that the plan refuses.
        TypeError, NotImplementedError: the model, or the batch, is one that `ring_plan` refuses; or the plan has a loss function,
            label smoothing or a z-loss, which the model has not in one process.
    """
    check_mesh(device_mesh)
    transport = transport_along(device_mesh)
    with refused_together(lambda: [transport]):
        chosen = _plan_for(model, device_mesh, placement, strategy, plan)
        # The plan's own model: a wrapper such as PEFT's adds nothing to compare, and its modules are inside.
        model = chosen._model
        _check_loss(chosen)
        case = Case.read(with_labels(model, batch), shifted=not labels_are_unshifted(model))
        if "labels" in inspect.signature(model.forward).parameters and case.given.get("labels") is not None and not case.count():
            raise ValueError("verify: no label of this batch counts, so there is no loss to compare: give labels other than -100")
    # A rank that has refused is found here, before any rank applies a plan.
    meet(transport, "verify", [case.rows, case.length, int(edge_cases)])
    with _eager(), _applied(model, device_mesh, chosen), unchanged(model), _remembering(chosen):
        ranks = Ranks(model, device_mesh)
        title = (
            f"{type(model).__name__}, {chosen._placement!r} over {device_mesh.size()} ranks of {axis_name(device_mesh, 0)}, "
            f"{next(model.parameters()).dtype}, {case.rows} x {case.length} tokens"
            f"{'' if case.documents is None else f' in {case.documents.parts} documents'}"
        )
        verifier = Verifier(model, chosen, chosen._placement, ranks)
        _check_passes([passes for _, passes in ranks.tell(verifier.passes(case, edge_cases=edge_cases))])
        return verifier.verify(case, title, edge_cases=edge_cases)


def _plan_for(
    model: PreTrainedModel,
    mesh: DeviceMesh,
    placement: SequencePlacement | None,
    strategy: Strategy | None,
    plan: RingPlan | None,
) -> RingPlan:
    if plan is None:
        if isinstance(model, PreTrainedModel) and model.config._attn_implementation == NAME:
            raise ValueError("verify: this model is parallelized: pass its plan, verify(model, batch, mesh, plan=plan)")
        return ring_plan(model, placement, strategy)
    if placement is not None or strategy is not None:
        raise ValueError("verify: a plan has its own placement and strategy: pass plan= alone")
    if not any(plan._model is module for module in model.modules()):
        raise ValueError(f"verify: this plan was made for another {type(plan._model).__name__}: pass the plan of this model")
    if plan._mesh is not None and plan._mesh.mesh.tolist() != mesh.mesh.tolist():
        raise ValueError(f"verify: the plan is applied over {plan._mesh}, not over {mesh}: pass the mesh axis of the plan")
    return plan


def _check_loss(plan: RingPlan) -> None:
    asked = plan._asked_loss
    if asked.function is not None or asked.terms.label_smoothing or asked.terms.z_loss:
        raise NotImplementedError(
            f"verify: this plan computes {asked}, and one process the model's own loss, which is another: verify the model under a "
            "plan with the loss left out or loss='chunked', without label_smoothing and z_loss"
        )


def _check_passes(told: list[tuple[int, ...]]) -> None:
    """Ranks that gather weights for each other must pass through the model equally often, or they would wait for ever."""
    other = next((passes for passes in told if passes != told[0]), None)
    if other is not None:
        raise ValueError(
            f"verify: ranks that share weights must run as many passes, found pieces and edge cases {told[0]} and {other}: give "
            "data-parallel ranks batches of one kind, with as many documents, and padding and labels on all or none"
        )


@contextmanager
def _applied(model: PreTrainedModel, mesh: DeviceMesh, plan: RingPlan) -> Iterator[None]:
    """The plan is applied inside the block, and afterwards if it was before."""
    if plan._mesh is not None:
        yield
        return
    parallelize_module(model, mesh, plan)
    try:
        yield
    finally:
        plan.undo()


@contextmanager
def _remembering(plan: RingPlan) -> Iterator[None]:
    """The plan knows the user's last batch afterwards, not the last one of ours."""
    before = plan._documents, plan._is_packed
    try:
        yield
    finally:
        plan._documents, plan._is_packed = before


@contextmanager
def _eager() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield
