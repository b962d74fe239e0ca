"""`RingParallelismConfig`: scripts written for Accelerate train over a sequence axis as one process does."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import GradientAccumulationPlugin
from accelerate_ranks import accelerator_of
from helpers import once, slow
from models import worst
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

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
    total, norm = torch.zeros(()), None
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
    total, norm = torch.zeros(()), None
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
    with accelerated(mode) as accelerator:
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
        (4, "fsdp2", "llama", True),
        (4, "plain", "window", True),
        slow(2, "fsdp2", "window", False),
        slow(2, "ddp", "llama", False),
        slow(2, "plain", "llama", True),
        slow(4, "fsdp2", "window", False),
        slow(4, "ddp", "llama", True),
        slow(4, "ddp", "window", False),
    ],
)
def test_steps_with_accumulation_clipping_and_a_scheduler_are_those_of_one_process(pools, world, mode, kind, by_tokens):
    pools.run(world, trains, mode, kind, by_tokens)
