"""`verify`: right models pass, and each fault is found where it was put."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from helpers import PLACEMENTS, grid, line, refused, slow
from test_families import EXPERT_FAMILIES, FAMILIES, ONLY_EAGER
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from transformers import AutoModelForCausalLM

from dtensor_ring import Contiguous, Documents, Zigzag, ring_plan, verify
from dtensor_ring.integrations.transformers.attention import KEYWORD, STATE
from dtensor_ring.planning.layout import Layout

LENGTH, ATTENTION = 24, "model.layers.1.self_attn"


def make_model(family: str = "llama", dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    attention = "eager" if family in ONLY_EAGER else "sdpa"
    model = AutoModelForCausalLM.from_config(FAMILIES[family](), attn_implementation=attention).to(dtype)
    if family in EXPERT_FAMILIES:
        model.set_experts_implementation("eager")  # grouped_mm has no float64
    return model


def make_batch(*, packed: bool, rows: int = 2):
    ids = torch.randint(3, 48, (rows, LENGTH), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids.clone()}
    if packed:
        batch["position_ids"] = Documents.from_lengths([5, 12, 7]).position_ids().expand(rows, -1)
    return batch


def right_model(family: str, dtype: torch.dtype, packed: bool, placement: str, edge_cases: bool):
    batch, chosen = make_batch(packed=packed), PLACEMENTS[placement]
    found = verify(make_model(family, dtype), batch, line(), placement=chosen, edge_cases=edge_cases)
    assert found.ok, str(found)
    assert found.first_difference is None
    assert found.row("outputs of modules").tolerance > 0
    if edge_cases:
        assert found.row("others, when the first").tolerance == 0 or family in EXPERT_FAMILIES
        assert found.row("padding only").left_out is None or packed or family == "gemma2"
    return str(found)


BY_DEFAULT = [
    ("llama", torch.float32, False, "zigzag", True),
    ("gemma3_text", torch.float32, True, "contiguous", False),
    ("qwen3_moe", torch.bfloat16, False, "stripe", False),
    ("gemma2", torch.bfloat16, True, "zigzag", True),
]
DTYPES = torch.float32, torch.bfloat16, torch.float64
SWEEP = [(family, dtype, packed, "zigzag", True) for family in FAMILIES for dtype in DTYPES for packed in (False, True)]


@pytest.mark.parametrize(
    ("world", "family", "dtype", "packed", "placement", "edge_cases"),
    [(2, *cell) for cell in BY_DEFAULT] + [slow(world, *cell) for world in (2, 4) for cell in SWEEP],
)
def test_a_right_model_passes_alike_on_every_rank(pools, world, family, dtype, packed, placement, edge_cases):
    assert len(set(pools.run(world, right_model, family, dtype, packed, placement, edge_cases))) == 1


def routed_model(packed: bool):
    """With the load-balancing loss, which no part of the batch has by itself: right, and then that of each rank's own tokens."""
    torch.manual_seed(0)
    config = FAMILIES["qwen3_moe"]()
    config.output_router_logits = True
    model = AutoModelForCausalLM.from_config(config)
    batch = make_batch(packed=packed)
    found = verify(model, batch, line(), edge_cases=False)
    assert found.ok, str(found)
    with patch("dtensor_ring.integrations.transformers.router.SumOverRanks", SimpleNamespace(apply=lambda sums, _mesh: sums)):
        found = verify(model, batch, line(), edge_cases=False)
    assert not found.row("loss").ok
    assert found.row("logits").ok
    return str(found)


@pytest.mark.parametrize("packed", [True, slow(False)])
def test_the_loss_of_routers_is_verified(pools, packed):
    assert len(set(pools.run(2, routed_model, packed))) == 1


@contextmanager
def under_plan(model, placement):
    plan = ring_plan(model, placement)
    parallelize_module(model, line(), plan)
    try:
        yield plan
    finally:
        plan.undo()


def in_one_layer(model, change):
    """Layer 1's attention, where it runs under a plan, is called with what `change` makes of its keywords."""
    module = model.get_submodule(ATTENTION)
    right = module.forward

    def forward(*args, **kwargs):
        if KEYWORD not in kwargs:
            return right(*args, **kwargs)
        with change(module, kwargs) as changed:
            return right(*args, **changed)

    return patch.object(module, "forward", forward)


@contextmanager
def scaled_badly(module, kwargs):
    with patch.object(module, "scaling", 1.5 * module.scaling):
        yield kwargs


@contextmanager
def without_documents(_module, kwargs):
    yield {**kwargs, KEYWORD: replace(kwargs[KEYWORD], documents=None)}


@contextmanager
def without_other_ranks(module, kwargs):
    """Each rank attends to its own keys only."""
    from torch.distributed.device_mesh import init_device_mesh

    one = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("other", "one"))["one"]
    with patch.object(module, STATE, replace(getattr(module, STATE), mesh=one)):
        yield {**kwargs, KEYWORD: replace(kwargs[KEYWORD], length=kwargs["hidden_states"].shape[1])}


def wrong_layout():
    model = make_model()
    with under_plan(model, Contiguous(1)) as plan:
        for module in model.modules():
            if hasattr(module, STATE):
                setattr(module, STATE, replace(getattr(module, STATE), layout=Layout("zigzag")))
        found = verify(model, make_batch(packed=False), line(), plan=plan, edge_cases=False)
    row = found.row("layout of 2 attention modules")
    assert not row.ok
    assert "model.layers.0.self_attn, model.layers.1.self_attn: attends in another layout than contiguous" in row.note
    assert found.row("tokens of each rank").ok
    return found.first_difference, "model.layers.0.self_attn", "output"


def cut_in_another_order():
    """Ranks get one another's tokens: what the first module is given is wrong already."""
    model = make_model()
    with under_plan(model, Contiguous(1)) as plan:
        plan._placement, right = Zigzag(1), plan._placement
        swap = model.register_forward_pre_hook(lambda *_: setattr(plan, "_placement", right), with_kwargs=True, prepend=True)
        back = model.register_forward_hook(lambda *_: setattr(plan, "_placement", Zigzag(1)))
        found = verify(model, make_batch(packed=False), line(), plan=plan, edge_cases=False)
        swap.remove()
        back.remove()
    assert not found.row("tokens of each rank").ok
    assert "tokens are not those that Zigzag(1) gives ranks 0, 1" in found.row("tokens of each rank").note
    assert "parts already" in found.first_difference.note
    return found.first_difference, "model.embed_tokens", "output"


def labels_shifted_after_the_cut():
    model = make_model()

    def shift(_module, args, kwargs):
        if KEYWORD in kwargs:
            labels = kwargs["labels"]
            kwargs = {**kwargs, "shift_labels": nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()}
        return args, kwargs

    with under_plan(model, Contiguous(1)) as plan:
        model.register_forward_pre_hook(shift, with_kwargs=True)
        found = verify(model, make_batch(packed=False), line(), plan=plan, edge_cases=False)
    lost = 2 * (dist.get_world_size() - 1)
    assert found.row("labels of each rank").deviation == lost, "one of each row, at the end of all ranks but the last"
    assert f"{lost} labels are not those that Contiguous(1) gives rank" in found.row("labels of each rank").note
    assert found.row("labels that count").deviation == lost
    assert found.row("outputs of modules").ok
    return found.first_difference, "", "loss"


def leak_between_documents():
    model = make_model()
    with under_plan(model, Contiguous(1)) as plan, in_one_layer(model, without_documents):
        found = verify(model, make_batch(packed=True), line(), plan=plan)
    row = found.row("others, when the first document changes")
    assert row.deviation > 0
    assert row.tolerance == 0
    assert row.note == "19 tokens from 5 on"
    assert found.first_difference.first_token == 5, "where the second document begins"
    return found.first_difference, ATTENTION, "output"


def gradients_over_cp():
    model, world = make_model(), dist.get_world_size()

    def scale(_module, _args, kwargs, out):
        if KEYWORD in kwargs:
            out.loss = out.loss / world + (out.loss * (1 - 1 / world)).detach()

    with under_plan(model, Contiguous(1)) as plan:
        model.register_forward_hook(scale, with_kwargs=True)
        found = verify(model, make_batch(packed=False), line(), plan=plan, edge_cases=False)
    assert found.row("loss").ok
    assert f"every gradient is {1 / world:.4g} times that of one process, which is 1/{world}" in found.row("gradients,").note
    assert found.row("gradient norm").deviation == pytest.approx(1 - 1 / world, rel=1e-4)
    return found.first_difference, "lm_head", "output gradient"


def keys_of_a_rank_never_attended():
    model, world = make_model(), dist.get_world_size()
    with under_plan(model, Contiguous(1)) as plan, in_one_layer(model, without_other_ranks):
        found = verify(model, make_batch(packed=False), line(), plan=plan, edge_cases=False)
    assert found.first_difference.ranks == tuple(range(1, world)), "rank 0 needs no other rank's keys"
    assert found.first_difference.first_token == LENGTH // world
    assert f"{LENGTH - LENGTH // world} tokens from {LENGTH // world} on" in found.row("logits").note
    return found.first_difference, ATTENTION, "output"


def gradient_of_a_rank_never_added():
    model, under = make_model(), []

    def note(_module, _args, kwargs):
        under[:] = [KEYWORD in kwargs]

    def silence(_module, _args, out):
        if under[0] and out.requires_grad and dist.get_rank() == 1:
            out.register_hook(torch.zeros_like)

    with under_plan(model, Contiguous(1)) as plan:
        model.register_forward_pre_hook(note, with_kwargs=True)
        model.lm_head.register_forward_hook(silence)
        found = verify(model, make_batch(packed=False), line(), plan=plan, edge_cases=False)
    assert found.row("outputs of modules").ok
    assert found.first_difference.ranks == (1,)
    assert "nothing but zeros on rank 1" in found.row("gradients of outputs").note
    return found.first_difference, "lm_head", "output gradient"


def bad_scale():
    model = make_model()
    with under_plan(model, Contiguous(1)) as plan, in_one_layer(model, scaled_badly):
        found = verify(model, make_batch(packed=False), line(), plan=plan, edge_cases=False)
    assert found.first_difference.first_token == 1, "one key has all the weight whatever the scale"
    assert not found.row("logits").ok
    return found.first_difference, ATTENTION, "output"


FAULTS = (
    wrong_layout,
    cut_in_another_order,
    labels_shifted_after_the_cut,
    leak_between_documents,
    gradients_over_cp,
    keys_of_a_rank_never_attended,
    gradient_of_a_rank_never_added,
    bad_scale,
)


def found_where_it_is(name: str):
    first, module, kind = globals()[name]()
    assert (first.module, first.kind) == (module, kind), str(first)
    return str(first)


@pytest.mark.parametrize("world", [2, slow(4)])
@pytest.mark.parametrize("fault", [fault.__name__ for fault in FAULTS])
def test_a_fault_is_found_at_its_module_and_by_its_row(pools, fault, world):
    assert len(set(pools.run(world, found_where_it_is, fault))) == 1


class Mixing(nn.Module):
    """Stands in for a part of a model that mixes tokens: each sees the two before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3)

    def forward(self, hidden):
        return self.conv(nn.functional.pad(hidden.transpose(1, 2), (2, 0))).transpose(1, 2)


def convolution():
    model = make_model()
    torch.manual_seed(1)
    model.model.layers[1].mlp = Mixing(32)
    found = verify(model, make_batch(packed=False), line(), placement=Contiguous(1), edge_cases=False)
    first = found.first_difference
    assert (first.module, first.class_name, first.kind) == ("model.layers.1.mlp.conv", "Conv1d", "output"), str(first)
    assert first.ranks == tuple(range(1, dist.get_world_size())), "rank 0 has the start of the row"
    refused(found.raise_if_wrong, RuntimeError, "first difference: model.layers.1.mlp.conv (Conv1d)")


def other_weights():
    model, rank = make_model(), dist.get_rank()
    with torch.no_grad():
        model.model.norm.weight.add_(rank * 1e-3)
    found = verify(model, make_batch(packed=False), line(), edge_cases=False)
    assert found.row("weights").deviation == 1
    assert "model.norm.weight" in found.row("weights").note


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict(keep_vars=False).items()}


def left_as_it_was():
    """Weights, gradients, buffers, flags, generators and the plan, whether it was applied or not, also where the run fails."""
    mesh, batch = line(), make_batch(packed=False)
    model = make_model().train()
    model.model.layers[0].eval()
    model(**batch).loss.backward()
    weights, gradients = state_of(model), [(p.grad, p.grad.clone()) for p in model.parameters()]
    flags, random = [module.training for module in model.modules()], torch.get_rng_state()

    def unchanged():
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        for parameter, (grad, value) in zip(model.parameters(), gradients, strict=True):
            assert parameter.grad is grad
            assert torch.equal(grad, value)
        assert [module.training for module in model.modules()] == flags
        assert torch.equal(torch.get_rng_state(), random)
        assert not any(module._forward_pre_hooks for module in model.model.modules())

    assert verify(model, batch, mesh, edge_cases=False).ok
    unchanged()
    assert model.config._attn_implementation == "sdpa"
    wrong = {"input_ids": batch["input_ids"] + 1000, "labels": batch["labels"]}
    refused(lambda: verify(model, wrong, mesh), IndexError, "out of range")
    unchanged()
    plan = ring_plan(model, Zigzag(1, per_document=True))
    assert verify(model, batch, mesh, plan=plan, edge_cases=False).ok
    assert not any(hasattr(module, STATE) for module in model.modules())
    parallelize_module(model, mesh, plan)
    documents = Documents.from_lengths([10, 14])
    logits = model(batch["input_ids"], documents=documents).logits
    assert verify(model, make_batch(packed=True, rows=1), mesh, plan=plan).ok
    assert plan.documents == documents
    assert torch.equal(model(batch["input_ids"], documents=documents).logits, logits)
    plan.undo()
    unchanged()


def other_batches():
    """Padding, documents of each row, a given count, no labels, embeddings, shifted labels, and a model without a head."""
    mesh, plain = line(), make_batch(packed=False)
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    mask[0, :5] = mask[1, 20:] = 0
    padded = {"input_ids": plain["input_ids"], "attention_mask": mask, "labels": plain["labels"].masked_fill(mask == 0, -100)}
    rows = torch.cat([Documents.from_lengths(lengths).position_ids() for lengths in ([9, 15], [LENGTH])])
    model = make_model()
    given = {**plain, "position_ids": rows, "num_items_in_batch": torch.tensor(31)}
    edges = {}
    for name, batch in {"padded": padded, "given": given, "no labels": {"input_ids": plain["input_ids"]}}.items():
        edges[name] = verify(model, batch, mesh, edge_cases=name != "no labels")
        assert edges[name].ok, str(edges[name])
        assert edges[name].row("labels of each rank").left_out is None
    assert edges["padded"].row("others, when padding changes").left_out is None
    assert edges["given"].row("others, when the first document changes").left_out is None
    assert edges["given"].row("rank 0 without labels: loss").tolerance > 0
    embedded = model.get_input_embeddings()(plain["input_ids"]).detach()
    for batch in ({"inputs_embeds": embedded}, {"inputs_embeds": embedded, "labels": plain["labels"]}):
        found = verify(model, batch, mesh, edge_cases=False)
        assert found.ok, str(found)
    headless = verify(model.model, {"input_ids": plain["input_ids"]}, mesh)
    assert headless.ok, str(headless)
    assert headless.row("loss").deviation > 0
    assert headless.row("labels of each rank").left_out == "the model was given none"


def sharded_weights():
    """FSDP2 over the sequence axis, or over data too, whose ranks have other batches: gradients are reduced by it."""
    world = dist.get_world_size()
    mesh = line() if world == 2 else grid()
    cp, whole = (mesh, mesh) if world == 2 else (mesh["cp"], mesh["dp", "cp"]._flatten("dp_cp"))
    model = make_model()
    plan = ring_plan(model)
    parallelize_module(model, cp, plan)
    for layer in model.model.layers:
        fully_shard(layer, mesh=whole)
    fully_shard(model, mesh=whole)
    batch = make_batch(packed=False)
    batch["input_ids"] = (batch["input_ids"] + dist.get_rank() // cp.size()) % 48
    before = [parameter.to_local().clone() for parameter in model.parameters()]
    found = verify(model, batch, cp, plan=plan)
    assert found.ok, str(found)
    assert found.row("gradients, of 21 parameters").tolerance > 0
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter.to_local(), value)
        assert parameter.grad is None
    if world > 2:  # other numbers of passes would leave ranks waiting for weights
        kinds = make_batch(packed=dist.get_rank() < 2)
        refused(lambda: verify(model, kinds, cp, plan=plan, edge_cases=False), ValueError, "must run as many passes")
    with in_one_layer(model, scaled_badly):
        assert verify(model, batch, cp, plan=plan, edge_cases=False).first_difference.module == ATTENTION


def small_bert(head: str):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return getattr(transformers, f"BertFor{head}")(transformers.BertConfig(vocab_size=48, num_labels=48, **sizes))


def heads_wrappers_and_losses():
    """Labels that are not shifted, also inside of PEFT; a loss in chunks; and losses that one process has not."""
    mesh, batch = line(), make_batch(packed=False)
    adapters = peft.LoraConfig(target_modules=["query"], init_lora_weights=False)
    for model in (small_bert("TokenClassification"), peft.get_peft_model(small_bert("MaskedLM"), adapters)):
        found = verify(model, batch, mesh, edge_cases=False)
        assert found.ok, str(found)
        assert found.row("labels that count").left_out is None
    model = make_model()
    found = verify(model, batch, mesh, plan=ring_plan(model, loss="chunked"), edge_cases=False)
    assert found.ok, str(found)
    assert found.row("labels of each rank").left_out is None
    for asked in ({"label_smoothing": 0.1}, {"z_loss": 1e-3}):
        refused(lambda asked=asked: verify(model, batch, mesh, plan=ring_plan(model, **asked)), NotImplementedError, "another")


def weights_that_are_nan_on_one_rank():
    """That rank's own run gives NaN and the other's a number: both go on, and write the same."""
    model = make_model()
    if dist.get_rank():
        with torch.no_grad():
            model.model.norm.weight[3] = torch.nan
    found = verify(model, make_batch(packed=False), line())
    assert not found.ok
    assert found.row("loss").note == "one process itself gives nan"
    told = [None] * dist.get_world_size()
    dist.all_gather_object(told, [(row.name, row.verdict) for row in found.rows])
    assert told[0] == told[1]


def calls_that_are_refused():
    mesh, batch = line(), make_batch(packed=False)
    model, other = make_model(), make_model()
    refused(lambda: verify(model, batch, mesh, plan=ring_plan(model), placement=Zigzag(1)), ValueError, "pass plan= alone")
    refused(lambda: verify(model, batch, mesh, plan=ring_plan(other)), ValueError, "was made for another LlamaForCausalLM")
    refused(
        lambda: verify(model, {**batch, "labels": batch["labels"] * 0 - 100}, mesh), ValueError, "no label of this batch counts"
    )
    refused(lambda: verify(nn.Linear(2, 2), batch, mesh), TypeError, "takes a transformers PreTrainedModel, found Linear")
    with under_plan(model, Zigzag(1)):
        refused(lambda: verify(model, batch, mesh), ValueError, "this model is parallelized: pass its plan")
    lengths = batch if dist.get_rank() else {key: value[:, :-1] for key, value in batch.items()}
    refused(lambda: verify(model, lengths, mesh), ValueError, "tokens")


def in_one_call(names):
    for name in names:
        globals()[name]()


def test_a_part_that_mixes_tokens_and_weights_that_differ_are_named(pools):
    pools.run(2, in_one_call, ("convolution", "other_weights", "weights_that_are_nan_on_one_rank"))


def test_heads_wrappers_and_losses_are_verified_or_refused(pools):
    pools.run(2, in_one_call, ("heads_wrappers_and_losses",))


@pytest.mark.filterwarnings("ignore")
def test_model_plan_and_generators_are_left_as_they_were(pools):
    pools.run(2, in_one_call, ("left_as_it_was",))


def test_batches_of_every_kind_are_verified(pools):
    pools.run(2, in_one_call, ("other_batches",))


@pytest.mark.parametrize("world", [2, slow(4)])
def test_weights_that_fsdp2_has_sharded_are_verified(pools, world):
    pools.run(world, in_one_call, ("sharded_weights",))


@pytest.mark.filterwarnings("ignore")
def test_calls_that_cannot_be_verified_are_refused_on_every_rank(pools):
    pools.run(2, in_one_call, ("calls_that_are_refused",))
