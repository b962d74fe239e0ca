"""`RingPlan.paused`: a model as it is without its plan, in the middle of training, and afterwards as before."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from helpers import line, refused
from models import make_batch, make_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

from dtensor_ring import Documents, Zigzag, ring_plan


def parallel(sharded: bool):
    model = make_model("qwen3 window")
    plan = ring_plan(model, Zigzag(1, per_document=True))
    parallelize_module(model, line(), plan)
    for module in (*model.model.layers, model) if sharded else ():
        fully_shard(module, mesh=line())
    return model, plan


def whole_rows(sharded: bool):
    reference, batch = make_model("qwen3 window"), make_batch(16)
    model, plan = parallel(sharded)
    packed = batch | {"documents": Documents.from_lengths([6, 10])}
    prompts = {"input_ids": batch["input_ids"][:, :7], "attention_mask": torch.ones(2, 7, dtype=torch.int64), "pad_token_id": 0}
    prompts["attention_mask"][0, :2] = 0
    alone = reference(**batch, use_cache=False)
    alone.loss.backward()
    texts = reference.generate(**prompts, max_new_tokens=4, do_sample=False)
    loss, documents = model(**packed).loss.detach(), plan.documents
    hooks = [dict(module._forward_pre_hooks) for module in model.modules()]
    for failing in (False, True):
        try:
            with plan.paused():
                with torch.no_grad():
                    out = model(**batch)
                    assert torch.equal(out.logits, alone.logits)
                    assert torch.equal(out.loss, alone.loss)
                    assert out.past_key_values.get_seq_length() == 16
                    assert torch.equal(model.generate(**prompts, max_new_tokens=4, do_sample=False), texts)
                model(**batch).loss.backward()
                for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
                    assert torch.equal(mine.grad.full_tensor() if sharded else mine.grad, theirs.grad)
                model.zero_grad()
                if failing:
                    raise KeyError("in the body")
        except KeyError:
            assert failing
        assert model.config._attn_implementation == "dtensor_ring"
        assert [dict(module._forward_pre_hooks) for module in model.modules()] == hooks
        assert plan.documents is documents
        assert torch.equal(model(**packed).loss, loss)
    plan.undo()
    assert torch.equal(model(**batch).loss, alone.loss)


@pytest.mark.parametrize("sharded", [False, True])
def test_evaluation_and_generation_are_those_of_one_process_and_training_goes_on(pools, sharded):
    pools.run(2, whole_rows, sharded)


def misuse():
    batch, (model, plan) = make_batch(16), parallel(False)
    fresh = ring_plan(make_model("llama"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused(fresh.paused, RuntimeError, "the plan is not applied")
        fresh._was_applied = True
    before, copied = model(**batch), copy.deepcopy(model)
    second = plan.paused()
    with plan.paused():
        refused(second.__enter__, RuntimeError, "the plan is paused")
        assert torch.equal(copied(**batch).loss, before.loss), "a copy has a plan of its own, which is not paused"
        for act in (plan.paused, plan.undo, lambda: plan.gather(before.logits), lambda: plan.sum_over_tokens(before.logits)):
            refused(act, RuntimeError, "the plan is paused, and its model gives whole outputs")
        before.loss.backward(retain_graph=True)  # nothing of the model runs again

    def pause(*_call):
        with plan.paused():
            pass

    handle = model.model.layers[1].register_forward_hook(pause)
    refused(
        lambda: model(**batch), RuntimeError, "in the middle of a forward pass, which began with its plan", "outside of the model"
    )
    handle.remove()
    refused(lambda: model(**batch, output_attentions=True), NotImplementedError, "output_attentions")
    dist.barrier()
    pause()  # forward passes that raised, in the model or at its door, have ended
    assert torch.equal(model(**batch).loss, before.loss)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    loss = model(**batch).loss
    with plan.paused():
        refused(loss.backward, RuntimeError, "Qwen3Attention runs again, in paused(), on a batch from before", "Call backward()")
        loss = model(**batch).loss
    refused(loss.backward, RuntimeError, "call backward() of what paused() gave before the pause ends")
    model(**batch).loss.backward()


def test_what_a_pause_would_get_wrong_is_refused_by_name(pools):
    pools.run(2, misuse)
