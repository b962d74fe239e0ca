"""Models that see tokens on both sides, and heads whose labels stay where they are: as in one process."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from helpers import line, once, refused
from test_families import SIZES
from torch.distributed.tensor.parallel import parallelize_module
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForMaskedLM, AutoModelForTokenClassification, PreTrainedModel

from dtensor_ring import Contiguous, Documents, Zigzag, ring_plan

BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ENCODERS: dict[str, dict[str, object]] = {
    "bert": {"type_vocab_size": 2, **BERT},
    "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 2},
    "eurobert": {},
    "electra": {"embedding_size": 16, **BERT},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_heads": 4, "n_layers": 2, "dropout": 0.0, "attention_dropout": 0.0},
    "roberta": BERT,
    "xlm-roberta": BERT,
}
DEFAULT = ("bert", "modernbert")
OFFSET = ("roberta", "xlm-roberta")  # their positions begin after that of the padding token


def make_model(kind: str, head=AutoModelForMaskedLM) -> PreTrainedModel:
    torch.manual_seed(0)
    model = head.from_config(CONFIG_MAPPING[kind](**SIZES, **ENCODERS[kind]), attn_implementation="sdpa").double()
    assert model.config.model_type == kind
    return model


def make_batch(kind: str, length: int, padded: bool = False) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 48, (2, length), generator=draw)
    labels = ids.masked_fill(torch.rand(2, length, generator=draw) > 0.4, -100)
    labels[:, 0] = ids[:, 0]  # no shift: the first token has a label too
    batch = {"input_ids": ids.masked_fill(labels != -100, 2), "labels": labels}
    if kind == "bert":
        batch["token_type_ids"] = torch.arange(length).ge(length // 3).long().expand(2, -1)
    if padded:
        mask = torch.ones_like(ids)
        mask[0, :4] = mask[1, length - 6 :] = 0
        batch |= {"attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)}
        batch["input_ids"] = batch["input_ids"].masked_fill(mask == 0, 0)
    if kind in OFFSET:
        batch["position_ids"] = torch.arange(1, length + 1).expand(2, -1)
    return batch


def mean_alone(kind: str, batch, head, documents: Documents | None = None):
    """Loss, logits and gradients of one process; of a packed row every document by itself. The loss is a mean over all labels."""
    model, logits = make_model(kind, head), []
    bounds = [0, batch["input_ids"].shape[1]] if documents is None else list(documents.bounds[0])
    for start, stop in pairwise(bounds):
        part = {key: value[:, start:stop] for key, value in batch.items() if key not in ("labels", "position_ids")}
        if kind in OFFSET:
            part["position_ids"] = batch["position_ids"][:, : stop - start]
        logits.append(model(**part).logits)
    whole = torch.cat(logits, dim=1)
    loss = torch.nn.functional.cross_entropy(whole.flatten(0, 1), batch["labels"].flatten())
    loss.backward()
    if documents is None:  # what is compared with is what the model itself makes of labels
        torch.testing.assert_close(loss, model(**batch).loss.double(), rtol=1e-6, atol=0)
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss.detach(), whole.detach(), grads


def encoder_step(kind: str, whole: bool):
    """Masked language models and token classifiers; padded, packed, without labels on a rank, under both contracts of the loss."""
    mesh, world = line(), dist.get_world_size()
    documents = Documents.from_lengths([5, 11, 7])
    cases = [
        (AutoModelForMaskedLM, False, None, Zigzag(1), False),
        (AutoModelForMaskedLM, True, None, Contiguous(1), True),
        (AutoModelForMaskedLM, False, documents, Zigzag(1), True),
        (AutoModelForTokenClassification, False, None, Contiguous(1), False),
    ]
    for head, padded, packed, placement, items in cases if whole else cases[:3]:
        batch = make_batch(kind, 23, padded)
        if head is AutoModelForTokenClassification:
            batch["labels"] = batch["labels"].clamp_max(1)
            batch["labels"][:, 10:] = -100  # the last rank of Contiguous has no label
        loss, logits, grads = once(lambda batch=batch, head=head, packed=packed: mean_alone(kind, batch, head, packed))
        model = make_model(kind, head)
        plan = ring_plan(model, placement)
        parallelize_module(model, mesh, plan)
        given = {**batch, **({"num_items_in_batch": (batch["labels"] != -100).sum()} if items else {})}
        if packed is not None:
            positions = packed.position_ids() + int(kind in OFFSET)
            given |= {"documents": packed, "position_ids": positions.expand(2, -1)}
        out = model(**given)
        out.loss.backward()
        real = batch.get("attention_mask", torch.ones(2, 23)).bool()
        torch.testing.assert_close(plan.gather(out.logits)[real], logits[real], rtol=0, atol=1e-10)
        mine = out.loss.detach().clone()
        if items:
            dist.all_reduce(mine)
        torch.testing.assert_close(mine.double(), loss, rtol=1e-6, atol=0)
        least = 1e-3 * max(grad.abs().max() for grad in grads.values() if grad is not None)  # keys' biases have none
        for name, parameter in model.named_parameters():
            assert (parameter.grad is None) == (grads[name] is None), name
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                error = (parameter.grad / (1 if items else world) - grads[name]).abs().max()
                assert error <= 1e-6 * grads[name].abs().max().clamp_min(least), f"{name}: {error}"
        assert list(model(**given, return_dict=False)[0].shape) == []


def refused_batches():
    model, batch = make_model("bert"), make_batch("bert", 16, padded=True)
    parallelize_module(model, line(), ring_plan(model))
    refused(lambda: model(**{**batch, "labels": batch["input_ids"]}), ValueError, "labels count at padding", "set them to -100")
    refused(lambda: model(**batch, shift_labels=batch["labels"]), ValueError, "shift_labels are labels of the next token")
    refused(lambda: model(**{**batch, "token_type_ids": batch["labels"][:, 1:]}), ValueError, "token_type_ids must have the shape")
    other = torch.zeros(2, 16, 32)
    refused(lambda: model(**batch, encoder_hidden_states=other), NotImplementedError, "encoder_hidden_states is not supported")
    model = make_model("roberta")
    parallelize_module(model, line(), ring_plan(model))
    refused(
        lambda: model(batch["input_ids"]), NotImplementedError, "numbers tokens from 1 on, and its padding 0: pass position_ids"
    )


@pytest.mark.parametrize("kind", [kind if kind in DEFAULT else pytest.param(kind, marks=pytest.mark.slow) for kind in ENCODERS])
def test_encoders_and_their_losses_are_those_of_one_process(pools, kind):
    pools.run(2, encoder_step, kind, kind != "modernbert")


def test_batches_that_an_encoder_would_get_wrong_are_refused(pools):
    pools.run(2, refused_batches)


def embedding_model():
    """Gemma's embedding models: attention both ways, with windows; outputs are pooled after they are gathered."""
    config = CONFIG_MAPPING["gemma3_text"](
        head_dim=8,
        query_pre_attn_scalar=24,
        use_bidirectional_attention=True,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=8,
        **SIZES,
    )
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(AutoModel.from_config(config, attn_implementation="sdpa").double())
        config = type(config).from_dict(models[0].config.to_dict() | {"sliding_window": 8})
    ids = make_batch("eurobert", 23)["input_ids"]
    wanted = models[0](ids, use_cache=False).last_hidden_state
    plan = ring_plan(models[1])
    parallelize_module(models[1], line(), plan)
    hidden = models[1](ids).last_hidden_state
    torch.testing.assert_close(plan.gather(hidden), wanted, rtol=0, atol=1e-10)
    torch.testing.assert_close(plan.sum_over_tokens(hidden) / 23, wanted.mean(1), rtol=0, atol=1e-10)


def test_bidirectional_embedding_models_are_those_of_one_process(pools):
    pools.run(2, embedding_model)
