"""PEFT models given to a plan as they are: the step of one process, adapters merged and switched, other methods refused by name."""

from __future__ import annotations

import warnings
from importlib import import_module

import pytest
import torch
import torch.distributed as dist
from helpers import line, once
from models import make_batch, make_model
from torch.distributed.tensor.parallel import parallelize_module

from dtensor_ring import ring_plan

LINEAR = ["q_proj", "v_proj", "down_proj", "lm_head"]
TUNERS = {
    "LORA": lambda peft: peft.LoraConfig(r=4, target_modules=LINEAR, use_dora=True, init_lora_weights=False),
    "LOHA": lambda peft: peft.LoHaConfig(r=4, target_modules=LINEAR, init_weights=False),
    "LOKR": lambda peft: peft.LoKrConfig(r=4, target_modules=LINEAR, init_weights=False),
    "IA3": lambda peft: peft.IA3Config(target_modules=LINEAR, feedforward_modules=["down_proj"], init_ia3_weights=False),
    "OFT": lambda peft: peft.OFTConfig(r=0, oft_block_size=8, target_modules=["q_proj"]),
    "BOFT": lambda peft: peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj"], init_weights=False),
    "VERA": lambda peft: peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"], init_weights=False),
    "LN_TUNING": lambda peft: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    "TRAINABLE_TOKENS": lambda peft: peft.TrainableTokensConfig(token_indices=[3, 5], target_modules=["embed_tokens"]),
}


def make_peft(config, tied: bool = False):
    peft = import_module("peft")  # not with this module, which every process of the tests would pay for
    model = make_model("llama")
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    torch.manual_seed(3)
    with warnings.catch_warnings():  # of layers and extensions that only some methods know
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config).double()


def lora(**more):
    return import_module("peft").LoraConfig(r=4, target_modules=LINEAR, task_type="CAUSAL_LM", init_lora_weights=False, **more)


def step_alone(model, batch):
    out = model(**batch)
    out.loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return out.loss.detach(), out.logits.detach(), grads


def assert_same_step(model, call, plan, batch, wanted) -> None:
    loss, logits, grads = wanted
    model.zero_grad()
    out = call(**batch)
    out.loss.backward()
    torch.testing.assert_close(out.loss.detach(), loss, rtol=0, atol=2e-6)  # transformers computes losses in float32
    torch.testing.assert_close(plan.gather(out.logits), logits, rtol=0, atol=1e-12)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained.keys() == grads.keys()
    for name, parameter in trained.items():
        dist.all_reduce(parameter.grad)
        error = (parameter.grad / dist.get_world_size() - grads[name]).abs().max()
        assert error <= 1e-6 * grads[name].abs().max(), name


def peft_models():
    """LoRA on attention, MLP and head of a model with tied weights, however it is parallelized and called; adapters that change."""
    warnings.filterwarnings("ignore", message="Model (has|with) `tie_word_embeddings=True`")
    mesh, batch = line(), make_batch(17)
    config = lora(ensure_weight_tying=False, modules_to_save=["norm"])
    wanted = once(lambda: step_alone(make_peft(config, tied=True), batch))
    for through_peft in (True, False):
        model = make_peft(config, tied=True)
        base = model.get_base_model()
        plan = ring_plan(model if through_peft else base)
        parallelize_module(model if through_peft else base, mesh, plan)
        for call in (model, model.base_model, base):
            assert_same_step(model, call, plan, batch, wanted)
        plan.undo()
    parallelize_module(model, mesh, plan := ring_plan(model))
    alone = make_peft(config, tied=True)
    for one in (model, alone):
        torch.manual_seed(4)
        one.add_adapter("second", lora())
        one.double()
    seen = []
    for change in (
        lambda one: one.set_adapter("second"),
        lambda one: one.merge_adapter(),
        lambda one: one.unmerge_adapter(),
        lambda one: one.set_adapter("default"),
        lambda one: one.base_model.disable_adapter_layers(),
    ):
        change(model), change(alone)
        seen.append(alone(batch["input_ids"], use_cache=False).logits)
        torch.testing.assert_close(plan.gather(model(batch["input_ids"]).logits), seen[-1], rtol=0, atol=1e-12)
    assert not torch.allclose(seen[0], seen[3])
    assert not torch.allclose(seen[3], seen[4])


def test_peft_models_train_as_in_one_process_and_adapters_may_change(pools):
    pools.run(2, peft_models)


def tuner_step(kind: str):
    batch = make_batch(17)
    wanted = once(lambda: step_alone(make_peft(TUNERS[kind](import_module("peft"))), batch))
    model = make_peft(TUNERS[kind](import_module("peft")))
    parallelize_module(model, line(), plan := ring_plan(model))
    assert_same_step(model, model, plan, batch, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TUNERS)
def test_every_method_that_is_accepted_trains_as_in_one_process(pools, kind):
    pools.run(2, tuner_step, kind)


REFUSED = {
    "PROMPT_TUNING puts virtual tokens before the first one": lambda peft: peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4
    ),
    "PREFIX_TUNING puts keys and values before the first token": lambda peft: peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4
    ),
    "P_TUNING puts virtual tokens": lambda peft: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "ADAPTION_PROMPT replaces attention modules": lambda peft: peft.AdaptionPromptConfig(
        task_type="CAUSAL_LM", adapter_layers=1, adapter_len=4
    ),
    "ADALORA adds to the loss": lambda peft: peft.AdaLoraConfig(target_modules=LINEAR, total_step=10),
    "alora_invocation_tokens": lambda _: lora(alora_invocation_tokens=[5]),
    "HRA was not tried; tried are LORA": lambda peft: peft.HRAConfig(target_modules=LINEAR),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("text", REFUSED)
def test_methods_that_change_the_sequence_are_refused_by_name(text):
    with pytest.raises(NotImplementedError, match=text):
        ring_plan(make_peft(REFUSED[text](import_module("peft"))))


def test_methods_that_were_not_tried_are_taken_as_unlisted():
    ring_plan(make_peft(import_module("peft").HRAConfig(target_modules=LINEAR)), unlisted=True)


def test_accepted_methods_are_those_that_are_tested():
    from dtensor_ring.integrations.transformers.peft_models import TUNERS as ACCEPTED

    assert set(ACCEPTED) == set(TUNERS)
