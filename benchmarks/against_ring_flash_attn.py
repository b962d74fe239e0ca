"""Errors and times of the package ring-flash-attn and of dtensor_ring.functional, on the same inputs in the same processes.

    pip install ring-flash-attn flash-attn
    torchrun --nproc-per-node 2 -m benchmarks.against_ring_flash_attn --json FILE
    torchrun --nproc-per-node 2 -m benchmarks.against_ring_flash_attn --dtypes bfloat16      where flash-attn has no other
    torchrun --nproc-per-node 2 -m benchmarks.against_ring_flash_attn --functions llama3_flash_attn_varlen

Errors are rms (and largest) differences to attention in float64 of out, lse, dq, dk, dv over all ranks; "kernel" is flash-attn on
one device. The shapes are those that ring-flash-attn tests itself on, and its benchmark's. Both are timed in turns, forward, and
forward with backward; what is prepared once a batch is not timed. llama3 runs with heads_k_stride=1 and with that
of all key heads, and with 1 once more where ours too gathers no more at a time, as it does for longer sequences. Faster kernels,
which are our default where they are there, are left out, so that both compute by FlashAttention-2. Exit status 1 if an error of
ours is larger in rms than theirs, or if a function of ours raises.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.record import device_name, facts, save
from benchmarks.timing import Call, Effort, Stopwatch, join_ranks, ratio
from dtensor_ring import functional, ring_attention
from dtensor_ring.functional import llama3
from dtensor_ring.ops.kernels import KERNELS
from dtensor_ring.planning.documents import Documents
from dtensor_ring.planning.layout import Layout

THEIRS, OURS = "ring-flash-attn", "dtensor_ring"
FAMILIES = {
    "ring_flash_attn": "contiguous",
    "zigzag_ring_flash_attn": "zigzag",
    "stripe_flash_attn": "stripe",
    "ring_flash_attn_varlen": "contiguous/even",
    "zigzag_ring_flash_attn_varlen": "zigzag/even",
    "llama3_flash_attn_varlen": "contiguous",
    "zigzag_llama3_flash_attn_varlen": "zigzag",
}
NAMES = ("out", "lse", "dq", "dk", "dv")
COMPARED = ((5, 5), (8, 2))  # query and key heads
RACED = (32, 8)
_FAILURES = (RuntimeError, ValueError, AssertionError, TypeError, NotImplementedError)
Package = Any  # a module with functions of these families: theirs, or ours
Attend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # this rank's q_BSHD, k_BSHD, v_BSHD to out_BSHD and lse_BHS


@dataclass
class Compared:
    """Errors of one function on one input.

    Attributes:
        function: its family.
        dtype: of q, k and v.
        heads: of queries and keys.
        tokens: of all ranks.
        rms: of each package that ran, and of the kernel, five numbers: those of `NAMES`.
        most: the largest differences, the same way.
        wrong: of each package that raised, what.
    """

    function: str
    dtype: str
    heads: str
    tokens: int
    rms: dict[str, list[float]] = field(default_factory=dict)
    most: dict[str, list[float]] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)

    def lines(self) -> str:
        """As the table prints it."""
        found = [f"{self.function}, {self.dtype}, heads {self.heads}, {self.tokens} tokens"]
        for who, means in self.rms.items():
            parts = zip(NAMES, means, self.most[who], strict=True)
            found.append(f"  {who:<16}" + "".join(f"{part:>4} {mean:.2e} ({most:.1e})" for part, mean, most in parts))
        return "\n".join([*found, *(f"  {who:<16}WRONG: {why}" for who, why in self.wrong.items())])

    @property
    def worse(self) -> bool:
        """Whether ours raised, or has an error larger than theirs by more than the order of additions explains."""
        if OURS not in self.rms:
            return True
        return THEIRS in self.rms and any(
            ours > 1.001 * theirs for ours, theirs in zip(self.rms[OURS], self.rms[THEIRS], strict=True)
        )


@dataclass
class Timed:
    """Times of one function.

    Attributes:
        function: its family.
        key_heads: `heads_k_stride` of llama3; None for others.
        no_more: whether ours gathers no more heads at a time than that.
        tokens: a rank.
        heads: of queries and keys.
        ms: of each package that ran, milliseconds of forward, and of forward and backward, of the slowest rank.
        ratio: their time over ours, where both ran.
        wrong: of each package that raised, what.
    """

    function: str
    key_heads: int | None
    tokens: int
    heads: str
    ms: dict[str, tuple[float, float]] = field(default_factory=dict)
    ratio: tuple[float, float] | None = None
    wrong: dict[str, str] = field(default_factory=dict)
    no_more: bool = False

    def lines(self) -> str:
        """As the table prints it."""
        name = self.function if self.key_heads is None else f"{self.function}, key heads: {self.key_heads}"
        name += ", no more" * self.no_more
        parts = [f"{who} {fwd:.3f}; {both:.3f} ms" for who, (fwd, both) in self.ms.items()]
        parts += [f"{who} WRONG: {why}" for who, why in self.wrong.items()]
        return f"{name:<48}" + "  ".join([*parts, *([f"{self.ratio[0]:.3f}; {self.ratio[1]:.3f}"] if self.ratio else [])])


class Comparison:
    """Both packages on the ranks of the default process group.

    Attributes:
        packages: by name, theirs first.
        watch: what times calls, on all ranks together.
        head_dim: of all tensors.
        shrink: how many times shorter sequences are where errors are compared.
    """

    def __init__(self, packages: dict[str, Package], watch: Stopwatch, head_dim: int = 128, shrink: int = 1) -> None:
        self.packages, self.watch, self.device, self.head_dim, self.shrink = packages, watch, watch.device, head_dim, shrink
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def compare(self, family: str, dtype: str, heads: tuple[int, int]) -> Compared:
        """Errors side by side."""
        bounds, length = self.bounds_of(family)
        torch.manual_seed(0)
        whole = self.inputs(heads, length, getattr(torch, dtype))
        documents = None if bounds is None else Documents((bounds,))
        exact = alone([x.double() for x in whole], documents, "math")
        single = alone(whole, documents, "flash_attn_2" if self.device.type == "cuda" else None)
        tokens = torch.tensor(Layout.parse(FAMILIES[family]).tokens(length, self.world, self.rank, bounds), device=self.device)
        row = Compared(family, dtype, f"{heads[0]}:{heads[1]}", length)
        self.put(row, "kernel", exact, single)
        wanted = [share(x, tokens, i) for i, x in enumerate(exact)]
        for who, package in self.having(family).items():
            *leaves, dout = (x[:, tokens].contiguous() for x in whole)
            leaves = [x.requires_grad_() for x in leaves]
            try:
                out, lse = self.function(package, family, 1, bounds)(*leaves)
                found = [out.detach(), lse, *torch.autograd.grad(out, leaves, dout)]
            except _FAILURES as failure:
                row.wrong[who] = said(failure)
            else:
                self.put(row, who, wanted, found)
        return row

    def race(self, family: str, key_heads: int | None, tokens: int, *, no_more: bool = False) -> Timed:
        """Forward, and forward with backward, of both in turns."""
        with patch.object(llama3, "AT_ONCE", 0) if no_more else nullcontext():
            return self._race(Timed(family, key_heads, tokens, f"{RACED[0]}:{RACED[1]}", no_more=no_more))

    def _race(self, row: Timed) -> Timed:
        family, key_heads, tokens = row.function, row.key_heads, row.tokens
        bounds = None if "varlen" not in family else tuple(tokens * self.world * i // 8 for i in range(9))
        *leaves, dout = self.inputs(RACED, tokens, torch.bfloat16)
        leaves = [x.requires_grad_() for x in leaves]
        calls: dict[str, tuple[Call, Call]] = {}
        for who, package in self.having(family).items():
            try:
                calls[who] = calls_of(self.function(package, family, key_heads, bounds), leaves, dout)
                calls[who][1]()
            except _FAILURES as failure:
                row.wrong[who] = said(failure)
                calls.pop(who, None)
        found = [self.watch.in_turns([pair[direction] for pair in calls.values()]) for direction in (0, 1)]
        for who, *times in zip(calls, *found, strict=True):
            forward, both = map(statistics.median, times)
            row.ms[who] = forward, both
        if len(calls) == 2:
            forward, both = (ratio(theirs, [ours]) for theirs, ours in found)
            row.ratio = forward, both
        return row

    def having(self, family: str) -> dict[str, Package]:
        """The packages that have a function."""
        return {who: package for who, package in self.packages.items() if hasattr(package, f"{family}_func")}

    def function(self, package: Package, family: str, key_heads: int | None, bounds: tuple[int, ...] | None) -> Attend:
        """One function of a package, causal; what depends on lengths alone is prepared here."""
        func = partial(getattr(package, f"{family}_func"), causal=True, return_attn_probs=True)
        if bounds is None:
            return lambda q, k, v: func(q, k, v)[:2]
        cu = torch.tensor(bounds, dtype=torch.int32, device=self.device)
        if family.startswith("zigzag_llama3"):
            more = (package.zigzag_llama3_flash_attn_prepare_cu_seqlens(cu, True, self.rank, self.world), key_heads)
        elif family.startswith("llama3"):
            *lengths, part = package.llama3_flash_attn_prepare_cu_seqlens(cu, True, self.rank, self.world)
            more = (*lengths, key_heads, part)
        else:
            local = cu // self.world
            more = local, int(local.diff().max())

        def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            out, lse, _ = func(q[0], k[0], v[0], *more)
            return out[None], lse[None] if lse.dim() == 2 else lse

        return attend

    def bounds_of(self, family: str) -> tuple[tuple[int, ...] | None, int]:
        """Documents and tokens of the reference's own tests, each divisible by twice the ranks."""
        bounds = (0, 128, 1248, 4240) if "zigzag" in family else (0, 120, 1248, 4232)
        chunk = 2 * self.world
        *starts, length = (x // (self.shrink * chunk) * chunk for x in (bounds if "varlen" in family else (3816,)))
        return ((*starts, length) if starts else None), length

    def inputs(self, heads: tuple[int, int], tokens: int, dtype: torch.dtype) -> list[Tensor]:
        """q, k, v and dout of so many tokens."""
        shapes = [(1, tokens, each, self.head_dim) for each in (heads[0], heads[1], heads[1], heads[0])]
        return [torch.randn(shape, device=self.device, dtype=dtype) for shape in shapes]

    def put(self, row: Compared, who: str, wanted: list[Tensor], found: list[Tensor]) -> None:
        """Write rms and largest differences over all ranks into a row."""
        pairs = [difference(a, b) for a, b in zip(found, wanted, strict=True)]
        row.rms[who], row.most[who] = ([pair[i] for pair in pairs] for i in (0, 1))


def said(failure: Exception) -> str:
    """What a package raised, in a line."""
    return f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"[:200]


def calls_of(attend: Attend, leaves: list[Tensor], dout: Tensor) -> tuple[Call, Call]:
    """The forward pass alone, and with the backward pass."""
    return torch.no_grad()(lambda: attend(*leaves)), lambda: torch.autograd.grad(attend(*leaves)[0], leaves, dout)


def alone(whole: list[Tensor], documents: Documents | None, kernel: str | None) -> list[Tensor]:
    """Out, lse, dq, dk, dv of q, k, v and dout on one device."""
    *leaves, dout = whole
    leaves = [x.detach().requires_grad_() for x in leaves]
    out, lse = ring_attention(*leaves, documents=documents, strategy="local", kernel=kernel, return_lse=True)
    return [out.detach(), lse, *torch.autograd.grad(out, leaves, dout)]


def share(x: Tensor, tokens: Tensor, index: int) -> Tensor:
    """This rank's tokens: dim 2 of lse, else dim 1."""
    return x.index_select(2 if index == 1 else 1, tokens)


def difference(found: Tensor, wanted: Tensor) -> tuple[float, float]:
    """Rms and largest difference over all ranks."""
    gap = found.double() - wanted.double()
    sums = torch.stack([gap.square().sum(), torch.tensor(float(gap.numel()), device=gap.device, dtype=torch.float64)])
    most = gap.abs().max()
    dist.all_reduce(sums)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return (sums[0] / sums[1]).sqrt().item(), most.item()


def run(options: argparse.Namespace, packages: dict[str, Package], device: torch.device) -> list[Compared | Timed]:
    """Compare and time what is asked for; rank 0 prints, and writes the file."""
    watch = Stopwatch(device, Effort(options.rounds, options.block), together=True)
    bench, rows = Comparison(packages, watch, options.head_dim, options.shrink), []

    def add(row: Compared | Timed) -> None:
        rows.append(row)
        if bench.rank == 0:
            print(row.lines(), flush=True)
        if options.json and bench.rank == 0:  # after each, so that a run that is ended keeps what it has
            known = facts("against_ring_flash_attn", device, devices=bench.world, rounds=options.rounds)
            save(options.json, known, rows)

    if bench.rank == 0:
        print(f"{bench.world} x {device_name(device)}, torch {torch.__version__}, head dim {options.head_dim}")
    for dtype in options.dtypes:
        for family in options.functions:
            for heads in COMPARED:
                add(bench.compare(family, dtype, heads))
    for family in options.functions if options.tokens else ():
        for key_heads, no_more in ((1, False), (1, True), (RACED[1], False)) if "llama3" in family else ((None, False),):
            add(bench.race(family, key_heads, options.tokens, no_more=no_more))
    return rows


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16"])
    parser.add_argument("--functions", nargs="+", default=list(FAMILIES), choices=list(FAMILIES), metavar="FUNCTION")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens per rank when timing; 0 leaves timing out")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--shrink", type=int, default=1, help="how many times shorter sequences are where errors are compared")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="on a CPU the kernels of both are not the same, and errors say little",
    )
    parser.add_argument("--rounds", type=int, default=5, help="blocks of each call, in turns")
    parser.add_argument("--block", type=float, default=40.0, help="milliseconds of a block of calls")
    parser.add_argument("--json", type=Path)
    return parser


def main() -> int:
    """Print a table; exit status 1 if ours is worse anywhere."""
    options = parser().parse_args()
    packages = {THEIRS: importlib.import_module("ring_flash_attn"), OURS: functional}
    if options.device == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
        for faster in ("flash_attn_4", "flash_attn_3"):  # theirs have FlashAttention-2 alone
            KERNELS.pop(faster, None)
    device = join_ranks(options.device)
    rows = run(options, packages, device)
    dist.barrier()
    dist.destroy_process_group()
    return int(any(row.worse if isinstance(row, Compared) else OURS not in row.ms for row in rows))


if __name__ == "__main__":
    sys.exit(main())
