"""Dropout outside of attention: masks of their own for every rank of the sequence axis, replayed by checkpointing."""

from __future__ import annotations

import math
from collections import Counter
from importlib import import_module

import pytest
import torch
import torch.distributed as dist
from helpers import grid, line, refused
from models import SIZES, make_batch, make_model
from torch import nn
from torch.distributed.tensor.parallel import parallelize_module
from transformers import AutoModelForCausalLM, Phi3Config

from dtensor_ring import Zigzag, ring_plan
from dtensor_ring.integrations.transformers.streams import stream_seed

P = 0.5


class Masks:
    """What the dropout modules of a model kept in each call, in order."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[torch.Tensor] = []
        for module in model.modules():
            if isinstance(module, nn.Dropout) and module.p:
                module.register_forward_hook(self._note)

    def _note(self, _module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        self.calls.append((output != 0)[args[0] != 0].flatten())

    def take(self) -> torch.Tensor:
        kept, self.calls = torch.cat(self.calls), []
        return kept


def hidden_dropout(dropout: str, mesh=None, checkpointing: bool = False):
    """A model with dropout after its blocks and of its embeddings, and in its attention."""
    torch.manual_seed(0)
    config = Phi3Config(resid_pdrop=P, embd_pdrop=P, attention_dropout=0.2, pad_token_id=0, **SIZES)
    model = AutoModelForCausalLM.from_config(config).double().train()
    plan = ring_plan(model, Zigzag(1), dropout=dropout, kernel="math")
    parallelize_module(model, mesh or line(), plan)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, plan


def of_all_ranks(value: torch.Tensor) -> list[torch.Tensor]:
    found = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(found, value)
    return found


def assert_independent(a: torch.Tensor, b: torch.Tensor) -> None:
    """Masks that agree as often as two draws do, within five standard deviations."""
    agree = (a == b).double().mean().item()
    assert abs(agree - (P * P + (1 - P) ** 2)) < 5 * 0.5 / math.sqrt(len(a)), agree


def streams():
    batch = make_batch(32)
    model, plan = hidden_dropout("per_rank")
    masks = Masks(model)
    torch.manual_seed(7)
    model(**batch).loss.backward()
    after = torch.get_rng_state()
    first = of_all_ranks(masks.take().byte())
    assert abs(first[0].double().mean().item() - (1 - P)) < 5 * 0.5 / math.sqrt(len(first[0]))
    assert_independent(*first)
    assert torch.equal(*of_all_ranks(after))
    # The next step drops others, and the same seed the same again, with the same gradients where layers run twice.
    model(**batch)
    assert_independent(masks.take(), first[dist.get_rank()].bool())
    grads = []
    for again in (False, True):
        model, _ = hidden_dropout("per_rank", checkpointing=again)
        masks = Masks(model)
        torch.manual_seed(7)
        model(**batch).loss.backward()
        assert torch.equal(torch.get_rng_state(), after)
        grads.append([parameter.grad for parameter in model.parameters()])
        ran = masks.take()
        assert torch.equal(ran[: len(first[0])], first[dist.get_rank()].bool())
        assert again == (len(ran) > len(first[0]))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    leaves_no_trace(model, plan)
    # Without it equal seeds are equal masks, and with LoRA's dropout too.
    model, _ = hidden_dropout("same")
    masks = Masks(model)
    torch.manual_seed(7)
    model(**batch)
    assert torch.equal(*of_all_ranks(masks.take().byte()))
    peft = import_module("peft")
    adapted = peft.get_peft_model(
        make_model("llama"), peft.LoraConfig(target_modules=["q_proj"], lora_dropout=P, task_type="CAUSAL_LM")
    ).train()
    parallelize_module(adapted, line(), ring_plan(adapted, dropout="per_rank"))
    masks = Masks(adapted)
    torch.manual_seed(7)
    adapted(**batch)
    assert_independent(*of_all_ranks(masks.take().byte()))
    assert torch.equal(*of_all_ranks(torch.get_rng_state()))


def leaves_no_trace(model, plan) -> None:
    """Evaluation draws nothing, and a forward pass that raises leaves the generator equal on all ranks."""
    batch = make_batch(32)
    before = torch.get_rng_state()
    model.eval()(**batch)
    assert torch.equal(torch.get_rng_state(), before)
    refused(lambda: model.train()(**batch, output_attentions=True), NotImplementedError, "output_attentions")
    assert torch.equal(torch.get_rng_state(), before)

    def fail(*_: object) -> None:
        raise ValueError("in the middle")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    refused(lambda: model(**batch), ValueError, "in the middle")
    handle.remove()
    assert torch.equal(*of_all_ranks(torch.get_rng_state()))
    assert not torch.equal(torch.get_rng_state(), before)
    plan.undo()


def test_masks_of_ranks_are_independent_and_replayed_and_generators_end_equal(pools):
    pools.run(2, streams)


def by_sequence_rank():
    """Ranks that hold one part of the sequence, as under tensor parallelism, drop alike; ranks with other parts do not."""
    model, _ = hidden_dropout("per_rank", grid("cp", "tp")["cp"])
    masks = Masks(model)
    torch.manual_seed(7)
    model(**make_batch(32))
    first, twin, other, last = of_all_ranks(masks.take().byte())
    assert torch.equal(first, twin)
    assert torch.equal(other, last)
    assert_independent(first, other)


def test_ranks_of_other_axes_share_the_masks_of_their_part(pools):
    pools.run(4, by_sequence_rank)


def one_rank():
    states, grads = [], []
    for dropout in ("same", "per_rank"):
        model, _ = hidden_dropout(dropout)
        torch.manual_seed(7)
        model(**make_batch(32)).loss.backward()
        states.append(torch.get_rng_state())
        grads.append([parameter.grad for parameter in model.parameters()])
    assert torch.equal(*states)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_one_rank_drops_what_it_drops_without(pools):
    pools.run(1, one_rank)


def test_seeds_of_streams_differ_by_rank_and_by_state():
    states = [torch.Generator().manual_seed(seed).get_state() for seed in range(8)]
    seeds = Counter(stream_seed(state, rank) for state in states for rank in range(512))
    assert len(seeds) == 8 * 512
    assert 0 <= min(seeds) <= max(seeds) < 1 << 63


def test_dropout_is_one_of_two_words():
    with pytest.raises(ValueError, match="dropout='each': use 'per_rank' for masks outside of attention"):
        ring_plan(make_model("llama"), dropout="each")
