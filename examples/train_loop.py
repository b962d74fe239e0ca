"""A model and a training loop written by hand: `shard_batch` cuts the batch, `ring_attention` is the only call that communicates.

    torchrun --nproc-per-node 2 examples/train_loop.py

Weights are the same on every rank; each rank works on its tokens, and gradients are summed over ranks.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.functional import cross_entropy, rms_norm
from tqdm import trange

from dtensor_ring import Zigzag, from_local, ring_attention, shard_batch
from dtensor_ring.data import ShardedBatch

WIDTH, HEADS, LAYERS, VOCABULARY, LENGTH = 64, 4, 2, 256, 512
PLACEMENT = Zigzag(1)


class Layer(nn.Module):
    """Attention and a multilayer perceptron on this rank's tokens."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.mesh = mesh
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor, length: int) -> Tensor:
        """The stream is (B, S/W, WIDTH)."""
        heads = self.qkv(rms_norm(x, (WIDTH,))).unflatten(2, (3, HEADS, WIDTH // HEADS)).unbind(2)
        q, k, v = (from_local(part, self.mesh, [PLACEMENT], length=length, run_check=False) for part in heads)
        x = x + self.out(ring_attention(q, k, v).to_local().flatten(2))
        return x + self.mlp(rms_norm(x, (WIDTH,)))


class Model(nn.Module):
    """A small causal language model; positions are learned."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList(Layer(mesh) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, batch: ShardedBatch) -> Tensor:
        """This rank's part of the loss; the parts of all ranks add up to the mean over the whole batch."""
        x = self.tokens(batch["input_ids"]) + self.positions(batch["position_ids"])
        for layer in self.layers:
            x = layer(x, batch.length)
        logits = self.head(rms_norm(x, (WIDTH,)))
        return cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten(), reduction="sum") / batch.num_items


def main() -> None:
    """Train on this file's bytes."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    mesh = init_device_mesh("cuda" if cuda else "cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    torch.manual_seed(0)  # the same weights on every rank
    model = Model(mesh).to(mesh.device_type)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with open(__file__, "rb") as file:
        text = torch.tensor(list(file.read()), device=mesh.device_type)
    steps = trange(20, disable=dist.get_rank() != 0, unit="step")
    for step in steps:
        rows = torch.stack([text.roll(-(step + i) * 97)[:LENGTH] for i in range(2)])
        loss = model(shard_batch({"input_ids": rows, "labels": rows}, mesh, PLACEMENT))
        loss.backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()
        shown = loss.detach()
        dist.all_reduce(shown)
        steps.set_postfix(loss=f"{shown.item():.4f}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
