"""How close ring_attention comes to the kernel of one GPU, after a check that it computes the same.

    torchrun --nproc-per-node 2 benchmarks/attention.py --tokens 8192 --layouts zigzag stripe contiguous --strategies ring gather

Ratio = time of the kernel on one rank's number of tokens, times the number of ranks, over the time of ring_attention: causal
attention of W ranks has W * W times the scores of one rank's tokens, spread over W ranks, so 1.0 means that communication,
merging and launches cost nothing. The kernel runs on all ranks at once, in the same process, in turns with ring_attention.
Times are medians over blocks of calls between CUDA events, the slowest rank counts. A configuration whose result is wrong
prints its error in place of a time, and the exit status is 1. On CPU ranks (gloo) it runs too, for trying it out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dtensor_ring import from_local, ring_attention
from dtensor_ring.debug import traffic
from dtensor_ring.ops.kernels import Block, KernelRequirements, Saved, SoftmaxParams, choose_kernel
from dtensor_ring.placements import Contiguous, SequencePlacement, Stripe, Zigzag
from dtensor_ring.planning.layout import Layout

PLACEMENTS: dict[str, SequencePlacement] = {"contiguous": Contiguous(1), "zigzag": Zigzag(1), "stripe": Stripe(1)}


@dataclass
class Row:
    """One line of the table; times in milliseconds, memory and traffic in MiB."""

    layout: str
    strategy: str
    direction: str
    ms: float = 0.0
    ratio: float = 0.0
    tflops: float = 0.0
    peak_mib: float = 0.0
    sent_mib: float = 0.0
    out_error: float = 0.0
    grad_error: float = 0.0
    wrong: str = ""


def main() -> int:
    """Measure every combination asked for; exit status 1 if any result is wrong."""
    options = _options()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    else:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
    mesh = init_device_mesh("cuda" if cuda else "cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    bench = Bench(options, mesh)
    baseline = bench.baseline()
    rows = [
        row for layout in options.layouts for strategy in options.strategies for row in bench.measure(layout, strategy, baseline)
    ]
    if dist.get_rank() == 0:
        _report(options, bench, baseline, rows)
    dist.barrier()
    dist.destroy_process_group()
    return int(any(row.wrong for row in rows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens per rank")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--full", action="store_true", help="not causal")
    parser.add_argument("--layouts", nargs="+", default=list(PLACEMENTS), choices=list(PLACEMENTS))
    parser.add_argument("--strategies", nargs="+", default=["ring", "gather"])
    parser.add_argument("--kernel", default=None)
    parser.add_argument("--blocks", type=int, default=5, help="blocks of calls, whose median counts")
    parser.add_argument("--calls", type=int, default=20, help="calls in a block")
    parser.add_argument("--check-tokens", type=int, default=2048, help="tokens per rank in the check against float32")
    parser.add_argument("--json", type=Path, default=None, help="also write the rows here")
    return parser.parse_args()


class Bench:
    """Inputs, baseline and measurements of one shape."""

    def __init__(self, options: argparse.Namespace, mesh: DeviceMesh) -> None:
        self.options, self.mesh, self.world, self.rank = options, mesh, dist.get_world_size(), dist.get_rank()
        self.dtype = getattr(torch, options.dtype)
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        need = KernelRequirements(self.device.type, self.dtype, options.head_dim, options.head_dim, training=True)
        self.kernel = choose_kernel(options.kernel, need)
        self.block = Block((-1, -1) if options.full else (-1, 0), SoftmaxParams(options.head_dim**-0.5))
        self.kernel_peaks = [0.0, 0.0]

    def inputs(self, tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and dout, the same on every rank for one seed."""
        generator = torch.Generator(self.device).manual_seed(seed)
        heads = self.options.heads, self.options.kv_heads, self.options.kv_heads, self.options.heads
        shapes = [(self.options.batch, tokens, h, self.options.head_dim) for h in heads]
        q, k, v, dout = (torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype) for shape in shapes)
        return q, k, v, dout

    def baseline(self) -> dict[str, float]:
        """Milliseconds of the kernel on one rank's tokens."""
        q, k, v, dout = self.inputs(self.options.tokens, self.rank)
        out, lse = self.kernel.forward(q, k, v, self.block)
        forward = self.timed(lambda: self.kernel.forward(q, k, v, self.block))
        backward = self.timed(lambda: self.kernel.backward(Saved(q, k, v, out, lse), dout, self.block))
        self.kernel_peaks = [self.cost(self.kernel_call(direction))[0] for direction in ("fwd", "fwd+bwd")]
        return {"fwd": forward, "fwd+bwd": forward + backward}

    def measure(self, layout: str, strategy: str, baseline: dict[str, float]) -> list[Row]:
        """Check, then time forward and forward with backward."""
        errors, wrong = self.check(layout, strategy)
        rows = [Row(layout, strategy, direction, out_error=errors[0], grad_error=errors[1], wrong=wrong) for direction in baseline]
        if wrong:
            return rows
        calls = self.calls(layout, strategy)
        for row, call in zip(rows, calls, strict=True):
            again = self.kernel_call(row.direction)
            ours, theirs = self.in_turns(call, again)
            share = 0.5 if not self.options.full else 1.0
            flops = (
                4
                * self.options.batch
                * (self.world * self.options.tokens) ** 2
                * self.options.heads
                * self.options.head_dim
                * share
            )
            row.ms, row.ratio = ours, self.world * theirs / ours
            row.tflops = flops * (1.0 if row.direction == "fwd" else 3.5) / self.world / ours / 1e9
            row.peak_mib, row.sent_mib = self.cost(call)
        return rows

    def calls(self, layout: str, strategy: str) -> list[Callable[[], object]]:
        """A forward call, and one with backward, on this rank's share."""
        length = self.options.tokens * self.world
        shares = [self.share(x, layout) for x in self.inputs(length, 1)]
        plain = [self.place(x, layout, length) for x in shares[:3]]
        learned = [self.place(x.requires_grad_(), layout, length) for x in shares[:3]]
        arguments = {"is_causal": not self.options.full, "strategy": strategy, "kernel": self.kernel.name}

        def forward() -> object:
            with torch.no_grad():
                return ring_attention(*plain, **arguments)

        def both() -> object:
            out = ring_attention(*learned, **arguments).to_local()
            return torch.autograd.grad(out, shares[:3], shares[3], retain_graph=False)

        def both_afresh() -> object:
            nonlocal learned
            learned = [self.place(x, layout, length) for x in shares[:3]]
            return both()

        return [forward, both_afresh]

    def kernel_call(self, direction: str) -> Callable[[], object]:
        """The kernel on one rank's tokens, to run in turns."""
        q, k, v, dout = self.inputs(self.options.tokens, self.rank)

        def call() -> object:
            out, lse = self.kernel.forward(q, k, v, self.block)
            return out if direction == "fwd" else self.kernel.backward(Saved(q, k, v, out, lse), dout, self.block)

        return call

    def share(self, x: Tensor, layout: str) -> Tensor:
        """This rank's tokens of a whole tensor."""
        tokens = Layout.parse(layout).tokens(x.shape[1], self.world, self.rank)
        return x[:, torch.tensor(tokens, device=x.device)].contiguous()

    def place(self, x: Tensor, layout: str, length: int) -> Tensor:
        """A share as a DTensor."""
        return from_local(x, self.mesh, [PLACEMENTS[layout]], length=length, run_check=False)

    def check(self, layout: str, strategy: str) -> tuple[tuple[float, float], str]:
        """Relative rms errors of out and gradients against float32, over those of the kernel on one device, and what is wrong."""
        length = min(self.options.tokens, self.options.check_tokens) * self.world
        q, k, v, dout = self.inputs(length, 2)
        causal = not self.options.full
        wide = [x.float().requires_grad_() for x in (q, k, v)]
        exact = ring_attention(*wide, is_causal=causal, kernel="math")
        exact = [exact.detach(), *torch.autograd.grad(exact, wide, dout.float())]
        alone = [x.clone().requires_grad_() for x in (q, k, v)]
        single = ring_attention(*alone, is_causal=causal, kernel=self.kernel.name)
        single = [single.detach(), *torch.autograd.grad(single, alone, dout)]
        shares = [self.share(x, layout).requires_grad_() for x in (q, k, v)]
        placed = [self.place(x, layout, length) for x in shares]
        ours = ring_attention(*placed, is_causal=causal, strategy=strategy, kernel=self.kernel.name).to_local()
        ours = [ours.detach(), *torch.autograd.grad(ours, shares, self.share(dout, layout))]
        ratios = []
        for mine, one, reference in zip(ours, single, exact, strict=True):
            sums = torch.stack(
                [(mine - self.share(reference, layout)).square().sum(), (one - reference).square().sum() / self.world]
            ).double()
            dist.all_reduce(sums)
            ratios.append((sums[0] / sums[1].clamp_min(1e-30)).sqrt().item())
        loose = 1.01 if self.dtype == torch.float32 else 1.0
        names = [
            name
            for name, ratio in zip(("out", "dq", "dk", "dv"), ratios, strict=True)
            if not ratio <= (1.3 if name == "out" else 1.5) * loose
        ]
        return (ratios[0], max(ratios[1:])), f"{', '.join(names)} past the error allowed" if names else ""

    def in_turns(self, ours: Callable[[], object], theirs: Callable[[], object]) -> tuple[float, float]:
        """Medians of both, measured block by block in turns."""
        pairs = [(self.block(ours), self.block(theirs)) for _ in range(self.options.blocks)]
        return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)

    def timed(self, call: Callable[[], object]) -> float:
        """Median over blocks."""
        return statistics.median(self.block(call) for _ in range(self.options.blocks))

    def block(self, call: Callable[[], object]) -> float:
        """Milliseconds a call over one block, the slowest rank's."""
        for _ in range(3):
            call()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            dist.barrier()
            torch.cuda.synchronize()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(self.options.calls):
                call()
            end.record()
            torch.cuda.synchronize()
            spent = start.elapsed_time(end)
        else:
            dist.barrier()
            begin = time.perf_counter()
            for _ in range(self.options.calls):
                call()
            spent = (time.perf_counter() - begin) * 1e3
        slowest = torch.tensor(spent / self.options.calls, device=self.device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return slowest.item()

    def cost(self, call: Callable[[], object]) -> tuple[float, float]:
        """Peak memory beyond what was allocated before, and bytes sent, of one call; the largest of all ranks."""
        before, peak = traffic(self.mesh), 0.0
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        result = call()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            peak = (torch.cuda.max_memory_allocated() - held) / 2**20
        del result
        values = torch.tensor([peak, traffic(self.mesh).since(before).bytes / 2**20], device=self.device)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values[0].item(), values[1].item()


def _report(options: argparse.Namespace, bench: Bench, baseline: dict[str, float], rows: list[Row]) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(
        f"{bench.world} x {device}, torch {torch.__version__}, kernel {bench.kernel.name}; per rank {options.tokens} tokens, batch "
        f"{options.batch}, heads {options.heads}:{options.kv_heads}, head dim {options.head_dim}, {options.dtype}, "
        f"{'full' if options.full else 'causal'}"
    )
    element = bench.dtype.itemsize
    kv = 2 * options.batch * options.tokens * options.kv_heads * options.head_dim * element / 2**20
    q = options.batch * options.tokens * options.heads * options.head_dim / 2**20
    peaks = f"peak {bench.kernel_peaks[0]:.0f} and {bench.kernel_peaks[1]:.0f} MiB"
    print(f"kernel on one rank's tokens: fwd {baseline['fwd']:.3f} ms, fwd+bwd {baseline['fwd+bwd']:.3f} ms, {peaks}")
    print(
        f"memory bound of the ring beyond inputs: fwd 2(K+V) + block out + fp32 out = {2 * kv + q * (element + 4):.0f} MiB, bwd "
        f"2(K+V) + 2 fp32(dK+dV) + fp32 dQ + block dQ, dK, dV = {2 * kv + 2 * kv * 4 / element + 4 * q + kv + q * element:.0f} MiB"
    )
    print(f"{'layout':<11}{'strategy':<9}{'pass':<9}{'ms':>9}{'ratio':>8}{'TFLOP/s':>9}", end="")
    print(f"{'peak MiB':>10}{'sent MiB':>10}{'out err':>9}{'grad err':>9}")
    for row in rows:
        start = f"{row.layout:<11}{row.strategy:<9}{row.direction:<9}"
        if row.wrong:
            print(f"{start} WRONG: {row.wrong} (out {row.out_error:.2f}, gradients {row.grad_error:.2f} x the kernel's own)")
            continue
        print(
            f"{start}{row.ms:>9.3f}{row.ratio:>8.3f}{row.tflops:>9.0f}{row.peak_mib:>10.0f}{row.sent_mib:>10.1f}"
            f"{row.out_error:>9.2f}{row.grad_error:>9.2f}"
        )
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    sys.exit(main())
