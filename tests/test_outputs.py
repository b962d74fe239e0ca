"""Losses of one's own from a parallelized model: gathered outputs, sums over tokens, gradients averaged or summed over the axis."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from helpers import line, slow
from models import make_batch, make_model, worst
from torch.distributed.tensor.parallel import parallelize_module

from dtensor_ring import Contiguous, Documents, Stripe, Zigzag, average_gradients, ring_plan


def two_models(placement):
    """One process and its parallel twin, with the plan."""
    reference, model = make_model("llama"), make_model("llama")
    plan = ring_plan(model, placement)
    parallelize_module(model, line(), plan)
    return reference, model, plan


def gradients_agree(model, reference, grad: str) -> float:
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size() if grad == "mean" else 1
    return worst(zip((p.grad for p in model.parameters()), (p.grad for p in reference.parameters()), strict=True))


def log_probabilities(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1).gather(2, targets[..., None])[..., 0]


def of_gathered(logits, _ids, plan, grad):
    whole = logits if plan is None else plan.gather(logits, grad=grad)
    return (whole * torch.linspace(0, 1, whole.shape[1])[:, None]).square().mean()


def of_sums(logits, ids, plan, grad):
    """As in preference optimization: per-sequence log-probabilities, and something that is not linear in them."""
    each = log_probabilities(logits, ids)
    summed = each.sum(1) if plan is None else plan.sum_over_tokens(each, grad=grad)
    return -torch.nn.functional.logsigmoid(0.01 * (summed[0] - summed[1])) + summed.square().mean() / 100


def name_of(value: object) -> str:
    """What a case is called by."""
    return getattr(value, "__name__", repr(value))


def own_loss(loss, placement, grad: str, length: int):
    reference, model, plan = two_models(placement)
    ids = make_batch(length)["input_ids"]
    wanted = loss(reference(input_ids=ids, use_cache=False).logits, ids, None, grad)
    wanted.backward()
    logits = model(input_ids=ids).logits
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = ids[:, placement.layout.tokens(length, world, rank)]
    found = loss(logits, mine, plan, grad)
    found.backward()
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    # transformers normalizes in float32, where three times a value is rounded
    assert gradients_agree(model, reference, grad) < 1e-6


PLACEMENTS = [Zigzag(1), Contiguous(1), Stripe(1, block=2)]
CELLS = list(itertools.product((1, 2, 3), ("mean", "sum"), PLACEMENTS, (of_gathered, of_sums)))
# Each placement at each number of ranks, with one loss and one kind of gradient.
BY_DEFAULT = [
    (world, ("mean", "sum")[(world + i // 2) % 2], placement, (of_gathered, of_sums)[(world // 2 + i) % 2])
    for world, (i, placement) in itertools.product((1, 2, 3), enumerate(PLACEMENTS))
]


@pytest.mark.parametrize(
    ("world", "grad", "placement", "loss"), [cell if cell in BY_DEFAULT else slow(*cell) for cell in CELLS], ids=name_of
)
def test_a_loss_of_one_s_own_has_the_gradients_of_one_process(pools, world, grad, placement, loss):
    pools.run(world, own_loss, loss, placement, grad, 17)


def gathered_loss():
    mesh, batch = line(), make_batch(17)
    reference, model = make_model("llama"), make_model("llama")
    reference(**batch, use_cache=False).logits.square().mean().backward()
    plan = ring_plan(model, Zigzag(1))
    parallelize_module(model, mesh, plan)
    plan.gather(model(**batch).logits).square().mean().backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()
    assert worst(zip((p.grad for p in model.parameters()), (p.grad for p in reference.parameters()), strict=True)) < 1e-6


def test_averaged_gradients_of_gathered_outputs_are_those_of_one_process(pools):
    pools.run(2, gathered_loss)


def gathered_late():
    mesh, model, reference = line(), make_model("llama"), make_model("llama")
    plan = ring_plan(model, Zigzag(1, per_document=True))
    parallelize_module(model, mesh, plan)
    batches = []
    for lengths in ([9, 15], [3, 14, 7]):
        ids = make_batch(24, rows=1)["input_ids"]
        batches.append({"input_ids": ids, "position_ids": Documents.from_lengths(lengths).position_ids()})
    first, _second = (model(**batch).logits for batch in batches)
    mask = torch.block_diag(*(torch.ones(n, n).tril() for n in (9, 15))).bool()[None, None]
    wanted = reference(**batches[0], attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(plan.gather(first), wanted, rtol=0, atol=1e-10)  # an output knows the documents of its own batch


def test_an_output_gathered_after_another_batch_is_right_or_raises(pools):
    pools.run(2, gathered_late)


def averaged_with_the_model_s_loss():
    """The model's loss and one of gathered logits in one sum: one average serves both."""
    reference, model, plan = two_models(Zigzag(1))
    batch = make_batch(17)
    out = reference(**batch, use_cache=False)
    (out.loss + of_gathered(out.logits, None, None, "mean")).backward()
    out = model(**batch)
    (out.loss + of_gathered(out.logits, None, plan, "mean")).backward()
    average_gradients(model, line())
    assert worst(zip((p.grad for p in model.parameters()), (p.grad for p in reference.parameters()), strict=True)) < 1e-6


def test_gathered_losses_add_to_the_model_s_own(pools):
    pools.run(2, averaged_with_the_model_s_loss)


def packed_outputs():
    """Outputs know their batch's documents; what is made of them is refused, unless the documents are given."""
    reference, model, plan = two_models(Zigzag(1, per_document=True))
    ids, layouts = make_batch(24, rows=1)["input_ids"], ([9, 15], [3, 14, 7])
    outputs, documents = [], []
    for lengths in layouts:
        outputs.append(model(input_ids=ids, documents=Documents.from_lengths(lengths), output_hidden_states=True))
        documents.append(plan.documents)
    for lengths, out, bounds in zip(layouts, outputs, documents, strict=True):
        mask = torch.block_diag(*(torch.ones(n, n).tril() for n in lengths)).bool()[None, None]
        positions = Documents.from_lengths(lengths).position_ids()
        wanted = reference(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, output_hidden_states=True)
        torch.testing.assert_close(plan.gather(out.logits), wanted.logits, rtol=0, atol=1e-10)
        torch.testing.assert_close(plan.gather(out.hidden_states[1]), wanted.hidden_states[1], rtol=0, atol=1e-10)
        made = out.logits.exp()
        with pytest.raises(ValueError, match=r"cannot be told which batch this tensor is of: pass an output.*or documents="):
            plan.gather(made)
        torch.testing.assert_close(plan.gather(made, documents=bounds), wanted.logits.exp(), rtol=0, atol=1e-10)
    alone = model(input_ids=ids).logits.exp()  # one document a row: its layout follows from the length
    torch.testing.assert_close(plan.gather(alone), reference(input_ids=ids, use_cache=False).logits.exp(), rtol=0, atol=1e-10)
    assert len(plan._documents_of) > 0
    del outputs, out, made, alone
    assert not len(plan._documents_of), "outputs are not kept alive"


def test_an_output_is_laid_out_by_the_documents_of_its_own_batch(pools):
    pools.run(2, packed_outputs)


def other_values():
    _, _, plan = two_models(Zigzag(1))
    local = torch.full((2, 3), 1.0 + dist.get_rank())
    assert torch.equal(plan.sum_over_tokens(local), torch.full((2,), 9.0))
    assert torch.equal(plan.sum_over_tokens(local.long()), torch.full((2,), 9))
    small = torch.full((1, 3000), 1.0, dtype=torch.bfloat16)
    assert plan.sum_over_tokens(small).item() == 6016, "added in float32, rounded once"
    for act in (lambda: plan.gather(local, grad="average"), lambda: plan.sum_over_tokens(local, grad="average")):
        with pytest.raises(ValueError, match="grad='average': use 'mean' where gradients are averaged over the axis"):
            act()
    plan.undo()
    for act in (plan.gather, plan.sum_over_tokens):
        with pytest.raises(RuntimeError, match="the plan is not applied"):
            act(local)


def test_sums_of_integers_and_sixteen_bits_and_conventions_that_are_none(pools):
    pools.run(2, other_values)
