"""Loss functions of one's own, of the plan or of the model, and losses that a model fuses: added up, or refused by name."""

from __future__ import annotations

import re
from functools import partial
from types import MethodType

import pytest
import torch
import torch.distributed as dist
from helpers import once, refused
from test_families import in_double, make_batch, make_model
from test_model_loss import alone, planned, run
from transformers.modeling_outputs import CausalLMOutputWithPast

from dtensor_ring import Zigzag, ring_plan
from dtensor_ring.integrations.transformers.loss_functions import check_function, check_model_function
from dtensor_ring.losses import Terms


def squared(logits, shift_labels):
    """Per token, with its sign, of all tokens: those at -100 are left out by the library."""
    return logits.double().logsumexp(-1).square() + logits.double().sum(-1)


def focal_sum(logits, shift_labels):
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), shift_labels.flatten(), reduction="none")
    return ((1 - (-nll).exp()).square() * nll).sum()


def as_models_call_it(logits, labels, vocab_size, num_items_in_batch=None, shift_labels=None, **_):
    assert logits.shape[-1] == vocab_size
    return focal_sum(logits, shift_labels) / num_items_in_batch


def of_one_s_own():
    """Losses of tokens or their sum, of whole logits or in chunks; and a function that the model had before."""
    batch = make_batch(23)
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    count = (shifted != -100).sum()

    def alone_with(function):
        model = make_model("gemma2")
        with in_double():
            losses = function(model(input_ids=batch["input_ids"], use_cache=False).logits, shifted)
        loss = (losses * (shifted != -100)).sum() / count if losses.dim() else losses / count
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters()}

    for function in (squared, focal_sum):
        wanted = once(lambda function=function: alone_with(function))
        for options in ({}, {"loss_chunk": 7}):
            model, plan = planned("gemma2", loss=function, **options)
            assert f"loss:      {function.__name__}" in plan.describe()
            with in_double():
                run(model, batch, wanted)
                run(model, {**batch, "num_items_in_batch": count}, wanted)
    model, plan = planned("gemma2", change=lambda model: setattr(model, "loss_function", as_models_call_it))
    with in_double():
        run(model, batch, wanted)
    plan.undo()
    assert model.loss_function is as_models_call_it

    model, plan = planned("gemma2")
    mine = shifted[:, Zigzag(1).layout.tokens(23, dist.get_world_size(), dist.get_rank())]
    with in_double():
        for grad, losses in (("mean", lambda x: squared(x, mine) * (mine != -100)), ("sum", lambda x: focal_sum(x, mine))):
            loss, grads = once(lambda grad=grad: alone_with(squared if grad == "mean" else focal_sum))
            model.zero_grad()
            found = plan.global_loss(losses(model(input_ids=batch["input_ids"]).logits), (mine != -100).sum(), grad=grad)
            found.backward()
            torch.testing.assert_close(found.detach(), loss, rtol=1e-6, atol=0)
            for name, parameter in model.named_parameters():
                dist.all_reduce(parameter.grad)
                scale = 1 / dist.get_world_size() if grad == "mean" else 1
                assert (parameter.grad * scale - grads[name]).abs().max() <= 1e-6 * grads[name].abs().max()
        refused(lambda: plan.global_loss(torch.ones(())), ValueError, "the last batch had no labels. Pass items=")
        model(**batch)
        found = plan.global_loss(focal_sum(model(**batch).logits, mine))
        torch.testing.assert_close(found.detach(), loss, rtol=1e-6, atol=0)
        refused(lambda: plan.global_loss(found, grad="both"), ValueError, "grad='both'")


def test_functions_of_one_s_own_are_summed_over_ranks(pools):
    pools.run(2, of_one_s_own)


def reads_labels(logits, labels, vocab_size, num_items_in_batch=None, shift_labels=None, **_):
    return focal_sum(logits, labels) / num_items_in_batch


def forgets_items(logits, labels, vocab_size, num_items_in_batch=None, shift_labels=None, **_):
    return focal_sum(logits, shift_labels)


def counts_ignored(logits, shift_labels):
    return logits.sum()


def of_other_shape(logits, shift_labels):
    return logits.sum(1)


def beside_others(logits, shift_labels):
    return logits.sum(-1) - logits.sum((-1, -2), keepdim=True)[..., 0]


OF_PLANS = [
    (lambda x, y: focal_sum(x, y) / 7, None),
    (lambda x, y: focal_sum(x, y) / (y != -100).sum(), "gives 3.9|a mean, or something else that is not linear over tokens"),
    (counts_ignored, "for tokens whose label is -100, which do not count"),
    (of_other_shape, "returned a tensor of shape (1, 64) for labels of shape (1, 7)"),
    (beside_others, "gives tokens other losses beside other tokens"),
    (lambda x, y: 3.0, "returned float: a loss function is called as"),
]
OF_MODELS = [
    (as_models_call_it, None),
    (reads_labels, "reads labels where shift_labels are given"),
    (forgets_items, "does not divide its sum by num_items_in_batch"),
    (lambda logits, *_, **names: logits.mean() / names["num_items_in_batch"], "not linear over tokens"),
    (lambda *_, **names: None, "returned NoneType: the loss of a model is a tensor of no dims"),
]


@pytest.mark.parametrize(
    ("check", "function", "text"),
    [(check_function, *case) for case in OF_PLANS] + [(check_model_function, *case) for case in OF_MODELS],
)
def test_functions_that_ranks_cannot_add_up_are_refused_by_name(check, function, text):
    act = partial(check, function, "f", 64, torch.device("cpu"))
    if text is None:
        act()
        return
    with pytest.raises((TypeError, ValueError), match="|".join(re.escape(part) for part in text.split("|")[-1:])) as failure:
        act()
    assert str(failure.value).startswith("f ")


REFUSED = [
    ({"loss": "chunk"}, ValueError, "loss='chunk': use 'model', 'chunked', or a function"),
    ({"loss": 3}, TypeError, "loss=3: use"),
    ({"loss_chunk": 8}, ValueError, "loss_chunk=8 with loss='model', which makes all logits"),
    ({"loss": "chunked", "loss_chunk": 0}, ValueError, "a chunk has at least 1 token, found 0"),
    ({"loss": "chunked", "loss_chunk": 1.5}, TypeError, "found 1.5 of type float"),
    ({"label_smoothing": 1.0}, ValueError, "label_smoothing=1.0: it is the share of the mean over the vocabulary"),
    ({"z_loss": -1.0}, ValueError, "z_loss=-1.0: it is the factor of logsumexp"),
    ({"loss": squared, "z_loss": 1e-4}, ValueError, "are of cross entropy, and loss is squared"),
]


@pytest.mark.parametrize(("options", "error", "text"), REFUSED, ids=[text for *_, text in REFUSED])
def test_arguments_about_the_loss_that_make_none_are_refused(options, error, text):
    with pytest.raises(error, match=re.escape(text)):
        ring_plan(make_model("llama"), **options)


def test_losses_without_a_head_and_beside_a_function_of_the_model_are_refused():
    model = make_model("llama")
    with pytest.raises(NotImplementedError, match="LlamaModel has no language-model head, and so no loss"):
        ring_plan(model.model, loss="chunked")
    model.loss_function = as_models_call_it
    with pytest.raises(ValueError, match=r"a loss function of its own, as_models_call_it, which loss=.*pass it as loss="):
        ring_plan(model, z_loss=1e-4)


def fused_forward(self, input_ids=None, labels=None, shift_labels=None, num_items_in_batch=None, **kwargs):
    """Shaped as Liger's: hidden states and the weight of the head go into one function, and no logits come out."""
    hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
    loss = torch.nn.functional.cross_entropy(
        (hidden @ self.lm_head.weight.T).flatten(0, 1), shift_labels.flatten(), reduction="sum"
    )
    return CausalLMOutputWithPast(loss=loss / num_items_in_batch)


def fused():
    batch = make_batch(23)
    wanted = once(lambda: alone("llama", batch, Terms()))

    def liger(model):
        model.forward = MethodType(fused_forward, model)

    model, _ = planned("llama", change=liger)
    run(model, batch, wanted)
    for options in ({"loss": "chunked"}, {"label_smoothing": 0.1}, {"loss": squared}):
        model, _ = planned("llama", change=liger, **options)
        refused(
            lambda model=model: model(**batch), NotImplementedError, "as forward passes with a fused loss do", "use loss='model'"
        )
    model, _ = planned("llama", z_loss=1e-4)
    model.loss_function = as_models_call_it
    refused(lambda: model(**batch), RuntimeError, "was changed to as_models_call_it, where the plan had set its own")
    model, _ = planned("llama", change=lambda model: setattr(model.config, "final_logit_softcapping", 5.0), loss="chunked")
    refused(
        lambda: model(**batch), NotImplementedError, "changes the logits of its head in a way that a chunked loss does not know"
    )


def test_fused_losses_of_a_model_are_taken_or_refused(pools):
    pools.run(2, fused)
