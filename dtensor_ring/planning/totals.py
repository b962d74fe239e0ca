"""How much each rank computes and exchanges, counted from runs and bands without making a plan.

    zigzag, causal, 4 ranks, 16 tokens       rank 0        rank 1        rank 2        rank 3
    holds                                    0 1 | 14 15   2 3 | 12 13   4 5 | 10 11   6 7 | 8 9
    needs the keys of positions              0 .. 15       0 .. 13       0 .. 11       0 .. 9
    fetches                                  12            10            8             6
    computes                                 34 scores     34            34            34

The queries of a run see a range of positions, or one range for each of its blocks where a window is narrower than the gap
between them. A rank fetches the keys in the union of its ranges that it does not hold, and a rank sends each key of its own as
often as other ranks' ranges cover it. All of these are sums over arithmetic runs, so a thousand ranks and ten million tokens
take a moment. The numbers equal those of `dtensor_ring.planning.schedule.plan`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from dtensor_ring.planning.document_sharding import balance_of
from dtensor_ring.planning.documents import Documents
from dtensor_ring.planning.mask import Band
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.runs import Run, cut, unions
from dtensor_ring.planning.schedule import Plan, plan

Runs = tuple[Run, ...]
Range = tuple[int, int]  # positions [low, high)


@dataclass(frozen=True, slots=True)
class Totals:
    """What each rank holds, computes and exchanges in a forward pass, one number a rank.

    `tokens` counts its queries, `scores` its work, `fetched` and `sent` the key tokens that travel (their values with them).
    """

    tokens: tuple[int, ...]
    scores: tuple[int, ...]
    fetched: tuple[int, ...]
    sent: tuple[int, ...]

    @property
    def most_loaded(self) -> int:
        """The first of the ranks with the most scores."""
        return self.scores.index(max(self.scores))

    @property
    def balance(self) -> float:
        """Mean work over the most loaded rank's: 1 is perfect."""
        return balance_of(self.scores)


def fetched_by(each: Plan) -> int:
    """The key tokens that come to a plan's rank from others; an all-gather brings every key, needed or not."""
    if each.problem.collective:
        return each.problem.k_length - each.problem.k_local(each.rank)
    return sum(keys.size for step in each.steps for keys in step.keys if keys.owner != each.rank)


def totals(problem: AttentionProblem) -> Totals:
    """The totals of all ranks, equal to those of their plans.

    Raises:
        ValueError: the layout cannot be laid out, as `Layout.runs` says.
    """
    ranks = range(problem.world)
    if not problem.segmentation.is_shared:  # parts of documents on one rank: only plans read them
        plans = [plan(problem, rank) for rank in ranks]
        counts = ((problem.q_local(each.rank), each.cells, fetched_by(each), each.key_tokens_sent) for each in plans)
        tokens, scores, fetched, sent = zip(*counts, strict=True)
        return Totals(tokens, scores, fetched, sent)
    queries = problem.layout.deal(problem.q_length, problem.world, problem.bounds[0])
    # With as many keys as queries the runs are the same; a thousand ranks' of them are not worked out twice.
    same = problem.q_length == problem.k_length
    keys = queries if same else problem.layout.deal(problem.k_length, problem.world, problem.bounds[0])
    exchanged = _exchanged(problem, queries, keys)
    return Totals(
        tuple(_tokens(runs) for runs in queries),
        tuple(_scores(problem, runs) for runs in queries),
        tuple(fetched for fetched, _ in exchanged),
        tuple(sent for _, sent in exchanged),
    )


def _tokens(runs: Runs) -> int:
    return sum(run.count for run in runs)


# Work: pairs of a query and a key of its document under the band.


def _scores(problem: AttentionProblem, runs: Runs) -> int:
    """Counts the scores of a rank's queries, over all batch rows whose documents differ."""
    band = problem.position_band
    return sum(
        _scores_of_run(piece.run, band, *_document(problem, bounds, piece.document))
        for bounds in problem.bounds
        for piece in cut(runs, bounds)
    )


def _document(problem: AttentionProblem, bounds: tuple[int, ...] | None, index: int) -> Range:
    """The positions of a document's keys."""
    return (0, problem.k_length) if bounds is None else (bounds[index], bounds[index + 1])


def _scores_of_run(run: Run, band: Band, start: int, stop: int) -> int:
    """Scores of a run's queries with keys [start, stop).

    A query p sees the keys up to p - lo, less those up to p - hi - 1. Of the keys up to x, max(x + 1 - start, 0) less
    max(x + 1 - stop, 0) are in the document.
    """
    if band.lo is not None and band.hi is not None and band.lo > band.hi:
        return 0
    seen = run.count * (stop - start)
    if band.lo is not None:
        seen = run.excess(1 - band.lo - start) - run.excess(1 - band.lo - stop)
    if band.hi is not None:
        seen -= run.excess(-band.hi - start) - run.excess(-band.hi - stop)
    return seen


# Exchange: key tokens a rank fetches, and how often its own are sent.


def _exchanged(problem: AttentionProblem, queries: Sequence[Runs], keys: Sequence[Runs]) -> list[tuple[int, int]]:
    """Counts the key tokens that each rank fetches and sends, as (fetched, sent)."""
    if problem.collective:  # one all-gather of shards that are padded to the largest
        held = [_tokens(runs) for runs in keys]
        return [(problem.k_length - own, (problem.world - 1) * max(held)) for own in held]
    if _has_gaps(problem):
        return _without_inner_rounds(problem, queries, keys)
    return _covered(problem, queries, keys)


def _covered(problem: AttentionProblem, queries: Sequence[Runs], keys: Sequence[Runs]) -> list[tuple[int, int]]:
    is_halo = problem.is_halo
    needed = [_needed(problem, runs, is_halo) for runs in queries]
    # What each rank sends is counted against the ranges of all ranks together: rank by rank it would be quadratic in ranks.
    cover = _Cover([each for ranges in needed for each in ranges])
    exchanged = []
    for ranges, runs in zip(needed, keys, strict=True):
        held_below = _held_below(runs)
        own = sum(held_below(high) - held_below(low) for low, high in ranges)
        fetched = sum(high - low for low, high in ranges) - own
        exchanged.append((fetched, sum(cover.over(run) for run in runs) - own))
    return exchanged


def _needed(problem: AttentionProblem, runs: Runs, is_halo: bool) -> list[Range]:
    """Positions whose keys the queries of a rank see. A halo fetches them for each run by itself, what two runs see twice."""
    band = problem.position_band
    needed: list[Range] = []
    for group in [(run,) for run in runs] if is_halo else [runs]:
        needed += unions(
            seen
            for bounds in problem.bounds
            for piece in cut(group, bounds)
            for seen in _seen(piece.run, band, *_document(problem, bounds, piece.document))
        )
    return needed


def _seen(run: Run, band: Band, start: int, stop: int) -> Iterable[Range]:
    """Positions of [start, stop) that the queries of a run see: one range, or one a block where they leave gaps."""
    lo, hi = band.lo, band.hi
    blocks, block = run.rounds()
    # Where a block's range reaches the next block's, all of them are one range, and a long run costs no more than a short one.
    whole = lo is None or hi is None or run.stride <= block + hi - lo
    if lo is not None and hi is not None and lo > hi:
        return
    step, width = (0, run.token(run.count - 1) - run.start + 1) if whole else (run.stride, block)
    for i in range(1 if whole else blocks):
        first = run.start + i * step
        low = start if hi is None else max(start, first - hi)
        high = stop if lo is None else min(stop, first + width - lo)
        if low < high:
            yield low, high


def _held_below(runs: Runs) -> Callable[[int], int]:
    """The function x -> tokens of some runs below position x."""
    if any(run.stride > 1 for run in runs):  # a stripe has two runs
        return lambda x: sum(run.first_at_or_after(x) for run in runs)
    ordered = sorted((run.start, run.count) for run in runs)
    starts = [start for start, _ in ordered]
    before = list(accumulate((count for _, count in ordered), initial=0))

    def below(x: int) -> int:
        at = bisect_right(starts, x)
        return min(before[at], before[at - 1] + x - starts[at - 1]) if at else 0

    return below


class _Cover:
    """How many of some ranges of positions cover a token, summed over the tokens of a run.

    A range [low, high) covers the tokens of a run below `high`, less those below `low`. How many tokens of a run lie below x is a
    clipped line in x, or for a run of blocks in x modulo its stride, so that sums over all ranges are made once for all ranks.
    """

    def __init__(self, ranges: Iterable[Range]) -> None:
        self._edges = [edge for low, high in ranges for edge in ((high, 1), (low, -1))]
        self._lines = _lines(self._edges)
        self._strided: dict[tuple[int, int, int | None], tuple[int, Callable[[int], int]]] = {}

    def over(self, run: Run) -> int:
        blocks, block = run.rounds()
        if blocks == 1:
            return self._lines(run.start) - self._lines(run.start + block)
        # Single tokens are dealt to the end of the sequence; rounds of blocks end before a last round dealt in another manner.
        end = None if block == 1 else blocks * run.stride
        whole, lines = self._of_rounds(run.stride, block, end)
        return whole + lines(run.start) - lines(run.start + block)

    def _of_rounds(self, stride: int, block: int, end: int | None) -> tuple[int, Callable[[int], int]]:
        key = stride, block, end
        if key not in self._strided:
            parts = [(divmod(x if end is None else min(x, end), stride), weight) for x, weight in self._edges]
            whole = sum(weight * rounds * block for (rounds, _), weight in parts)
            self._strided[key] = whole, _lines([(inside, weight) for (_, inside), weight in parts])
        return self._strided[key]


def _lines(edges: Iterable[tuple[int, int]]) -> Callable[[int], int]:
    """The function y -> sum of weight * max(x - y, 0) over all (x, weight)."""
    ordered = sorted(edges, reverse=True)
    at = [-x for x, _ in ordered]
    weights = list(accumulate((weight for _, weight in ordered), initial=0))
    moments = list(accumulate((weight * x for x, weight in ordered), initial=0))

    def value(y: int) -> int:
        above = bisect_right(at, -y)
        return moments[above] - weights[above] * y

    return value


def _has_gaps(problem: AttentionProblem) -> bool:
    """Whether a rank's queries see ranges with gaps between them, one a block: a window narrower than a stripe's stride."""
    lo, hi = problem.position_band.lo, problem.position_band.hi
    if problem.in_order or lo is None or hi is None or lo > hi:
        return False
    block = problem.layout.block
    return problem.q_length == problem.k_length and len(problem.bounds) == 1 and problem.world * block > block + hi - lo


def _without_inner_rounds(problem: AttentionProblem, queries: Sequence[Runs], keys: Sequence[Runs]) -> list[tuple[int, int]]:
    """As `_covered`, with rounds left out inside each document, and added again as often as one more round adds.

    A round deals a block to every rank. Deep inside a document every round is like the next, since a window reaches no document's
    end from there, and what it adds to a rank is the same in every document. So ranges of a few rounds are enough.
    """
    lo, hi = problem.position_band.lo, problem.position_band.hi
    assert lo is not None and hi is not None, "gaps need a window"
    stride = problem.world * problem.layout.block
    # As many rounds stay at each end of a document as a window reaches over, and one more, which is like all those between.
    kept = 2 + 2 * -(-max(abs(lo), abs(hi)) // stride)
    lengths = [b - a for a, b in pairwise(problem.bounds[0] or (0, problem.q_length))]
    removed = [max(0, length // stride - kept) for length in lengths]
    if not any(removed):
        return _covered(problem, queries, keys)
    short = [length - rounds * stride for length, rounds in zip(lengths, removed, strict=True)]
    longer = list(short)
    longer[removed.index(max(removed))] += stride
    base, more = (_covered_of_lengths(problem, each) for each in (short, longer))
    rounds = sum(removed)
    return [(f + rounds * (g - f), s + rounds * (t - s)) for (f, s), (g, t) in zip(base, more, strict=True)]


def _covered_of_lengths(problem: AttentionProblem, lengths: Sequence[int]) -> list[tuple[int, int]]:
    total = sum(lengths)
    documents = None if problem.documents is None else Documents.from_lengths(lengths)
    shorter = replace(problem, q_length=total, k_length=total, documents=documents)
    runs = shorter.layout.deal(total, shorter.world, shorter.bounds[0])
    return _covered(shorter, runs, runs)
