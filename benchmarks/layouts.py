"""Packed documents: is `per_document=True` ever slower than plain zigzag, and does the host take longer with more documents?

    python -m benchmarks.layouts --json FILE                 40 packings drawn anew, two minutes of one H100
    python -m benchmarks.layouts --draw 7 8 9 --kernels flash_attn_4

Emulated, as `benchmarks.emulate` does it. Of both layouts the ranks that are predicted to be slowest (the most blocks, the most
keys fetched) run in turns, and the ratio is the slowest of plain zigzag over the slowest of the other: below 1 cutting every
document by itself was the slower one. Packings are of many kinds, from a few long documents to thousands of short ones.

The host's time of a stage is what a call with seven stages takes longer than one with one stage, over six, where next to nothing is
computed: for one document, and for packings of more and more documents.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.cases import Case, long_tail
from benchmarks.checking import wrong_numbers
from benchmarks.links import EmulatedTransport
from benchmarks.problems import calls_of, predicted_slowest
from benchmarks.record import device_name, facts, save
from benchmarks.targets import LAYOUTS, PACKED, STAGE, available, need_of
from benchmarks.timing import Call, Effort, Stopwatch, ratio
from dtensor_ring.ops.kernels import Kernel, choose_kernel

DTYPE = torch.bfloat16


@dataclass
class Row:
    """One packing; milliseconds of plain zigzag's slowest rank and of the other's, forward and both, and the ratio of the two."""

    case: str
    documents: int
    kernel: str
    target: str = LAYOUTS
    plain_ms: tuple[float, float] = (0.0, 0.0)
    ms: tuple[float, float] = (0.0, 0.0)
    ratio: tuple[float, float] = (0.0, 0.0)
    wrong: str = ""

    def line(self) -> str:
        """As the table prints it."""
        start = f"{self.case:<28}{self.documents:>6} {self.kernel:<13}"
        if self.wrong:
            return f"{start} WRONG: {self.wrong}"
        return start + "".join(f"{pair[0]:>9.3f}{pair[1]:>9.3f}" for pair in (self.plain_ms, self.ms, self.ratio))


@dataclass
class StageRow:
    """What a stage costs the host, in milliseconds of forward and of forward and backward."""

    case: str
    documents: int
    kernel: str
    over_ms: tuple[float, float]
    target: str = STAGE

    def line(self) -> str:
        """As the table prints it."""
        return f"{self.case:<28}{self.documents:>6} {self.kernel:<13}{self.over_ms[0]:>9.3f}{self.over_ms[1]:>9.3f} ms"


def packing(seed: int, world: int, tokens: int) -> Case:
    """A packing of a kind that the seed draws, over `world` ranks of `tokens` tokens."""
    drawn, whole = random.Random(seed), world * tokens
    kind = drawn.choice(("long tail", "short", "long", "equal", "one long"))
    if kind == "long tail":
        lengths = long_tail(seed, whole, drawn.uniform(5.5, 8.0), drawn.uniform(0.8, 1.8))
    elif kind == "short":
        lengths = long_tail(seed, whole, drawn.uniform(4.0, 6.0), 0.5)
    elif kind == "long":
        lengths = long_tail(seed, whole, drawn.uniform(8.5, 10.0), 0.5)
    elif kind == "equal":
        each = drawn.randrange(tokens // 16, 2 * tokens)
        lengths = (each,) * (whole // each) + ((whole % each,) if whole % each else ())
    else:
        first = drawn.randrange(whole // 4, 3 * whole // 4)
        lengths = (first, *long_tail(seed, whole - first))
    shuffled = list(lengths)
    drawn.shuffle(shuffled)
    return Case(f"{kind} {seed}", layout=PACKED, world=world, tokens=tokens, lengths=tuple(shuffled), strict=True)


class Comparison:
    """Measures packings and stages on one device."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch

    def measure(self, case: Case, kernel: Kernel) -> Row:
        """Check both layouts, then time them in turns."""
        plain = replace(case, layout="zigzag")
        row = Row(case.name, len(case.lengths), kernel.name)
        row.wrong = wrong_numbers(case, kernel, self.watch.device, DTYPE) or wrong_numbers(plain, kernel, self.watch.device, DTYPE)
        if row.wrong:
            return row
        theirs, ours = ([self.calls(each, rank, kernel) for rank in predicted_slowest(each, 2)] for each in (plain, case))
        found = []
        for direction in (0, 1):
            times = self.watch.in_turns([calls[direction] for calls in (*theirs, *ours)])
            before, after = times[: len(theirs)], times[len(theirs) :]
            slowest = [max(round_) for round_ in zip(*before, strict=True)]
            found.append((*(max(map(statistics.median, each)) for each in (before, after)), ratio(slowest, after)))
        row.plain_ms, row.ms, row.ratio = zip(*found, strict=True)
        return row

    def stages(self, case: Case, kernel: Kernel) -> StageRow:
        """What a stage costs the host, of the rank that does the most."""
        rank = predicted_slowest(case, 1, 0)[0]
        few, many = (self.calls(replace(case, stages=count), rank, kernel) for count in (1, case.world - 1))
        more = [self.watch.host_time(many[i]) - self.watch.host_time(few[i]) for i in (0, 1)]
        return StageRow(case.name, max(1, len(case.lengths)), kernel.name, (more[0] / (case.world - 2), more[1] / (case.world - 2)))

    def calls(self, case: Case, rank: int, kernel: Kernel) -> tuple[Call, Call]:
        """The forward pass of one rank, and forward with backward."""
        transport = EmulatedTransport(rank, case.world, case.link, self.watch.device)
        return calls_of(case, transport, kernel, self.watch.device, DTYPE)


def packings_for_stages(world: int, tokens: int) -> Iterator[Case]:
    """One document, and packings of 4, 32 and 256 equal ones, a token more or less."""
    whole = world * tokens
    yield Case("host of a stage", world=world, tokens=tokens)
    for count in (4, 32, 256):
        each = whole // count
        lengths = tuple(each + (1 if i % 2 else -1) for i in range(count))
        yield Case("host of a stage", layout=PACKED, world=world, tokens=tokens, lengths=lengths, strict=True)


def main() -> int:
    """Measure what is asked for; exit status 1 if a result is wrong."""
    options = parser().parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    need = need_of(device, DTYPE)
    present = available(need)
    names = options.kernels or [present[family] for family in ("FA2", "FA4") if family in present] or [None]
    comparison = Comparison(Stopwatch(device, Effort(options.rounds, options.block)))
    seeds = options.draw or [random.SystemRandom().randrange(10**6) for _ in range(options.seeds)]
    print(f"emulated on one {device_name(device)}, torch {torch.__version__}, W={options.world}, {options.tokens} tokens a rank")
    print(f"{'packing':<28}{'docs':>6} {'kernel':<13}{'zigzag ms':>18}{'per document ms':>18}{'ratio':>18}")
    rows: list[Row | StageRow] = []

    def add(row: Row | StageRow) -> None:
        rows.append(row)
        print(row.line(), flush=True)
        if options.json:  # after each, so that a run that is ended keeps what it has
            save(options.json, facts("layouts", device, emulated=True, world=options.world, tokens=options.tokens), rows)

    for kernel in (choose_kernel(name, need) for name in names):
        for seed in seeds:
            add(comparison.measure(packing(seed, options.world, options.tokens), kernel))
        for case in packings_for_stages(options.world, min(1024, options.tokens)):
            add(comparison.stages(case, kernel))
    return int(any(getattr(row, "wrong", "") for row in rows))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8192, help="a rank")
    parser.add_argument("--seeds", type=int, default=40, help="how many packings, drawn anew each time")
    parser.add_argument("--draw", type=int, nargs="+", metavar="SEED", help="these packings")
    parser.add_argument("--kernels", nargs="+", help="left out: FA2 and FA4, as far as they are there")
    parser.add_argument("--rounds", type=int, default=5, help="blocks of each call, in turns")
    parser.add_argument("--block", type=float, default=20.0, help="milliseconds of a block of calls")
    parser.add_argument("--json", type=Path)
    return parser


if __name__ == "__main__":
    sys.exit(main())
