"""Every supported family of Hugging Face models, with the real classes: logits and all gradients as in one process."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from dtensor_ring import Contiguous, Documents, Stripe, Zigzag, ring_plan
from dtensor_ring.integrations.transformers.checks import MODEL_TYPES

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,  # scores large enough that softcaps, windows and sinks show
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 24, **ALTERNATING}
FAMILIES = {
    "llama": lambda: LlamaConfig(**SIZES),
    "mistral": lambda: MistralConfig(sliding_window=6, **SIZES),
    "qwen2": lambda: Qwen2Config(use_sliding_window=True, sliding_window=5, max_window_layers=1, **SIZES),
    "qwen3": lambda: Qwen3Config(head_dim=8, use_sliding_window=True, sliding_window=5, max_window_layers=1, **SIZES),
    "qwen3_moe": lambda: Qwen3MoeConfig(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, **SIZES),
    "mixtral": lambda: MixtralConfig(sliding_window=7, **EXPERTS, **SIZES),
    "gemma2": lambda: Gemma2Config(attn_logit_softcapping=2.0, final_logit_softcapping=5.0, **GEMMA, **SIZES),
    "gemma3_text": lambda: Gemma3TextConfig(**GEMMA, **SIZES),
    "gpt_oss": lambda: GptOssConfig(head_dim=8, **EXPERTS, **ALTERNATING, **SIZES),
    "phi3": lambda: Phi3Config(sliding_window=9, **SIZES),
}
ONLY_EAGER = ("gemma2", "gpt_oss")  # sdpa has neither softcaps nor sinks
EXPERT_FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss")
LAYOUTS = Contiguous(1), Zigzag(1), Stripe(1)


def make_model(family: str):
    torch.manual_seed(0)
    implementation = "eager" if family in ONLY_EAGER else "sdpa"
    model = AutoModelForCausalLM.from_config(FAMILIES[family](), attn_implementation=implementation).double()
    assert model.config.model_type == family
    if family in EXPERT_FAMILIES:
        model.set_experts_implementation("eager")  # grouped_mm has no float64
    return model


def in_double():
    """Softmax without the cast to float32 of the eager attention of gemma2: the same function, computed exactly."""
    softmax = torch.nn.functional.softmax
    return patch.object(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim))


def run_alone(family: str, batch, documents: Documents | None = None):
    """Loss and logits of one process, and its gradients; of a packed batch every document by itself."""
    model = make_model(family)
    bounds = (0, batch["input_ids"].shape[1]) if documents is None else documents.bounds[0]
    count = (batch["labels"][:, 1:] != -100).sum()
    outs = []
    for start, stop in pairwise(bounds):
        part = {name: value[:, start:stop] for name, value in batch.items() if name != "position_ids"}
        with in_double() if family == "gemma2" else nullcontext():
            outs.append(model(**part, num_items_in_batch=count, use_cache=False))
        outs[-1].loss.backward()
    logits = torch.cat([out.logits.detach() for out in outs], dim=1)
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return sum(out.loss.detach() for out in outs), logits, grads


def _mesh():
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))


def make_batch(length: int, rows: int = 2) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 48, (rows, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[-1, length // 2 : length // 2 + 2] = -100
    return {"input_ids": ids, "labels": labels}


def assert_same_gradients(model, wanted, scale: float) -> None:
    """`scale` times the sum over ranks is the gradient of one process, up to the float32 in which transformers computes losses."""
    for name, parameter in model.named_parameters():
        dist.all_reduce(parameter.grad)
        error = (parameter.grad * scale - wanted[name]).abs().max()
        assert wanted[name].abs().max() > 0, name
        assert error <= 1e-6 * wanted[name].abs().max(), f"{name}: {error} of {wanted[name].abs().max()}"


def train_step(family: str, packed: bool):
    """One step in every layout, beside one process."""
    world, length = dist.get_world_size(), 23
    batch, documents, items = make_batch(length), None, {}
    if packed:
        documents = Documents.from_lengths([4, length - 7, 3])
        batch["position_ids"] = documents.position_ids().expand(2, -1)
        batch["labels"][:, [4, length - 3]] = -100
        items = {"num_items_in_batch": (batch["labels"][:, 1:] != -100).sum()}
    loss, logits, grads = run_alone(family, batch, documents)
    for placement in LAYOUTS:
        model = make_model(family)
        plan = ring_plan(model, placement)
        parallelize_module(model, _mesh(), plan)
        out = model(**batch, **items)
        out.loss.backward()
        torch.testing.assert_close(plan.gather(out.logits), logits, rtol=0, atol=1e-12)
        mine = out.loss.detach().clone()
        if items:
            dist.all_reduce(mine)
        torch.testing.assert_close(mine, loss, rtol=1e-6, atol=0)
        assert_same_gradients(model, grads, 1 if items else 1 / world)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_logits_and_every_gradient_are_those_of_one_process(pools, world, family, packed):
    pools.run(world, train_step, family, packed)


def test_every_supported_family_is_tested():
    assert set(FAMILIES) == set(MODEL_TYPES)
