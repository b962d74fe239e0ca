"""Small Hugging Face models and batches: the same on every rank and in every test."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen3Config

from dtensor_ring import Documents

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen3": lambda: Qwen3Config(head_dim=8, **SIZES),
    "qwen3 window": lambda: Qwen3Config(head_dim=8, use_sliding_window=True, sliding_window=5, max_window_layers=1, **SIZES),
}


def build(config: PretrainedConfig, attention: str = "sdpa") -> PreTrainedModel:
    """A float64 model with the weights that its config has in every test."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).double()


def make_model(kind: str) -> PreTrainedModel:
    return build(CONFIGS[kind]())


def make_batch(length: int, rows: int = 2) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, : min(3, length - 2)] = -100
    labels[-1, length // 2 : length // 2 + 2] = -100
    return {"input_ids": ids, "labels": labels}


def packed_mask(documents: Documents, rows: int) -> torch.Tensor:
    """What a packed row means, spelled out for a model without it: (rows, 1, S, S)."""
    starts = documents.position_ids() - torch.arange(documents.length)
    seen = (starts[:, :, None] == starts[:, None]) & torch.ones(documents.length, documents.length).tril().bool()
    return seen[:, None].expand(rows, -1, -1, -1)


def worst(pairs) -> float:
    return max(((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).item() for a, b in pairs)
