"""`RingParallelismConfig`: scripts written for Accelerate train over a sequence axis as one process does."""

from __future__ import annotations

import shutil
import tempfile
import warnings

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import GradientAccumulationPlugin
from accelerate_ranks import accelerator_of
from helpers import once, refused, slow
from models import worst
from peft import LoraConfig, get_peft_model
from test_encoders import make_batch
from test_encoders import make_model as make_masked
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from dtensor_ring.integrations.accelerate import ring_of

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "llama": lambda: LlamaConfig(num_key_value_heads=2, **SIZES),
    "window": lambda: MistralConfig(num_key_value_heads=2, sliding_window=5, **SIZES),
}
STEPS = 2  # micro-batches of an optimizer step
CLIP = 0.5
CLOSE = 1e-5  # relative, in float32, after several steps of AdamW


class Rows(Dataset):
    """Rows of tokens, each with its number; labels count alike in all, or not."""

    def __init__(self, count: int = 16, *, alike: bool = False, length: int = 17) -> None:
        self.ids = torch.randint(0, 64, (count, length), generator=torch.Generator().manual_seed(3))
        self.labels = self.ids.clone()
        for row in range(count):
            self.labels[row, : 4 if alike else 5 * row % 13] = -100

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[row], "labels": self.labels[row], "row": torch.tensor(row)}


def build(kind: str, seed: int = 0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]())
    # An epsilon that gradients are not small beside: AdamW would make errors of rounding as large as steps.
    optimizer = AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    return model, optimizer, LambdaLR(optimizer, lambda step: 0.97**step)


def whole(parameter: torch.Tensor) -> torch.Tensor:
    return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach().clone()


def accelerated(mode: str, **options):
    """An accelerator that accumulates gradients of `STEPS` micro-batches, which the scripts read ahead of their turn."""
    accumulation = GradientAccumulationPlugin(num_steps=STEPS, sync_with_dataloader=False)
    return accelerator_of(mode, gradient_accumulation_plugin=accumulation, **options)


def step_by_tokens(accelerator, model, optimizer, scheduler, micro) -> tuple[float, float]:
    """An optimizer step as Accelerate's guide to accumulating gradients of unequal batches has it, written for DDP."""
    count = accelerator.gather(sum((batch["labels"][:, 1:] != -100).sum() for batch in micro)).sum()
    total, norm = torch.zeros((), device=accelerator.device), None
    for batch in micro:
        with accelerator.accumulate(model):
            loss = model(**batch, num_items_in_batch=count).loss
            loss = loss * accelerator.num_processes * accelerator.gradient_accumulation_steps
            accelerator.backward(loss)
            total += loss.detach() / accelerator.gradient_accumulation_steps
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return accelerator.gather(total).mean().item(), float(norm)


def step_by_means(accelerator, model, optimizer, scheduler, micro) -> tuple[float, float]:
    """The plainest script: the model's loss, nothing scaled."""
    total, norm = torch.zeros((), device=accelerator.device), None
    for batch in micro:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            total += loss.detach() / len(micro)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return accelerator.gather(total).mean().item(), float(norm)


def train(accelerator, step, kind: str, rows: Dataset, epochs: int = 1):
    """Rows of each optimizer step, its loss and gradient norm, and in the end learning rate and parameters."""
    model, optimizer, scheduler = build(kind)
    loader = DataLoader(rows, batch_size=2, shuffle=True)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    seen, losses, norms = [], [], []
    for _ in range(epochs):
        batches = iter(loader)
        for _ in range(len(loader) // STEPS):
            micro = [next(batches) for _ in range(STEPS)]
            seen.append(torch.cat([accelerator.gather_for_metrics(batch.pop("row")) for batch in micro]))
            loss, norm = step(accelerator, model, optimizer, scheduler, micro)
            losses.append(loss)
            norms.append(norm)
        assert next(batches, None) is None
    return seen, losses, norms, scheduler.get_last_lr()[0], [whole(p) for p in model.parameters()]


def train_alone(kind: str, rows: Rows, seen: list[torch.Tensor], data: int):
    """One process that is given all rows of an optimizer step as one batch."""
    model, optimizer, scheduler = build(kind)
    losses, norms = [], []
    for chosen in seen:
        loss = model(input_ids=rows.ids[chosen], labels=rows.labels[chosen], use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        with warnings.catch_warnings(action="ignore"):
            for _ in range(data):
                scheduler.step()
        optimizer.zero_grad()
    return losses, norms, scheduler.get_last_lr()[0], [p.detach() for p in model.parameters()]


def far(values: list[float], wanted: list[float]) -> float:
    return max(abs(value - right) / abs(right) for value, right in zip(values, wanted, strict=True))


def trains(mode: str, kind: str, by_tokens: bool) -> None:
    rows = Rows(alike=not by_tokens)
    data = dist.get_world_size() // 2
    sizes = {"cp_size": 2, "dp_replicate_size": data} if mode == "hsdp" else {"cp_size": 2}
    with accelerated("fsdp2" if mode == "hsdp" else mode, sizes=sizes) as accelerator:
        torch.manual_seed(100 + dist.get_rank())  # ranks that draw each for themselves
        epochs = 2 if data > 1 else 1
        seen, losses, norms, rate, parameters = train(
            accelerator, step_by_tokens if by_tokens else step_by_means, kind, rows, epochs
        )
    # Each row once an epoch: nothing is read twice, and a sequence axis counts its samples once.
    order = torch.cat(seen).view(epochs, -1)
    assert order.sort().values.tolist() == [list(range(len(rows)))] * epochs
    if epochs > 1:
        assert order[0].tolist() != order[1].tolist()
    alone = once(lambda: train_alone(kind, rows, seen, data))
    assert far(losses, alone[0]) < CLOSE, (losses, alone[0])
    assert far(norms, alone[1]) < CLOSE, (norms, alone[1])
    assert rate == alone[2]
    assert worst(zip(parameters, alone[3], strict=True)) < CLOSE


@pytest.mark.parametrize(
    ("world", "mode", "kind", "by_tokens"),
    [
        (2, "ddp", "window", True),
        (2, "plain", "llama", False),
        (4, "fsdp2", "window", True),
        (4, "plain", "llama", True),
        slow(2, "fsdp2", "window", False),
        slow(2, "ddp", "llama", False),
        slow(2, "plain", "llama", True),
        slow(4, "fsdp2", "llama", False),
        slow(4, "hsdp", "llama", True),
        slow(4, "ddp", "llama", True),
        slow(4, "ddp", "window", False),
    ],
)
def test_steps_with_accumulation_clipping_and_a_scheduler_are_those_of_one_process(pools, world, mode, kind, by_tokens):
    pools.run(world, trains, mode, kind, by_tokens)


def resumes(mode: str) -> None:
    """Saved after one optimizer step of two; models, optimizers and loaders that begin with other weights and orders go on."""
    folders: list = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folders)
    results = []
    for resumed in (False, True):
        with accelerated(mode, loaders={"use_seedable_sampler": True, "data_seed": 7}) as accelerator:
            model, optimizer, scheduler = build("window", seed=1 if resumed else 0)
            loader = DataLoader(Rows(8), batch_size=2, shuffle=True)
            model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
            if resumed:
                accelerator.load_state(folders[0])
                loader = accelerator.skip_first_batches(loader, STEPS)
            batches, losses = iter(loader), []
            for step in range(1 if resumed else 2):
                micro = [next(batches) for _ in range(STEPS)]
                rows = [batch.pop("row").tolist() for batch in micro]
                losses.append((rows, *step_by_tokens(accelerator, model, optimizer, scheduler, micro)))
                if step == 0 and not resumed:
                    accelerator.save_state(folders[0])
            results.append((losses[-1], scheduler.get_last_lr(), [whole(p) for p in model.parameters()]))
    (last, rate, parameters), (last_again, rate_again, parameters_again) = results
    assert last == last_again
    assert rate == rate_again
    assert all(torch.equal(a, b) for a, b in zip(parameters, parameters_again, strict=True))
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folders[0])


@pytest.mark.parametrize("mode", ["ddp", "fsdp2", slow("plain")])
def test_a_run_that_is_resumed_from_save_state_is_bitwise_the_one_that_was_not_interrupted(pools, mode):
    pools.run(2, resumes, mode)


def averages_late() -> None:
    """Without a wrapper: weights that began apart, `loss.backward()`, and what reads gradients before the optimizer."""
    batch = {key: value[:2] for key, value in (("input_ids", Rows(alike=True).ids), ("labels", Rows(alike=True).labels))}
    alone, _, _ = build("llama")
    alone(**batch, use_cache=False).loss.backward()
    alone.model.embed_tokens.weight.requires_grad_(requires_grad=False)
    wanted = {name: parameter.grad.clone() for name, parameter in alone.named_parameters() if parameter.requires_grad}
    norm = torch.nn.utils.clip_grad_norm_([p for p in alone.parameters() if p.requires_grad], 1e9)
    with accelerator_of("plain") as accelerator:
        model, optimizer, _ = build("llama", seed=dist.get_rank())
        model.model.embed_tokens.weight.requires_grad_(requires_grad=False)
        model, optimizer = accelerator.prepare(model, optimizer)

        def gradients() -> float:
            return worst((p.grad, wanted[name]) for name, p in model.named_parameters() if p.requires_grad)

        accelerator.backward(model(**batch).loss)
        assert gradients() < CLOSE
        optimizer.zero_grad()
        for clip in (accelerator.clip_grad_norm_, accelerator.clip_grad_value_):
            model(**batch).loss.backward()
            assert gradients() > 0.1, "not averaged yet"
            shown = clip([p for p in model.parameters() if p.requires_grad], 1e9)
            assert gradients() < CLOSE
            assert shown is None or far([shown.item()], [norm.item()]) < CLOSE
            optimizer.zero_grad()
        seen = []
        optimizer.optimizer.register_step_pre_hook(lambda *_: seen.append(gradients()))
        model(**batch).loss.backward()
        optimizer.step()
        assert len(seen) == 1
        assert seen[0] < CLOSE


def test_models_without_a_wrapper_start_alike_and_average_before_anything_reads_a_gradient(pools):
    pools.run(2, averages_late)


def casts() -> None:
    """In bfloat16 by autocast: the loss of one process, within the rounding of its dtype."""
    batch = {key: value[:2] for key, value in (("input_ids", Rows().ids), ("labels", Rows().labels))}
    with accelerator_of("ddp", mixed_precision="bf16") as accelerator:
        model, optimizer, _ = build("llama")
        with torch.autocast("cpu", torch.bfloat16):
            wanted = model(**batch, use_cache=False)
        model, optimizer = accelerator.prepare(model, optimizer)
        for items in ({}, {"num_items_in_batch": (batch["labels"][:, 1:] != -100).sum()}):
            out = model(**batch, **items)
            assert out.logits.dtype == torch.float32
            torch.testing.assert_close(out.loss, wanted.loss, rtol=2**-8, atol=0)
            (loss,) = model(**batch, **items, return_dict=False)[:1]
            torch.testing.assert_close(loss, out.loss)
        accelerator.backward(out.loss)
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_loss_is_the_whole_one_under_mixed_precision_and_in_a_tuple(pools):
    pools.run(2, casts)


def wholes() -> None:
    """The loss over a number of items, of models whose calls a plan sees otherwise: labels that stay, adapters, a pause."""
    masked, rows = make_batch("modernbert", 16), {"input_ids": Rows().ids[:2], "labels": Rows().labels[:2]}
    counted = masked["labels"] != -100
    model = make_masked("modernbert")
    adapted = get_peft_model(build("llama")[0], LoraConfig(target_modules=["q_proj"], r=2))
    with torch.no_grad():
        of_masked = cross_entropy(model(**masked).logits[counted], masked["labels"][counted], reduction="sum") / 7
        of_rows = adapted(**rows, num_items_in_batch=7).loss
    with accelerator_of("ddp") as accelerator:
        model, adapted = accelerator.prepare(model, adapted)
        torch.testing.assert_close(model(**masked, num_items_in_batch=7).loss, of_masked)
        torch.testing.assert_close(adapted(**rows, num_items_in_batch=7).loss, of_rows)
        plan = ring_of(accelerator).plan_of(adapted)
        with plan.paused():
            torch.testing.assert_close(adapted(**rows, num_items_in_batch=7).loss, of_rows)
        refused(lambda: ring_of(accelerator).plan_of(build("llama")[0]), ValueError, "was not prepared by this accelerator")


def test_a_loss_over_a_number_of_items_is_the_whole_one_for_masked_models_adapters_and_in_a_pause(pools):
    pools.run(2, wholes)
