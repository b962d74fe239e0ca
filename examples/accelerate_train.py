"""Train a Hugging Face model with Accelerate on long sequences: two lines differ from the script for one GPU.

    torchrun --nproc-per-node 2 examples/accelerate_train.py --cp 2
    PARALLELISM_CONFIG_CP_SIZE=4 accelerate launch --multi_gpu --num_processes 8 examples/accelerate_train.py --length 131072
    accelerate launch --config_file fsdp2.yaml examples/accelerate_train.py --model meta-llama/Llama-3.2-1B --text book.txt

Processes beside the sequence axis are data parallel. Gradients are accumulated over two batches and clipped; --save keeps the state
halfway, for accelerator.load_state; the evaluation counts every row once. Without --model a small Llama with random weights is
trained, without --text on this file; on CPUs where there are no GPUs. docs/accelerate.md has the file for FSDP2.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

from dtensor_ring.integrations.accelerate import RingParallelismConfig


def main() -> None:
    """Train for a number of steps, evaluate, and print both losses."""
    options = parse_options()
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        gradient_accumulation_steps=2,
        parallelism_config=RingParallelismConfig(cp_size=options.cp),
    )
    set_seed(0)
    model = build_model(options)
    rows = read_rows(options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.99**step)
    loader = DataLoader(TensorDataset(rows[2:]), batch_size=options.batch, shuffle=True, drop_last=True)
    evaluation = DataLoader(TensorDataset(rows[:2]), batch_size=1)
    model, optimizer, scheduler, loader, evaluation = accelerator.prepare(model, optimizer, scheduler, loader, evaluation)

    steps = tqdm(loader, disable=not accelerator.is_main_process, unit="batch")
    for step, (ids,) in enumerate(steps):
        with accelerator.accumulate(model):
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        steps.set_postfix(loss=f"{accelerator.gather(loss.detach()).mean().item():.4f}")
        if options.save and step == len(loader) // 2:
            accelerator.save_state(str(options.save))

    model.eval()
    losses = []
    for (ids,) in evaluation:
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss
        losses.append(accelerator.gather_for_metrics(loss.repeat(len(ids))))
    accelerator.print(f"evaluation: {torch.cat(losses).mean().item():.4f} over {len(torch.cat(losses))} rows")
    accelerator.end_training()


def parse_options() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cp", type=int, default=None, help="ranks that share a sequence; as accelerate launch says by default")
    parser.add_argument("--model", default=None, help="a pretrained model; a small random Llama without it")
    parser.add_argument("--text", type=Path, default=Path(__file__), help="training text")
    parser.add_argument("--length", type=int, default=130, help="tokens of a row")
    parser.add_argument("--batch", type=int, default=2, help="rows for each data-parallel rank")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--save", type=Path, default=None, help="folder for the state halfway")
    return parser.parse_args()


def build_model(options: argparse.Namespace) -> PreTrainedModel:
    """The pretrained model, or a small Llama with random weights."""
    if options.model:
        return AutoModelForCausalLM.from_pretrained(options.model)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    return AutoModelForCausalLM.from_config(config)


def read_rows(options: argparse.Namespace) -> torch.Tensor:
    """The text as rows of tokens: the model's tokens, or bytes for the random model."""
    if options.model:
        tokens = AutoTokenizer.from_pretrained(options.model)(options.text.read_text(), return_tensors="pt").input_ids[0]
    else:
        tokens = torch.tensor(list(options.text.read_bytes()))
    return tokens[: len(tokens) // options.length * options.length].view(-1, options.length)


if __name__ == "__main__":
    main()
