"""A training step of a model with the shapes of Llama-3.1-8B under ring_plan, beside the same model with plain attention.

    python -m benchmarks.train_step --tokens 8192 16384                      one GPU, world 1
    python -m benchmarks.train_step --tokens 8192 32768 --emulate 8          one rank of eight, 64k and 256k tokens in all
    torchrun --nproc-per-node 2 -m benchmarks.train_step --tokens 8192       real ranks: tokens are those of a rank
    python -m benchmarks.train_step --model tiny --device cpu --tokens 64

Both models share their weights and run in turns: forward without gradients, and a step, which is forward, backward and AdamW. The
plain one is Hugging Face's with `scaled_dot_product_attention` as PyTorch chooses its kernel, on one rank's tokens: with more than
one rank it computes less attention, and only says what the rest of the model takes. The loss is computed in pieces of tokens, since
the logits of a long sequence are larger than the GPU. On real ranks gradients are averaged as well (`average_gradients`); where
ranks are emulated they are not, and every row says so. Losses and gradients of both are compared first, with fewer tokens.

    model FLOPs a token = 6 N + 6 L H D S     N weights that are multiplied with (all but the embedding), L layers, H heads of D, S
                                              tokens that a sequence has in all: causal attention multiplies S/2 keys, 4 H D FLOPs
                                              each, and backward takes twice as much as forward
    MFU                 = tokens/s a GPU x model FLOPs a token / the GPU's dense 16-bit peak; recomputed activations do not count
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaModel

from benchmarks.links import Link, emulated_axis
from benchmarks.record import device_name, facts, save
from benchmarks.targets import MODEL
from benchmarks.timing import Call, Effort, Stopwatch, ratio
from dtensor_ring import Zigzag, average_gradients, ring_plan
from dtensor_ring.planning.layout import Layout

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
PEAKS = {"H100": 989.4, "H200": 989.4, "A100": 312.0}  # TFLOP/s, dense bfloat16, from NVIDIA's data sheets
PIECE = 2048  # tokens whose logits exist at a time


@dataclass
class Row:
    """One line of the table: times in milliseconds of forward and of a step, of the slowest rank."""

    model: str
    attention: str
    kernel: str
    layers: int
    recomputed: bool
    world: int
    tokens: int
    emulated: bool
    target: str = ""
    ms: tuple[float, float] = (0.0, 0.0)
    ratio: tuple[float, float] | None = None
    tokens_per_second: float = 0.0
    mfu: float | None = None
    peak_gib: float = 0.0

    def line(self) -> str:
        """As the table prints it."""
        name = f"{self.attention}{' emulated' if self.emulated else ''}{', recomputed' if self.recomputed else ''}"
        figures = f"{self.ms[0]:>10.2f}{self.ms[1]:>10.2f}{self.tokens_per_second:>10.0f}"
        mfu = "" if self.mfu is None else f"{self.mfu:.1%}"
        pair = "" if self.ratio is None else f"{self.ratio[0]:>9.3f}{self.ratio[1]:>7.3f}"
        return f"{name:<32}{self.layers:>7}{self.world:>4}{self.tokens:>8}{figures}{mfu:>8}{self.peak_gib:>9.1f}{pair}"


HEADER = (
    f"{'attention':<32}{'layers':>7}{'W':>4}{'tokens':>8}{'fwd ms':>10}{'step ms':>10}{'tokens/s':>10}{'MFU':>8}{'peak GiB':>9}"
    f"{'plain/it':>9}"
)


class Trainer(nn.Module):
    """A model without its head, and a head whose loss is computed some tokens at a time."""

    def __init__(self, body: LlamaModel, head: nn.Linear) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """The sum of losses of the tokens of `labels`, which are those of `body`'s outputs, shifted already; in float32."""
        hidden = self.body(input_ids=ids, use_cache=False).last_hidden_state
        pieces = zip(hidden.split(PIECE, 1), labels.split(PIECE, 1), strict=True)
        return torch.stack([checkpoint(self._loss, *piece, use_reentrant=False) for piece in pieces]).sum()

    def _loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.head(hidden).float().flatten(0, 1), labels.flatten(), reduction="sum")


class Race:
    """Both models on one axis of ranks.

    Attributes:
        mesh: the axis.
        watch: what times steps.
        options: the command line.
        plain: with PyTorch's attention.
        ours: under ring_plan, with the same weights.
    """

    def __init__(self, options: argparse.Namespace, mesh: DeviceMesh, watch: Stopwatch) -> None:
        self.options, self.mesh, self.watch = options, mesh, watch
        self.world, self.rank, self.emulated = mesh.size(), mesh.get_local_rank(), bool(options.emulate)
        self.plain = make_model(options, watch.device)
        # Weights are shared by naming them as copied already; the config must not be, since it names the attention.
        self.ours = copy.deepcopy(self.plain, {id(weight): weight for weight in self.plain.parameters()})
        parallelize_module(self.ours.body, mesh, ring_plan(self.ours.body, Zigzag(1), kernel=options.kernel))
        self.optimizer = torch.optim.AdamW(self.plain.parameters(), lr=1e-6, fused=watch.device.type == "cuda")

    def check(self, tokens: int) -> str:
        """What differs between the two on one short sequence of all ranks; empty if nothing does or there are no other ranks."""
        if self.emulated:
            return ""
        ids, labels = self.batch(tokens * self.world)
        results = []
        for model, mine in ((self.plain, labels), (self.ours, self.share(labels))):
            model.zero_grad()
            loss = model(ids, mine) / labels.numel()
            (loss * self.world if model is self.ours else loss).backward()
            if model is self.ours:
                average_gradients(model, self.mesh)
                dist.all_reduce(loss := loss.detach().clone(), group=self.mesh.get_group())
            results.append((loss.item(), torch.cat([weight.grad.flatten() for weight in model.parameters()]).float()))
        (loss, wanted), (our_loss, found) = results
        gap = ((found - wanted).norm() / wanted.norm()).item()
        allowed = 8 * torch.finfo(self.plain.head.weight.dtype).eps
        if abs(our_loss - loss) <= allowed * abs(loss) and gap <= allowed:
            return ""
        return f"loss {our_loss:.6f} beside {loss:.6f}, gradients differ by {gap:.2g} of their norm"

    def measure(self, tokens: int) -> list[Row]:
        """Time both with so many tokens a rank."""
        recomputed = tokens > self.options.recompute_past
        for model in (self.plain, self.ours):
            model.body.gradient_checkpointing_disable()
            if recomputed:
                model.body.gradient_checkpointing_enable({"use_reentrant": False})
        whole, labels = self.batch(tokens * self.world)
        few, few_labels = self.batch(tokens)
        calls = [
            (self.forward(self.plain, few, few_labels), self.step(self.plain, few, few_labels)),
            (self.forward(self.ours, whole, self.share(labels)), self.step(self.ours, whole, self.share(labels))),
        ]
        times = [self.watch.in_turns([call[direction] for call in calls]) for direction in (0, 1)]
        rows = []
        for number, (name, world) in enumerate((("plain SDPA", 1), ("ring_plan", self.world))):
            ms = tuple(statistics.median(each[number]) for each in times)
            kernel = "sdpa" if number == 0 else self.options.kernel or "default"
            shape = self.options.layers, recomputed, world, tokens, bool(number and self.emulated)
            row = Row(self.options.model, name, kernel, *shape, ms=ms)
            row.tokens_per_second = tokens / ms[1] * 1e3
            peak = peak_of(self.watch.device)
            row.mfu = row.tokens_per_second * flops_a_token(self.plain, tokens * world) / peak / 1e12 if peak else None
            self.watch.peak_memory(calls[number][1])
            row.peak_gib = self.watch.largest(torch.cuda.max_memory_allocated() / 2**30) if peak else 0.0
            rows.append(row)
        ours = rows[1]
        if self.world == 1:
            ours.ratio = ratio(times[0][0], [times[0][1]]), ratio(times[1][0], [times[1][1]])
            is_target = self.options.model != "tiny" and tokens in (8192, 16384) and peak_of(self.watch.device)
            ours.target = MODEL if is_target else ""
        return rows

    def forward(self, model: Trainer, ids: Tensor, labels: Tensor) -> Call:
        """The loss, without gradients."""
        return torch.no_grad()(partial(model, ids, labels))

    def step(self, model: Trainer, ids: Tensor, labels: Tensor) -> Call:
        """A whole step; gradients of real ranks are averaged."""

        def act() -> None:
            self.optimizer.zero_grad()
            (model(ids, labels) / labels.numel()).backward()
            if model is self.ours and self.world > 1 and not self.emulated:
                average_gradients(model, self.mesh)
            self.optimizer.step()

        return act

    def batch(self, tokens: int) -> tuple[Tensor, Tensor]:
        """The same random tokens on every rank (1, tokens), and the ones after each of them."""
        generator = torch.Generator().manual_seed(tokens)
        text = torch.randint(0, self.plain.head.out_features, (1, tokens + 1), generator=generator).to(self.watch.device)
        return text[:, :-1], text[:, 1:]

    def share(self, labels: Tensor) -> Tensor:
        """Those of this rank's tokens."""
        mine = Layout("zigzag").tokens(labels.shape[1], self.world, self.rank)
        return labels[:, torch.tensor(mine, device=labels.device)]


def make_model(options: argparse.Namespace, device: torch.device) -> Trainer:
    """A model with random weights, the same on every rank."""
    torch.manual_seed(0)
    config = LlamaConfig(**MODELS[options.model], num_hidden_layers=options.layers, max_position_embeddings=1 << 20)
    config._attn_implementation = "sdpa"
    dtype = getattr(torch, options.dtype)
    with device:
        body = LlamaModel(config).to(dtype)
        head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)
    return Trainer(body, head).train()


def flops_a_token(model: Trainer, length: int) -> float:
    """Model FLOPs a token of a step over sequences of `length` tokens, as the module's text has it."""
    config = model.body.config
    multiplied = sum(weight.numel() for weight in model.parameters()) - model.body.embed_tokens.weight.numel()
    heads = config.num_attention_heads * (config.head_dim or config.hidden_size // config.num_attention_heads)
    return 6 * multiplied + 6 * config.num_hidden_layers * heads * length


def peak_of(device: torch.device) -> float | None:
    """TFLOP/s of a GPU that is known."""
    return next((peak for name, peak in PEAKS.items() if name in device_name(device)), None)


def run(options: argparse.Namespace, mesh: DeviceMesh, device: torch.device) -> tuple[list[Row], str]:
    """Check and measure everything asked for; rank 0 prints. Gives the rows, and what is wrong."""
    watch = Stopwatch(device, Effort(options.rounds, options.block), together=mesh.size() > 1 and not options.emulate)
    report: Callable[[str], None] = print if mesh.get_local_rank() == 0 or options.emulate else lambda _: None
    race, rows = Race(options, mesh, watch), []
    ranks = f"rank {options.rank} of {mesh.size()}, emulated, on one" if options.emulate else f"{mesh.size()} x"
    report(f"{options.model}, {options.dtype}, {ranks} {device_name(device)}, torch {torch.__version__}\n{HEADER}")
    wrong = race.check(min(options.check_tokens, *options.tokens))
    if wrong:
        report(f"WRONG: {wrong}")
        return rows, wrong
    for tokens in options.tokens:
        for row in race.measure(tokens):
            rows.append(row)
            report(row.line())
    return rows, ""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(MODELS), default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, default=4, help="of the model's 32, as many as memory allows")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384], help="a rank")
    parser.add_argument(
        "--emulate", type=int, default=0, metavar="W", help="this process is one rank of W, the others are emulated"
    )
    parser.add_argument("--rank", type=int, default=0, help="the rank that is emulated")
    parser.add_argument("--link", type=float, default=200.0, help="gigabytes a second of the emulated link")
    parser.add_argument("--kernel", help="of ring_plan; left out: the library's choice")
    parser.add_argument("--recompute-past", type=int, default=16384, help="tokens a rank past which activations are recomputed")
    parser.add_argument("--check-tokens", type=int, default=512, help="a rank, in the comparison of both models")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rounds", type=int, default=5, help="blocks of each call, in turns")
    parser.add_argument("--block", type=float, default=40.0, help="milliseconds of a block of calls")
    parser.add_argument("--json", type=Path)
    return parser


def axis_of(options: argparse.Namespace, device: torch.device) -> DeviceMesh:
    """The ranks that torchrun started, emulated ones, or this process alone."""
    if options.emulate:
        return emulated_axis(options.emulate, options.rank, Link(options.link), device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("cp",))


def main() -> int:
    """Measure what is asked for; exit status 1 if the models differ."""
    options = parser().parse_args()
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        device = torch.device("cuda", torch.cuda.current_device())
    mesh = axis_of(options, device)
    rows, wrong = run(options, mesh, device)
    if options.json and rows and (options.emulate or dist.get_rank() == 0):
        note = f"{Link(options.link)}, rank {options.rank}; gradients are not averaged over ranks." if options.emulate else ""
        more = {"emulated": bool(options.emulate), "devices": 1 if options.emulate else mesh.size(), "note": note}
        save(options.json, facts("train_step", device, **more), rows)
    dist.destroy_process_group()
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
