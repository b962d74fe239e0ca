"""Every supported family of Hugging Face models, with the real classes: logits and all gradients as in one process."""

from __future__ import annotations

import itertools
import warnings
from contextlib import nullcontext
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from helpers import backend_here, line, once, refused, slow
from models import build
from torch.distributed.tensor.parallel import parallelize_module
from transformers import (
    DataCollatorWithFlattening,
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
    "qwen3_moe": lambda: Qwen3MoeConfig(
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        use_sliding_window=True,
        sliding_window=6,
        **SIZES,
    ),
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
    model = build(FAMILIES[family](), "eager" if family in ONLY_EAGER else "sdpa")
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


def train_step(family: str, packed: bool, every: bool):
    """One step in every layout, beside one process; or in some, on two ranks in others than on four."""
    world, length = dist.get_world_size(), 23
    batch, documents, items = make_batch(length), None, {}
    if packed:
        documents = Documents.from_lengths([4, length - 7, 3])
        batch["position_ids"] = documents.position_ids().expand(2, -1)
        batch["labels"][:, [4, length - 3]] = -100
        items = {"num_items_in_batch": (batch["labels"][:, 1:] != -100).sum()}
    loss, logits, grads = once(lambda: run_alone(family, batch, documents))
    layouts = (*LAYOUTS, Zigzag(1, per_document=True)) if packed else LAYOUTS
    some = layouts[:2] if world == 2 else layouts[2:]
    for placement in layouts if every else some:
        model = make_model(family)
        plan = ring_plan(model, placement)
        parallelize_module(model, line(), plan)
        out = model(**batch, **items)
        out.loss.backward()
        torch.testing.assert_close(plan.gather(out.logits), logits, rtol=0, atol=1e-12)
        mine = out.loss.detach().clone()
        if items:
            dist.all_reduce(mine)
        torch.testing.assert_close(mine, loss, rtol=1e-6, atol=0)
        assert_same_gradients(model, grads, 1 if items else 1 / world)


# Packed rows are those of llama, of the families whose attention differs, and of one with experts; of all as slow tests.
BY_DEFAULT = [(family, 2, False, False) for family in FAMILIES]
BY_DEFAULT += [(family, 4, True, False) for family in ("llama", "mistral", "qwen3_moe", "gemma2", "gpt_oss")]
CELLS = list(itertools.product(FAMILIES, (2, 4), (False, True), (False, True)))


@pytest.mark.parametrize(("family", "world", "packed", "every"), [cell if cell in BY_DEFAULT else slow(*cell) for cell in CELLS])
def test_logits_and_every_gradient_are_those_of_one_process(pools, world, family, packed, every):
    pools.run(world, train_step, family, packed, every)


def checkpointed(family: str, compiled: str):
    """The layers run twice under checkpointing; their attention, if compiled, in one graph over changing lengths."""
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")  # dynamo looks at it
    model = make_model(family).train()
    parallelize_module(model, line(), ring_plan(model))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in {"": [], "one": model.model.layers[:1], "all": model.model.layers}[compiled]:  # each has graphs of its own
        layer.self_attn.compile(backend=backend_here("aot_eager", compiled == "all"), fullgraph=True)
    for length in (20, 24) if compiled else (21,):
        batch = make_batch(length)
        loss, _, grads = once(lambda batch=batch: run_alone(family, batch))
        model.zero_grad()
        out = model(**batch)
        out.loss.backward()
        torch.testing.assert_close(out.loss.detach(), loss, rtol=1e-6, atol=0)
        assert_same_gradients(model, grads, 1 / dist.get_world_size())


@pytest.mark.parametrize(("family", "compiled"), [("gemma2", ""), ("gemma3_text", ""), ("gpt_oss", "one"), slow("gpt_oss", "all")])
def test_checkpointing_and_compiled_attention_compute_the_same(pools, family, compiled):
    pools.run(2, checkpointed, family, compiled)


def grouped_experts(family: str):
    """Experts as transformers runs them by default, in float32: no further from float64 than one process is."""
    batch = make_batch(23)
    _, exact, _ = run_alone(family, batch)
    alone, model = make_model(family).float(), make_model(family).float()
    plan = ring_plan(model)
    parallelize_module(model, line(), plan)
    for one in (alone, model):
        one.set_experts_implementation("grouped_mm")
    unavoidable = (alone(**batch, use_cache=False).logits - exact).pow(2).mean().sqrt()
    error = (plan.gather(model(**batch).logits) - exact).pow(2).mean().sqrt()
    assert 0 < unavoidable < 1e-4
    assert error <= 1.3 * unavoidable, f"{error} over {unavoidable}"


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_grouped_experts_are_as_exact_as_in_one_process(pools, family):
    pools.run(2, grouped_experts, family)


def padded_batch(length: int):
    """Rows padded on the left, on the right, on both sides and not at all; labels -100 at padding and first tokens."""
    batch = make_batch(length, rows=4)
    mask = torch.ones(4, length, dtype=torch.int64)
    mask[0, :6] = 0
    mask[1, length - 5 :] = 0
    mask[2, :2] = mask[2, length - 9 :] = 0
    batch["input_ids"] = batch["input_ids"].masked_fill(mask == 0, SIZES["pad_token_id"])
    first = mask.diff(dim=1, prepend=torch.zeros_like(mask[:, :1])) == 1
    batch["labels"] = batch["labels"].masked_fill((mask == 0) | first, -100)
    return {**batch, "attention_mask": mask}


def padded_step(family: str):
    world, batch = dist.get_world_size(), padded_batch(23)
    loss, logits, grads = once(lambda: run_alone(family, batch))
    real = batch["attention_mask"].bool()
    for placement in LAYOUTS:
        model = make_model(family)
        plan = ring_plan(model, placement)
        parallelize_module(model, line(), plan)
        out = model(**batch)
        out.loss.backward()
        torch.testing.assert_close(plan.gather(out.logits)[real], logits[real], rtol=0, atol=1e-12)
        torch.testing.assert_close(out.loss.detach(), loss, rtol=1e-6, atol=0)
        assert_same_gradients(model, grads, 1 / world)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss", "mixtral"])
def test_padded_rows_are_those_of_one_process_with_the_same_mask(pools, family):
    pools.run(2, padded_step, family)


def padding_details():
    mesh, batch = line(), padded_batch(16)
    model, reference = make_model("llama"), make_model("llama")
    plan = ring_plan(model)
    parallelize_module(model, mesh, plan)
    real = batch["attention_mask"].bool()
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)  # as generate numbers rows padded on the left
    for mask in (batch["attention_mask"], real):
        given = {**batch, "attention_mask": mask, "position_ids": positions}
        wanted, out = reference(**given, use_cache=False), model(**given)
        torch.testing.assert_close(plan.gather(out.logits)[real], wanted.logits[real], rtol=0, atol=1e-12)
        torch.testing.assert_close(out.loss, wanted.loss, rtol=1e-6, atol=0)
    counted = {**batch, "labels": batch["labels"].clone()}
    counted["labels"][0, 6] = 7  # the first real token of row 0: nothing real predicts it
    torch.testing.assert_close(model(**counted).loss, model(**batch).loss, rtol=0, atol=0)
    counted["labels"][1, -1] = 7
    refused(lambda: model(**counted), ValueError, "1 labels count that padding tokens would predict")


def test_positions_and_labels_of_padded_rows(pools):
    pools.run(2, padding_details)


def collators():
    """What DataCollatorWithFlattening sends is told apart by any of its fields."""
    mesh, lengths = line(), (5, 9, 4)
    ids = torch.randint(3, 48, (sum(lengths),), generator=torch.Generator().manual_seed(2)).split(lengths)
    features = [{"input_ids": part.tolist()} for part in ids]
    model = make_model("llama")
    plan = ring_plan(model)
    parallelize_module(model, mesh, plan)
    losses = []
    for positions, numbers, bounds in [(True, False, False), (False, True, False), (False, False, True), (True, True, True)]:
        collate = DataCollatorWithFlattening(
            return_position_ids=positions, return_seq_idx=numbers, return_flash_attn_kwargs=bounds, return_tensors="pt"
        )
        losses.append(model(**collate(features)).loss)
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    batch = {"input_ids": torch.cat(ids)[None], "labels": torch.cat(ids)[None].clone()}
    batch["labels"][:, [5, 14]] = -100
    wanted, _, _ = run_alone("llama", batch, Documents.from_lengths(lengths))
    torch.testing.assert_close(losses[0].detach(), wanted, rtol=1e-6, atol=0)


def test_packed_batches_of_the_collator_need_one_of_its_fields(pools):
    pools.run(2, collators)


def accumulation():
    """Two unequal batches, gradients added up, with the number of labels in both: the step of one process over all rows."""
    lengths = (9, 16)
    batches = [make_batch(length, rows=1 + length % 2) for length in lengths]
    batches[1]["labels"][:, :11] = -100
    total = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    reference = make_model("gpt_oss")
    for batch in batches:
        reference(**batch, num_items_in_batch=total, use_cache=False).loss.backward()
    wanted = {name: parameter.grad for name, parameter in reference.named_parameters()}
    model = make_model("gpt_oss")
    parallelize_module(model, line(), ring_plan(model, Contiguous(1)))
    for batch in batches:
        model(**batch, num_items_in_batch=total).loss.backward()
    assert_same_gradients(model, wanted, 1)


def test_accumulated_gradients_of_unequal_batches_are_those_of_one_process(pools):
    pools.run(2, accumulation)


def rank_without_labels():
    """Rank 0 of Contiguous holds no label that counts, under both contracts of the loss."""
    world = dist.get_world_size()
    batch = make_batch(16)
    batch["labels"][:, :9] = -100
    loss, _, grads = run_alone("qwen3_moe", batch)
    for items in ({}, {"num_items_in_batch": (batch["labels"] != -100).sum()}):
        model = make_model("qwen3_moe")
        parallelize_module(model, line(), ring_plan(model, Contiguous(1)))
        out = model(**batch, **items)
        out.loss.backward()
        mine = out.loss.detach().clone()
        if items:
            assert mine == 0 or dist.get_rank() > 0
            dist.all_reduce(mine)
        torch.testing.assert_close(mine, loss, rtol=1e-6, atol=0)
        assert_same_gradients(model, grads, 1 if items else 1 / world)


def test_a_rank_whose_labels_are_all_ignored_adds_nothing(pools):
    pools.run(2, rank_without_labels)


def borders():
    """Labels that count at the first tokens of documents: no token of another document predicts them."""
    documents = Documents.from_lengths([6, 1, 8])
    batch = make_batch(15)
    wanted, _, _ = run_alone("llama", {**batch, "labels": batch["labels"].index_fill(1, torch.tensor([6, 7]), -100)}, documents)
    for placement in LAYOUTS:
        model = make_model("llama")
        parallelize_module(model, line(), ring_plan(model, placement))
        loss = model(**batch, documents=documents).loss.detach()
        torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)


def test_no_label_is_predicted_across_documents(pools):
    pools.run(2, borders)
