"""The steps of the strategies: whose keys a rank has in each, in what order, and the tiles on them.

zigzag, causal, 4 ranks, 16 tokens; rank 1 holds 2 3 | 12 13
ring      step s has the keys of rank 1 - s, as they are stored there       2 3 12 13, then 0 1, then 6 7 8 9, then 4 5 10 11
  stages  own keys, then those of several ranks at once, in position order  2 3 12 13, then 0 1 4 .. 11 (1 stage)
gather    one step has all keys in position order                           0 .. 15
halo      one step has the keys that a window sees, run by run              window (1, 0): 1 2 3 | 11 12 13
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

from dtensor_ring.planning.kernel_calls import Step, TokenRange, document_tiles, keep_needed, step_of
from dtensor_ring.planning.mask import Tile
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.runs import Piece, Run, cut


def step_count(problem: AttentionProblem) -> int:
    """How many steps a plan has."""
    return 1 + problem.transfers if problem.strategy == "ring" and not problem.is_halo else 1


def takers(problem: AttentionProblem, rank: int, index: int) -> list[int]:
    """The other ranks whose step `index` may have keys of `rank`: no other rank's step need be worked out for what it sends."""
    return [(rank + distance) % problem.world for distance in _distances(problem, index)]


def _owners(problem: AttentionProblem, rank: int, index: int) -> list[int]:
    """The ranks whose keys step `index` of a rank may have."""
    others = [(rank - distance) % problem.world for distance in _distances(problem, index)]
    if problem.strategy == "gather":
        return sorted([rank, *others])
    # A ring's step 0 has the rank's own keys alone, so that it computes while the first foreign keys travel.
    return others if index else [rank]


def _distances(problem: AttentionProblem, index: int) -> range:
    """How far apart a rank is, modulo the world, from those whose keys it may have in a step."""
    if step_count(problem) > 1:
        return problem.distances(index) if index else range(0)
    return range(1, problem.world)


def make_step(problem: AttentionProblem, rank: int, index: int) -> Step:
    """Makes step `index` of a rank's plan."""
    if problem.is_halo:
        return _halo_step(problem, rank)
    # Under a name that is unknown here ranks would exchange all keys, and whatever counts by plans would count that.
    known = problem.strategy in ("ring", "gather")
    assert known, f"no plan is made for strategy {problem.strategy!r}: see AttentionProblem.planned"
    owners = _owners(problem, rank, index)
    # A stripe's queries lie a stride apart and have one band with keys of the same stride only: its keys stay shard by shard.
    if len(owners) == 1 or not problem.in_order:
        keys = [TokenRange.of_owner(owner, 0, problem.k_local(owner)) for owner in owners]
        return _step_on(problem, rank, keys, *(problem.k_runs(owner) for owner in owners))
    # In position order neighbours of two ranks are one run, so that keys of many ranks make few tiles: all keys under a causal
    # mask are one kernel call.
    ordered = sorted((run.start, run.count, keys) for owner in owners for run, keys in _stored(owner, problem.k_runs(owner)))
    return _step_on(problem, rank, [keys for _, _, keys in ordered], _joined([(start, count) for start, count, _ in ordered]))


def _joined(ordered: Iterable[tuple[int, int]]) -> tuple[Run, ...]:
    """Runs of neighbouring tokens, given as (start, count) in position order, joined where one begins at the end of another."""
    runs: list[Run] = []
    for start, count in ordered:
        if runs and runs[-1].start + runs[-1].count == start:
            runs[-1] = Run(runs[-1].start, runs[-1].count + count)
        else:
            runs.append(Run(start, count))
    return tuple(runs)


def _stored(rank: int, runs: Sequence[Run]) -> Iterable[tuple[Run, TokenRange]]:
    """Gives each run of a rank together with the place in its shard where it is stored."""
    offset = 0
    for run in runs:
        yield run, TokenRange.of_owner(rank, offset, offset + run.count)
        offset += run.count


def _step_on(problem: AttentionProblem, rank: int, keys: list[TokenRange], *shards: tuple[Run, ...]) -> Step:
    """The step on a buffer of keys, given as ranges and as runs of tokens; keys that no tile reads are dropped."""
    tiles: list[tuple[int, Tile]] = []
    for row in range(len(problem.bounds)):
        queries, offset = problem.q_pieces(rank, row), 0
        for shard in shards:
            on_shard = document_tiles(queries, problem.k_pieces(shard, row), problem.position_band)
            tiles += [(row, tile.moved(0, offset)) for tile in on_shard]
            offset += sum(run.count for run in shard)
    if problem.collective:  # an all-gather brings every key, needed or not
        return step_of(tuple(keys), tiles)
    return step_of(*keep_needed(keys, tiles))


def _halo_step(problem: AttentionProblem, rank: int) -> Step:
    """A window's keys around each local run, fetched into position order run by run.

    The keys of a run lie in the buffer just as its queries lie in the shard, ahead of and behind it as far as the window reaches.
    So the tile of every run has the same window, and one kernel call serves all runs and documents. The price are keys that two
    runs see: they are fetched once for each.
    """
    band = problem.position_band
    assert band.lo is not None and band.hi is not None, "a halo needs a window"
    # All runs of all ranks in position order: they cover the sequence without gaps or overlaps.
    holders = sorted(
        (run.start, run.start + run.count, keys) for r in range(problem.world) for run, keys in _stored(r, problem.k_runs(r))
    )
    ends = [stop for _, stop, _ in holders]
    keys: list[TokenRange] = []
    offset = 0  # of this run's keys in the buffer
    tiles: list[tuple[int, Tile]] = []
    # Runs are not cut at documents here: a call of one window needs each run's keys in one piece. Documents cut the tiles below.
    for piece in cut(problem.q_runs(rank), None):
        run = piece.run
        low, high = max(0, run.start - band.hi), min(problem.k_length, run.start + run.count - band.lo)
        if low >= high:
            continue
        for row, bounds in enumerate(problem.bounds):
            q_pieces = [Piece(p.run, p.offset + piece.offset, p.document) for p in cut((run,), bounds)]
            near = cut((Run(low, high - low),), bounds)
            tiles += [(row, tile.moved(0, offset)) for tile in document_tiles(q_pieces, near, band)]
        at = bisect_right(ends, low)
        while at < len(holders) and holders[at][0] < high:
            a, b, held = holders[at]
            keys.append(TokenRange(held.owner, held.start + max(low, a) - a, held.start + min(high, b) - a, held.peer))
            at += 1
        offset += high - low
    # Where a document begins inside a window's reach, the keys before it were put into the buffer and are needed by no tile.
    return step_of(*keep_needed(keys, tiles))
