"""A training step of a model with the shapes of Llama-3.1-8B under ring_plan, beside the same model with other attention.

    python -m benchmarks.train_step --tokens 8192 16384                      one GPU, world 1
    python -m benchmarks.train_step --tokens 8192 32768 --emulate 8          one rank of eight, 64k and 256k tokens in all
    torchrun --nproc-per-node 2 -m benchmarks.train_step --fsdp --layers 32 --tokens 16384 65536 --rounds 3
    torchrun --nproc-per-node 2 -m benchmarks.train_step --model tiny --device cpu --dtype float32 --fsdp --tokens 64

All contenders have the same weights and run in turns: forward without gradients, and a step, which is forward, backward and AdamW.
`--tokens` are those of a rank. Plain attention is Hugging Face's with `scaled_dot_product_attention` as PyTorch chooses its kernel,
on one rank's tokens: with more than one rank it computes less attention, and only says what the rest of the model takes. On real
ranks PyTorch's `context_parallel` and ring-flash-attn's adapter train the same model too, where they can. Losses and gradients of
everyone are compared first with those of plain attention on a whole sequence, with fewer tokens; who is wrong gets no time.

With `--fsdp` weights, gradients and states are sharded over the ranks, and averaged there; without, every rank has them whole and
gradients are averaged after backward (`average_gradients`). Where ranks are emulated they are not, and every row says so. A step
that does not fit is a row "out of memory": the models are made anew after it, and longer ones of that contender are not tried.

What fits by `python -m dtensor_ring estimate`, in bfloat16 with AdamW, on two GPUs with `--fsdp`: 32 layers hold 23 GiB between
steps, 58 GiB at 64,000 tokens a rank, 121 GiB at 192,000; 8 layers 91 GiB at 256,000. Layers are not recomputed up to
`--recompute-past`, where 32 of them take 124 GiB at 16,000 tokens a rank: give a GPU of 80 GiB a lower one.

    model FLOPs a token = 6 N + 6 L H D S     N weights that are multiplied with (all but the embedding), L layers, H heads of D, S
                                              tokens that a sequence has in all: causal attention multiplies S/2 keys, 4 H D FLOPs
                                              each, and backward takes twice as much as forward
    MFU                 = tokens/s a GPU x model FLOPs a token / the GPU's dense 16-bit peak; recomputed activations do not count
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.links import Link, emulated_axis
from benchmarks.record import device_name, facts, save
from benchmarks.targets import MODEL
from benchmarks.timing import Call, Effort, Stopwatch, ratio
from benchmarks.train_checks import WRONG, Training, difference, gap
from benchmarks.train_contenders import CONTENDERS, Contender, Plain, Ring
from benchmarks.train_models import MODELS, Models, Recomputed, flops_a_token, make_models
from benchmarks.train_rows import HEADER, Row, peak_of
from benchmarks.train_trials import OUT_OF_MEMORY, Trials, limit_memory

LONG = 3000.0  # milliseconds of a step past which each block is one step, with none before it that is not counted


@dataclass
class Run:
    """A contender at one length: its forward pass and its step.

    Attributes:
        is_long: a step takes so long that each block is one call.
        counts: the calls of a block, of both; 0 until they are known.
        times: milliseconds a call of the blocks of both.
    """

    contender: Contender
    row: Row
    recomputed: Recomputed
    calls: tuple[Call, Call]
    is_long: bool = False
    counts: list[int] = field(default_factory=lambda: [0, 0])
    times: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))


class Race:
    """Contenders with the same weights, on the ranks of one mesh axis.

    Attributes:
        watch: what times steps.
        options: the command line.
        trials: what makes the models, runs what may fail, and makes them anew after that.
        contenders: who is measured.
    """

    def __init__(self, options: argparse.Namespace, mesh: DeviceMesh, watch: Stopwatch) -> None:
        self.options, self.mesh, self.watch = options, mesh, watch
        self.world, self.emulated = mesh.size(), bool(options.emulate)
        self.trials = Trials(partial(make_models, options, mesh, watch.device), mesh, watch)
        self.contenders: list[Contender] = []
        self.too_long: set[tuple[str, Recomputed]] = set()

    @property
    def models(self) -> Models:
        """As they are now."""
        return self.trials.models

    def enter(self, keys: Sequence[str]) -> tuple[str, list[str]]:
        """Check contenders, and let those take part that are right; what is wrong with ours, and who else is left out and why."""
        left_out = []
        for contender in (each for each in CONTENDERS if each.key in keys):
            reason = self.refusal(contender) or self.check(contender, min(self.options.check_tokens, *self.options.tokens))
            if not reason:
                self.contenders.append(contender)
            elif reason.startswith(WRONG) and not contender.modules:
                return f"{contender.name}: {reason}", left_out
            else:
                left_out.append(f"{contender.name}: {reason}")
        return "", left_out

    def refusal(self, contender: Contender) -> str:
        """Why a contender cannot be measured as it is asked for; empty if it can."""
        if contender.modules and self.emulated:
            return "it needs real ranks, and these are emulated"
        if contender.recomputed(self.recomputes(max(self.options.tokens))) is None:
            return "nothing is recomputed with so few tokens"
        return contender.missing(self.watch.device)

    def recomputes(self, tokens: int) -> bool:
        """Whether backward computes layers again with so many tokens a rank."""
        return tokens > self.options.recompute_past

    def check(self, contender: Contender, tokens: int) -> str:
        """What differs between a contender and plain attention on one short sequence of all ranks; empty if nothing does."""
        if self.emulated or isinstance(contender, Plain):
            return ""
        self.models.recompute(contender.recomputed(self.recomputes(max(self.options.tokens))) or "")
        batch = self.batch(tokens * self.world)
        results: list[Training] = []

        def compute() -> None:
            results.append(self.train(contender, *batch))

        if failure := self.trials.attempt(compute, foreign=bool(contender.modules)):
            return failure
        group = self.mesh.get_group()
        exact = self.train(Plain(), *batch)
        with sdpa_kernel(SDPBackend.MATH):
            rounding = gap(exact, self.train(Plain(), *batch), group)
        return difference(exact, results[0], rounding, group)

    def train(self, contender: Contender, ids: Tensor, labels: Tensor) -> Training:
        """Loss and gradients of a batch."""
        self.models.optimizer.zero_grad()
        loss = self.backward(contender, ids, labels)
        if contender.shares:
            dist.all_reduce(loss, group=self.mesh.get_group())
        return Training(loss.item(), [grad.clone() for grad in self.models.gradients()])

    def measure(self, tokens: int) -> list[Row]:
        """Time everyone with so many tokens a rank, in turns."""
        runs = [run for contender in self.contenders if (run := self.run_of(contender, tokens)) is not None]
        for run in runs:
            if not run.row.wrong:
                self.try_out(run)
        for direction in (0, 1):
            # The first time says how many calls a block has.
            for number in range(1 + self.watch.effort.rounds):
                for run in runs:
                    if not run.row.wrong and (number or not run.is_long):
                        self.block(run, direction)
        for run in runs:
            if not run.row.wrong:
                self.fill(run)
        self.compare([run for run in runs if not run.row.wrong])
        return [run.row for run in runs]

    def run_of(self, contender: Contender, tokens: int) -> Run | None:
        """A contender at one length; None where it would be another one again."""
        recomputed = contender.recomputed(self.recomputes(tokens))
        if recomputed is None:
            return None
        world = self.world if contender.shares else 1
        ids, labels = self.batch(tokens * world)
        kernel = self.options.kernel or contender.kernel if isinstance(contender, Ring) else contender.kernel
        shape = self.options.layers, bool(recomputed), world, tokens, self.emulated and contender.shares
        row = Row(self.options.model, contender.name, kernel, *shape, sharded=self.options.fsdp)
        row.wrong = contender.refuses(tokens * world, world)
        if (contender.key, recomputed) in self.too_long:
            row.wrong = OUT_OF_MEMORY
        return Run(contender, row, recomputed, (self.forward(contender, ids, labels), self.step(contender, ids, labels)))

    def try_out(self, run: Run) -> None:
        """A step of which it is not known whether it fits: its peak of memory, and whether it takes long."""
        self.models.recompute(run.recomputed)
        if self.watch.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        self.attempt(run, run.calls[1])
        if not run.row.wrong:
            self.watch.wait()
            run.is_long = self.watch.largest((time.perf_counter() - begin) * 1e3) > LONG
        if self.watch.device.type == "cuda":
            run.row.peak_gib = self.watch.largest(torch.cuda.max_memory_allocated() / 2**30)

    def block(self, run: Run, direction: int) -> None:
        """Time one block, or find out how many calls it is to have."""
        self.models.recompute(run.recomputed)
        call, count = run.calls[direction], 1 if run.is_long else run.counts[direction]

        def timed() -> None:
            if count:
                run.times[direction].append(self.watch.block(call, count, warm_up=not run.is_long))
            else:
                run.counts[direction] = max(1, round(self.watch.effort.block / max(self.watch.block(call, 2), 1e-3)))

        self.attempt(run, timed)

    def attempt(self, run: Run, call: Call) -> None:
        """Make a call that may need more memory than there is."""
        run.row.wrong = self.trials.attempt(call)
        if run.row.wrong:
            self.too_long.add((run.contender.key, run.recomputed))

    def fill(self, run: Run) -> None:
        """Fill in the figures of a row."""
        row, peak = run.row, peak_of(self.watch.device)
        row.ms = statistics.median(run.times[0]), statistics.median(run.times[1])
        row.tokens_per_second = row.tokens / row.ms[1] * 1e3
        row.mfu = row.tokens_per_second * flops_a_token(self.models.plain, row.tokens * row.world) / peak / 1e12 if peak else None

    def compare(self, runs: list[Run]) -> None:
        """Fill in ratios, and the target that one rank has."""
        ours = next((run for run in runs if run.contender.key == Ring.key), None)
        if ours is None or self.emulated:
            return
        for run in runs:
            if run.contender.shares is not (self.world > 1) or run is ours:
                continue
            found = ratio(run.times[0], [ours.times[0]]), ratio(run.times[1], [ours.times[1]])
            (ours if self.world == 1 else run).row.ratio = found
        alone = self.world == 1 and not self.options.fsdp and self.options.model != "tiny"
        is_target = alone and ours.row.ratio and ours.row.tokens in (8192, 16384) and peak_of(self.watch.device)
        ours.row.target = MODEL if is_target else ""

    def forward(self, contender: Contender, ids: Tensor, labels: Tensor) -> Call:
        """The loss, without gradients."""

        def act() -> None:
            with torch.no_grad(), contender.session(self.models, ids, labels) as loss:
                loss()

        return act

    def step(self, contender: Contender, ids: Tensor, labels: Tensor) -> Call:
        """A whole step."""

        def act() -> None:
            self.models.optimizer.zero_grad()
            self.backward(contender, ids, labels)
            self.models.optimizer.step()

        return act

    def backward(self, contender: Contender, ids: Tensor, labels: Tensor) -> Tensor:
        """Forward and backward; this rank's part of the mean loss. Of ranks that are not emulated gradients are averaged."""
        with contender.session(self.models, ids, labels) as loss:
            part = loss() / labels.numel()
            # Averaging divides by the ranks, whose losses are parts of one mean.
            (part * self.world if contender.shares else part).backward()
        if contender.shares and self.world > 1 and not self.emulated:
            self.models.average()
        return part.detach()

    def batch(self, tokens: int) -> tuple[Tensor, Tensor]:
        """The same random tokens on every rank (1, tokens), and the ones after each of them."""
        generator = torch.Generator().manual_seed(tokens)
        text = torch.randint(0, self.models.plain.config.vocab_size, (1, tokens + 1), generator=generator).to(self.watch.device)
        return text[:, :-1], text[:, 1:]


def run(options: argparse.Namespace, mesh: DeviceMesh, device: torch.device) -> tuple[list[Row], str]:
    """Check and measure everything asked for; rank 0 prints, and saves after each length. Gives the rows, and what is wrong."""
    several = mesh.size() > 1 and not options.emulate
    watch = Stopwatch(device, Effort(options.rounds, options.block), together=several)
    is_first = bool(options.emulate) or mesh.get_local_rank() == 0
    report: Callable[[str], None] = partial(print, flush=True) if is_first else lambda _: None
    ranks = f"rank {options.rank} of {mesh.size()}, emulated, on one" if options.emulate else f"{mesh.size()} x"
    sharded = ", sharded with FSDP2" if options.fsdp else ""
    report(f"{options.model}, {options.dtype}{sharded}, {ranks} {device_name(device)}, torch {torch.__version__}")
    race, rows = Race(options, mesh, watch), []
    recomputes = race.recomputes(max(options.tokens))
    usual = [each.key for each in CONTENDERS if (several or not each.modules) and each.recomputed(recomputes) is not None]
    wrong, left_out = race.enter(options.contenders or usual)
    for text in left_out:
        report(f"left out: {text}")
    if wrong:
        report(wrong)
        return rows, wrong
    report(HEADER)
    for tokens in options.tokens:
        for row in race.measure(tokens):
            rows.append(row)
            report(row.line())
        if options.json and is_first:
            save(options.json, known_facts(options, mesh, device, left_out), rows)
    return rows, ""


def known_facts(options: argparse.Namespace, mesh: DeviceMesh, device: torch.device, left_out: list[str]) -> dict[str, object]:
    """What is known of a run but for its rows."""
    notes = [f"{Link(options.link)}, rank {options.rank}; gradients are not averaged over ranks."] if options.emulate else []
    notes += [f"Left out: {'; '.join(left_out)}."] if left_out else []
    more = {"emulated": bool(options.emulate), "devices": 1 if options.emulate else mesh.size(), "note": " ".join(notes)}
    return facts("train_step", device, **more)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(MODELS), default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, default=4, help="of the model's 32, as many as memory allows: see above")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384], help="a rank")
    parser.add_argument("--fsdp", action="store_true", help="shard the model with FSDP2 over the ranks")
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=[contender.key for contender in CONTENDERS],
        help="left out: plain and ring_plan, with save_attention where layers are recomputed; on real ranks other packages too",
    )
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
        # The host is far ahead of a GPU that takes minutes for a step, and its collectives are waited for from when they are begun.
        dist.init_process_group(backend, timeout=timedelta(hours=1))
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("cp",))


def main() -> int:
    """Measure what is asked for; exit status 1 if ring_plan computes something else than plain attention."""
    options = parser().parse_args()
    if options.fsdp and options.emulate:
        parser().error("--fsdp shards over real ranks, and those of --emulate are not")
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        device = torch.device("cuda", torch.cuda.current_device())
    mesh = axis_of(options, device)
    if device.type == "cuda" and mesh.size() > 1 and not options.emulate:
        limit_memory(device)
    _, wrong = run(options, mesh, device)
    dist.destroy_process_group()
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
