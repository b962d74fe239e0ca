"""The steps of the strategies: whose keys a rank has in each, in what order, and the tiles on them.

zigzag, causal, 4 ranks, 16 tokens; rank 1 holds 2 3 | 12 13
ring      step s has the keys of rank 1 - s, in position order              2 3 12 13, then 0 1, then 6 7 8 9, then 4 5 10 11
  stages  own keys, then those of several ranks at once, in position order  2 3 12 13, then 0 1 4 .. 11 (1 stage)
gather    one step has the keys of all ranks that it needs, in that order   0 .. 13
halo      one step has the keys that a window sees, run by run              window (1, 0): 1 2 3 | 11 12 13
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from dtensor_ring.planning.halo import HaloSteps
from dtensor_ring.planning.holders import Arc
from dtensor_ring.planning.kernel_calls import Step, TokenRange, document_tiles, keep_needed, step_of
from dtensor_ring.planning.mask import Tile
from dtensor_ring.planning.ordered import OrderedSteps
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.runs import Run


class Steps:
    """The steps of one problem, of whatever ranks are asked for, and what other ranks' steps have of a rank's keys."""

    def __init__(self, problem: AttentionProblem) -> None:
        self._problem = problem
        exact = problem.world > 1 and problem.in_order and not problem.collective
        self._halo = HaloSteps(problem) if problem.is_halo else None
        self._ordered = OrderedSteps(problem) if exact and not problem.is_halo else None
        # How far apart a rank is, modulo the world, from those whose keys it may have in each step. A ring's step 0 has the rank's
        # own keys alone, so that it computes while the first foreign keys travel.
        in_stages = problem.strategy == "ring" and self._halo is None
        self._distances = (range(0), *problem.distances) if in_stages else (range(1, problem.world),)

    @property
    def begins_alone(self) -> bool:
        """Whether step 0 has a rank's own keys alone, whatever the rank."""
        return not self._distances[0]

    @property
    def count(self) -> int:
        """How many steps a plan has."""
        return len(self._distances)

    def make(self, rank: int, index: int) -> Step:
        """Makes step `index` of a rank's plan."""
        problem = self._problem
        if self._halo is not None:
            return self._halo.step(rank)
        # Under a name that is unknown here ranks would exchange all keys, and whatever counts by plans would count that.
        known = problem.strategy in ("ring", "gather")
        assert known, f"no plan is made for strategy {problem.strategy!r}: see AttentionProblem.planned"
        owners = self._owners(rank, index)
        if self._ordered is not None and (owners.size > 1 or rank not in owners):
            return self._ordered.step(rank, owners)
        # A stripe's queries lie a stride apart and have one band with keys of the same stride only: its keys stay shard by shard.
        if owners.size == 1 or not problem.in_order:
            nearest_first = list(owners) if problem.strategy == "gather" else list(owners)[::-1]
            keys = [TokenRange.of_owner(owner, 0, problem.k_local(owner)) for owner in nearest_first]
            return _step_on(problem, rank, keys, *(problem.k_runs(owner) for owner in nearest_first))
        # An all-gather brings every key; those that are needed are kept. In position order all of them under a causal mask are one
        # kernel call.
        every = [keys for owner in owners for keys in _stored(owner, problem.k_runs(owner))]
        return _step_on(problem, rank, [keys for _, keys in sorted(every)], (Run(0, problem.k_length),))

    def takers(self, rank: int, index: int) -> list[int]:
        """The other ranks whose step `index` may have keys of `rank`: no other rank's step need be worked out for what it sends."""
        return [(rank + distance) % self._problem.world for distance in self._distances[index]]

    def sends(self, rank: int, index: int, make: Callable[[int, int], Step]) -> Iterator[tuple[int, tuple[TokenRange, ...], bool]]:
        """What other ranks' steps `index` have of a rank's keys: the rank, the keys as they stand there, and its `Step.sums`.

        `make` gives another rank's step, where no formula says what it needs.
        """
        # No rank asks another what it needs: it follows from the table of holders, or the other's plan, which is a pure function
        # too. So nothing waits for a request.
        if self._problem.collective:
            return
        if self._halo is not None:
            needed = self._halo.sends(rank)
            for other in self.takers(rank, index):
                if other in needed:
                    yield other, needed[other], self._halo.sums(other)
            return
        for other in self.takers(rank, index):
            if self._ordered is None:
                step = make(other, index)
                ranges, sums = tuple(keys for keys in step.keys if keys.peer == rank), step.sums
            else:
                owners = self._owners(other, index)
                ranges = self._ordered.needs(other, owners, rank)
                sums = bool(ranges) and self._ordered.sums(other, owners)
            if ranges:
                yield other, ranges, sums

    def _owners(self, rank: int, index: int) -> Arc:
        """The ranks whose keys step `index` of a rank may have."""
        world, distances = self._problem.world, self._distances[index] or range(1)
        if self._problem.strategy == "gather":
            return Arc(0, world, world)
        return Arc((rank - distances[-1]) % world, len(distances), world)


def _stored(rank: int, runs: Sequence[Run]) -> Iterator[tuple[int, TokenRange]]:
    """Gives each run's first token together with the place in the rank's shard where the run is stored."""
    offset = 0
    for run in runs:
        yield run.start, TokenRange.of_owner(rank, offset, offset + run.count)
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
    return step_of(*keep_needed(keys, tiles))
