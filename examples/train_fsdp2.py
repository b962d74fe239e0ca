"""Train a Hugging Face model on long sequences with FSDP2 and sequence parallelism, on any number of GPUs or CPU processes.

    torchrun --nproc-per-node 4 examples/train_fsdp2.py --cp 2 --length 4096
    torchrun --nproc-per-node 8 examples/train_fsdp2.py --cp 8 --model meta-llama/Llama-3.2-1B --text book.txt --length 131072

The ranks form a (dp, cp) mesh: ranks of one dp row share a sequence, each holding 1/cp of its tokens; parameters are sharded over
all ranks. First the sequence (`parallelize_module`), then the parameters (`fully_shard`). Without --model a small Llama with
random weights is trained, without --text on this file.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

from dtensor_ring import Zigzag, ring_plan


def main() -> None:
    """Train for a number of steps and print the loss."""
    options = parse_options()
    mesh = start(options.cp)
    tokens = read_tokens(options)
    model = build_model(options).to(mesh.device_type, getattr(torch, options.dtype))
    model.train()

    plan = ring_plan(model, Zigzag(1))
    parallelize_module(model, mesh["cp"], plan)
    shard_parameters(model, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)

    if dist.get_rank() == 0:
        print(plan.describe())
    steps = tqdm(range(options.steps), disable=dist.get_rank() != 0, unit="step")
    for step in steps:
        batch = pick_batch(tokens, step, options, mesh).to(mesh.device_type)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        shown = loss.detach()
        dist.all_reduce(shown, op=dist.ReduceOp.SUM)
        steps.set_postfix(loss=f"{shown.item() / dist.get_world_size():.4f}")
    dist.barrier()
    dist.destroy_process_group()


def parse_options() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cp", type=int, default=2, help="ranks that share a sequence")
    parser.add_argument("--model", default=None, help="a pretrained model; a small random Llama without it")
    parser.add_argument("--text", type=Path, default=Path(__file__), help="training text")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=1, help="sequences for each dp row")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    return parser.parse_args()


def start(cp: int) -> DeviceMesh:
    """The (dp, cp) mesh over all processes that torchrun started."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    else:
        dist.init_process_group("gloo")
    world = dist.get_world_size()
    if world % cp:
        raise SystemExit(f"--cp {cp} does not divide the {world} processes")
    return init_device_mesh("cuda" if cuda else "cpu", (world // cp, cp), mesh_dim_names=("dp", "cp"))


def build_model(options: argparse.Namespace) -> PreTrainedModel:
    """The pretrained model, or a small Llama with the same random weights on every rank."""
    if options.model:
        return AutoModelForCausalLM.from_pretrained(options.model)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2
    )
    return AutoModelForCausalLM.from_config(config)


def read_tokens(options: argparse.Namespace) -> torch.Tensor:
    """The text as token ids: the model's tokens, or bytes for the random model."""
    if options.model:
        return AutoTokenizer.from_pretrained(options.model)(options.text.read_text(), return_tensors="pt").input_ids[0]
    return torch.tensor(list(options.text.read_bytes()))


def shard_parameters(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """FSDP2 over all ranks: gradients are averaged over dp and cp, which is what the loss of `ring_plan` expects."""
    flat = mesh["dp", "cp"]._flatten("dp_cp")
    for layer in model.model.layers:
        fully_shard(layer, mesh=flat)
    fully_shard(model, mesh=flat)


def pick_batch(tokens: torch.Tensor, step: int, options: argparse.Namespace, mesh: DeviceMesh) -> torch.Tensor:
    """Sequences for this dp row, the same on all of its cp ranks: (batch, length)."""
    row, rows = mesh.get_local_rank("dp"), mesh["dp"].size()
    first = (step * rows + row) * options.batch
    starts = [(first + i) * options.length % max(1, len(tokens) - options.length) for i in range(options.batch)]
    indices = torch.arange(options.length)
    return torch.stack([tokens[(start + indices) % len(tokens)] for start in starts])


if __name__ == "__main__":
    main()
