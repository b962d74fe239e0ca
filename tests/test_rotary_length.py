"""Rotary embeddings that depend on how long the batch is take the length of the whole batch, not of a rank's part."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import line, refused
from models import SIZES, build
from torch import nn
from torch.distributed.tensor.parallel import parallelize_module
from transformers import Gemma3TextConfig, LlamaConfig, Phi3Config

from dtensor_ring import Contiguous, Documents, Zigzag, ring_plan
from dtensor_ring.integrations.transformers.rotary import length_rotaries, longest_position

SIZES = SIZES | {"max_position_embeddings": 16}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 3.0, 4.0]}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
CONFIGS = {
    "longrope": lambda: Phi3Config(
        rope_parameters=LONG,
        original_max_position_embeddings=16,
        pad_token_id=0,
        **SIZES | {"max_position_embeddings": 64},
    ),
    "dynamic": lambda: LlamaConfig(rope_parameters=DYNAMIC, **SIZES),
    "dynamic in one kind of layers": lambda: Gemma3TextConfig(
        head_dim=8,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=5,
        rope_parameters={"full_attention": DYNAMIC, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
        **SIZES,
    ),
}
# Across the 16 tokens that frequencies were made for, up and down, and up again by less than before: `dynamic` keeps what it had.
LENGTHS = (9, 30, 22, 12, 17, 40)


def whole_lengths(kind: str):
    ids = torch.randint(3, 64, (1, max(LENGTHS)), generator=torch.Generator().manual_seed(1))
    packed = Documents.from_lengths([7, 18, 5])
    alone, model = build(CONFIGS[kind]()), build(CONFIGS[kind]())
    ours = Contiguous(1) if kind == "longrope" else Zigzag(1)  # rank 0 of Contiguous has the short half of every row
    plan = ring_plan(model, ours)
    hooks = [len(part._forward_pre_hooks) for part in model.modules()]
    parallelize_module(model, line(), plan)
    outs = []
    for length in LENGTHS:
        wanted, found = alone(ids[:, :length], use_cache=False).logits, plan.gather(model(ids[:, :length]).logits)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10, msg=lambda text, length=length: f"{length}: {text}")
        outs.append(wanted)
    assert not torch.allclose(outs[0], outs[1][:, : LENGTHS[0]])  # the length does matter
    positions = packed.position_ids()
    wanted = alone(ids[:, :30], position_ids=positions, use_cache=False).logits
    for given in ({"position_ids": positions}, {"documents": packed}):
        torch.testing.assert_close(plan.gather(model(ids[:, :30], **given).logits), wanted, rtol=0, atol=1e-10)
    refused(lambda: model.model(ids[:, :9]), RuntimeError, "was run outside of the forward pass of the parallelized model")
    plan.undo()
    assert [len(part._forward_pre_hooks) for part in model.modules()] == hooks
    assert torch.equal(model(ids[:, :9], use_cache=False).logits, alone(ids[:, :9], use_cache=False).logits)


@pytest.mark.parametrize("kind", CONFIGS)
def test_frequencies_are_those_of_the_whole_batch_as_it_grows_and_shrinks(pools, kind):
    pools.run(2, whole_lengths, kind)


def test_the_longest_position_of_a_batch_is_known_before_it_is_cut():
    documents = Documents(((0, 4, 10), (0, 7, 10)))
    mask = torch.ones(2, 10)
    assert longest_position({}, 10, None) == 9
    assert longest_position({}, 10, documents) == 6
    assert longest_position({"attention_mask": mask}, 10, documents) == 9
    assert longest_position({"position_ids": torch.tensor([[3, 4, 8]])}, 3, None) == 8


def test_rotary_modules_inside_layers_are_refused():
    model = build(CONFIGS["dynamic"]())
    assert length_rotaries(model) == [model.model.rotary_emb]
    model.model.layers[1].register_module("rotary_emb", model.model.rotary_emb)
    model.model.rotary_emb = nn.Identity()
    with pytest.raises(
        NotImplementedError, match=re.escape("model.layers.1.rotary_emb has a rope type that depends on the length")
    ):
        ring_plan(model)
