"""How close one rank of many comes to the kernel alone, measured on one GPU over an emulated link.

    python -m benchmarks.emulate --preset quick                      under a minute of one H100
    python -m benchmarks.emulate --preset targets --json FILE        five minutes: the emulated tables of docs/performance.md
    python -m benchmarks.emulate --cases tails lists --world 8 --kernels torch_flash --layout zigzag/documents

The project's own executor runs the plan of one rank after another over `benchmarks.links`. All ranks are timed shortly, and the
two slowest again, in turns with the kernel; the slower one counts (column "ranks": 2/8). The ratio is the ideal time over that
rank's: 1.0 means that communication, merging, copies and launches cost nothing. The ideal is the number of ranks times the kernel
on one rank's tokens, or, for rows marked strict, the kernel on the whole sequence over the number of ranks.
Both run in turns on the same kernel. A case whose result is wrong prints its error in place of a time, and the exit status is 1.
On a CPU everything runs too, for trying it out; its times say nothing.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args

import torch

from benchmarks import cases as suite
from benchmarks.cases import Case, ideal_of
from benchmarks.checking import wrong_numbers
from benchmarks.links import EmulatedTransport, Link, Model
from benchmarks.problems import calls_of, flops_of, kernels_of, problem_of, ranks_to_measure, strategy_of
from benchmarks.record import device_name, facts, save
from benchmarks.targets import available, extra, need_of, quick, targets
from benchmarks.timing import Call, Effort, Stopwatch, ratio
from dtensor_ring.ops.kernels import KERNELS, Kernel, KernelRequirements, choose_kernel
from dtensor_ring.planning.schedule import plan

DTYPE = torch.bfloat16
Pair = tuple[Call, Call]  # forward, and forward with backward


@dataclass
class Row:
    """One line of the table; times in milliseconds, memory in MiB.

    Times, ratios and the host's are those of the slowest rank; memory is the most of all ranks measured. `kernels` is the ratio
    that the kernel calls alone of the rank that was slowest shortly would have: without exchanging, waiting, merging and adding up.
    """

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
    kernels: tuple[float, float] | None = None
    host: tuple[float, float] = (0.0, 0.0)
    peak: float = 0.0
    launches: int = 0
    calls: int = 0
    shortly: dict[int, tuple[float, float]] = field(default_factory=dict)
    fully: int = 0
    wrong: str = ""

    def line(self) -> str:
        """As the table prints it."""
        start = (
            f"{self.case:<17}{self.layout:<18}{self.strategy:<8}{self.world:>4}{self.tokens:>7} {self.heads:<6}{self.kernel:<13}"
            f"{self.link:<22}"
        )
        if self.wrong:
            return f"{start} WRONG: {self.wrong}"
        (fwd, both), (fwd_ms, both_ms), (host_fwd, host_both) = self.ratio, self.ms, self.host
        times = f"{fwd:>7.3f}{both:>7.3f}{fwd_ms:>9.3f}{both_ms:>9.3f}{self.tflops[0]:>5.0f}{self.tflops[1]:>5.0f}"
        ranks = f"{self.fully}/{len(self.shortly)}"
        times += "".join(f"{each:>7.3f}" for each in self.kernels or ()) or 14 * " "
        rest = f"{host_fwd:>7.2f}{host_both:>7.2f}{self.calls:>6}{self.launches:>6}{self.peak:>7.0f}{ranks:>6}"
        return f"{start}{times}{rest}{' strict' if self.strict else ''}"


HEADER = (
    f"{'case':<17}{'layout':<18}{'strategy':<8}{'W':>4}{'tokens':>7} {'heads':<6}{'kernel':<13}{'link':<22}{'fwd':>7}{'f+b':>7}"
    f"{'fwd ms':>9}{'f+b ms':>9}{'TFLOP/s':>10}"
    f"{'kernels alone':>14}{'host f':>7}{'host b':>7}{'calls':>6}{'lnch':>6}{'peak':>7}{'ranks':>6}"
)


class Emulation:
    """Measures cases on one device.

    Attributes:
        watch: what times calls.
        slowest: how many ranks are timed at full effort; all ranks are timed shortly first.
        spent: seconds by what they were spent on.
    """

    def __init__(self, watch: Stopwatch, slowest: int = 2) -> None:
        self.watch, self.slowest = watch, slowest
        self.checked: dict[object, str] = {}
        self.spent: Counter[str] = Counter()

    def measure(self, case: Case, kernel: Kernel) -> Row:
        """Check the case, then time it."""
        heads = f"{case.heads}:{case.kv_heads}"
        named = (
            case.name,
            case.layout,
            strategy_of(case, kernel.name),
            case.world,
            case.tokens,
            heads,
            kernel.name,
            str(case.link),
            case.strict,
        )
        row = Row(*named, target=case.target)
        with self.spending("checks"):
            row.wrong = self.check(case, kernel)
        if row.wrong:
            return row
        with self.spending("plans and inputs"):
            ideal, share = ideal_of(case)
            ideal_calls = self.calls(ideal, 0, kernel)
            ours = {rank: self.calls(case, rank, kernel) for rank in ranks_to_measure(case)}
            row.calls = max(plan(problem_of(case, kernel.name), rank).calls for rank in ours)
        slowest = self.time(case, row, (ideal_calls, share), ours)
        with self.spending("host"):
            row.host = self.watch.host_time(ours[slowest][0]), self.watch.host_time(ours[slowest][1])
        with self.spending("launches"):
            row.launches = self.watch.launches(ours[slowest][1])
        with self.spending("memory"):
            ours.clear()
            row.peak = max(self.watch.peak_memory(self.calls(case, rank, kernel, allocate=True)[1]) for rank in row.shortly)
        return row

    def time(self, case: Case, row: Row, ideal: tuple[Pair, float], ours: dict[int, Pair]) -> int:
        """Fill in times and ratios; give the slowest rank, forward and backward together."""
        ideal_calls, share = ideal
        with self.spending("short times"):
            short = [self.watch.shortly([calls[direction] for calls in ours.values()]) for direction in (0, 1)]
        row.shortly = dict(zip(ours, zip(*short, strict=True), strict=True))
        found = []
        for direction, flops in enumerate(flops_of(case)):
            ranks = sorted(ours, key=lambda rank: -row.shortly[rank][direction])[: self.slowest]
            with self.spending("full times"):
                alone = self.kernels(case, ranks[0], row.kernel)[direction]
                every = ideal_calls[direction], *(ours[rank][direction] for rank in ranks), alone
                best, *times, kernels = self.watch.in_turns(every)
            best = [share * x for x in best]
            ms = max(statistics.median(each) for each in times)
            found.append((ms, ratio(best, times), flops / ms / 1e9, ratio(best, [kernels])))
        (row.ms, row.ratio, row.tflops, row.kernels), row.fully = zip(*found, strict=True), len(ranks)
        return ranks[0]

    @contextmanager
    def spending(self, part: str) -> Iterator[None]:
        """Count the seconds of the block as spent on a part."""
        begin = time.monotonic()
        yield
        self.watch.wait()
        self.spent[part] += time.monotonic() - begin

    def check(self, case: Case, kernel: Kernel) -> str:
        """What is wrong with the case, looked at once for all links and lengths."""
        key = case.layout, case.mask, case.strategy, case.stages, min(case.world, 8), bool(case.lengths), case.name, kernel.name
        if key not in self.checked:
            self.checked[key] = wrong_numbers(case, kernel, self.watch.device, DTYPE)
        return self.checked[key]

    def kernels(self, case: Case, rank: int, kernel: str) -> Pair:
        """The kernel calls of one rank alone, forward, and forward with backward."""
        transport = EmulatedTransport(rank, case.world, case.link, self.watch.device)
        return kernels_of(case, transport, KERNELS[kernel], self.watch.device, DTYPE)

    def calls(self, case: Case, rank: int, kernel: Kernel, *, allocate: bool = False) -> Pair:
        """The forward pass of one rank, and forward with backward."""
        transport = EmulatedTransport(rank, case.world, case.link, self.watch.device, allocate=allocate)
        return calls_of(case, transport, kernel, self.watch.device, DTYPE)


def _suites(options: argparse.Namespace) -> dict[str, list[Case]]:
    world, link = options.world, Link(options.link, options.node, latency=options.latency * 1e-6, model=options.model)
    size = {} if options.tokens is None else {"tokens": options.tokens}
    return {
        "batch": [suite.batch(world, link=link, **size)],
        "full": [suite.full(world, link=link, **size)],
        "window": [suite.window(world, link=link, **size)],
        "lists": list(suite.lists(world, link=link, **size)),
        "tails": list(suite.tails(world, options.draw or range(1, 1 + options.seeds), link=link, **size)),
    }


def main() -> int:
    """Measure what is asked for; exit status 1 if a result is wrong."""
    options = parser().parse_args()
    # With an index: asking for the current stream of a device without one takes longer than launching a kernel.
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    need = need_of(device, DTYPE)
    emulation = Emulation(Stopwatch(device, Effort(options.rounds, options.block)), options.slowest)
    print(f"emulated: one rank at a time on one {device_name(device)}, torch {torch.__version__}, {DTYPE}, head dim 128")
    print(f"ranks: how many of those timed shortly, the slowest, were timed at full effort\n{HEADER}")
    begin, rows, cases = time.monotonic(), [], cases_of(options, need)
    waits = sorted({case.link.latency * 1e6 for case in cases})
    note = f"A transfer takes {' or '.join(f'{wait:g}' for wait in waits)} us beside the time of its bytes."
    known = facts("emulate", device, emulated=True, preset=options.preset, rounds=options.rounds, note=note)
    for case in cases:
        rows.append(emulation.measure(case, choose_kernel(case.kernel, need)))
        print(rows[-1].line(), flush=True)
        if options.json:  # after each, so that a run that is ended keeps what it has
            save(options.json, known, rows)
    parts = ", ".join(f"{part} {seconds:.0f}" for part, seconds in emulation.spent.most_common())
    print(f"{time.monotonic() - begin:.0f} s: {parts}")
    return int(any(row.wrong for row in rows))


def cases_of(options: argparse.Namespace, need: KernelRequirements) -> list[Case]:
    """The cases asked for."""
    present = available(need)
    if options.preset == "quick":
        cases = quick(present.get("FA2"))
    elif options.preset == "targets":
        seeds = options.draw or [random.SystemRandom().randrange(10**6) for _ in range(options.seeds)]
        cases = [*targets(present, seeds), *extra(present)]
    else:
        named = _suites(options)
        cases = [case for name in options.cases for case in named[name]]
    changes = {name: getattr(options, name) for name in ("layout", "strategy") if getattr(options, name) is not None}
    cases = [replace(case, **changes) for case in cases]
    if options.kernels:
        cases = list(dict.fromkeys(replace(case, kernel=kernel) for kernel in options.kernels for case in cases))
    return [replace(case, stages=stages) for case in cases for stages in options.stages or [None]]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("quick", "targets"))
    parser.add_argument("--cases", nargs="+", default=["batch"], choices=("batch", "full", "window", "lists", "tails"))
    parser.add_argument("--world", type=int, default=8)
    parser.add_argument("--tokens", type=int, help="a rank")
    parser.add_argument("--seeds", type=int, default=3, help="how many long-tailed packings; targets draws new ones")
    parser.add_argument("--draw", type=int, nargs="+", metavar="SEED", help="these long-tailed packings")
    parser.add_argument("--layout", help="as Layout.parse reads it")
    parser.add_argument("--strategy", choices=("ring", "gather"), help="left out: the library's choice")
    parser.add_argument("--stages", type=int, nargs="+", help="of ring; left out: the library's choice")
    parser.add_argument("--kernels", nargs="+", help="left out: the library's choice")
    parser.add_argument("--link", type=float, default=200.0, help="gigabytes a second")
    parser.add_argument("--latency", type=float, default=20.0, help="microseconds of a transfer")
    parser.add_argument("--node", type=int, default=0, help="ranks of a node, 0 for all")
    parser.add_argument("--model", choices=get_args(Model), default="copy_engine", help="what carries transfers")
    parser.add_argument("--rounds", type=int, default=5, help="blocks of each call, in turns")
    parser.add_argument("--block", type=float, default=40.0, help="milliseconds of a block of calls")
    parser.add_argument("--slowest", type=int, default=2, help="ranks timed at full effort, of all that are timed shortly")
    parser.add_argument("--json", type=Path)
    return parser


if __name__ == "__main__":
    sys.exit(main())
