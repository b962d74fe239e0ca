"""How close one rank of many comes to the kernel alone, measured on one GPU over an emulated link.

    python -m benchmarks.emulate --preset quick                      two minutes of one H100
    python -m benchmarks.emulate --preset targets --json FILE        ten minutes: the emulated tables of docs/performance.md
    python -m benchmarks.emulate --cases tails list --world 8 --kernel torch_flash --layout zigzag/documents

The project's own executor runs the plan of one rank after another over `benchmarks.links`; the slowest rank counts. The ratio is
the ideal time over that rank's: 1.0 means that communication, merging, copies and launches cost nothing. The ideal is the number of
ranks times the kernel on one rank's tokens, or, for rows marked strict, the kernel on the whole sequence over the number of ranks.
Both run in turns on the same kernel. A case whose result is wrong prints its error in place of a time, and the exit status is 1.
On a CPU everything runs too, for trying it out; its times say nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

import torch

from benchmarks import cases as suite
from benchmarks.cases import Case
from benchmarks.checking import wrong_numbers
from benchmarks.links import EmulatedTransport, Link, Model
from benchmarks.problems import problem_of, ranks_to_measure
from benchmarks.timing import Call, Effort, host_time, in_turns, launches, peak_memory, ratio
from dtensor_ring.ops.executors.plan_executor import Executor
from dtensor_ring.ops.kernels import Kernel, KernelRequirements, SoftmaxParams, choose_kernel
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.schedule import plan

DTYPE = torch.bfloat16


@dataclass
class Row:
    """One line of the table; times in milliseconds, memory in MiB, of the slowest rank measured."""

    case: str
    layout: str
    strategy: str
    world: int
    tokens: int
    kernel: str
    link: str
    strict: bool
    ranks: int = 0
    ms: tuple[float, float] = (0.0, 0.0)
    ratio: tuple[float, float] = (0.0, 0.0)
    host: tuple[float, float] = (0.0, 0.0)
    peak: float = 0.0
    launches: int = 0
    calls: int = 0
    wrong: str = ""

    def line(self) -> str:
        """As the table prints it."""
        start = (
            f"{self.case:<14}{self.layout:<18}{self.strategy:<8}{self.world:>4}{self.tokens:>7} {self.kernel:<13}{self.link:<22}"
        )
        if self.wrong:
            return f"{start} WRONG: {self.wrong}"
        (fwd, both), (fwd_ms, both_ms), (host_fwd, host_both) = self.ratio, self.ms, self.host
        times = f"{fwd:>7.3f}{both:>7.3f}{fwd_ms:>9.3f}{both_ms:>9.3f}{host_fwd:>7.2f}{host_both:>7.2f}"
        return f"{start}{times}{self.calls:>6}{self.launches:>6}{self.peak:>7.0f}{' strict' if self.strict else ''}"


HEADER = (
    f"{'case':<14}{'layout':<18}{'strategy':<8}{'W':>4}{'tokens':>7} {'kernel':<13}{'link':<22}{'fwd':>7}{'f+b':>7}{'fwd ms':>9}"
    f"{'f+b ms':>9}{'host f':>7}{'host b':>7}{'calls':>6}{'lnch':>6}{'peak':>7}"
)


class Emulation:
    """Measures cases on one device."""

    def __init__(self, device: torch.device, effort: Effort) -> None:
        self.device, self.effort = device, effort
        self.checked: dict[object, str] = {}

    def measure(self, case: Case, kernel: Kernel) -> Row:
        """Check the case, then time it."""
        problem = problem_of(case)
        row = Row(case.name, case.layout, _named(problem), case.world, case.tokens, kernel.name, str(case.link), case.strict)
        row.wrong = self.check(case, kernel)
        if row.wrong:
            return row
        lengths = case.lengths if case.strict else ()
        alone = replace(case, layout="zigzag", world=1, tokens=case.length if case.strict else case.tokens, lengths=lengths)
        ideal = self.calls(alone, 0, kernel)
        share = 1 / case.world if case.strict else case.world
        ranks = ranks_to_measure(case)
        ours = [self.calls(case, rank, kernel) for rank in ranks]
        row.ranks = len(ranks)
        ratios, slowest = [], []
        for direction in (0, 1):
            best, *times = in_turns([calls[direction] for calls in (ideal, *ours)], self.effort, self.device)
            ratios.append(ratio([share * x for x in best], times))
            slowest.append(max(statistics.median(each) for each in times))
        row.ratio, row.ms = (ratios[0], ratios[1]), (slowest[0], slowest[1])
        host = [[host_time(call, self.device, 10) for call in calls] for calls in ours]
        row.host = max(x[0] for x in host), max(x[1] for x in host)
        row.peak = max(peak_memory(self.calls(case, rank, kernel, allocate=True)[1], self.device) for rank in ranks)
        row.launches = max(launches(calls[1], self.device) for calls in ours[:2])
        row.calls = max(plan(problem, rank).calls for rank in ranks)
        return row

    def check(self, case: Case, kernel: Kernel) -> str:
        """What is wrong with the case, looked at once for all links and lengths."""
        key = case.layout, case.mask, case.strategy, case.stages, min(case.world, 8), bool(case.lengths), case.name, kernel.name
        if key not in self.checked:
            self.checked[key] = wrong_numbers(case, kernel, self.device, DTYPE)
        return self.checked[key]

    def calls(self, case: Case, rank: int, kernel: Kernel, *, allocate: bool = False) -> tuple[Call, Call]:
        """The forward pass of one rank, and forward with backward."""
        problem = problem_of(case)
        transport = EmulatedTransport(rank, case.world, case.link, self.device, allocate=allocate)
        executor = Executor(plan(problem, rank), transport, kernel, SoftmaxParams(case.head_dim**-0.5))
        shapes = [
            (1, problem.q_local(rank), heads, case.head_dim) for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads)
        ]
        q, k, v, dout = (torch.randn(shape, device=self.device, dtype=DTYPE) for shape in shapes)

        def both() -> None:
            out, lse = executor.forward(q, k, v)
            executor.backward(dout, q, k, v, out, lse)

        return lambda: executor.forward(q, k, v), both


def _named(problem: AttentionProblem) -> str:
    return f"ring/{problem.transfers}" if problem.strategy == "ring" and not problem.is_halo else problem.strategy


def _suites(options: argparse.Namespace) -> dict[str, list[Case]]:
    world, link = options.world, Link(options.link, options.node, latency=options.latency * 1e-6, model=options.model)
    size = {} if options.tokens is None else {"tokens": options.tokens}
    return {
        "batch": [suite.batch(world, link=link, **size)],
        "full": [suite.full(world, link=link, **size)],
        "window": [suite.window(world, link=link, **size)],
        "lists": list(suite.lists(world, link=link, **size)),
        "tails": list(suite.tails(world, range(1, 1 + options.seeds), link=link, **size)),
    }


def _preset(name: str) -> list[Case]:
    """The cases of a preset."""
    slow = Link(gigabytes=45.0)
    packed = {"layout": "zigzag/documents"}
    if name == "quick":
        return [
            suite.batch(8),
            suite.batch(8, link=slow),
            suite.full(8),
            *list(suite.lists(8, **packed))[3:],
            *suite.tails(8, range(1, 2), **packed),
        ]
    batches = [suite.batch(world, link=link) for world in (2, 8) for link in (Link(), slow, Link(model="nccl"))]
    far = suite.batch(64, link=Link(node=8))
    return [*batches, far, suite.full(8), suite.window(8), *suite.lists(8, **packed), *suite.tails(8, range(1, 4), **packed)]


def main() -> int:
    """Measure what is asked for; exit status 1 if a result is wrong."""
    options = _options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    need = KernelRequirements(device.type, DTYPE, 128, 128, training=True)
    kernels = [choose_kernel(name, need) for name in options.kernels or [None]]
    emulation = Emulation(device, Effort(options.rounds, options.block))
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"emulated: one rank at a time on one {where}, torch {torch.__version__}, {DTYPE}, heads 32:8, head dim 128\n{HEADER}")
    begin, rows = time.monotonic(), []
    for kernel in kernels:
        for case in _cases(options):
            rows.append(emulation.measure(case, kernel))
            print(rows[-1].line(), flush=True)
    print(f"{time.monotonic() - begin:.0f} s")
    if options.json:
        facts = {"device": where, "torch": torch.__version__, "emulated": True, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(facts, indent=1) + "\n")
    return int(any(row.wrong for row in rows))


def _cases(options: argparse.Namespace) -> list[Case]:
    if options.preset:
        cases = _preset(options.preset)
    else:
        named = _suites(options)
        cases = [case for name in options.cases for case in named[name]]
    changes = {name: getattr(options, name) for name in ("layout", "strategy") if getattr(options, name) is not None}
    cases = [replace(case, **changes) for case in cases]
    return [replace(case, stages=stages) for case in cases for stages in options.stages or [None]]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("quick", "targets"))
    parser.add_argument("--cases", nargs="+", default=["batch"], choices=("batch", "full", "window", "lists", "tails"))
    parser.add_argument("--world", type=int, default=8)
    parser.add_argument("--tokens", type=int, help="a rank")
    parser.add_argument("--seeds", type=int, default=3, help="long-tailed packings")
    parser.add_argument("--layout", help="as Layout.parse reads it")
    parser.add_argument("--strategy", choices=("ring", "gather"), help="left out: the library's choice")
    parser.add_argument("--stages", type=int, nargs="+", help="of ring; left out: the library's choice")
    parser.add_argument("--kernels", nargs="+", help="left out: the library's choice")
    parser.add_argument("--link", type=float, default=200.0, help="gigabytes a second")
    parser.add_argument("--latency", type=float, default=20.0, help="microseconds of a transfer")
    parser.add_argument("--node", type=int, default=0, help="ranks of a node, 0 for all")
    parser.add_argument("--model", choices=get_args(Model), default="copy_engine", help="what carries transfers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--block", type=float, default=40.0, help="milliseconds of a block of calls")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
