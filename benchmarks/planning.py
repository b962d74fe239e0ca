"""What it costs the host to plan a new batch: CPU time of one rank, whatever the kernels and the link.

    python -m benchmarks.planning                                        all rows, worlds of 8, 64 and 256
    python -m benchmarks.planning --worlds 8 64 256 1024 --json FILE
    python -m benchmarks.planning --layouts zigzag --documents 1000 --masks causal --parts plans

A million tokens, in long-tailed documents drawn from a seed; 1 document is the whole sequence, without documents where the layout
needs none. A figure is the CPU time, in milliseconds, of a rank that has planned nothing yet: caches are empty before, and of the
ranks 0, W/2 and W-1 the slowest counts. Other programs only ever add, so it is the least of some repetitions.

    plans       `plan` of a problem whose stages are left open ("ring"), or as many as ranks ("ring, W-1"), or "gather"
    totals      `totals` of all ranks, which costs and the warning of imbalance count by
    dealing     `share_documents` alone, for all ranks: in rows of "zigzag/documents" it was done before
    batch       what else is worked out once a batch: documents read off position ids, index tensors of shards and of transfers

A row whose plan does not fetch what other ranks send it, or computes another number of scores than `totals` says, prints so, and
the exit status is 1. A figure that takes more than `--most` seconds is given up.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from types import FrameType

import torch

from benchmarks.record import facts, save
from dtensor_ring.cache import _CACHES, Cache
from dtensor_ring.comm.collectives import take_shard
from dtensor_ring.ops.executors.routes import routes
from dtensor_ring.planning.document_sharding import share_documents
from dtensor_ring.planning.documents import Documents
from dtensor_ring.planning.layout import Layout
from dtensor_ring.planning.mask import Band
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.schedule import plan
from dtensor_ring.planning.totals import fetched_by, totals

TOKENS = 1 << 20
LAYOUTS = ("contiguous", "zigzag", "zigzag/documents")
MASKS = ("causal", "window:4095,0")
STRATEGIES = ("ring", "ring, W-1", "gather")
DEALT = ("documents shared out",)
SHORTEST = 0.06  # seconds
CHECKED = 64  # ranks up to which every other rank's plan is made, to compare what it sends


class GivenUpError(Exception):
    """A figure takes longer than it may."""


@dataclass
class Row:
    """One line of the table: milliseconds for each world, None where it was given up."""

    part: str
    case: str
    documents: int
    ms: dict[int, float | None] = field(default_factory=dict)
    wrong: str = ""


@dataclass(frozen=True)
class Todo:
    """A row before it is measured: what gives the seconds of each world, and what raises where the result is wrong."""

    part: str
    case: str
    documents: int
    figures: dict[int, Callable[[], float]]
    check: Callable[[int], None] = lambda _: None


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--documents", type=int, nargs="+", default=[1, 100, 1000, 10000])
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, help="stripes too: stripe:1, stripe:16")
    parser.add_argument("--masks", nargs="+", default=MASKS)
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, choices=STRATEGIES)
    parser.add_argument("--parts", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--repeat", type=int, default=2, help="repetitions, whose least counts")
    parser.add_argument("--most", type=float, default=20.0, help="seconds of CPU time after which a figure is given up")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    packed = {number: documents_of(number, options.seed) for number in options.documents}
    print(f"{'milliseconds of CPU time':58}" + "".join(f"{f'W={world}':>10}" for world in options.worlds))
    rows = [measured(row, options) for part in options.parts for row in ROWS[part](options, packed)]
    if options.json:
        save(options.json, facts("planning", torch.device("cpu"), tokens=TOKENS, worlds=options.worlds), rows)
    sys.exit(any(row.wrong for row in rows))


def measured(todo: Todo, options: argparse.Namespace) -> Row:
    """A row with its figures, printed."""
    row = Row(todo.part, todo.case, todo.documents)
    for world, figure in todo.figures.items():
        try:
            with no_longer_than(options.most):
                row.ms[world] = min(figure() for _ in range(options.repeat)) * 1e3
                todo.check(world)
        except GivenUpError:
            row.ms[world] = None
        except AssertionError as error:
            row.wrong = f"W={world}: {error}"
    figures = "".join(f"{'-' if row.ms.get(world) is None else f'{row.ms[world]:.1f}':>10}" for world in options.worlds)
    print(f"{row.part:8}{row.case:44}{row.documents:6}{figures}" + (f"  WRONG {row.wrong}" if row.wrong else ""), flush=True)
    return row


def plans(options: argparse.Namespace, packed: dict[int, Documents]) -> Iterator[Todo]:
    """Plans of one rank."""
    for layout, mask, strategy in product(options.layouts, options.masks, options.strategies):
        for number, documents in packed.items():
            makers = {world: problem_of(layout, mask, strategy, documents, world) for world in options.worlds}
            figures = {world: partial(seconds_of_plan, make) for world, make in makers.items()}
            check = partial(check_plan, makers)
            yield Todo("plan", f"{layout}, {mask}, {strategy}", number, figures, check)


def all_totals(options: argparse.Namespace, packed: dict[int, Documents]) -> Iterator[Todo]:
    """Totals of all ranks."""
    for layout, mask in product(options.layouts, options.masks):
        for number, documents in packed.items():
            makers = {world: problem_of(layout, mask, "ring", documents, world) for world in options.worlds}
            figures = {world: partial(seconds, lambda make=make: totals(make()), DEALT) for world, make in makers.items()}
            yield Todo("totals", f"{layout}, {mask}", number, figures)


def dealing(options: argparse.Namespace, packed: dict[int, Documents]) -> Iterator[Todo]:
    """Documents shared out over the ranks."""
    for number, documents in packed.items():
        (bounds,) = documents.bounds
        even = {world: tuple(TOKENS // world + (rank < TOKENS % world) for rank in range(world)) for world in options.worlds}
        figures = {world: partial(seconds, partial(share_documents, bounds, tokens)) for world, tokens in even.items()}
        yield Todo("dealing", "share_documents", number, figures)


def once_a_batch(options: argparse.Namespace, packed: dict[int, Documents]) -> Iterator[Todo]:
    """What else is worked out of a batch once; what does not depend on the ranks has a figure for the first world alone."""
    ids, cpu, first = torch.arange(TOKENS)[None], torch.device("cpu"), options.worlds[0]
    for number, documents in packed.items():
        lengths = [b - a for a, b in pairwise(documents.bounds[0])]
        works = {
            "Documents.from_position_ids": partial(Documents.from_position_ids, documents.position_ids()),
            "Documents.from_lengths": partial(Documents.from_lengths, lengths),
            "position ids of documents": documents.position_ids,
        }
        for case, work in works.items():
            yield Todo("batch", case, number, {first: partial(seconds, work)})
        for layout in options.layouts:
            problems = {world: problem_of(layout, "causal", "ring", documents, world)() for world in options.worlds}
            cuts = {world: partial(take_shard, ids, 1, problem.split, world, 0) for world, problem in problems.items()}
            figures = {world: partial(seconds, work, DEALT) for world, work in cuts.items()}
            yield Todo("batch", f"{layout}, a shard's index tensor", number, figures)
            moves = {world: partial(routes, problem, world // 2, 1, cpu) for world, problem in problems.items()}
            figures = {world: partial(seconds, work, (*DEALT, "plans")) for world, work in moves.items()}
            yield Todo("batch", f"{layout}, index tensors of transfers", number, figures)


ROWS = {"plans": plans, "totals": all_totals, "dealing": dealing, "batch": once_a_batch}


def problem_of(layout: str, mask: str, strategy: str, documents: Documents, world: int) -> Callable[[], AttentionProblem]:
    """What makes the problem anew, as a call on a new batch does: a problem keeps what it has worked out of itself."""
    spread, band = Layout.parse(layout), Band.parse(mask)
    kept = documents if spread.cut or documents.parts > 1 else None
    name, _, every = strategy.partition(", ")
    return lambda: AttentionProblem(spread, band, TOKENS, TOKENS, world, name, kept).staged(world - 1 if every else 0)


def seconds_of_plan(make: Callable[[], AttentionProblem]) -> float:
    """CPU time of the slowest of three ranks, each planning a problem of which nothing is known."""
    world = make().world
    return max(seconds(lambda rank=rank: plan(make(), rank), DEALT) for rank in sorted({0, world // 2, world - 1}))


def check_plan(makers: dict[int, Callable[[], AttentionProblem]], world: int) -> None:
    """Compare a plan with the totals, and where ranks are few what it fetches with what the other ranks' plans send to it."""
    problem, rank = makers[world](), world // 2
    each, counted = plan(problem, rank), totals(problem)
    expected = counted.scores[rank], counted.fetched[rank], counted.sent[rank]
    found = each.cells, fetched_by(each), each.key_tokens_sent
    assert found == expected, f"(scores, fetched, sent) of rank {rank} are {found}, totals say {expected}"
    if problem.collective or problem.world > CHECKED:
        return
    others = [other for other in range(problem.world) if other != rank]
    for index, step in enumerate(each.steps):
        for other in {keys.owner for keys in step.keys} & set(others):
            sent = [send.ranges for send in plan(problem, other).sends[index] if send.rank == rank]
            fetched = tuple(keys for keys in step.keys if keys.owner == other)
            assert sent == [fetched], f"rank {rank} fetches {fetched} of rank {other} in step {index}, which sends {sent}"


def seconds(work: Callable[[], object], kept: tuple[str, ...] = ()) -> float:
    """CPU time of some work where all caches are empty but those of some names."""
    work()  # fills the caches that are kept
    least, runs, begin = float("inf"), 0, time.process_time()
    # The CPU's clock may tick every few milliseconds, or jump: short work is done again until that does not matter. Another clock
    # counts other programs too. Both only ever show too much.
    while runs < 3 or time.process_time() - begin < SHORTEST:
        forget(kept)
        start = time.perf_counter()
        work()
        least = min(least, time.perf_counter() - start)
        runs += 1
    return min(least, (time.process_time() - begin) / runs)


def forget(kept: tuple[str, ...]) -> None:
    """Empty every cache of the process but those of some names."""
    for name, cache in list(_CACHES.items()):
        if isinstance(cache, Cache) and name not in kept:  # the others belong to meshes, of which there is none here
            cache.clear()


@contextmanager
def no_longer_than(limit: float) -> Iterator[None]:
    """Raise `GivenUpError` in the block once it has used so much CPU time."""

    def give_up(_number: int, _frame: FrameType | None) -> None:
        raise GivenUpError

    before = signal.signal(signal.SIGPROF, give_up)
    signal.setitimer(signal.ITIMER_PROF, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def documents_of(number: int, seed: int) -> Documents:
    """So many long-tailed documents that fill the sequence."""
    drawn = random.Random(seed)
    weights = [drawn.lognormvariate(0.0, 1.3) for _ in range(number)]
    lengths = [1 + int((TOKENS - number) * weight / sum(weights)) for weight in weights]
    lengths[lengths.index(max(lengths))] += TOKENS - sum(lengths)
    return Documents.from_lengths(lengths)


if __name__ == "__main__":
    main()
