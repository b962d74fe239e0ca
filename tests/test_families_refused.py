"""What a family of Hugging Face models has and a part of the sequence would get wrong is refused by name."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import refused
from test_families import FAMILIES, GEMMA, SIZES, make_batch, make_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3Model,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    Phi3Config,
    PhimoeConfig,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3NextConfig,
)

from dtensor_ring import ring_plan

VISION = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
REFUSED = [
    (
        lambda: Qwen3Config(head_dim=8, layer_types=["linear_attention", "full_attention"], **SIZES),
        "layers of type linear_attention",
    ),
    (lambda: Qwen3Config(head_dim=8, layer_types=["chunked_attention"] * 2, **SIZES), "layers of type chunked_attention"),
    (lambda: PhimoeConfig(sliding_window=5, num_local_experts=2, **SIZES), "its layers do not pass the window on to attention"),
    (
        lambda: Qwen2MoeConfig(num_experts=2, use_sliding_window=True, sliding_window=5, max_window_layers=1, **SIZES),
        "sliding_window=5 of a 'qwen2_moe' model is not supported",
    ),
    (lambda: BertConfig(add_cross_attention=True, is_decoder=True, **SIZES), "models that attend to a second sequence"),
    (lambda: Gemma2Config(use_bidirectional_attention=True, **GEMMA, **SIZES), "its masks stay causal under some attentions"),
    (lambda: LlamaConfig(is_causal=False, **SIZES), "is_causal=False is not supported in the config"),
    (lambda: LlamaConfig(output_router_logits=True, **SIZES), "output_router_logits=True in the config"),
    (lambda: MistralConfig(output_router_logits=True, **SIZES), "load-balancing loss is not linear"),
    (lambda: Phi3Config(output_router_logits=True, **SIZES), "in the config is not supported"),
    (lambda: Gemma3Config(text_config=FAMILIES["gemma3_text"](), vision_config=VISION), "holds more than a text model"),
    (lambda: Qwen3NextConfig(head_dim=8, **SIZES), "models of type 'qwen3_next' are not supported; supported are llama, mistral"),
]


@pytest.mark.parametrize(("config", "text"), REFUSED, ids=[text for _, text in REFUSED])
def test_configs_that_a_part_of_the_sequence_would_get_wrong_are_refused(config, text):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(), attn_implementation="eager")
    with pytest.raises(NotImplementedError, match=re.escape(text)):
        ring_plan(model)


def test_vision_towers_are_refused_with_the_class_that_is_supported():
    with torch.device("meta"):
        model = Gemma3Model(Gemma3Config(text_config=FAMILIES["gemma3_text"](), vision_config=VISION))
    with pytest.raises(
        NotImplementedError, match=r"Gemma3Model holds more than a text model .* such as one of class Gemma3ForCausalLM"
    ):
        ring_plan(model)


def test_heads_that_pool_are_refused():
    with pytest.raises(NotImplementedError, match="LlamaForSequenceClassification is not supported: only"):
        ring_plan(LlamaForSequenceClassification(LlamaConfig(**SIZES)))


@pytest.mark.parametrize(("window", "text"), [(None, "but sliding_window is None"), (0, "at least 1, found 0")])
def test_windows_without_tokens_are_refused(window, text):
    model = make_model("gemma3_text")
    model.config.sliding_window = window
    with pytest.raises(ValueError, match=text):
        ring_plan(model)


def refused_calls():
    model, batch = make_model("mistral"), make_batch(8)
    parallelize_module(model, init_device_mesh("cpu", (2,)), ring_plan(model))
    cases = [
        ({"output_router_logits": True}, "output_router_logits=True in the call is not supported"),
        ({"is_causal": False}, "is_causal=False is not supported in a call"),
        ({"token_type_ids": torch.zeros(2, 8)}, "token_type_ids is not supported"),
        ({"pixel_values": torch.zeros(1, 3, 4, 4)}, "pixel_values is not supported"),
        ({"attention_mask": torch.zeros(2, 1, 8, 8)}, "found a torch.float32 tensor of shape (2, 1, 8, 8); only a mask (2, 8)"),
    ]
    for extra, text in cases:
        refused(lambda extra=extra: model(**batch, **extra), NotImplementedError, text)
    model.config.output_router_logits = True
    refused(lambda: model(**batch), NotImplementedError, "output_router_logits=True in the config")
    model(**batch, output_router_logits=False)


def test_calls_that_a_part_of_the_sequence_would_get_wrong_are_refused(pools):
    pools.run(2, refused_calls)
