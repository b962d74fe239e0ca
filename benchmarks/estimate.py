"""Memory and time of training steps on one GPU, beside what `dtensor_ring.estimate` says of them.

    python -m benchmarks.estimate --json benchmarks/results/estimate-h200.json      about a minute of one GPU
    python -m benchmarks.estimate --beside benchmarks/results/estimate-h200.json    its figures beside estimates
    python -m benchmarks.estimate --device cpu --cases tiny                         whether it runs: no memory, no times

Models of `estimate_cases` with random weights train for some steps at world 1 under ring_plan, with AdamW. Of the second step,
which starts without gradients as every step of a loop does, PyTorch's allocator says what is allocated after the model was made,
and the most that was in each phase: forward, backward, optimizer. Cases that are held out had no part in how the formulas and
constants of `estimate` were found.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.estimate_cases import CASES, COMPARED, GIB, TINY, Case, beside
from benchmarks.record import device_name, facts, load, save
from dtensor_ring import Zigzag, ring_plan


@dataclass
class Row:
    """A case as it ran: bytes that PyTorch's allocator had given out, and milliseconds.

    Attributes:
        case: what ran.
        parameters: held once the model is made.
        states: held between steps, with the optimizer's states.
        saved: held between forward and backward, beyond `states`.
        forward: the most during forward.
        backward: the most during backward.
        optimizer: the most during the optimizer's step.
        reserved: the most that the allocator had of the GPU.
        ms: of a step.
        forward_ms: of its forward pass.
        optimizer_ms: of its optimizer.
    """

    case: Case
    parameters: int = 0
    states: int = 0
    saved: int = 0
    forward: int = 0
    backward: int = 0
    optimizer: int = 0
    reserved: int = 0
    ms: float = 0.0
    forward_ms: float = 0.0
    optimizer_ms: float = 0.0
    note: str = ""

    @property
    def peak(self) -> int:
        """The most of all phases."""
        return max(self.forward, self.backward, self.optimizer)


@dataclass
class Meter:
    """Reads allocator and clock of a device; of a CPU no memory."""

    device: torch.device
    marks: list[Any] = field(default_factory=list)

    def held(self) -> int:
        """Bytes that are allocated now."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def most(self) -> int:
        """The most bytes since the last call, or since `begin`."""
        if self.device.type != "cuda":
            return 0
        torch.cuda.synchronize(self.device)
        most = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return most

    def mark(self) -> None:
        """Note the time on the device."""
        if self.device.type == "cuda":
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()

    def spans(self) -> list[float]:
        """Milliseconds between marks; forgets them."""
        if self.device.type != "cuda":
            return []
        torch.cuda.synchronize(self.device)
        spans = [a.elapsed_time(b) for a, b in zip(self.marks, self.marks[1:], strict=False)]
        self.marks.clear()
        return spans


def make_model(case: Case, mesh: DeviceMesh, device: torch.device) -> nn.Module:
    """The model with random weights, sequence-parallel over the mesh of one rank."""
    torch.manual_seed(0)
    fields = dict(case.config)
    config = AutoConfig.for_model(fields.pop("model_type"), **{"max_position_embeddings": 1 << 20, **fields})
    mixed = case.precision == "mixed"
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if mixed else torch.bfloat16).train()
    if case.checkpoint == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    asked = {} if case.loss == "whole" else {"loss": case.loss}
    parallelize_module(model, mesh, ring_plan(model, Zigzag(1), **asked))
    if mixed:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def run_case(case: Case, mesh: DeviceMesh, device: torch.device, steps: int) -> Row:
    """Train for a step that is not looked at, one whose memory is read, and some that are timed."""
    meter, row = Meter(device), Row(case)
    before = meter.held()  # what the CUDA libraries keep from earlier cases
    model = make_model(case, mesh, device)
    row.parameters = meter.held() - before
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=device.type == "cuda")
    ids = torch.randint(0, case.config["vocab_size"], (case.rows, case.tokens), generator=torch.Generator().manual_seed(1))
    ids = ids.to(device)

    def forward() -> Tensor:
        return model(input_ids=ids, labels=ids).loss

    forward().backward()
    optimizer.step()
    optimizer.zero_grad()
    gc.collect()
    meter.most()
    row.states = meter.held()
    loss = forward()
    row.saved = meter.held() - row.states
    row.forward = meter.most()
    loss.backward()
    row.backward = meter.most()
    optimizer.step()
    row.optimizer = meter.most()
    del loss
    timed: list[list[float]] = []
    for _ in range(steps):
        optimizer.zero_grad()
        meter.mark()
        loss = forward()
        meter.mark()
        loss.backward()
        meter.mark()
        optimizer.step()
        meter.mark()
        del loss
        timed.append(meter.spans())
    if device.type == "cuda":
        row.ms = statistics.median(map(sum, timed))
        row.forward_ms, _, row.optimizer_ms = (statistics.median(each) for each in zip(*timed, strict=True))
        row.reserved = torch.cuda.max_memory_reserved(device)
    return row


def refuses(case: Case) -> str | None:
    """Why a case cannot run here, or None."""
    if case.loss != "whole" and "loss" not in inspect.signature(ring_plan).parameters:
        return "this ring_plan has no loss="
    return None


def run(cases: tuple[Case, ...], mesh: DeviceMesh, device: torch.device, steps: int, report: Callable[[str], None]) -> list[Row]:
    """Run every case, alone on the device."""
    rows = []
    for case in cases:
        reason = refuses(case)
        if reason is not None:
            report(f"{case.name}: left out, {reason}")
            continue
        try:
            row = run_case(case, mesh, device, steps)
        except torch.OutOfMemoryError as error:
            row = Row(case, note=f"out of memory: {str(error)[:200]}")
        rows.append(row)
        report(line(row))
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
    return rows


HEADER = f"{'model':<24}{'tokens':>7}{'':>3}{'saved':>9}{'forward':>9}{'backward':>9}{'optim.':>9} GiB{'ms':>9}"


def line(row: Row) -> str:
    """A row as it is printed while cases run."""
    case = row.case
    gib = "".join(f"{x / GIB:>9.3f}" for x in (row.saved, row.forward, row.backward, row.optimizer))
    about = ", ".join(word for word in (case.checkpoint, case.loss, case.precision, "held out" if case.held_out else "") if word)
    return f"{case.name:<24}{case.rows * case.tokens:>7}{'':>3}{gib}    {row.ms:>9.1f}  {about} {row.note}"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", choices=("all", "tiny"), default="all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=3, help="that are timed")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--beside", type=Path, metavar="JSON", help="measure nothing, and print a run beside estimates")
    return parser


def main() -> int:
    """Measure; exit status 1 if a case failed."""
    options = parser().parse_args()
    if options.beside:
        print(COMPARED, *(each.line() for each in beside(load(options.beside))), sep="\n")
        return 0
    device = torch.device(options.device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if device.type == "cuda":
        torch.cuda.set_device(0)
        device = torch.device("cuda", 0)
    mesh = init_device_mesh(device.type, (1,), mesh_dim_names=("cp",))
    print(f"{device_name(device)}, torch {torch.__version__}\n{HEADER}", flush=True)
    rows = run(TINY if options.cases == "tiny" else CASES, mesh, device, options.steps, print)
    kept = {"rows": [{**asdict(row), "peak": row.peak} for row in rows], "device": device_name(device)}
    if device.type == "cuda":
        print(COMPARED, *(each.line() for each in beside(kept)), sep="\n")
    if options.json:
        save(options.json, facts("estimate", device), kept["rows"])
    dist.destroy_process_group()
    return int(any(row.note for row in rows))


if __name__ == "__main__":
    sys.exit(main())
