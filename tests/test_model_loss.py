"""The loss of a parallelized model, in chunks, smoothed, of one's own, with that of routers: as in one process."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from helpers import grid, line, once, refused, slow
from peft import LoraConfig, inject_adapter_in_model
from test_families import in_double, make_batch, make_model, padded_batch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, loss_parallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.trainer_pt_utils import LabelSmoother

from dtensor_ring import Contiguous, Documents, Stripe, Zigzag, ring_plan
from dtensor_ring.losses import Terms

SMOOTH = Terms(label_smoothing=0.2, z_loss=1e-2)


def exact_loss(logits, labels, terms):
    """The sum over tokens, spelled out in float64."""
    log_p, lse = logits.log_softmax(-1), logits.logsumexp(-1)
    counts = labels != -100
    own = log_p.gather(2, labels.masked_fill(~counts, 0)[..., None])[..., 0]
    smoothing = terms.label_smoothing
    each = -(1 - smoothing) * own - smoothing * log_p.mean(-1) + terms.z_loss * lse.square()
    return (each * counts).sum()


def alone(family, batch, terms, documents=None, change=None):
    """The mean loss of one process and its gradients, with a loss in float64; of a packed batch every document by itself."""
    model = make_model(family)
    if change:
        change(model)
    bounds = (0, batch["input_ids"].shape[1]) if documents is None else documents.bounds[0]
    total = 0
    with in_double() if family == "gemma2" else nullcontext():
        for start, stop in pairwise(bounds):
            part = {name: value[:, start:stop] for name, value in batch.items() if name != "labels"}
            logits = model(**part, use_cache=False).logits
            total = total + exact_loss(logits[:, :-1], batch["labels"][:, start + 1 : stop], terms)
    loss = total / (batch["labels"][:, 1:] != -100).sum()
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def run(model, batch, wanted, tolerance=1e-6):
    """A step: loss and gradients are those wanted, up to the float32 of norms; averaged, unless the caller counts labels."""
    loss, grads = wanted
    world, items = dist.get_world_size(), "num_items_in_batch" in batch
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    mine = out.loss.detach().double()
    if items:
        dist.all_reduce(mine)
    torch.testing.assert_close(mine, loss.double(), rtol=tolerance, atol=0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            grad = parameter.grad.clone()
            dist.all_reduce(grad)
            error = (grad * (1 if items else 1 / world) - grads[name]).abs().max()
            assert error <= tolerance * grads[name].abs().max(), f"{name}: {error} of {grads[name].abs().max()}"
    return out


def planned(family, placement=None, change=None, **loss):
    model = make_model(family)
    if change:
        change(model)
    plan = ring_plan(model, placement, **loss)
    parallelize_module(model, line(), plan)
    return model, plan


def tied_and_biased(model):
    """A head with a bias, whose weight is that of the embedding."""
    head = nn.Linear(32, 48, bias=True).double()
    torch.manual_seed(3)
    nn.init.normal_(head.bias)
    head.weight = model.get_input_embeddings().weight
    model.lm_head = head


def in_chunks(family):
    """Chunks that do not divide the tokens, with all terms and with none; whole logits with all terms; packed; counted labels."""
    batch, documents = make_batch(23), Documents.from_lengths([4, 16, 3])
    packed = {**batch, "labels": batch["labels"].index_fill(1, torch.tensor([0, 4, 20]), -100)}
    plain, smooth = (once(lambda terms=terms: alone(family, batch, terms)) for terms in (Terms(), SMOOTH))
    by_document = once(lambda: alone(family, packed, SMOOTH, documents))
    model, plan = planned(family, loss="chunked", loss_chunk=7)
    out = run(model, batch, plain)
    assert out.logits is None
    assert "logits in chunks of 7 tokens" in plan.describe()
    mine = Zigzag(1).layout.local_length(23, dist.get_world_size(), dist.get_rank())
    assert model(input_ids=batch["input_ids"]).logits.shape == (2, mine, 48)
    count = (batch["labels"][:, 1:] != -100).sum()
    run(model, {**batch, "num_items_in_batch": count}, plain)
    assert [x.shape for x in model(**batch, return_dict=False)] == [()], "no logits in the tuple"
    plan.undo()
    assert "forward" not in vars(model.lm_head)
    assert model(**batch, use_cache=False).logits.shape == (2, 23, 48)
    for chunk in (None, 1):
        model, _ = planned(family, Stripe(1), loss="chunked", loss_chunk=chunk, **of_terms(SMOOTH))
        run(model, {**packed, "documents": documents}, by_document)
    model, _ = planned(family, Contiguous(1), **of_terms(SMOOTH))
    out = run(model, batch, smooth)
    assert out.logits.shape[2] == 48


def of_terms(terms):
    return {"label_smoothing": terms.label_smoothing, "z_loss": terms.z_loss}


CELLS = [
    (world, family) if world < 3 and (world == 2 or family == "llama") else slow(world, family)
    for world in (1, 2, 3, 4)
    for family in ("llama", "gemma2", "qwen3_moe")
]


@pytest.mark.parametrize(("world", "family"), CELLS)
def test_losses_in_chunks_and_smoothed_ones_are_those_of_one_process(pools, world, family):
    pools.run(world, in_chunks, family)


def heavy(model):
    model.router_aux_loss_coef = 3.0  # as much of the gradients as cross entropy


def router_alone(family, batch):
    """Loss, router loss and gradients of one process, as transformers computes them."""
    model = make_model(family)
    heavy(model)
    out = model(**batch, output_router_logits=True, use_cache=False)
    out.loss.backward()
    return out.loss.detach(), out.aux_loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def with_routers(family):
    """The product of two means over all tokens, or over those that the mask leaves; in every form of the loss and of the output."""
    batch, padded = make_batch(23), padded_batch(23)
    loss, aux, grads = once(lambda: router_alone(family, batch))
    count = (batch["labels"][:, 1:] != -100).sum()
    asked = {"output_router_logits": True}
    for options in ({}, {"loss": "chunked", "loss_chunk": 7}):
        model, _ = planned(family, change=heavy, **options)
        out = run(model, {**batch, **asked}, (loss, grads))
        torch.testing.assert_close(out.aux_loss.float(), aux, rtol=1e-6, atol=0)
        run(model, {**batch, **asked, "num_items_in_batch": count}, (loss, grads))
        first, second, *_ = model(**batch, **asked, return_dict=False)
        torch.testing.assert_close(first.double(), loss.double(), rtol=1e-6, atol=0)
        torch.testing.assert_close(second.float(), aux, rtol=1e-6, atol=0)
    model.config.output_router_logits = True
    torch.testing.assert_close(model(input_ids=batch["input_ids"]).aux_loss.float(), aux, rtol=1e-6, atol=0)
    loss, aux, grads = once(lambda: router_alone(family, padded))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    out = run(model.train(), padded, (loss, grads))
    torch.testing.assert_close(out.aux_loss.float(), aux, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("world", "family"), [(2, "qwen3_moe"), (2, "gpt_oss"), slow(2, "mixtral"), slow(3, "gpt_oss"), slow(4, "qwen3_moe")]
)
def test_the_load_balancing_loss_of_routers_is_that_of_the_whole_batch(pools, world, family):
    pools.run(world, with_routers, family)


def head_of_layers(model):
    """A head that is no single matrix product, and has a parameter without a gradient."""
    torch.manual_seed(3)
    head = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 48)).double()
    head[0].weight.requires_grad_(False)
    model.lm_head = head


def with_lora(model):
    torch.manual_seed(3)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False), model)
    model.double()


def heads():
    """Heads with a bias and a weight that is the embedding's, of two layers, and with adapters beside frozen weights."""
    batch = make_batch(17)
    for change in (tied_and_biased, head_of_layers, with_lora):
        wanted = once(lambda change=change: alone("llama", batch, SMOOTH, change=change))
        model, _ = planned("llama", change=change, loss="chunked", loss_chunk=7, **of_terms(SMOOTH))
        assert any(not parameter.requires_grad for parameter in model.parameters()) == (change is not tied_and_biased)
        run(model, batch, wanted)


def test_heads_with_biases_ties_layers_and_adapters(pools):
    pools.run(2, heads)


def sharded(model, mesh, how):
    if how == "head":
        fully_shard(model.lm_head, mesh=mesh, reshard_after_forward=True)
    if how == "head and norm":
        fully_shard([model.model.norm, model.lm_head], mesh=mesh, reshard_after_forward=True)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def under_fsdp():
    """The head is gathered with the root, or by itself, and then a second time for backward; the plan comes before or after."""
    batch, mesh = make_batch(17), line()
    wanted = once(lambda: alone("llama", batch, SMOOTH))
    exact = {
        change: once(lambda change=change: alone("llama", batch, SMOOTH, change=change)) for change in (with_lora, tied_and_biased)
    }
    exact[None] = wanted
    for how, first, change in [
        ("root", True, tied_and_biased),
        ("head", True, None),
        ("head", False, None),
        ("head and norm", False, None),
        ("head", False, with_lora),
    ]:
        model = make_model("llama")
        if change:
            change(model)
        plan = ring_plan(model, loss="chunked", loss_chunk=5, **of_terms(SMOOTH))
        if not first:
            sharded(model, mesh, how)
        parallelize_module(model, mesh, plan)
        if first:
            sharded(model, mesh, how)
        loss, grads = exact[change]
        for _ in range(2):  # the second time what the first has left must be in order
            model.zero_grad()
            out = model(**batch)
            out.loss.backward()
            torch.testing.assert_close(out.loss.detach(), loss, rtol=1e-6, atol=0)
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    assert isinstance(parameter.grad, DTensor)
                    error = (parameter.grad.full_tensor() - grads[name]).abs().max()
                    assert error <= 1e-6 * grads[name].abs().max(), f"{how}: {name}"


def test_fsdp_gathers_the_head_for_its_losses_and_for_their_backward(pools):
    pools.run(2, under_fsdp)


def compiled():
    """A whole model in one graph for all lengths but the first, with checkpointed layers."""
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")  # dynamo looks at it
    model, _ = planned("llama", loss="chunked", loss_chunk=5, **of_terms(SMOOTH))
    counter = CompileCounterWithBackend("aot_eager")
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.forward = torch.compile(model.forward, backend=counter, fullgraph=True)
    for length in (17, 20, 24):
        batch = make_batch(length)
        run(model, batch, once(lambda batch=batch: alone("llama", batch, SMOOTH)))
    assert counter.frame_count == 2


@pytest.mark.slow
def test_a_compiled_model_has_one_graph_for_all_lengths(pools):
    pools.run(2, compiled, timeout=280)


class LargestTensor(TorchDispatchMode):
    """The most elements that any tensor has had which an operator returned."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.most = max([self.most, *(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor))])
        return result


def memory():
    """Of 2 x 96 tokens with a vocabulary of 48 no more than chunks of logits are ever made or kept, heads of all kinds alike."""
    batch, world = make_batch(96), dist.get_world_size()
    whole, chunk = 2 * 96 // world * 48, 8 * 48
    rest = 2 * 96 // world * 32  # hidden states; weights have fewer, 48 x 32, and 48 x 48 in the MLP
    saved = []

    def pack(x):
        saved.append(x.numel())
        return x

    for change in (None, with_lora):
        model, _ = planned("llama", change=change, loss="chunked", loss_chunk=8, **of_terms(SMOOTH))
        head = LargestTensor()
        losses_of = model.lm_head.forward

        def inside(hidden, head=head, losses_of=losses_of):
            with head, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                return losses_of(hidden)

        model.lm_head.forward = inside
        out = model(**batch)
        with head:
            torch.autograd.grad(out.loss, [p for p in model.lm_head.parameters() if p.requires_grad])
        assert chunk <= head.most <= max(rest, chunk, 48 * 48) < whole
        assert max(saved) <= rest
    whole_logits, _ = planned("llama")
    with LargestTensor() as every:
        whole_logits(**batch)
    assert every.most >= whole, "what is counted is seen"


def test_no_tensor_is_as_large_as_whole_logits(pools):
    pools.run(2, memory)


def without_labels_that_count():
    """On one rank, and in the whole batch, where the mean is none in one process too."""
    batch = make_batch(16)
    some = {**batch, "labels": batch["labels"].clone()}
    some["labels"][:, :9] = -100
    none = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    wanted = once(lambda: alone("llama", some, SMOOTH))
    for options in ({}, {"loss": "chunked", "loss_chunk": 5}):
        model, _ = planned("llama", Contiguous(1), **of_terms(SMOOTH), **options)
        run(model, some, wanted)
        assert model(**none).loss.isnan()
        assert make_model("llama")(**none).loss.isnan()
        model.zero_grad()
        out = model(**none, num_items_in_batch=3)
        out.loss.backward()
        assert out.loss == 0
        assert all(not parameter.grad.any() for parameter in model.parameters())


def test_ranks_and_batches_whose_labels_are_all_ignored(pools):
    pools.run(2, without_labels_that_count)


def sixteen_bits():
    """In bfloat16 and under autocast the loss and gradients are no further from float64 than the model's own."""
    batch = make_batch(24)
    exact = alone("gemma2", batch, Terms())
    for change in (lambda model: model.bfloat16(), lambda model: model.float()):
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=change(make_model("gemma2")).dtype == torch.float32)
        errors = []
        for options in ({}, {"loss": "chunked", "loss_chunk": 7}):
            model, _ = planned("gemma2", change=change, **options)
            with autocast:
                loss = model(**batch).loss
            loss.backward()
            assert loss.dtype == torch.float32
            pairs = [(loss.detach(), exact[0]), *((p.grad, exact[1][name]) for name, p in model.named_parameters())]
            errors.append([((a.double() - b).norm() / b.norm()).item() for a, b in pairs])
        own, chunked = errors
        assert max(own) > 1e-3
        assert all(b <= 1.3 * a for a, b in zip(own[1:], chunked[1:], strict=True)), f"{own} {chunked}"
        assert chunked[0] <= torch.finfo(torch.bfloat16).eps / 8, "one number, in which the rounding of 46 tokens averages out"


def test_losses_of_sixteen_bits_are_as_exact_as_the_model_s_own(pools):
    pools.run(1, sixteen_bits)


def of_transformers():
    """The smoothed loss is that of LabelSmoother, under both of its contracts."""
    batch, smoother = make_batch(23), LabelSmoother(0.1)
    model, _ = planned("llama", label_smoothing=0.1)
    logits = {"logits": make_model("llama")(input_ids=batch["input_ids"], use_cache=False).logits}
    for count in (None, torch.tensor(31)):
        loss = model(**batch, **({} if count is None else {"num_items_in_batch": count})).loss.detach()
        if count is not None:
            dist.all_reduce(loss)
        wanted = smoother(logits, batch["labels"], shift_labels=True, num_items_in_batch=count)
        torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)


def test_label_smoothing_is_that_of_transformers(pools):
    pools.run(2, of_transformers)


def loss_parallel_step(ranks):
    """Logits sharded over the vocabulary: the model's own loss is right under loss_parallel, others are refused."""
    batch, mesh = make_batch(22), grid("cp", "tp", ranks)
    loss, grads = once(lambda: alone("llama", batch, Terms()))

    def placed(**options):
        model = make_model("llama")
        plan = ring_plan(model, **options)
        head = ColwiseParallel(input_layouts=Replicate(), output_layouts=Shard(-1), use_local_output=False)
        parallelize_module(model, mesh["tp"], {"lm_head": head})
        parallelize_module(model, mesh["cp"], plan)
        return model

    model = placed()
    with loss_parallel():
        out = model(**batch)
        out.loss.backward()
    torch.testing.assert_close(out.loss.detach().double(), loss, rtol=1e-6, atol=0)
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        grad = (grad.full_tensor() if isinstance(grad, DTensor) else grad).contiguous()
        dist.all_reduce(grad, group=mesh["cp"].get_group())
        error = (grad / mesh["cp"].size() - grads[name]).abs().max()
        assert error <= 1e-6 * grads[name].abs().max(), f"{name}: {error} of {grads[name].abs().max()}"
    for options, text in (
        (
            {"label_smoothing": 0.1},
            "logits are a DTensor (loss_parallel), and the plan's loss is cross entropy, label_smoothing 0.1",
        ),
        ({"loss": "chunked"}, "the weight of the head of LlamaForCausalLM is a DTensor in its forward pass"),
    ):
        model = placed(**options)
        with loss_parallel():
            refused(lambda model=model: model(**batch), NotImplementedError, text)


@pytest.mark.parametrize(("world", "ranks"), [(2, 1), (2, 2), slow(4, 2)])
def test_loss_parallel_is_right_or_refused(pools, world, ranks):
    pools.run(world, loss_parallel_step, ranks)
