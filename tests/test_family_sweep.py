"""More families of Hugging Face models than run by default: loss, logits and every gradient at two ranks beside one process."""

from __future__ import annotations

import re
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import line, once
from test_encoders import ENCODERS
from test_families import FAMILIES, SIZES, in_double, make_batch
from test_towers import MODELS as TOWERS
from torch.distributed.tensor.parallel import parallelize_module
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from dtensor_ring import Contiguous, Zigzag, ring_plan
from dtensor_ring.integrations.transformers import check_tokenwise
from dtensor_ring.integrations.transformers.checks import MODEL_TYPES
from dtensor_ring.integrations.transformers.structure import check_structure

SMALL = 1e-6  # of the largest: models compute norms and rotations in float32, whatever their weights are
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
SLIDING = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 5}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# Heads of latent attention: keys of 8 + 8, values of 8.
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
}
DEEPSEEK = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LLAMA_4_SCALE = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 8}
SWEPT: dict[str, dict[str, object]] = {
    "afmoe": {
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "num_dense_layers": 1,
        **ALTERNATING,
    },
    "apertus": {},
    "arcee": {},
    "cohere": {"logit_scale": 0.5, "use_qk_norm": True},
    "cohere2": {"logit_scale": 0.5, **ALTERNATING},
    "cwm": ALTERNATING,
    "deepseek_v2": {**LATENT, **DEEPSEEK},
    "deepseek_v3": {**LATENT, **DEEPSEEK},
    "diffllama": {},
    "dots1": {"head_dim": 8, **DEEPSEEK, **ALTERNATING},
    "ernie4_5": {"head_dim": 8},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 16,
        "moe_layer_start_index": 1,
        "moe_num_shared_experts": 1,
    },
    "exaone4": ALTERNATING,
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "gemma": {"head_dim": 8},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "glm4_moe": {"head_dim": 8, **DEEPSEEK},
    "gpt2": {"n_positions": 128, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "scale_attn_by_inverse_layer_idx": True},
    "gpt_neox": {"rotary_pct": 0.5, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "attention_multiplier": 0.3},
    "helium": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "jais2": {},
    "minimax_m2": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "ministral": {"head_dim": 8, **ALTERNATING},
    "ministral3": {"head_dim": 8, "rope_parameters": {**LLAMA_4_SCALE, "llama_4_scaling_beta": 0.3}},
    "modernbert-decoder": {**ALTERNATING},
    "nanochat": {},
    "olmo": {"clip_qkv": 1.0},
    "olmo2": {},
    "olmo3": ALTERNATING,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "persimmon": {"hidden_dropout": 0.0},
    "phi": {"resid_pdrop": 0.0},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.0},
    "qwen2_moe": {**ROUTED, "shared_expert_intermediate_size": 16},
    "seed_oss": {"head_dim": 8, "residual_dropout": 0.0, "attention_dropout": 0.0},
    "smollm3": {"no_rope_layers": [1, 0], "use_sliding_window": True, **ALTERNATING},
    "starcoder2": {"sliding_window": 5, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    "vaultgemma": {"head_dim": 8, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0, **ALTERNATING},
}
EAGER = ("vaultgemma",)  # sdpa has no softcaps


def make_model(kind: str):
    sizes = {**SIZES, "num_hidden_layers": 2, **SWEPT[kind]}
    config = CONFIG_MAPPING[kind](**sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager" if kind in EAGER else "sdpa").double().train()
    assert model.config.model_type == kind
    assert sum(parameter.numel() for parameter in model.parameters()) < 200_000
    if "experts" in str(model).lower():
        model.set_experts_implementation("eager")  # grouped_mm has no float64
    return model


def step_alone(kind: str, batch, bounds: tuple[int, ...]):
    """Loss, logits and gradients of one process, every document by itself."""
    model, outs = make_model(kind), []
    count = (batch["labels"][:, 1:] != -100).sum()
    for start, stop in pairwise(bounds):
        part = {name: value[:, start:stop] for name, value in batch.items()}
        with in_double() if kind in EAGER else nullcontext():
            outs.append(model(**part, num_items_in_batch=count, use_cache=False))
        outs[-1].loss.backward()
    logits = torch.cat([out.logits.detach() for out in outs], dim=1)
    return sum(out.loss.detach() for out in outs), logits, {name: parameter.grad for name, parameter in model.named_parameters()}


def error_of(found: torch.Tensor, wanted: torch.Tensor, least: float = 0.0) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max().clamp_min(max(least, 1e-30))).item()


def swept_step(kind: str):
    """One step at each of two lengths and layouts, and a packed one; windows of 5 tokens end within a rank and beyond it."""
    for bounds, placement in (((0, 23), Zigzag(1)), ((0, 16), Contiguous(1)), ((0, 11, 23), Zigzag(1))):
        batch = make_batch(bounds[-1])
        batch["labels"][:, list(bounds[1:-1])] = -100  # a document's first token is predicted by none
        loss, logits, grads = once(lambda batch=batch, bounds=bounds: step_alone(kind, batch, bounds))
        model = make_model(kind)
        check_structure(model)
        check_tokenwise(model)
        plan = ring_plan(model, placement)
        parallelize_module(model, line(), plan)
        packed = {"documents": list(bounds)} if len(bounds) > 2 else {}
        out = model(**batch, **packed)
        out.loss.backward()
        assert error_of(plan.gather(out.logits), logits) < SMALL
        torch.testing.assert_close(out.loss.detach(), loss, rtol=1e-6, atol=0)
        # The bias of keys moves all scores of a query alike, so that its gradient is zero but for rounding.
        least = 1e-3 * max(grad.abs().max().item() for grad in grads.values() if grad is not None)
        for name, parameter in model.named_parameters():
            assert (parameter.grad is None) == (grads[name] is None), name
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                error = error_of(parameter.grad / dist.get_world_size(), grads[name], least)
                assert error < SMALL, f"{name}: {error}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", SWEPT)
def test_a_step_at_two_ranks_is_that_of_one_process(pools, kind):
    pools.run(2, swept_step, kind)


def test_every_supported_family_is_tested():
    tested = [*FAMILIES, *SWEPT, *ENCODERS, *TOWERS]
    assert sorted(tested) == sorted(MODEL_TYPES)
    told = set(re.findall(r"[\w-]+", (Path(__file__).parent.parent / "docs" / "models.md").read_text()))
    assert told >= set(MODEL_TYPES)
