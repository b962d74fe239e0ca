"""Packed documents through a real model: SmolLM2-135M, texts of very different lengths in one row, each as if it were alone.

    make packed

One process runs every text by itself. Then two and four ranks (GPUs over NCCL where there are, else CPU processes over gloo) run
all of them packed without padding, documents cut one by one (`Zigzag(1, per_document=True)`): the loss of each text must be the
same to 1e-5. Exit status 1 if one is not.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from demo import TEXT, device_of, free_port, load, prepare
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers.utils import logging

from dtensor_ring import Documents, Zigzag, explain, ring_plan

LENGTHS = (418, 5, 96, 1, 233, 37, 12, 171)
ALLOWED = 1e-5


def main() -> int:
    """Texts alone, texts packed, table."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    documents = Documents.from_lengths(LENGTHS)
    found: dict[int, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        ids = prepare(Path(folder), documents.length)
        alone = run_alone(Path(folder), ids, documents)
        for ranks in (2, 4):
            mp.spawn(run_rank, args=(ranks, free_port(), folder), nprocs=ranks)
            found[ranks] = json.loads((Path(folder) / f"losses{ranks}.json").read_text())
    return report(documents, alone, found)


def losses_of(logits: Tensor, ids: Tensor, documents: Documents) -> list[float]:
    """The mean loss of each text of more than one token."""
    bounds = documents.bounds[0]
    return [cross_entropy(logits[0, a : b - 1], ids[0, a + 1 : b]).item() for a, b in pairwise(bounds) if b - a > 1]


def run_alone(folder: Path, ids: Tensor, documents: Documents) -> list[float]:
    """Every text by itself, in one process."""
    device = device_of(0, 1)
    model, ids = load(folder, device), ids.to(device)
    found: list[float] = []
    with torch.no_grad():
        for a, b in tqdm(list(pairwise(documents.bounds[0])), desc="one process", unit="text"):
            text = ids[:, a:b]
            found += losses_of(model(input_ids=text, use_cache=False).logits, text, Documents.from_lengths([b - a]))
    return found


def run_rank(rank: int, ranks: int, port: int, folder_name: str) -> None:
    """One rank: all texts packed."""
    folder, device = Path(folder_name), device_of(rank, ranks)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", rank=rank, world_size=ranks, device_id=device)
    else:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", rank=rank, world_size=ranks)
    mesh = init_device_mesh(device.type, (ranks,), mesh_dim_names=("cp",))
    ids, model = torch.load(folder / "ids.pt").to(device), load(folder, device)
    documents = Documents.from_lengths(LENGTHS)
    applied = ring_plan(model, Zigzag(1, per_document=True))
    parallelize_module(model, mesh, applied)
    with torch.no_grad():
        # what DataCollatorWithFlattening sends: positions that start again with every text
        out = model(input_ids=ids, position_ids=documents.position_ids().to(device))
        logits = applied.gather(out.logits)
    if rank == 0:
        (folder / f"losses{ranks}.json").write_text(json.dumps(losses_of(logits, ids, documents)))
    dist.barrier()
    dist.destroy_process_group()


def report(documents: Documents, alone: list[float], found: dict[int, list[float]]) -> int:
    """Print the table; exit status 1 if a text's loss is another."""
    print(f"\nSmolLM2-135M, {documents.length} tokens of {TEXT.stem} in {len(LENGTHS)} texts: loss of each text")
    print(f"{'tokens':>8}{'alone':>12}" + "".join(f"{f'{ranks} ranks':>12}{'relative':>11}" for ranks in found))
    worst = 0.0
    for i, length in enumerate(length for length in LENGTHS if length > 1):
        cells = ""
        for losses in found.values():
            gap = abs(losses[i] - alone[i]) / alone[i]
            worst = max(worst, gap)
            cells += f"{losses[i]:>12.6f}{gap:>11.1e}"
        print(f"{length:>8}{alone[i]:>12.6f}{cells}")
    for ranks in found:
        balance = explain(Zigzag(1, per_document=True), documents.length, ranks, documents).block_balance
        print(f"balance over {ranks} ranks (mean blocks of scores / most loaded rank): {balance:.3f}")
    print("all within 1e-5" if worst <= ALLOWED else "OUT OF TOLERANCE")
    return int(worst > ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
