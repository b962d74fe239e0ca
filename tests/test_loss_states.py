"""A plan's loss through pauses, failures, copies and changed heads: its model is as it was, or refuses by name."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from helpers import line, refused
from models import make_batch, make_model
from peft import LoraConfig, inject_adapter_in_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from transformers import BertConfig, BertForMaskedLM, BertForTokenClassification

from dtensor_ring import clip_gradients, ring_plan

OPTIONS = {"loss": "chunked", "loss_chunk": 5, "label_smoothing": 0.1, "dropout": "per_rank"}


def boom(*_call):
    raise KeyError("in the middle")


def through_states(sharded):
    """A pause, and undo, give back the model's own head and loss; in between passes that raise and a copy of the model."""
    reference, batch, model = make_model("llama"), make_batch(16), make_model("llama")
    alone, untouched = reference(**batch, use_cache=False), [set(vars(part)) for part in reference.modules()]
    plan = ring_plan(model, **OPTIONS)
    parallelize_module(model, line(), plan)
    for module in (model.lm_head, model) if sharded else ():
        fully_shard(module, mesh=line())
    loss = model(**batch).loss.detach()
    for text in ("chunks of 5 tokens", "label_smoothing 0.1", "stream of each rank's own"):
        assert text in plan.describe()
    for module in (model.model.norm, model):
        handle = module.register_forward_hook(boom)
        refused(lambda: model(**batch), KeyError, "in the middle")
        handle.remove()
        held = model.lm_head.forward.__self__._pass
        assert (held.labels, held.losses) == (None, None)
    for _ in range(2):
        with plan.paused():
            assert "forward" not in vars(model.lm_head)
            assert "_loss_function" not in vars(model)
            assert "paused" in plan.describe()
            out = model(**batch)
            assert torch.equal(out.logits, alone.logits)
            assert torch.equal(out.loss, alone.loss)
        out = model(**batch)
        assert out.logits is None
        assert torch.equal(out.loss.detach(), loss)
    if not sharded:
        other = copy.deepcopy(model)
        torch.nn.init.zeros_(other.lm_head.weight)
        assert abs(other(**batch).loss.item() - torch.tensor(64.0).log().item()) < 1e-5, "the head of the copy, not of the original"
        second = ring_plan(model, loss="chunked")
    plan.undo()
    assert torch.equal(model(**batch).loss, alone.loss)
    if sharded:
        return
    assert [set(vars(part)) for part in model.modules()] == untouched
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    parallelize_module(model, line(), second)
    assert model(**batch).logits is None
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["lm_head"]), model)
    refused(lambda: model(**batch), RuntimeError, "head of this parallelized LlamaForCausalLM was changed to a Linear")


@pytest.mark.parametrize("sharded", [False, True])
def test_pauses_failures_copies_and_undo_leave_head_and_loss_as_they_were(pools, sharded):
    pools.run(2, through_states, sharded)


def own_function():
    config = BertConfig(
        vocab_size=48, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, max_position_embeddings=64
    )
    ids = make_batch(16)["input_ids"] % 2
    for kind in (BertForMaskedLM, BertForTokenClassification):
        model = kind(copy.deepcopy(config))
        for options in ({"loss": "chunked"}, {"label_smoothing": 0.1}, {"z_loss": 0.1}, {"loss": lambda x, y: x.sum(-1)}):
            refused(
                lambda model=model, options=options: ring_plan(model, **options),
                NotImplementedError,
                f"of a {kind.__name__}, whose labels stay with their tokens",
            )
        model.loss_function = boom
        plan = ring_plan(model)
        parallelize_module(model, line(), plan)
        assert "labels stay with their tokens" in plan.describe()
        refused(lambda model=model: model(input_ids=ids, labels=ids), NotImplementedError, "is boom, and the plan computes")
        model(input_ids=ids)


def test_losses_that_heads_without_a_shift_would_pass_by_are_refused(pools):
    pools.run(1, own_function)


def test_one_parameter_alone_is_clipped():
    parameter = torch.nn.Parameter(torch.ones(4, 1))
    parameter.grad = torch.full((4, 1), 2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert clip_gradients(parameter, 1.0) == 4
    torch.testing.assert_close(parameter.grad, torch.full((4, 1), 0.5))
