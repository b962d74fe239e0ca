"""How close ring_attention comes to the kernel of one GPU on real ranks, and how other packages do beside it.

    torchrun --nproc-per-node 2 -m benchmarks.attention --layouts zigzag stripe:1 contiguous --strategies ring gather
    torchrun --nproc-per-node 2 -m benchmarks.attention --preset targets --peers --json FILE
    torchrun --nproc-per-node 2 -m benchmarks.attention --device cpu --tokens 64 --heads 4 --kv-heads 2 --head-dim 16 --peers

Cases and ratios are those of `benchmarks.emulate`: 1.0 means that communication, merging and launches cost nothing. All ranks run
the kernel alone in turns with the attention over ranks; blocks of calls start together, and the slowest rank counts. Every result
is compared with float64 first, with fewer tokens: what is wrong prints its error in place of a time, and the exit status is 1 if it
is ours. A package that cannot be imported is named with the reason. Its ratio is to the same ideal as ours. `--peers NAME` measures
some of them, should one end the program.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from benchmarks import cases as suite
from benchmarks.cases import Case, ideal_of
from benchmarks.checking import Measured, alone, faults, small
from benchmarks.peers import PEERS, Attend, Peer
from benchmarks.problems import calls_of, flops_of, problem_of, strategy_of
from benchmarks.record import device_name, facts, save
from benchmarks.targets import available, real_ranks
from benchmarks.timing import Call, Effort, Stopwatch, join_ranks, ratio
from dtensor_ring import Contiguous, Documents, Stripe, Zigzag, from_local, ring_attention
from dtensor_ring.comm import TRANSPORTS, AloneTransport, TransportName, use_transport
from dtensor_ring.debug import traffic
from dtensor_ring.ops.kernels import KERNELS, Kernel, KernelRequirements, SoftmaxParams, choose_kernel
from dtensor_ring.placements import SequencePlacement
from dtensor_ring.planning.layout import Layout

OURS = "dtensor_ring"
PATIENCE = 4.0  # errors of other packages may be so many times as large as ours may: they round sums in between
Session = Callable[[Case], AbstractContextManager[Attend]]


@dataclass
class Row:
    """One line of the table; times in milliseconds, memory and traffic in MiB, of the rank with the largest."""

    who: str
    case: str
    layout: str
    strategy: str
    world: int
    tokens: int
    heads: str
    kernel: str
    link: str
    strict: bool
    target: str = ""
    ms: tuple[float, float] = (0.0, 0.0)
    ratio: tuple[float, float] = (0.0, 0.0)
    tflops: tuple[float, float] = (0.0, 0.0)
    errors: tuple[float, float] = (0.0, 0.0)
    peak: float | None = None
    sent: float | None = None
    wrong: str = ""

    def line(self) -> str:
        """As the table prints it."""
        start = f"{self.who:<23}{self.case:<14}{self.layout:<18}{self.strategy:<8}{self.tokens:>7} {self.heads:<6}{self.kernel:<13}"
        start += f"{self.link:<17}"
        if self.wrong:
            return f"{start} WRONG: {self.wrong}"
        pairs = f"{self.ratio[0]:>7.3f}{self.ratio[1]:>7.3f}{self.ms[0]:>9.3f}{self.ms[1]:>9.3f}"
        pairs += f"{self.tflops[0]:>5.0f}{self.tflops[1]:>5.0f}{self.errors[0]:>6.2f}{self.errors[1]:>6.2f}"
        sent = "" if self.sent is None else f"{self.sent:.1f}"
        return f"{start}{pairs}{self.peak or 0:>7.0f}{sent:>8}{' strict' if self.strict else ''}"


HEADER = (
    f"{'who':<23}{'case':<14}{'layout':<18}{'strategy':<8}{'tokens':>7} {'heads':<6}{'kernel':<13}{'link':<17}{'fwd':>7}{'f+b':>7}"
    f"{'fwd ms':>9}{'f+b ms':>9}{'TFLOP/s':>10}{'errors':>12}{'peak':>7}{'sent':>8}"
)


class Bench:
    """Measures cases on the ranks of a mesh axis.

    Attributes:
        mesh: the axis.
        watch: what times calls, on all ranks together.
        dtype: of all tensors.
        check_tokens: a rank, in the comparison with float64.
    """

    def __init__(self, mesh: DeviceMesh, watch: Stopwatch, dtype: torch.dtype, check_tokens: int = 256) -> None:
        self.mesh, self.watch, self.dtype, self.check_tokens = mesh, watch, dtype, check_tokens
        self.rank, self.device = mesh.get_local_rank(), watch.device
        self.link = self.backend = dist.get_backend(mesh.get_group())

    def over(self, transport: TransportName | None) -> None:
        """Let what is ours travel over a transport from now on; None is the library's choice."""
        use_transport(self.mesh, transport)
        self.link = transport if transport not in (None, "process_group") else self.backend

    def ours(self, case: Case, kernel: Kernel) -> Row:
        """Measure ring_attention on DTensors made from this rank's shares."""
        return self.measure(case, kernel, OURS, lambda each: nullcontext(attention_of(each, kernel, self.mesh)))

    def peer(self, case: Case, kernel: Kernel, peer: Peer) -> Iterator[Row]:
        """Measure another package in each of the layouts that it has."""
        for layout in peer.layouts(case, self.device):
            changed = replace(case, layout=layout, strategy=None, target="")
            row = self.measure(changed, kernel, peer.name, lambda each: peer.session(each, self.mesh))
            row.strategy = ""
            yield row

    def measure(self, case: Case, kernel: Kernel, who: str, session: Session) -> Row:
        """Check, then time, in turns with the kernel alone."""
        heads, link = f"{case.heads}:{case.kv_heads}", self.link if who == OURS else self.backend
        start = (
            who,
            case.name,
            case.layout,
            strategy_of(case, kernel.name),
            case.world,
            case.tokens,
            heads,
            kernel.name,
            link,
            case.strict,
        )
        row = Row(*start, target=case.target)
        try:
            found = self.errors(small(case, self.check_tokens, case.world, 2 * case.world), kernel, session)
            row.wrong = faults(found, self.dtype, 1.0 if who == OURS else PATIENCE)
            row.errors = ratio_of(found[:1]), ratio_of(found[1:])
            if not row.wrong:
                self.time(case, kernel, row, session)
        except (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError) as failure:
            if who == OURS:
                raise
            row.wrong = f"{type(failure).__name__}: {str(failure).splitlines()[0][:200]}"
        return row

    def errors(self, case: Case, kernel: Kernel, session: Session) -> list[Measured]:
        """Of out, dq, dk and dv over all ranks; every rank computes the whole by itself."""
        problem, softmax = problem_of(case), SoftmaxParams(case.head_dim**-0.5)
        whole = self.inputs(case, problem.q_length)
        exact = alone(problem, KERNELS["math"], softmax, [x.double() for x in whole])
        single = alone(problem, kernel, softmax, whole)
        tokens = torch.tensor(problem.q_tokens(self.rank), device=self.device)
        *leaves, dout = (x[:, tokens].contiguous() for x in whole)
        leaves = [x.requires_grad_() for x in leaves]
        with session(case) as attend:
            out = attend(*leaves)
            ours = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
        found = []
        for right, one, mine in zip(exact, single, ours, strict=True):
            square = (mine - right[:, tokens]).double().square().sum()
            dist.all_reduce(square, group=self.mesh.get_group())
            unavoidable, size = ((x.double()).square().mean().sqrt().item() for x in (one - right, right))
            found.append(Measured((square / right.numel()).sqrt().item(), unavoidable, size))
        return found

    def time(self, case: Case, kernel: Kernel, row: Row, session: Session) -> None:
        """Fill in times, ratios, memory and bytes."""
        ideal, share = ideal_of(case)
        problem = problem_of(case)
        *leaves, dout = self.inputs(case, problem.q_local(self.rank))
        leaves = [x.requires_grad_() for x in leaves]
        ideal_calls = calls_of(ideal, AloneTransport(), kernel, self.device, self.dtype)
        with session(case) as attend:
            calls: tuple[Call, Call] = (
                torch.no_grad()(lambda: attend(*leaves)),
                lambda: torch.autograd.grad(attend(*leaves), leaves, dout),
            )
            found = []
            for direction, flops in enumerate(flops_of(case)):
                best, ours = self.watch.in_turns([ideal_calls[direction], calls[direction]])
                ms = statistics.median(ours)
                found.append((ms, ratio([share * x for x in best], [ours]), flops / ms / 1e9))
            row.ms, row.ratio, row.tflops = zip(*found, strict=True)
            row.peak = self.watch.peak_memory(calls[1])
            if row.who == OURS:
                before = traffic(self.mesh)
                calls[1]()
                row.sent = self.watch.largest(traffic(self.mesh).since(before).bytes / 2**20)

    def inputs(self, case: Case, tokens: int) -> list[Tensor]:
        """q, k, v and dout of so many tokens, the same on every rank."""
        generator = torch.Generator(self.device).manual_seed(1)
        heads = case.heads, case.kv_heads, case.kv_heads, case.heads
        shapes = [(1, tokens, each, case.head_dim) for each in heads]
        return [torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype) for shape in shapes]


def attention_of(case: Case, kernel: Kernel, mesh: DeviceMesh) -> Attend:
    """Our attention of a case, from local shares to local shares."""
    placement, length = placement_of(case.layout), case.length
    documents = Documents.from_lengths(list(case.lengths)) if case.lengths else None
    back, _, ahead = case.mask.removeprefix("window:").partition(",")
    window = (int(back), int(ahead)) if ahead else (-1, -1)
    options = {"is_causal": case.mask == "causal", "window": window, "documents": documents, "kernel": kernel.name}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        placed = (from_local(x, mesh, [placement], length=length, run_check=False) for x in (q, k, v))
        return ring_attention(*placed, strategy=case.strategy, stages=case.stages, **options).to_local()

    return attend


def placement_of(layout: str) -> SequencePlacement:
    """The placement of a layout's text.

    Raises:
        ValueError: no placement has it.
    """
    parsed = Layout.parse(layout)
    block = int(layout.partition(":")[2] or 1)
    for placement in (Contiguous(1), Zigzag(1), Zigzag(1, per_document=True), Stripe(1, block)):
        if placement.layout == parsed:
            return placement
    raise ValueError(f"no placement of ours has the layout {layout!r}: choose contiguous, zigzag, zigzag/documents or stripe:BLOCK")


def ratio_of(found: list[Measured]) -> float:
    """The largest error in terms of the kernel's own."""
    return max(each.error / max(each.unavoidable, 1e-12) for each in found)


def run(options: argparse.Namespace, mesh: DeviceMesh, device: torch.device) -> list[Row]:
    """Measure everything asked for on the ranks of the mesh; rank 0 prints, and writes the file."""
    dtype = getattr(torch, options.dtype)
    watch = Stopwatch(device, Effort(options.rounds, options.block), together=True)
    bench, rows = Bench(mesh, watch, dtype, options.check_tokens), []
    need = KernelRequirements(device.type, dtype, options.head_dim, options.head_dim, training=True)

    def report(text: str) -> None:
        if mesh.get_local_rank() == 0:
            print(text, flush=True)

    report(
        f"{mesh.size()} x {device_name(device)}, torch {torch.__version__}, {options.dtype}, head dim {options.head_dim}\n{HEADER}"
    )

    def add(row: Row) -> None:
        rows.append(row)
        report(row.line())
        if options.json and mesh.get_local_rank() == 0:  # after each, so that a run that is ended keeps what it has
            save(options.json, facts("attention", device, devices=mesh.size(), rounds=options.rounds), rows)

    usable = []
    for peer in peers_asked_for(options.peers):
        reason = peer.missing(device)
        usable += [] if reason else [peer]
        if reason:
            report(f"{peer.name:<23}left out: {reason}")
    peers_seen = set()
    for case in cases_of(options, mesh.size(), need):
        kernel = choose_kernel(case.kernel, need)
        for transport in options.transports:
            bench.over(transport)
            add(bench.ours(case, kernel))
        alike = replace(case, layout="", strategy=None, stages=None, target="")
        for peer in () if alike in peers_seen else usable:
            for row in bench.peer(case, kernel, peer):
                add(row)
        peers_seen.add(alike)
    return rows


def peers_asked_for(names: Sequence[str] | None) -> list[Peer]:
    """Other packages by their names: all where the list is empty, none where there is no list.

    Raises:
        ValueError: no adapter has a name.
    """
    known = {peer.name: peer for peer in PEERS}
    if unknown := set(names or ()) - known.keys():
        raise ValueError(f"--peers: there is no {', '.join(sorted(unknown))} among {', '.join(known)}")
    return [] if names is None else [known[name] for name in names or known]


def cases_of(options: argparse.Namespace, world: int, need: KernelRequirements) -> list[Case]:
    """The cases asked for, each in every layout, strategy and with every kernel asked for."""
    fields = {"heads": options.heads, "kv_heads": options.kv_heads, "head_dim": options.head_dim}
    if options.preset == "targets":
        found = list(real_ranks(available(need), world))
    else:
        packed = {**fields, "layout": "zigzag/documents"}
        size = {} if options.tokens is None else {"tokens": options.tokens}
        named = {
            "batch": lambda: [suite.batch(world, **fields, **size)],
            "full": lambda: [suite.full(world, **fields, **size)],
            "window": lambda: [suite.window(world, back=options.window - 1, **fields, **size)],
            "lists": lambda: list(suite.lists(world, **packed, **size)),
            "tails": lambda: list(suite.tails(world, [1, 2, 3], **packed, **size)),
        }
        found = [case for name in options.cases for case in named[name]()]
    for name in ("layout", "strategy", "kernel"):
        values = getattr(options, "strategies" if name == "strategy" else f"{name}s")
        if values:
            found = [replace(case, **{name: value}) for case in found for value in values]
    return [replace(case, stages=stages) for case in found for stages in options.stages or [None]]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("targets",))
    parser.add_argument("--cases", nargs="+", default=["batch"], choices=("batch", "full", "window", "lists", "tails"))
    parser.add_argument("--peers", nargs="*", metavar="NAME", help="other packages too: these, or without names all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, help="a rank; left out: 8192, with a window 32768")
    parser.add_argument("--window", type=int, default=4096, help="tokens that a token of the case window sees, itself among them")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--layouts", nargs="+", help="as Layout.parse reads them: zigzag, zigzag/documents, stripe:1, contiguous")
    parser.add_argument("--strategies", nargs="+", choices=("ring", "gather", "ulysses"), help="left out: the library's choice")
    parser.add_argument("--stages", type=int, nargs="+", help="of ring; left out: the library's choice")
    parser.add_argument("--kernels", nargs="+", help="left out: the library's choice")
    parser.add_argument("--transports", nargs="+", default=[None], choices=tuple(TRANSPORTS), help="left out: the library's choice")
    parser.add_argument("--check-tokens", type=int, default=256, help="tokens a rank in the comparison with float64")
    parser.add_argument("--rounds", type=int, default=5, help="blocks of each call, in turns")
    parser.add_argument("--block", type=float, default=40.0, help="milliseconds of a block of calls")
    parser.add_argument("--json", type=Path)
    return parser


def main() -> int:
    """Measure what is asked for; exit status 1 if a result of ours is wrong."""
    options = parser().parse_args()
    device = join_ranks(options.device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("cp",))
    rows = run(options, mesh, device)
    dist.barrier()
    dist.destroy_process_group()
    return int(any(row.wrong for row in rows if row.who == OURS))


if __name__ == "__main__":
    sys.exit(main())
