"""The set-ups of `curves.py`: the same training in a loop, over (dp, cp), with Accelerate, with Trainer and with SFTTrainer."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from curves_data import SEED, Row, checksum, collate
from curves_report import ALONE, SFT, SFT_ALONE, Curve
from datasets import Dataset, disable_progress_bars
from demo import load
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.data import DataLoader
from train_fsdp2 import shard_parameters
from transformers import AutoTokenizer, PreTrainedModel, PrinterCallback, Trainer, TrainingArguments
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from dtensor_ring import RingPlan, RingTrainerMixin, Zigzag, average_gradients, ring_plan
from dtensor_ring.integrations.accelerate import RingParallelismConfig

# Gradients are measured and never clipped: PyTorch's float32 norm of one large tensor on a CPU is off by more than 1e-5, and by
# less where FSDP2 holds the tensor in parts, so that clipped steps would be of unlike lengths.
UNCLIPPED = 1e9
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Task:
    """What every set-up does.

    Attributes:
        folder: where model and rows are.
        steps: optimizer steps.
        batch: rows of all ranks in a step.
        length: tokens of a row, at most.
        optimizer: "adamw" or "sgd".
        lr: its learning rate, which stays.
    """

    folder: Path
    steps: int
    batch: int
    length: int
    optimizer: str
    lr: float

    def rows(self) -> list[Row]:
        """All rows, in the order of steps."""
        return json.loads((self.folder / "rows.json").read_text())[: self.steps * self.batch]

    def batches(self, part: slice = slice(None)) -> Iterable[dict[str, Tensor]]:
        """The batch of each step, or a part of its rows."""
        rows = self.rows()
        return (collate(rows[i : i + self.batch][part]) for i in range(0, len(rows), self.batch))

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer, without decay."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(model.parameters(), lr=self.lr)
        return torch.optim.AdamW(model.parameters(), lr=self.lr, weight_decay=0.0)


def plan_of(model: PreTrainedModel) -> RingPlan:
    """The plan of every set-up: documents are cut one by one."""
    return ring_plan(model, Zigzag(1, per_document=True))


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    """Step, forget gradients; their norm before."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), UNCLIPPED)
    optimizer.step()
    optimizer.zero_grad()
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def alone(task: Task, curve: Curve) -> None:
    """One process, transformers' own attention, without this library."""
    model = load(task.folder, CPU).train()
    curve.by_document = by_document(task, model)
    optimizer = task.make_optimizer(model)
    for batch in task.batches():
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        curve.add(loss.detach(), take_step(model, optimizer), checksum(batch))


@torch.no_grad()
def by_document(task: Task, model: PreTrainedModel) -> float:
    """The loss of the first batch, each of its documents by itself: nothing of packing can be wrong in it."""
    ids = next(iter(task.batches()))["input_ids"]
    lengths = [length for row in task.rows()[: task.batch] for length in row["seq_lengths"]]
    documents = [one for one in ids.split(lengths, 1) if one.shape[1] > 1]
    sums = [model(input_ids=one, labels=one, use_cache=False).loss.double() * (one.shape[1] - 1) for one in documents]
    return (sum(sums) / sum(one.shape[1] - 1 for one in documents)).item()


def loop_cp(task: Task, curve: Curve) -> None:
    """A plain loop: every rank holds all weights, and gradients are averaged over the sequence axis."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    model = load(task.folder, CPU).train()
    parallelize_module(model, mesh, plan_of(model))
    optimizer = task.make_optimizer(model)
    for batch in task.batches():
        loss = model(**batch).loss
        loss.backward()
        average_gradients(model, mesh["cp"])
        curve.add(loss.detach(), take_step(model, optimizer), checksum(batch))


def loop_dp_cp(task: Task, curve: Curve) -> None:
    """FSDP2 over (dp, cp): each dp row has its rows of the batch, which do not have as many labels as the other's.

    So the loss is a sum divided by the labels of all, and FSDP2, which averages gradients, is given it times the ranks.
    """
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "cp"))
    model = load(task.folder, CPU).train()
    parallelize_module(model, mesh["cp"], plan_of(model))
    shard_parameters(model, mesh)
    optimizer = task.make_optimizer(model)
    for batch in task.batches(slice(mesh.get_local_rank("dp"), None, 2)):
        items, seen = (batch["labels"] != -100).sum(), torch.tensor(checksum(batch))
        for number in (items, seen):
            dist.all_reduce(number, group=mesh.get_group("dp"))
        part = model(**batch, num_items_in_batch=items).loss
        (part * world).backward()
        dist.all_reduce(loss := part.detach().clone())
        curve.add(loss, take_step(model, optimizer), int(seen))


def accelerated(task: Task, curve: Curve) -> None:
    """Accelerate, under DDP, as a script has it."""
    accelerator = Accelerator(cpu=True, parallelism_config=RingParallelismConfig(cp_size=dist_size(), plan=plan_of))
    model = load(task.folder, CPU).train()
    loader = DataLoader(task.rows(), batch_size=task.batch, collate_fn=collate)
    model, optimizer, loader = accelerator.prepare(model, task.make_optimizer(model), loader)
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), UNCLIPPED)
        optimizer.step()
        optimizer.zero_grad()
        curve.add(loss.detach(), norm, checksum(batch))


def trainer_arguments(task: Task) -> dict[str, Any]:
    """Arguments of Trainer and of SFTTrainer."""
    return {
        "output_dir": str(task.folder / "trainer"),
        "max_steps": task.steps,
        "per_device_train_batch_size": task.batch,
        "optim": "adamw_torch" if task.optimizer == "adamw" else "sgd",
        "learning_rate": task.lr,
        "lr_scheduler_type": "constant",
        "max_grad_norm": UNCLIPPED,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": False,
        "ddp_find_unused_parameters": False,
        "logging_steps": 1,
        "disable_tqdm": True,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "seed": SEED,
    }


class Watched(RingTrainerMixin):
    """A trainer over several ranks that keeps which batches it saw."""

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | None = None) -> Tensor:
        """Trainer's own."""
        self.seen = [*getattr(self, "seen", []), checksum(inputs)]
        return super().training_step(model, inputs, num_items_in_batch)

    def train_into(self, curve: Curve) -> None:
        """Train, and keep what is logged."""
        self.remove_callback(PrinterCallback)
        self.train()
        logged = [entry for entry in self.state.log_history if "grad_norm" in entry]
        curve.losses, curve.norms = ([float(entry[key]) for entry in logged] for key in ("loss", "grad_norm"))
        curve.batches = self.seen


class RingTrainer(Watched, Trainer):
    """Trainer, with sequences over ranks."""


class RingSFTTrainer(Watched, SFTTrainer):
    """SFTTrainer, with sequences over ranks."""


def trainer(task: Task, curve: Curve) -> None:
    """Trainer, under DDP."""
    RingTrainer(
        model=load(task.folder, CPU),
        args=TrainingArguments(**trainer_arguments(task), remove_unused_columns=False),
        train_dataset=task.rows(),
        data_collator=collate,
        cp_size=dist_size(),
        make_plan=plan_of,
    ).train_into(curve)


def sft(task: Task, curve: Curve) -> None:
    """SFTTrainer, over several processes under DDP; it packs the documents itself."""
    documents = json.loads((task.folder / "documents.json").read_text())
    RingSFTTrainer(
        model=load(task.folder, CPU),
        args=SFTConfig(**trainer_arguments(task), packing=True, max_length=task.length, shuffle_dataset=True),
        train_dataset=Dataset.from_dict({"input_ids": documents}),
        processing_class=AutoTokenizer.from_pretrained(task.folder),
        cp_size=dist_size(),
        make_plan=plan_of,
    ).train_into(curve)


def dist_size() -> int:
    """Processes of this set-up, also before they have met."""
    return int(os.environ["WORLD_SIZE"])


@dataclass(frozen=True)
class Setup:
    """A set-up by its name: how many processes it takes, what each of them runs, and whether the ranks meet before."""

    name: str
    ranks: int
    run: Callable[[Task, Curve], None]
    meets: bool = False


SETUPS = (
    Setup(ALONE, 1, alone),
    Setup("cp=2", 2, loop_cp, meets=True),
    Setup("dp=2 x cp=2, FSDP2", 4, loop_dp_cp, meets=True),
    Setup("Accelerate, cp=2", 2, accelerated),
    Setup("Trainer, cp=2", 2, trainer),
    Setup(SFT_ALONE, 1, sft),
    Setup(SFT, 2, sft),
)


def run_rank(rank: int, port: int, number: int, task: Task, out: Path) -> None:
    """One process of a set-up, started as torchrun does; the first one keeps the curve."""
    setup = SETUPS[number]
    size = {"WORLD_SIZE": setup.ranks, "LOCAL_WORLD_SIZE": setup.ranks, "RANK": rank, "LOCAL_RANK": rank}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_TORCH_DEVICE": "cpu"}
    threads = max(1, (os.cpu_count() or 1) // setup.ranks)
    os.environ.update({name: str(value) for name, value in (size | place | {"OMP_NUM_THREADS": threads}).items()})
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    warnings.simplefilter("ignore", FutureWarning)
    warnings.filterwarnings("ignore", message="attention on this packed batch keeps its ranks busy")  # rows are short here
    if setup.meets:
        dist.init_process_group("gloo")
    curve, began = Curve(), time.perf_counter()
    setup.run(task, curve)
    curve.seconds = time.perf_counter() - began
    if rank == 0:
        out.write_text(json.dumps(vars(curve)))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
