"""Models whose type is not listed: taken if tokens reach one another through attention alone, refused by what is seen if not."""

from __future__ import annotations

import re
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
from helpers import line, refused
from models import SIZES, make_batch
from test_families import FAMILIES
from test_families import make_model as make_family
from torch import nn
from torch.distributed.tensor.parallel import parallelize_module
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from dtensor_ring import ring_plan
from dtensor_ring.integrations.transformers import check_tokenwise
from dtensor_ring.integrations.transformers.structure import check_structure


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnForCausalLM(LlamaForCausalLM):
    """A user's model: a Llama under another name, which nobody tried."""

    config_class = OwnConfig


def make_own(change=lambda model: None) -> OwnForCausalLM:
    torch.manual_seed(0)
    config = OwnConfig(**SIZES, attn_implementation="sdpa")
    model = OwnForCausalLM(config).double()
    change(model)
    return model


class ShiftedMLP(LlamaMLP):
    """Takes half of its input from the token before, as RWKV does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward((x + x.roll(1, dims=1)) / 2)


class MeanMLP(LlamaMLP):
    """Adds a little of the row's mean."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + 1e-6 * x.mean(1, keepdim=True))


class Counted(nn.Module):
    """An embedding of the place in the row, whatever position_ids say."""

    def __init__(self, words: nn.Embedding) -> None:
        super().__init__()
        self.words, self.places = words, nn.Embedding(128, 32, dtype=torch.float64)
        self.num_embeddings = words.num_embeddings

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.words(ids) + self.places(torch.arange(ids.shape[1]))


class Forgetful(LlamaAttention):
    """Loses the keywords of the model's call, among which the batch is."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **_keywords):
        return super().forward(hidden_states, position_embeddings, attention_mask)


class OwnAttention(LlamaAttention):
    """Computes attention by itself, without transformers' interface."""

    def forward(self, hidden_states, *_args, **_keywords):
        scores = self.q_proj(hidden_states) @ self.q_proj(hidden_states).mT
        return self.o_proj(scores.tril().softmax(-1) @ self.q_proj(hidden_states)), None


class Told(LlamaAttention):
    """Passes an argument to its attention that changes what is computed."""

    def forward(self, *args, **keywords):
        return super().forward(*args, **keywords, position_bias=torch.ones(1))


def of_kind(name: str, kind: type, model: nn.Module) -> None:
    """Modules of that name, turned into another class with the same parameters."""
    for layer in model.model.layers:
        getattr(layer, name).__class__ = kind


def with_window_in_its_mask_alone(model: nn.Module) -> None:
    """A mask of a window, of which the layers say nothing."""
    inner, forward = model.model, model.model.forward

    def masked(input_ids=None, attention_mask=None, **keywords):
        if attention_mask is None:
            embeds = inner.embed_tokens(input_ids)
            shifted = create_causal_mask(
                config=inner.config,
                inputs_embeds=embeds,
                attention_mask=None,
                past_key_values=None,
                and_mask_function=lambda b, h, q, k: k > q - 1000,
            )
            attention_mask = shifted
        return forward(input_ids=input_ids, attention_mask=attention_mask, **keywords)

    inner.forward = masked


def with_conv(model: nn.Module) -> None:
    model.model.layers[0].mlp.conv = nn.Conv1d(32, 32, 3, padding=1)


REFUSED = {
    "token 3 changes the outputs of tokens [4, 5] outside": partial(of_kind, "mlp", ShiftedMLP),
    "token 3 changes the outputs of tokens [0, 1, 2, 4, 5, 6, 7] outside": partial(of_kind, "mlp", MeanMLP),
    "do not give what they give in the whole row": lambda model: model.set_input_embeddings(Counted(model.get_input_embeddings())),
    "none of its modules asks for the attention interface": partial(of_kind, "self_attn", OwnAttention),
    "model.layers.1.self_attn (OwnAttention) computes attention by itself": lambda model: setattr(
        model.model.layers[1].self_attn, "__class__", OwnAttention
    ),
    "gives its attention 'position_bias', which ring attention does not read": partial(of_kind, "self_attn", Told),
    "Forgetful does not get the keywords of the model's call": partial(of_kind, "self_attn", Forgetful),
    "hides key 6000 to query 10000, which its is_causal=True and window (-1, -1) do not say": with_window_in_its_mask_alone,
    "model.layers.0.mlp.conv (Conv1d) reads other tokens": with_conv,
    "layerdrop=0.1 skips layers at random": lambda model: setattr(model.config, "layerdrop", 0.1),
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_reaches_other_tokens_outside_of_attention_is_seen(text):
    with pytest.raises(NotImplementedError, match=re.escape(text)):
        ring_plan(make_own(REFUSED[text]), unlisted=True)


def test_families_that_cannot_be_cut_are_refused_by_what_is_seen_of_them():
    sizes = {**SIZES, "pad_token_id": 0}
    cases = {
        "bloom": "does not go through the attention interface",
        "llama4_text": "counts the tokens that it sees (its forward calls arange)",
        "camembert": "without position_ids it does not count tokens from 0",
    }
    more = {"llama4_text": {"num_local_experts": 2, "layer_types": ["full_attention"] * 2, "intermediate_size_mlp": 32}}
    for kind, text in cases.items():
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes, **more.get(kind, {})))
        with pytest.raises(NotImplementedError, match=re.escape(text)):
            ring_plan(model, unlisted=True)


def test_families_that_are_exact_pass_every_look():
    for family in FAMILIES:
        model = make_family(family)
        check_structure(model)
        check_tokenwise(model)


def test_a_look_leaves_the_model_as_it_was():
    model = make_own().train()
    model.model.layers[0].eval()
    modes = [part.training for part in model.modules()]
    state = torch.get_rng_state()
    check_tokenwise(model)
    assert [part.training for part in model.modules()] == modes
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_without_weights_is_taken_with_a_warning():
    with torch.device("meta"):
        model = OwnForCausalLM(OwnConfig(**SIZES))
    with pytest.raises(ValueError, match="is on the meta device, where nothing can be run"):
        check_tokenwise(model)
    with pytest.warns(UserWarning, match=r"call dtensor_ring.integrations.transformers.check_tokenwise\(model\)"):
        ring_plan(model, unlisted=True)


def own_step():
    batch = make_batch(17)
    refused(lambda: ring_plan(make_own()), NotImplementedError, "models of type 'own_llama' are not supported", "unlisted=True")
    alone, model = make_own(), make_own()
    wanted = alone(**batch)
    wanted.loss.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = ring_plan(model, unlisted=True)
    parallelize_module(model, line(), plan)
    out = model(**batch)
    out.loss.backward()
    torch.testing.assert_close(plan.gather(out.logits), wanted.logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(out.loss, wanted.loss, rtol=0, atol=2e-6)
    for one, other in zip(model.parameters(), alone.parameters(), strict=True):
        dist.all_reduce(one.grad)
        assert (one.grad / 2 - other.grad).abs().max() <= 1e-6 * other.grad.abs().max()


def test_a_users_model_trains_as_in_one_process(pools):
    pools.run(2, own_step)
