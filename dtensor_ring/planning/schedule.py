"""The plan: which keys a rank fetches in each step, what it computes on them, and what it sends to whom.

    zigzag, causal, 4 ranks, 16 tokens: the ring plan of rank 1, which holds 2 3 | 12 13
    step 0   own keys                   one causal call      2 3 12 13 x 2 3 12 13
    step 1   rank 0 sends 0 1           one full call        2 3 12 13 x 0 1
    step 2   rank 3 sends 6 7 8 9       one full call            12 13 x 6 7 8 9
    step 3   rank 2 sends 4 5 10 11     one full call            12 13 x 4 5 10 11

A plan is a pure function of (layout, band, lengths, documents, strategy, world, rank). Ring, gather and the window's halo
differ in their steps only: the executor walks the steps of whatever plan it gets. "Ring" is a rotation of pairs: keys go from
their owner straight to the rank that needs them. At step s of a ring every rank receives from
the rank s places before it and sends to the rank s places after it, exactly the keys that have a tile there.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import starmap
from threading import Lock
from typing import NamedTuple

from dtensor_ring.cache import cached
from dtensor_ring.planning.kernel_calls import Step, TokenRange, deepest
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.steps import Steps


class KeySend(NamedTuple):
    """Keys that a rank sends in one step to one peer, in one message, and whose gradients come back from there.

    Attributes:
        rank: the peer, as the transport counts.
        ranges: the keys, all of one owner.
        sums: whether their gradients come back summed in float32.
        step: the earlier step in which this rank got the keys, to pass them on; None for keys of its own.
    """

    rank: int
    ranges: tuple[TokenRange, ...]
    sums: bool
    step: int | None = None


CALLS_OF_TWO_STREAMS = 3  # the most calls of a plan whose steps are computed on two streams
# Kernels whose calls gain by it. Those of cuDNN, which keep all multiprocessors to their end, lose a tenth forward; others were not
# measured.
KERNELS_OF_TWO_STREAMS = ("torch_flash", "flash_attn_2")


@dataclass(frozen=True, slots=True)
class Plan:
    """All that one rank does in one attention, forward and backward.

    Sends to one peer in a step stand in the order in which that peer's step first names their owners. Where keys are passed on,
    the step in which they came has `sums`, since its gradients are summed with those that come back.

    Attributes:
        problem: what is planned.
        rank: this rank's number in the layout.
        steps: what is fetched and computed, in the order of the forward pass.
        sends: what each step sends to whom.
        q_parts: the most contributions that any query's output is summed from.
        relays: whether some rank passes keys on that are not its own; the same on every rank.
        begins_alone: whether step 0 has this rank's own keys alone, on every rank, so that no rank takes part in a transfer for it.
    """

    problem: AttentionProblem
    rank: int
    steps: tuple[Step, ...]
    sends: tuple[tuple[KeySend, ...], ...]
    q_parts: int
    relays: bool = False
    begins_alone: bool = False

    @property
    def cells(self) -> int:
        """How many scores this rank computes for one head: its work."""
        return sum(step.cells for step in self.steps)

    @property
    def calls(self) -> int:
        """How many kernel calls a forward pass makes."""
        return sum(len(step.calls) for step in self.steps)

    @property
    def key_tokens_sent(self) -> int:
        """Keys that this rank sends in a forward pass; an all-gather sends the padded shard to every other rank."""
        if self.problem.collective:
            return (self.problem.world - 1) * max(self.problem.k_local(r) for r in range(self.problem.world))
        return sum(keys.size for sends in self.sends for send in sends for keys in send.ranges)

    @property
    def positions(self) -> tuple[list[int], list[list[int]]]:
        """Positions of this rank's queries, and of the keys in each step's buffer; queries count from k_length - q_length."""
        # One integer a token, which plans avoid elsewhere: only what depends on a token's position (ALiBi, dropout) asks.
        problem = self.problem
        shift = problem.k_length - problem.q_length
        held = {source: problem.k_tokens(source) for source in range(problem.world)}
        queries = [token + shift for token in problem.q_tokens(self.rank)]
        return queries, [[t for part in step.keys for t in held[part.owner][part.start : part.stop]] for step in self.steps]

    @property
    def ends_together(self) -> bool:
        """Whether in every segment queries and keys are neighbours in position and end at the same one.

        Then a kernel that measures distances from the bottom right corner of a block measures them rightly.
        """
        queries, keys = self.positions
        for step, held in zip(self.steps, keys, strict=True):
            for segment in (segment for call in step.calls for segment in call.segments):
                q_last, k_last = queries[segment.q1 - 1], held[segment.k1 - 1]
                whole_q = q_last - queries[segment.q0] == segment.q1 - segment.q0 - 1
                whole_k = k_last - held[segment.k0] == segment.k1 - segment.k0 - 1
                if not (whole_q and whole_k and q_last == k_last):
                    return False
        return True

    def is_on_two_streams(self, kernel: str) -> bool:
        """Whether GPUs compute this rank's own keys and those of other ranks beside each other: in a plan of these two steps.

        Only some kernels gain by it; `kernel` is the name of the one that computes. With more steps, what each computes would have
        to wait for the end, and take memory; so would more calls than one merge, and one sum of gradients, take in. A first call of
        all queries is what the others are merged into.
        """
        if kernel not in KERNELS_OF_TWO_STREAMS or len(self.steps) != 2:
            return False
        if self.calls > CALLS_OF_TWO_STREAMS or self.relays or not self.steps[0].calls:
            return False
        return self.steps[0].calls[0].queries == (0, self.problem.q_local(self.rank))

    @property
    def messages(self) -> int:
        """To how many ranks this rank sends keys, summed over the steps."""
        return self.problem.world - 1 if self.problem.collective else sum(len(sends) for sends in self.sends)


@dataclass(slots=True, eq=False)
class _Book:
    """What is worked out of one problem, a part at a time: plans of the ranks that are asked for, and what they need.

    Where a plan reads off the other ranks' steps what it must send, as those of stripes do, `needs` keeps of these the keys alone:
    the calls on them, which are most of a step, belong to the other ranks.
    """

    problem: AttentionProblem
    plans: dict[int, Plan] = field(default_factory=dict)
    needs: dict[tuple[int, int], Step] = field(default_factory=dict)  # (rank, step)
    ends_together: bool | None = None
    nbytes: int = 0
    _lock: Lock = field(default_factory=Lock)  # ranks may be threads, which plan one problem at a time

    def add_plan(self, rank: int, made: Plan) -> Plan:
        """Keep a rank's plan, and return the one kept."""
        steps = sum(_step_bytes(step) for step in made.steps)
        sends = sum(200 + 168 * len(send.ranges) for sent in made.sends for send in sent)
        with self._lock:
            if rank not in self.plans:
                self.plans[rank] = made
                self.nbytes += 300 + steps + sends
            return self.plans[rank]

    def need(self, rank: int, index: int) -> Step:
        """The keys of a rank's step, without its calls if its plan was not made here."""
        made = self.plans.get(rank)
        kept = self.needs.get((rank, index)) if made is None else made.steps[index]
        if kept is not None:
            return kept
        # Made outside the lock, which threads of other ranks wait for: at worst two of them make the same step.
        step = replace(Steps(self.problem).make(rank, index), calls=())
        with self._lock:
            if (rank, index) not in self.needs:
                self.needs[rank, index] = step
                self.nbytes += 200 + _step_bytes(step)
        return step


def _step_bytes(step: Step) -> int:
    """Bytes that a step holds, estimated: a range is four integers in a tuple, two of them small, a segment five, one small."""
    segments = sum(len(call.segments) for call in step.calls)
    return 250 + 250 * len(step.calls) + 168 * len(step.keys) + 232 * segments


def _book_bytes(book: _Book, problem: AttentionProblem) -> int:
    return 1000 + problem.nbytes + book.nbytes


# One entry for all ranks of a problem: where ranks are threads, and where totals need every plan, each step is worked out once.
@cached("plans", most_bytes=24 << 20, most_entries=32, size=_book_bytes)
def _book(problem: AttentionProblem) -> _Book:
    return _Book(problem)


def plan(problem: AttentionProblem, rank: int) -> Plan:
    """The plan of one rank."""
    book = _book(problem)
    made = book.plans.get(rank)
    if made is None:
        # The book has grown: without a new count the cache would hold far more bytes than it is allowed.
        made = book.add_plan(rank, _plan(book, rank))
        _book.resize(book, problem)
    return made


def _plan(book: _Book, rank: int) -> Plan:
    problem = book.problem
    of_all = Steps(problem)
    steps = tuple(of_all.make(rank, i) for i in range(of_all.count))
    sends = tuple(tuple(starmap(KeySend, of_all.sends(rank, i, book.need))) for i in range(len(steps)))
    segments = [segment for step in steps for call in step.calls for segment in call.segments]
    # A query's outputs are merged once for each call it is in. Segments of other batch rows have other queries.
    rows = {segment.row for segment in segments}
    q_parts = max((deepest([(s.q0, s.q1) for s in segments if s.row == row]) for row in rows), default=0)
    return Plan(problem, rank, steps, sends, q_parts, begins_alone=of_all.begins_alone)


def ends_together(problem: AttentionProblem) -> bool:
    """Whether `Plan.ends_together` holds on every rank."""
    # A strategy is chosen by it, which must be the same on all ranks: so all ranks' plans are asked, not this rank's alone.
    book = _book(problem)
    if book.ends_together is None:
        book.ends_together = all(plan(problem, rank).ends_together for rank in range(problem.world))
    return book.ends_together
