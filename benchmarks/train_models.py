"""The model of `benchmarks.train_step`, with plain attention and under `ring_plan`: two that share weights, or one that is sharded.

    on one GPU, whole            plain and ours are two models with the same weights; only ours has a plan
    sharded with FSDP2           they are one model, whose plan rests (`RingPlan.paused`) while others attend: built on the meta
                                 device, given its plan, sharded over the axis of the sequence, and then given its weights

The loss is the library's `chunked_cross_entropy` for everyone, since logits of a long sequence are larger than a GPU.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

from dtensor_ring import Zigzag, average_gradients, chunked_cross_entropy, ring_plan, save_attention
from dtensor_ring.integrations.transformers import RingPlan, materialize

Recomputed = Literal["", "layers", "layers but attention"]  # what backward computes again

MODELS = {
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
    },
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256},
}


class Llama(LlamaForCausalLM):
    """A Llama whose forward pass gives the sum of its losses, and no logits."""

    def forward(self, ids: Tensor, labels: Tensor, positions: Tensor | None = None) -> Tensor:  # pyrefly: ignore[bad-override]
        """The sum of the losses of this rank's tokens, in float32.

        Args:
            ids: (1, S), the tokens that the model takes: the whole sequence where a plan cuts it, else those of `labels`.
            labels: (1, S/W), the token after each of those whose outputs the model gives.
            positions: (1, S), of `ids`; None for 0, 1, 2 and so on.
        """
        hidden = self.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        return chunked_cross_entropy(hidden, self.lm_head.weight, labels).sum()


@dataclass(frozen=True)
class Models:
    """Both models, and what trains them.

    Attributes:
        plain: with PyTorch's attention, where `without_plan` is entered.
        ours: under the plan. The same object as `plain` where weights are sharded.
        plan: of the body of `ours`.
        mesh: the axis that the sequence is cut over.
        optimizer: of the weights, which both share.
    """

    plain: Llama
    ours: Llama
    plan: RingPlan
    mesh: DeviceMesh
    optimizer: torch.optim.Optimizer

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 has spread the weights over the ranks."""
        return self.plain is self.ours

    def without_plan(self) -> AbstractContextManager[object]:
        """Inside, `plain` is a model without a plan."""
        return self.plan.paused() if self.sharded else nullcontext()

    @contextmanager
    def attention(self, name: str) -> Iterator[None]:
        """Inside, `plain` attends by the function that transformers knows by this name; a plan must rest."""
        before = self.plain.model.config._attn_implementation
        self.plain.model.set_attn_implementation(name)
        try:
            yield
        finally:
            self.plain.model.set_attn_implementation(before or "sdpa")

    def recompute(self, what: Recomputed) -> None:
        """Let backward compute again layers, layers but for our attention, or nothing, in both models."""
        for model in (self.plain, self.ours):
            model.gradient_checkpointing_disable()
            if what:
                saved = {"context_fn": save_attention} if what == "layers but attention" else {}
                model.gradient_checkpointing_enable({"use_reentrant": False, **saved})

    def average(self) -> None:
        """Average gradients over the ranks; FSDP2 has done so in backward."""
        if not self.sharded:
            average_gradients(self.ours, self.mesh)

    def gradients(self) -> list[Tensor]:
        """What this rank has of the gradients, weight by weight."""
        grads = [weight.grad for weight in self.plain.parameters() if weight.grad is not None]
        return [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]


def make_models(options: argparse.Namespace, mesh: DeviceMesh, device: torch.device) -> Models:
    """Both models with the same random weights on every rank, and AdamW with its states."""
    if options.fsdp:
        plain = ours = make_model(options, torch.device("meta"))
    else:
        plain = make_model(options, device)
        # Weights are shared by naming them as copied already; the config must not be, since it names the attention.
        ours = copy.deepcopy(plain, {id(weight): weight for weight in plain.parameters()})
    plan = ring_plan(ours.model, Zigzag(1), kernel=options.kernel)
    parallelize_module(ours.model, mesh, plan)
    if options.fsdp:
        _shard(ours, options, mesh, device)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-6, fused=device.type == "cuda")
    # States are made by a step without gradients: the first contender's memory would be short of them, and that of others not.
    for weight in plain.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.zero_grad()
    return Models(plain, ours, plan, mesh, optimizer)


def make_model(options: argparse.Namespace, device: torch.device) -> Llama:
    """A whole model with random weights, the same on every rank; on the meta device without any."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **MODELS[options.model], num_hidden_layers=options.layers, max_position_embeddings=1 << 20, tie_word_embeddings=False
    )
    config._attn_implementation = "sdpa"
    with _default_dtype(getattr(torch, options.dtype)), device:
        return Llama(config).train()


def flops_a_token(model: Llama, length: int) -> float:
    """Model FLOPs a token of a step over sequences of `length` tokens, as `benchmarks.train_step` has them."""
    config = model.config
    multiplied = sum(weight.numel() for weight in model.parameters()) - model.model.embed_tokens.weight.numel()
    heads = config.num_attention_heads * (config.head_dim or config.hidden_size // config.num_attention_heads)
    return 6 * multiplied + 6 * config.num_hidden_layers * heads * length


def _shard(model: Llama, options: argparse.Namespace, mesh: DeviceMesh, device: torch.device) -> None:
    """Shard layer by layer over the ranks that share the sequence, then give each rank the weights of its shards."""
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if device.type == "cpu":  # where shards cannot draw their own numbers; such models are small
        materialize(model, device, make_model(options, device).state_dict() if dist.get_rank() == 0 else {})
    else:
        torch.manual_seed(0)
        materialize(model, device, "random")


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New parameters have this dtype; a model that is cast afterwards has rotary frequencies in 16 bits too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
