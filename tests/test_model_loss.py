"""The loss of a parallelized model, in chunks, smoothed, of one's own, with that of routers: as in one process."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from helpers import line, once, refused, slow
from test_families import in_double, make_batch, make_model, padded_batch
from torch import nn
from torch.distributed.tensor.parallel import parallelize_module
from transformers.trainer_pt_utils import LabelSmoother

from dtensor_ring import Contiguous, Documents, Stripe, Zigzag, ring_plan
from dtensor_ring.losses import Terms

SMOOTH = Terms(label_smoothing=0.2, z_loss=1e-2)


def exact_loss(logits, labels, terms):
    """The sum over tokens, spelled out in float64."""
    log_p, lse = logits.log_softmax(-1), logits.logsumexp(-1)
    counts = labels != -100
    own = log_p.gather(2, labels.masked_fill(~counts, 0)[..., None])[..., 0]
    smoothing = terms.label_smoothing
    each = -(1 - smoothing) * own - smoothing * log_p.mean(-1) + terms.z_loss * lse.square()
    return (each * counts).sum()


def alone(family, batch, terms, documents=None, change=None):
    """The mean loss of one process and its gradients, with a loss in float64; of a packed batch every document by itself."""
    model = make_model(family)
    if change:
        change(model)
    bounds = (0, batch["input_ids"].shape[1]) if documents is None else documents.bounds[0]
    total = 0
    with in_double() if family == "gemma2" else nullcontext():
        for start, stop in pairwise(bounds):
            part = {name: value[:, start:stop] for name, value in batch.items() if name != "labels"}
            logits = model(**part, use_cache=False).logits
            total = total + exact_loss(logits[:, :-1], batch["labels"][:, start + 1 : stop], terms)
    loss = total / (batch["labels"][:, 1:] != -100).sum()
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def run(model, batch, wanted, tolerance=1e-6):
    """A step: loss and gradients are those wanted, up to the float32 of norms; averaged, unless the caller counts labels."""
    loss, grads = wanted
    world, items = dist.get_world_size(), "num_items_in_batch" in batch
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    mine = out.loss.detach().double()
    if items:
        dist.all_reduce(mine)
    torch.testing.assert_close(mine, loss.double(), rtol=tolerance, atol=0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            grad = parameter.grad.clone()
            dist.all_reduce(grad)
            error = (grad * (1 if items else 1 / world) - grads[name]).abs().max()
            assert error <= tolerance * grads[name].abs().max(), f"{name}: {error} of {grads[name].abs().max()}"
    return out


def planned(family, placement=None, change=None, **loss):
    model = make_model(family)
    if change:
        change(model)
    plan = ring_plan(model, placement, **loss)
    parallelize_module(model, line(), plan)
    return model, plan


def tied_and_biased(model):
    """A head with a bias, whose weight is that of the embedding."""
    head = nn.Linear(32, 48, bias=True).double()
    torch.manual_seed(3)
    nn.init.normal_(head.bias)
    head.weight = model.get_input_embeddings().weight
    model.lm_head = head


def in_chunks(family):
    """Chunks that do not divide the tokens, with all terms and with none; whole logits with all terms; packed; counted labels."""
    batch, documents = make_batch(23), Documents.from_lengths([4, 16, 3])
    packed = {**batch, "labels": batch["labels"].index_fill(1, torch.tensor([0, 4, 20]), -100)}
    plain, smooth = (once(lambda terms=terms: alone(family, batch, terms)) for terms in (Terms(), SMOOTH))
    by_document = once(lambda: alone(family, packed, SMOOTH, documents))
    model, plan = planned(family, loss="chunked", loss_chunk=7)
    out = run(model, batch, plain)
    assert out.logits is None
    assert "logits in chunks of 7 tokens" in plan.describe()
    assert model(input_ids=batch["input_ids"]).logits.shape[1:] == (-(-23 // dist.get_world_size()) - (dist.get_rank() > 0), 48)
    count = (batch["labels"][:, 1:] != -100).sum()
    run(model, {**batch, "num_items_in_batch": count}, plain)
    assert [x.shape for x in model(**batch, return_dict=False)] == [()], "no logits in the tuple"
    plan.undo()
    assert "forward" not in vars(model.lm_head)
    assert model(**batch, use_cache=False).logits.shape == (2, 23, 48)
    for chunk in (None, 1):
        model, _ = planned(family, Stripe(1), loss="chunked", loss_chunk=chunk, **of_terms(SMOOTH))
        run(model, {**packed, "documents": documents}, by_document)
    model, _ = planned(family, Contiguous(1), **of_terms(SMOOTH))
    out = run(model, batch, smooth)
    assert out.logits.shape[2] == 48


def of_terms(terms):
    return {"label_smoothing": terms.label_smoothing, "z_loss": terms.z_loss}


CELLS = [
    (world, family) if world < 3 and (world, family) != (1, "qwen3_moe") else slow(world, family)
    for world in (1, 2, 3, 4)
    for family in ("llama", "gemma2", "qwen3_moe")
]


@pytest.mark.parametrize(("world", "family"), CELLS)
def test_losses_in_chunks_and_smoothed_ones_are_those_of_one_process(pools, world, family):
    pools.run(world, in_chunks, family)
