"""Text models from inside of vision models: positions on three axes are cut with their tokens."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from helpers import line, once, refused, slow
from test_families import SIZES
from torch.distributed.tensor.parallel import parallelize_module
from transformers.models import qwen2_5_vl, qwen2_vl, qwen3_vl

from dtensor_ring import Contiguous, Documents, Zigzag, ring_plan

ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
MODELS = {
    "qwen2_vl_text": (qwen2_vl, "Qwen2VLText", {}),
    "qwen2_5_vl_text": (qwen2_5_vl, "Qwen2_5_VLText", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3_vl_text": (qwen3_vl, "Qwen3VLText", {"head_dim": 8}),
}


def make_tower(kind: str):
    room, name, more = MODELS[kind]
    torch.manual_seed(0)
    config = getattr(room, f"{name}Config")(rope_parameters=ROPE, **SIZES, **more)
    config._attn_implementation = "sdpa"
    assert config.model_type == kind
    return getattr(room, f"{name}Model")(config).double()


def places(length: int) -> torch.Tensor:
    """Positions (3, B, S) of rows with an image of 2 x 3 patches after four tokens of text."""
    text = torch.arange(length)[None].expand(3, -1).clone()
    text[:, 4:10] = torch.stack([torch.zeros(6), torch.arange(6) // 3, torch.arange(6) % 3]).long() + 4
    text[:, 10:] = torch.arange(7, 7 + length - 10)
    return text[:, None].expand(-1, 2, -1)


def alone(kind: str, cases):
    model, outs = make_tower(kind), []
    for _, alone_given, _ in cases:
        outs.append(model(use_cache=False, **alone_given).last_hidden_state)
    sum(out.square().sum() for out in outs).backward()
    return [out.detach() for out in outs], {name: parameter.grad for name, parameter in model.named_parameters()}


def tower_step(kind: str):
    """Embedded tokens, as a vision model hands them over: plain text, an image's positions, and packed rows in four axes."""
    length, documents = 23, Documents.from_lengths([9, 14])
    torch.manual_seed(1)
    embedded = {"inputs_embeds": torch.randn(2, length, 32, dtype=torch.float64)}
    packed = torch.cat([documents.position_ids().expand(2, -1)[None], places(length)])
    text = {**embedded, "position_ids": torch.arange(length).expand(3, 2, -1)}
    cases = [
        (Zigzag(1), embedded, text),
        (Contiguous(1), {**embedded, "position_ids": places(length)}, {**embedded, "position_ids": places(length)}),
        (Zigzag(1), {**embedded, "position_ids": packed}, {**embedded, "position_ids": packed}),
    ]
    wanted, grads = once(lambda: alone(kind, cases))
    assert not torch.allclose(wanted[0], wanted[1])
    model = make_tower(kind)
    for (placement, _, given), whole in zip(cases, wanted, strict=True):
        plan = ring_plan(model, placement)
        parallelize_module(model, line(), plan)
        hidden = model(**given).last_hidden_state
        torch.testing.assert_close(plan.gather(hidden), whole, rtol=0, atol=1e-6)  # angles are computed in float32
        hidden.square().sum().backward()
        plan.undo()
    for name, parameter in model.named_parameters():
        if grads[name] is not None:
            dist.all_reduce(parameter.grad)
            error = (parameter.grad - grads[name]).abs().max()
            assert error <= 1e-6 * grads[name].abs().max() + 1e-9, f"{name}: {error}"
    parallelize_module(model, line(), ring_plan(model))
    again = torch.cat([torch.arange(12), torch.arange(11)]).expand(3, 2, -1)
    refused(lambda: model(**embedded, position_ids=again), ValueError, "position_ids (3, B, S) go back within a row", "documents=")
    model(**embedded, position_ids=again, documents=Documents.from_lengths([12, 11]))
    refused(lambda: model(**embedded, position_ids=again[:2]), NotImplementedError, "takes (B, S), or (3, B, S) or (4, B, S)")
    if kind == "qwen3_vl_text":
        seen = torch.zeros(2, length, dtype=torch.bool)
        refused(lambda: model(**embedded, visual_pos_masks=seen), NotImplementedError, "visual_pos_masks is not supported")


@pytest.mark.parametrize("kind", [kind if kind == "qwen2_5_vl_text" else slow(kind) for kind in MODELS])
def test_towers_are_those_of_one_process_with_positions_on_three_axes(pools, kind):
    pools.run(2, tower_step, kind)
