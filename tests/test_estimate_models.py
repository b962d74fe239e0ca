"""`estimate` beside transformers: weights of models, and bytes that an allocator gives out while they take a step."""

from __future__ import annotations

import gc

import pytest
import torch
from allocated import Allocated
from helpers import line, slow
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from transformers import AutoConfig, AutoModelForCausalLM

from dtensor_ring import Zigzag, ring_plan
from dtensor_ring.estimation.memory import LIBRARIES, PRECISIONS, StepMemory, Training, step_memory
from dtensor_ring.estimation.model_shape import read_model

# Types whose layers are described; others are taken for Llama's, and a note says so.
DESCRIBED = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma2", "gemma3_text", "gpt_oss", "phi3")
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
WIDE = {"num_attention_heads": 8, "head_dim": 32, "intermediate_size": 64}  # queries larger than all else


def fields_of(kind, **more):
    experts = EXPERTS if kind in ("mixtral", "qwen3_moe", "gpt_oss") else {}
    inside = {"moe_intermediate_size": 48} if kind == "qwen3_moe" else {}
    window = {} if kind == "qwen3_moe" else {"sliding_window": 64}
    return {"model_type": kind, **SIZES, **experts, **inside, **window, **more}


def make(fields, dtype, attention=None):
    fields = dict(fields)
    torch.manual_seed(0)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).train()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", DESCRIBED)
def test_a_config_has_as_many_weights_as_its_model(kind, tied):
    fields = fields_of(kind, tie_word_embeddings=tied, num_hidden_layers=3)
    with torch.device("meta"):
        model = make(fields, torch.float32)
    read = read_model(fields)
    assert read.parameters == sum(weight.numel() for weight in model.parameters())
    assert read == read_model(model.config.to_dict())
    for index in range(3):
        assert read.layer_weights(index) == sum(weight.numel() for weight in model.model.layers[index].parameters())


def stepped(model: nn.Module, vocabulary: int, tokens: int) -> dict[str, int]:
    """Bytes of a second step: saved between forward and backward, and the most of each phase beyond those before it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, foreach=False)
    ids = torch.randint(2, vocabulary, (1, tokens))
    counted = Allocated()
    with counted:
        for weight in model.parameters():
            counted.hold(weight.to_local() if hasattr(weight, "to_local") else weight)
        for _ in range(2):
            optimizer.zero_grad()
            gc.collect()
            counted.phase()
            before = counted.now
            loss = model(input_ids=ids, labels=ids).loss
            saved, forward = counted.now - before, counted.phase() - before
            loss.backward()
            backward = counted.phase() - before
            optimizer.step()
            del loss
    return {"states": before, "saved": saved, "forward": forward, "backward": backward}


def predicted(memory: StepMemory) -> dict[str, int]:
    before = memory.phase("between steps").bytes
    phases = {name: memory.phase(name).bytes - before for name in ("forward", "backward")}
    return {"states": before - LIBRARIES, "saved": memory.saved, **phases}


STEPS = [
    ("llama", WIDE, "bf16", "full"),
    ("llama", {"vocab_size": 1024, "tie_word_embeddings": True}, "fp32", "none"),
    ("gemma3_text", {}, "bf16", "full"),
    ("qwen3_moe", {}, "bf16", "none"),
]
_FEW = len(STEPS)
STEPS += [
    ("qwen3", WIDE, "bf16", "full"),
    ("llama", {"vocab_size": 1024}, "bf16", "full"),
    *(
        (kind, {}, precision, checkpoint)
        for kind in DESCRIBED
        for precision in ("bf16", "fp32")
        for checkpoint in ("none", "full")
        if not (precision == "fp32" and kind in ("mixtral", "qwen3_moe", "gpt_oss"))
    ),
]


def steps_of_one_rank(steps, tokens=256):
    for kind, more, precision, checkpoint in steps:
        fields, size = fields_of(kind, **more), PRECISIONS[precision]
        model = make(fields, torch.bfloat16 if precision == "bf16" else torch.float32)
        if checkpoint == "full":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        parallelize_module(model, line(), ring_plan(model, Zigzag(1), kernel="math"))
        found = stepped(model, fields["vocab_size"], tokens)
        memory = step_memory(Training(read_model(fields), tokens, tokens, size, checkpoint), lambda _: (0.0, 0.0))
        wanted = predicted(memory)
        where = f"{kind} {more} {precision} {checkpoint}: {wanted}, found {found}, {memory.peak.moment}"
        # A tracing mode makes one more tensor of each expert's rows than a program without one; gpt-oss' bias is gathered beside.
        loose = 0.05 if kind in ("mixtral", "gpt_oss") else 0.01
        assert wanted["states"] == pytest.approx(found["states"], rel=0.02), where
        assert wanted["saved"] == pytest.approx(found["saved"], rel=0.03 if loose > 0.01 else 0.01), where
        assert wanted["backward"] == pytest.approx(found["backward"], rel=loose), where
        if checkpoint == "none":
            assert wanted["forward"] == pytest.approx(found["forward"], rel=loose if kind != "gpt_oss" else 0.1), where


@pytest.mark.parametrize("steps", [STEPS[:_FEW], slow(STEPS[_FEW:])], ids=["some", "every"])
def test_a_step_holds_the_bytes_that_are_estimated(pools, steps):
    pools.run(1, steps_of_one_rank, steps)


def steps_in_shards(precisions, layers=3, tokens=16):
    for precision in precisions:
        fields, size = fields_of("llama", hidden_size=128, intermediate_size=512, num_hidden_layers=layers), PRECISIONS[precision]
        model = make(fields, torch.bfloat16 if precision == "bf16" else torch.float32, "sdpa")
        model.gradient_checkpointing_enable({"use_reentrant": False})
        mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        policy = mixed if precision == "mixed" else MixedPrecisionPolicy()
        for layer in model.model.layers:
            fully_shard(layer, mesh=line(), mp_policy=policy)
        fully_shard(model, mesh=line(), mp_policy=policy)
        found = stepped(model, fields["vocab_size"], tokens)
        training = Training(read_model(fields), tokens, tokens, size, "full", parallel="fsdp", shards=line().size())
        wanted = predicted(step_memory(training, lambda _: (0.0, 0.0)))
        assert wanted["forward"] == pytest.approx(found["forward"], rel=0.02), (precision, wanted, found)
        # gloo sends a layer's gradients from a copy of its own, which its threads free a moment earlier or later
        assert 0.98 * wanted["backward"] <= found["backward"] <= 1.1 * wanted["backward"], (precision, wanted, found)


@pytest.mark.parametrize("precisions", [("mixed",), slow(("bf16", "fp32"))], ids=["mixed", "others"])
def test_weights_in_shards_hold_the_buffers_that_are_estimated(pools, precisions):
    pools.run(2, steps_in_shards, precisions)
