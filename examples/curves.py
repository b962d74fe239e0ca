"""The same training in every set-up: SmolLM2-135M on packed text, 20 steps, the same losses as in one process.

    make curves                                               the whole model; docs/curves.md has what it shows
    make curves-short                                         two layers and few steps
    python examples/curves.py --layers 2 --optimizers sgd     any other

One process with transformers' own attention, a plain loop over cp=2, FSDP2 over dp=2 x cp=2, Accelerate, Trainer, and TRL's
SFTTrainer, which packs the documents by itself: all see the same batches and train the same weights in float32, on CPU processes
over gloo. At every step their losses must be within 1e-5 of the one process, with SGD within 1e-6, norms of gradients within 1e-4.
SFTTrainer sums the same loss up in another way, so it is compared with itself in one process, and that one, within 1e-5, with the
other. (AdamW divides each gradient by its own size: where one is as small as its rounding error, so is the direction of a step.)
The first loss of the one process must be that of its documents run one by one. Losses are drawn in one picture. Exit status 1 if a
set-up parts from the one process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

# Before torch and tokenizers are imported: this is a comparison of CPU processes, and they are forked.
os.environ.update(CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="false")

import torch
import torch.multiprocessing as mp
from curves_data import cut_documents, pack, save, unpack
from curves_report import ALLOWED, Curve, Curves, around_table, compare, draw, keep, write_table
from curves_setups import SETUPS, Task, run_rank
from datasets import disable_progress_bars
from demo import free_port
from tqdm import tqdm
from transformers.utils import logging

PRELOADED = ["trl.trainer.sft_trainer", "transformers.models.llama.modeling_llama", "dtensor_ring.integrations.accelerate"]


def main() -> int:
    """Every set-up, table, picture."""
    options = parse_options()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    disable_progress_bars()
    torch.set_num_threads(1)  # of this process, which computes nothing
    multiprocessing.set_forkserver_preload(PRELOADED)  # so that libraries are read once, and not by every process
    if options.page:
        around_table(options.page)  # now, and not after half an hour
    found: dict[str, Curves] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        documents = cut_documents(unpack(folder, options.layers), options.length, options.steps * options.batch)
        save(folder, documents, pack(documents, options.length))
        bar = tqdm(total=len(options.optimizers) * len(SETUPS), unit="set-up")
        for optimizer in options.optimizers:
            rate = options.lr if optimizer == "adamw" else options.sgd_lr
            task = Task(folder, options.steps, options.batch, options.length, optimizer, rate)
            found[optimizer] = {}
            for number, setup in enumerate(SETUPS):
                bar.set_postfix(optimizer=optimizer, now=setup.name)
                found[optimizer][setup.name] = train(number, task)
                bar.update()
        bar.close()
    table, is_good = compare(found, options.layers)
    print(table)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        draw(found, options.out)
        keep(found, options.layers, options.out.with_suffix(".json"))
    if options.page:
        write_table(options.page, table)
    return int(not is_good)


def parse_options() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30, help="of the model, from the first")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--length", type=int, default=192, help="tokens of a packed row, at most")
    parser.add_argument("--batch", type=int, default=2, help="rows of a step, of all ranks; even")
    parser.add_argument("--optimizers", nargs="+", choices=ALLOWED, default=["adamw", "sgd"])
    parser.add_argument("--lr", type=float, default=2e-5, help="of AdamW")
    parser.add_argument("--sgd-lr", type=float, default=1e-3, help="of SGD")
    parser.add_argument("--out", type=Path, default=None, help="a PNG file; the curves are kept as JSON beside it")
    parser.add_argument("--page", type=Path, default=None, help="a page of Markdown, whose table is replaced")
    options = parser.parse_args()
    if options.batch % 2:
        parser.error(f"--batch {options.batch} cannot be shared out over dp=2")
    return options


def train(number: int, task: Task) -> Curve:
    """Run a set-up in processes of its own."""
    setup, out = SETUPS[number], task.folder / "curve.json"
    mp.start_processes(run_rank, (free_port(), number, task, out), nprocs=setup.ranks, start_method="forkserver")
    return Curve(**json.loads(out.read_text()))


if __name__ == "__main__":
    sys.exit(main())
