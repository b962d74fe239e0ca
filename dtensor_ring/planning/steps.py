"""The steps of the strategies."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

from dtensor_ring.planning.kernel_calls import Step, TokenRange, document_tiles, keep_needed, step_of
from dtensor_ring.planning.mask import Tile, whole_sequence
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.runs import Piece, Run, cut, document_at


def step_count(problem: AttentionProblem) -> int:
    """How many steps a plan has."""
    return problem.world if problem.strategy == "ring" and not problem.is_halo else 1


def make_step(problem: AttentionProblem, rank: int, index: int) -> Step:
    """Step `index` of a rank."""
    if problem.is_halo:
        return _halo_step(problem, rank)
    if problem.strategy == "ring":
        source = (rank - index) % problem.world
        keys = [TokenRange.of_owner(source, 0, problem.k_rows(source))]
        return _finish(problem, rank, keys, problem.k_runs(source))
    shards = [(r, problem.k_runs(r)) for r in range(problem.world)]
    if not problem.in_order:
        keys = [TokenRange.of_owner(r, 0, problem.k_rows(r)) for r, _ in shards]
        return _finish(problem, rank, keys, *(runs for _, runs in shards))
    starts = sorted((run.start, run.count, rows) for r, runs in shards for run, rows in _with_rows(r, runs))
    return _finish(problem, rank, [rows for _, _, rows in starts], whole_sequence(problem.k_length))


def _with_rows(rank: int, runs: Sequence[Run]) -> Iterable[tuple[Run, TokenRange]]:
    offset = 0
    for run in runs:
        yield run, TokenRange.of_owner(rank, offset, offset + run.count)
        offset += run.count


def _finish(problem: AttentionProblem, rank: int, keys: list[TokenRange], *shards: tuple[Run, ...]) -> Step:
    """Tiles of this rank's queries and the keys given, shard after shard in buffer order; keys without a tile are dropped."""
    tiles: list[tuple[int, Tile]] = []
    for row in range(len(problem.bounds)):
        queries, offset = problem.q_pieces(rank, row), 0
        for shard in shards:
            found = document_tiles(queries, problem.k_pieces(shard, row), problem.position_band)
            tiles += [(row, tile.moved(0, offset)) for tile in found]
            offset += sum(run.count for run in shard)
    if problem.collective:
        return step_of(tuple(keys), tiles)
    return step_of(*keep_needed(keys, tiles))


def _halo_step(problem: AttentionProblem, rank: int) -> Step:
    """A window's keys around each local run, fetched into position order run by run: one window serves every run."""
    band = problem.position_band
    assert band.lo is not None and band.hi is not None, "a halo needs a window"
    holders = sorted(
        (run.start, run.start + run.count, rows) for r in range(problem.world) for run, rows in _with_rows(r, problem.k_runs(r))
    )
    ends = [stop for _, stop, _ in holders]
    keys: list[TokenRange] = []
    offset = 0
    tiles: list[tuple[int, Tile]] = []
    for piece in cut(problem.q_runs(rank), None):
        run = piece.run
        low, high = max(0, run.start - band.hi), min(problem.k_length, run.start + run.count - band.lo)
        if low >= high:
            continue
        for row, bounds in enumerate(problem.bounds):
            q_pieces = [Piece(p.run, p.offset + piece.offset, p.document) for p in cut((run,), bounds)]
            near = [Piece(Run(low, high - low), 0, 0)] if bounds is None else _between(bounds, low, high)
            tiles += [(row, tile.moved(0, offset)) for tile in document_tiles(q_pieces, near, band)]
        at = bisect_right(ends, low)
        while at < len(holders) and holders[at][0] < high:
            a, b, rows = holders[at]
            keys.append(TokenRange(rows.owner, rows.start + max(low, a) - a, rows.start + min(high, b) - a, rows.peer))
            at += 1
        offset += high - low
    return step_of(*keep_needed(keys, tiles))


def _between(bounds: tuple[int, ...], low: int, high: int) -> list[Piece]:
    """Positions [low, high) cut into documents, stored from 0."""
    found = []
    for document in range(document_at(bounds, low), len(bounds) - 1):
        a, b = max(low, bounds[document]), min(high, bounds[document + 1])
        if a < b:
            found.append(Piece(Run(a, b - a), a - low, document))
        if b == high:
            break
    return found
