"""Hugging Face models made sequence-parallel: loss, logits and every gradient as in one process."""

from __future__ import annotations

import itertools
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
from helpers import backend_here, grid, line, once, one_or_all, refused, slow
from models import CONFIGS, make_batch, make_model, packed_mask, worst
from sweeps import swept
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.tensor.parallel import parallelize_module
from transformers import BertConfig, BertModel

from dtensor_ring import Contiguous, Documents, Stripe, Zigzag, ring_plan


def train_step(kind: str, placement, length: int, strategy: str | None, items: bool, packed: bool, checkpointing: bool):
    world = dist.get_world_size()
    mesh, batch, extra, theirs = line(), make_batch(length), {}, {}
    if packed:
        documents = Documents.from_lengths([4, length - 7, 3])
        batch["labels"][:, [4, length - 3]] = -100
        extra["position_ids"] = documents.position_ids().expand(2, -1)
        theirs = {"attention_mask": packed_mask(documents, 2), "position_ids": extra["position_ids"]}

    def alone():
        """Loss, logits and gradients of one process."""
        reference = make_model(kind)
        out = reference(**batch, **theirs, use_cache=False)
        out.loss.backward()
        return out.loss.detach(), out.logits.detach(), [parameter.grad for parameter in reference.parameters()]

    wanted_loss, wanted_logits, wanted_gradients = once(alone)
    model = make_model(kind)
    plan = ring_plan(model, placement, strategy)
    parallelize_module(model, mesh, plan)
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    count = (batch["labels"][:, 1:] != -100).sum()
    out = model(**batch, **extra, **({"num_items_in_batch": count} if items else {}))
    out.loss.backward()
    loss = out.loss.detach().clone()
    if items:
        dist.all_reduce(loss)
    torch.testing.assert_close(loss, wanted_loss, rtol=0, atol=2e-6)  # transformers computes losses in float32
    torch.testing.assert_close(plan.gather(out.logits), wanted_logits, rtol=0, atol=1e-12)
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= 1 if items else world
    assert worst(zip((p.grad for p in model.parameters()), wanted_gradients, strict=True)) < 1e-6


CELLS = list(itertools.product((False, True), CONFIGS, (1, 2, 4), (Zigzag(1), Contiguous(1), Stripe(1, block=2))))
# Each kind of model with two of the placements at four ranks, and every value of an argument at fewer.
BY_DEFAULT = [
    (False, "llama", 4, Zigzag(1)),
    (True, "llama", 4, Contiguous(1)),
    (False, "qwen3", 4, Contiguous(1)),
    (True, "qwen3", 4, Stripe(1, block=2)),
    (False, "qwen3 window", 4, Stripe(1, block=2)),
    (True, "qwen3 window", 4, Zigzag(1)),
    (True, "qwen3", 2, Zigzag(1)),
    (False, "qwen3 window", 2, Zigzag(1)),
    (True, "llama", 1, Zigzag(1)),
]


@pytest.mark.parametrize(
    ("items", "kind", "world", "placement"), [cell if cell in BY_DEFAULT else slow(*cell) for cell in CELLS], ids=repr
)
def test_loss_logits_and_gradients_are_those_of_one_process(pools, world, kind, placement, items):
    pools.run(world, train_step, kind, placement, 17, None, items, False, False)


@pytest.mark.parametrize(
    ("strategy", "placement", "kind"), swept(("ring", "gather"), (Zigzag(1), Stripe(1)), ("llama", "qwen3")), ids=repr
)
def test_packed_rows_are_attended_document_by_document(pools, kind, placement, strategy):
    pools.run(4, train_step, kind, placement, 23, strategy, False, True, False)


@pytest.mark.parametrize("length", [4, slow(5), 16])
def test_short_and_even_rows(pools, length):
    pools.run(4, train_step, "llama", Zigzag(1), length, None, True, False, False)


def test_gradient_checkpointing_computes_the_same(pools):
    pools.run(2, train_step, "qwen3", Zigzag(1), 17, None, False, True, True)


def all_labels_of_one_rank_ignored():
    mesh, model, reference = line(), make_model("llama"), make_model("llama")
    batch = make_batch(16)
    batch["labels"][:, :9] = -100  # rank 0 of Contiguous holds none that count
    parallelize_module(model, mesh, ring_plan(model, Contiguous(1)))
    loss, wanted = model(**batch).loss, reference(**batch).loss
    torch.testing.assert_close(loss, wanted, rtol=0, atol=2e-6)
    loss.backward()
    assert all(not parameter.grad.isnan().any() for parameter in model.parameters())


def test_a_rank_without_labels_is_no_trouble(pools):
    pools.run(2, all_labels_of_one_rank_ignored)


def two_models():
    """Two models on two meshes, with two layouts and kernels, in turns."""
    mesh, plane = line(), grid()
    first, second, reference = make_model("llama"), make_model("llama"), make_model("llama")
    parallelize_module(first, mesh, ring_plan(first, Zigzag(1), kernel="math"))
    second_plan = ring_plan(second, Stripe(1), strategy="gather", kernel="torch_cpu")
    parallelize_module(second, plane["cp"], second_plan)
    batch = make_batch(16)
    for _ in range(2):
        wanted = reference(**batch)
        torch.testing.assert_close(first(**batch).loss, wanted.loss, rtol=0, atol=2e-6)
        out = second(**batch)
        torch.testing.assert_close(out.loss, wanted.loss, rtol=0, atol=2e-6)
        torch.testing.assert_close(second_plan.gather(out.logits), wanted.logits, rtol=0, atol=1e-12)


def test_two_models_on_two_meshes_live_side_by_side(pools):
    pools.run(4, two_models)


def undo():
    mesh, model, reference = line(), make_model("llama"), make_model("llama")
    batch, plan = make_batch(16), ring_plan(model)
    assert "not applied yet" in plan.describe()
    parallelize_module(model, mesh, plan)
    text = plan.describe()
    assert "LlamaForCausalLM: sequence parallel as Zigzag(1), over 2 ranks of axis 'cp'" in text
    assert "2 modules, model.layers.0.self_attn to model.layers.1.self_attn" in text
    model(**batch)
    plan.undo()
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(**batch).logits, reference(**batch).logits)
    assert model.generate(batch["input_ids"], max_new_tokens=2, do_sample=False).shape == (2, 18)
    parallelize_module(model, mesh, ring_plan(model, Stripe(1)))
    torch.testing.assert_close(model(**batch).loss, reference(**batch).loss, rtol=0, atol=2e-6)


@pytest.mark.filterwarnings("ignore")
def test_undo_gives_the_model_back(pools):
    pools.run(2, undo)


def positional_and_embedded():
    mesh, model, reference = line(), make_model("llama"), make_model("llama")
    batch, plan = make_batch(15), ring_plan(model)
    parallelize_module(model, mesh, plan)
    wanted = reference(batch["input_ids"]).logits
    torch.testing.assert_close(plan.gather(model(batch["input_ids"]).logits), wanted, rtol=0, atol=1e-12)
    embedded = reference.get_input_embeddings()(batch["input_ids"])
    torch.testing.assert_close(plan.gather(model(inputs_embeds=embedded).logits), wanted, rtol=0, atol=1e-12)
    loss, logits = model(**batch, return_dict=False)
    torch.testing.assert_close(loss, reference(**batch).loss, rtol=0, atol=2e-6)
    torch.testing.assert_close(plan.gather(logits), wanted, rtol=0, atol=1e-12)


def test_arguments_by_position_embeddings_and_tuples(pools):
    pools.run(2, positional_and_embedded)


def compiled_model(everywhere: bool):
    mesh, model, reference = line(), make_model("llama"), make_model("llama")
    parallelize_module(model, mesh, ring_plan(model))
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")  # dynamo looks at it
    for layer in model.model.layers if everywhere else model.model.layers[1:]:  # a layer has graphs of its own
        layer.compile(backend=backend_here("aot_eager", everywhere), fullgraph=True)
    for length in (16, 20, 24):
        batch = make_batch(length)
        loss, wanted = model(**batch).loss, reference(**batch).loss
        torch.testing.assert_close(loss, wanted, rtol=0, atol=2e-6)
        loss.backward()


@one_or_all
def test_layers_compile_in_one_graph(pools, everywhere):
    pools.run(2, compiled_model, everywhere, timeout=240)


def refused_calls():
    mesh, rank = line(), dist.get_rank()
    plane = grid(rows=1)
    model, batch = make_model("llama"), make_batch(16)
    other = make_model("llama")
    plan = ring_plan(model)
    refused(lambda: plan.gather(torch.zeros(2, 8)), RuntimeError, "the plan is not applied")
    refused(lambda: parallelize_module(model, plane, plan), ValueError, "such as mesh['cp']")
    refused(lambda: parallelize_module(other, mesh, plan), ValueError, "was made for another LlamaForCausalLM")
    model(**batch)  # nothing is half applied
    parallelize_module(model, mesh, plan)
    refused(lambda: parallelize_module(model, mesh, plan), RuntimeError, "applied already")
    refused(lambda: parallelize_module(model, mesh, ring_plan(model)), RuntimeError, "sequence parallel already")
    cases = [
        ({"use_cache": True}, NotImplementedError, "use_cache=True (generation) is not supported"),
        ({"logits_to_keep": 1}, NotImplementedError, "logits_to_keep counts tokens of the whole sequence"),
        ({"output_attentions": True}, NotImplementedError, "output_attentions=True"),
        ({"attention_mask": batch["input_ids"] > 5}, NotImplementedError, "with zeros"),
        ({"visual": torch.zeros(16, 2)}, ValueError, "'visual' of type Tensor is read by no layer"),
        ({"documents": [0, 4]}, ValueError, "documents end at token 4"),
    ]
    for extra, error, text in cases:
        refused(lambda extra=extra: model(**batch, **extra), error, text)
    refused(lambda: model(input_ids=batch["input_ids"][:, :1]), ValueError, "rows of 1 tokens leave ranks [1] of 2 without any")
    refused(lambda: model(input_ids=batch["input_ids"] + rank), ValueError, "hold different batches")
    refused(lambda: model.model(input_ids=batch["input_ids"]), RuntimeError, "call the parallelized model itself")
    for cache in (True, False):
        generate = partial(model.generate, batch["input_ids"], max_new_tokens=1, use_cache=cache)
        refused(generate, NotImplementedError, "eneration")
        refused(generate, NotImplementedError, "is not supported on a parallelized model")
        refused(generate, NotImplementedError, "Generate in `with plan.paused():`, or after plan.undo()")
    absent = batch["input_ids"].to("meta")
    refused(lambda: model(input_ids=absent), ValueError, "input_ids is on the meta device, which has no values to read")
    model.loss_function = lambda logits, *_, **_names: logits.mean()
    refused(lambda: model(**batch), ValueError, "not linear over tokens, whose parts ranks cannot add up")


@pytest.mark.filterwarnings("ignore")
def test_calls_that_would_be_silently_wrong_are_refused_by_name(pools):
    pools.run(2, refused_calls)


def test_models_that_would_be_silently_wrong_are_refused_by_name():
    with pytest.raises(TypeError, match="takes a transformers PreTrainedModel, found Linear: see shard_batch"):
        ring_plan(torch.nn.Linear(2, 2))
    with pytest.raises(NotImplementedError, match=r"BertModel has a pooler \(pooler\), which would pick a token of each rank's"):
        ring_plan(
            BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9))
        )
    with pytest.raises(ValueError, match=r"cut in dim 1 by Contiguous\(1\), Zigzag\(1\) or Stripe\(1\), found Zigzag\(2\)"):
        ring_plan(make_model("llama"), Zigzag(2))


def test_an_unparallelized_module_says_so():
    model = make_model("llama")
    ring_plan(model)
    from dtensor_ring.integrations.transformers.attention import register

    register()
    model.set_attn_implementation("dtensor_ring")
    with pytest.raises(RuntimeError, match=r"was not parallelized .* call parallelize_module"):
        model(torch.zeros(1, 4, dtype=torch.int64))


def undo_after_modules_were_wrapped():
    """Marks are taken off the modules that got them, wherever they are by then; a shared config is named."""
    model, mesh = make_model("llama"), line()
    plan = ring_plan(model)
    parallelize_module(model, mesh, plan)
    twin = type(model)(model.config)
    with pytest.raises(RuntimeError, match="shares its config object"):
        parallelize_module(twin, mesh, ring_plan(twin))
    for layer in model.model.layers:
        layer.self_attn = checkpoint_wrapper(layer.self_attn)
    plan.undo()
    assert model.config._attn_implementation == "sdpa"
    ids = make_batch(9)["input_ids"]
    torch.testing.assert_close(model(ids, use_cache=False).logits, make_model("llama")(ids, use_cache=False).logits)


def gather_an_earlier_batch():
    model, mesh, ids = make_model("llama"), line(), make_batch(20)["input_ids"]
    plan = ring_plan(model, Zigzag(1, per_document=True))
    parallelize_module(model, mesh, plan)
    documents = [Documents.from_lengths([5, 15]), Documents.from_lengths([12, 8])]
    first, second = (model(ids, documents=each).logits for each in documents)
    found = plan.gather(first, documents=documents[0]), plan.gather(second)
    for whole, each in zip(found, documents, strict=True):
        again = plan.gather(model(ids, documents=each).logits)
        assert torch.equal(whole, again)
    assert not torch.equal(found[0], found[1])


def test_undo_finds_the_modules_it_marked(pools):
    pools.run(2, undo_after_modules_were_wrapped)


def test_logits_of_an_earlier_batch_are_gathered_by_its_documents(pools):
    pools.run(2, gather_an_earlier_batch)
