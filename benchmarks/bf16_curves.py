"""Losses of 200 steps in bfloat16 under ring_plan, beside plain attention: closer to it than another seed's initial weights are.

    python -m benchmarks.bf16_curves                              one GPU at world 1; with two GPUs cp=2 over NCCL as well
    python -m benchmarks.bf16_curves --dtype bfloat16             weights in bfloat16, instead of autocast
    python -m benchmarks.bf16_curves --model tiny --device cpu --tokens 128 --steps 30 --document 48

A model with the shapes of SmolLM2-135M and random weights learns this repository byte by byte: rows of packed files, no padding,
the same rows in every run, AdamW. The model of another seed differs in its initial weights alone. Losses are means of ten steps,
and two runs are as far apart as their means are, over all steps: on the mean, and at most. Runs under ring_plan pass where both
are smaller than between the two seeds. Exit status 1 if one does not; curves as JSON and as a picture.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks.record import facts, save
from dtensor_ring import Documents, Zigzag, average_gradients, ring_plan

ROOT = Path(__file__).parents[1]
SMOOTHED = 10  # steps
MODELS = {
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "initializer_range": 1 / 24,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


@dataclass(frozen=True)
class Run:
    """One training: which attention, over how many ranks, from the weights of which seed."""

    name: str
    is_ring: bool
    world: int
    seed: int


@dataclass
class Curve:
    """What a run gave: the loss before each step, and milliseconds a step (the median)."""

    name: str
    losses: list[float]
    ms: float


PLAIN, OTHER_SEED = Run("plain", False, 1, 0), Run("plain, other seed", False, 1, 1)
RING = Run("ring_plan, world 1", True, 1, 0)


def main() -> int:
    """Train, compare, draw."""
    options = parse_options()
    devices = torch.cuda.device_count() if options.device == "cuda" else 2
    worlds: list[list[Run]] = [[PLAIN, OTHER_SEED, RING]]
    if devices > 1:
        worlds.append([Run("ring_plan, cp=2", True, 2, 0)])
    curves: list[Curve] = []
    for runs in worlds:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(run_rank, args=(free_port(), runs, options, folder), nprocs=runs[0].world)
            curves += torch.load(Path(folder) / "curves.pt", weights_only=False)
    return report(curves, options)


def parse_options() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smollm2-135m")
    parser.add_argument("--dtype", choices=("autocast", "bfloat16"), default="autocast")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a row, in all")
    parser.add_argument("--document", type=int, default=1500, help="tokens of a document, at most")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--kernel", default=None, help="of ring_plan; its own choice by default")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for bf16_curves.json and bf16_curves.png")
    return parser.parse_args()


def free_port() -> int:
    """A port on which ranks can meet."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def run_rank(rank: int, port: int, runs: Sequence[Run], options: argparse.Namespace, folder: str) -> None:
    """One rank of some runs of the same world, one after another."""
    world, device = runs[0].world, torch.device("cpu")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if options.device == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", rank=rank, world_size=world, device_id=device)
    else:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", rank=rank, world_size=world)
    curves = [train(run, options, device) for run in runs]
    if rank == 0:
        torch.save(curves, Path(folder) / "curves.pt")
    dist.barrier()
    dist.destroy_process_group()


def train(run: Run, options: argparse.Namespace, device: torch.device) -> Curve:
    """Train one model on the rows that every run sees."""
    mesh = init_device_mesh(device.type, (run.world,), mesh_dim_names=("cp",))
    model = make_model(run, options, device)
    if run.is_ring:
        plan = ring_plan(model, Zigzag(1, per_document=True), kernel=options.kernel)
        parallelize_module(model, mesh, plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95), fused=device.type == "cuda")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
    losses, ended = [], [time.perf_counter()]
    for ids, position_ids, labels in rows(options, device):
        with precision(options, device):
            loss = model(input_ids=ids, position_ids=position_ids, labels=labels, use_cache=False).loss
        loss.backward()
        if run.is_ring:
            average_gradients(model, mesh["cp"])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        ended.append(time.perf_counter())
    times = sorted(b - a for a, b in pairwise(ended))
    if run.is_ring and dist.get_rank() == 0:
        print(plan.describe())
    return Curve(run.name, losses, times[len(times) // 2] * 1e3)


def make_model(run: Run, options: argparse.Namespace, device: torch.device) -> PreTrainedModel:
    """The model with the weights of a seed, drawn on the CPU so that every device has the same."""
    torch.manual_seed(run.seed)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**MODELS[options.model]), attn_implementation="sdpa")
    return model.to(device, torch.bfloat16 if options.dtype == "bfloat16" else torch.float32).train()


def precision(options: argparse.Namespace, device: torch.device) -> AbstractContextManager[object]:
    """What a forward pass runs in."""
    return torch.autocast(device.type, torch.bfloat16) if options.dtype == "autocast" else nullcontext()


def rows(options: argparse.Namespace, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Ids, positions that start again with every document, and labels, (1, S) each: parts of this repository's files, packed."""
    files = sorted(path for part in ("dtensor_ring", "tests", "docs") for path in (ROOT / part).rglob("*") if is_text(path))
    texts = [torch.tensor(list(path.read_bytes())) for path in files]
    drawn = Random(0)
    for _ in range(options.steps):
        pieces, left = [], options.tokens
        while left:
            text = drawn.choice([text for text in texts if len(text)])
            start = drawn.randrange(len(text))
            pieces.append(text[start : start + min(left, drawn.randint(1, options.document))])
            left -= len(pieces[-1])
        ids = torch.cat(pieces)[None].to(device)
        positions = Documents.from_lengths([len(piece) for piece in pieces]).position_ids().to(device)
        yield ids, positions, ids.masked_fill(positions == 0, -100)


def is_text(path: Path) -> bool:
    """Whether a file is code or prose."""
    return path.suffix in {".py", ".md"}


def smoothed(losses: Sequence[float]) -> Tensor:
    """Means over ten steps, of every ten that follow each other."""
    return torch.tensor(losses, dtype=torch.float64).unfold(0, SMOOTHED, 1).mean(-1)


def distance(curve: Curve, other: Curve) -> tuple[float, float]:
    """How far two curves are apart: on the mean, and at most."""
    gaps = (smoothed(curve.losses) - smoothed(other.losses)).abs()
    return gaps.mean().item(), gaps.max().item()


def report(curves: Sequence[Curve], options: argparse.Namespace) -> int:
    """Print the table, keep JSON and picture; exit status 1 where a run is further from plain attention than the other seed."""
    plain, noise = curves[0], distance(curves[1], curves[0])
    print(f"\n{'losses, means of ten steps':<28}{'first':>9}{'last':>9}{'mean gap':>11}{'largest':>11}{'ms a step':>11}")
    good, compared = True, []
    for curve in curves:
        means, gaps = smoothed(curve.losses), distance(curve, plain)
        is_within = curve.name not in (PLAIN.name, OTHER_SEED.name) and all(a < b for a, b in zip(gaps, noise, strict=True))
        verdict = "" if curve.name in (PLAIN.name, OTHER_SEED.name) else "within" if is_within else "OUTSIDE"
        good &= verdict != "OUTSIDE"
        cells = f"{means[0]:>9.4f}{means[-1]:>9.4f}{gaps[0]:>11.1e}{gaps[1]:>11.1e}{curve.ms:>11.1f}"
        print(f"{curve.name:<28}{cells}  {verdict}")
        compared.append({"name": curve.name, "mean_gap": gaps[0], "largest_gap": gaps[1], "ms": curve.ms, "losses": curve.losses})
    print("all within the noise of two seeds" if good else "OUTSIDE THE NOISE OF TWO SEEDS")
    options.out.mkdir(parents=True, exist_ok=True)
    known = {name: getattr(options, name) for name in ("model", "dtype", "tokens", "document", "steps", "lr", "kernel")}
    save(options.out / "bf16_curves.json", facts("bf16_curves", torch.device(options.device), **known), compared)
    draw(curves, options.out / "bf16_curves.png")
    return int(not good)


def draw(curves: Sequence[Curve], out: Path) -> None:
    """Two panels: losses, and their distance from plain attention."""
    try:
        import matplotlib as mpl
    except ImportError:
        print("no picture: pip install 'dtensor-ring[plot]'")
        return
    mpl.use("Agg")  # draws without a display
    from matplotlib import pyplot as plt

    figure, (losses, gaps) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for curve in curves:
        losses.plot(range(SMOOTHED, len(curve.losses) + 1), smoothed(curve.losses), label=curve.name, linewidth=1.2)
    for number, curve in enumerate(curves[1:], 1):
        gap = (smoothed(curve.losses) - smoothed(curves[0].losses)).abs()
        gaps.semilogy(range(SMOOTHED, len(curve.losses) + 1), gap, label=curve.name, color=f"C{number}", linewidth=1.2)
    losses.set(title="loss, mean of ten steps", xlabel="step")
    gaps.set(title="distance from plain attention", xlabel="step")
    losses.legend()
    gaps.legend()
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
