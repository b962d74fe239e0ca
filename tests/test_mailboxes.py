"""Slots between ranks: nothing is overwritten before it was read, nothing waits for ever, whatever runs first."""

from __future__ import annotations

from itertools import combinations, permutations

import pytest
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st

from dtensor_ring.comm.mailboxes import ALIGNMENT, SLOTS, Mailboxes, Parcel, Slots, Wait, Write

SLOT = 2 * ALIGNMENT


class Rank:
    """A rank of the model: its buffer, and queues of work, each of which runs in order."""

    def __init__(self, rank: int, slots: Slots, queues: int) -> None:
        self.rank, self.slots = rank, slots
        self.boxes = Mailboxes(rank, slots)
        self.flags: set[int] = set()  # that are 1
        self.held: dict[int, tuple] = {}  # what lies in each slot, by its place
        self.queues: list[list] = [[] for _ in range(queues)]
        self.done = [0] * queues
        self.got: dict[tuple, list] = {}

    def call(self, number: int, sizes: dict[tuple[int, int], tuple[int, ...]]) -> None:
        """Enqueue a call; a message is (number of the call, sender, receiver, which of the pair)."""
        sends = [(b, size, n) for (a, b), each in sizes.items() if a == self.rank for n, size in enumerate(each)]
        receives = [(a, size, n) for (a, b), each in sizes.items() if b == self.rank for n, size in enumerate(each)]
        for parcel in self.boxes.parcels([m[:2] for m in sends], [m[:2] for m in receives]):
            messages = [(number, self.rank, peer, n) for peer, _, n in sends]
            if not parcel.outgoing:
                messages = [(number, peer, self.rank, n) for peer, _, n in receives]
            pieces = tuple((messages[piece.message], piece.start, piece.stop, piece.at) for piece in parcel.pieces)
            queue = self.queues[0 if parcel.outgoing else -1]
            # A copy of a slot takes time: others may do something between its beginning and its end.
            for step in self.slots.steps(self.rank, parcel):
                queue.extend(
                    [(step, pieces, half) for half in (False, True)] if isinstance(step, Parcel) else [(step, pieces, False)]
                )

    def can_go(self, queue: int) -> bool:
        if self.done[queue] == len(self.queues[queue]):
            return False
        step = self.queues[queue][self.done[queue]][0]
        return not isinstance(step, Wait) or (step.word in self.flags) == step.value

    def go(self, ranks: list[Rank], queue: int) -> None:
        step, pieces, last = self.queues[queue][self.done[queue]]
        self.done[queue] += 1
        if isinstance(step, Write):
            (ranks[step.rank].flags.add if step.value else ranks[step.rank].flags.discard)(step.word)
        elif isinstance(step, Parcel) and step.outgoing:
            place = self.slots.place(self.rank, step.peer, step.slot)
            assert last or place not in self.held, "a slot is filled while another parcel lies in it"
            self.held[place] = (pieces, last)
        elif isinstance(step, Parcel):
            sender, place = ranks[step.peer], self.slots.place(step.peer, self.rank, step.slot)
            assert sender.held.get(place) == (pieces, True), (
                "what is read is the parcel that was sent, whole, from beginning to end"
            )
            if last:
                del sender.held[place]
                for message, start, stop, _ in pieces:
                    self.got.setdefault(message, []).append((start, stop))

    def state(self) -> tuple:
        return tuple(self.done), frozenset(self.flags), tuple(sorted(self.held.items()))

    def restore(self, state: tuple) -> None:
        self.done, self.flags, self.held = list(state[0]), set(state[1]), dict(state[2])


def begun(world: int, queues: int, calls) -> list[Rank]:
    ranks = [Rank(rank, Slots(world, SLOT), queues) for rank in range(world)]
    for rank in ranks:
        for number, sizes in enumerate(calls):
            rank.call(number, sizes)
    return ranks


def ready(ranks: list[Rank]) -> list[tuple[Rank, int]]:
    """What can go on; where nothing can, everything must be done."""
    able = [(rank, queue) for rank in ranks for queue in range(len(rank.queues)) if rank.can_go(queue)]
    if not able:
        waiting = [
            (r.rank, queue[done][0]) for r in ranks for queue, done in zip(r.queues, r.done, strict=True) if done < len(queue)
        ]
        assert not waiting, f"ranks wait for ever: {waiting}"
        assert not any(rank.flags or rank.held for rank in ranks), "all slots are free again"
    return able


def run(ranks: list[Rank], choose) -> None:
    """Do one piece of work after the other; `choose` says which of so many."""
    while able := ready(ranks):
        rank, queue = able[choose(len(able))]
        rank.go(ranks, queue)


def everything_arrived(ranks: list[Rank], calls) -> None:
    for rank in ranks:
        wanted = {
            (number, a, b, n): size
            for number, sizes in enumerate(calls)
            for (a, b), each in sizes.items()
            if b == rank.rank
            for n, size in enumerate(each)
        }
        assert set(rank.got) == set(wanted)
        for message, size in wanted.items():
            ends = [0, *(stop for _, stop in rank.got[message])]
            assert [start for start, _ in rank.got[message]] == ends[:-1]
            assert ends[-1] == size


@st.composite
def programs(draw):
    world = draw(st.integers(2, 4))
    pair = st.tuples(st.integers(0, world - 1), st.integers(0, world - 1)).filter(lambda pair: pair[0] != pair[1])
    sizes = st.lists(st.integers(1, 5 * SLOT), min_size=1, max_size=2).map(tuple)
    return world, draw(st.lists(st.dictionaries(pair, sizes, max_size=world * (world - 1)), min_size=1, max_size=4))


@pytest.mark.parametrize("queues", [1, 2], ids=["one queue", "queue each way"])
@examples(300)
@given(program=programs(), choices=st.randoms(use_true_random=False))
def test_no_order_of_events_overwrites_an_unread_slot_or_ends_in_a_deadlock(queues, program, choices):
    world, calls = program
    ranks = begun(world, queues, calls)
    run(ranks, choices.randrange)
    everything_arrived(ranks, calls)


@pytest.mark.parametrize(
    ("world", "queues", "parcels"), [(2, 1, 5), (2, 2, 4), (3, 1, 1), pytest.param(3, 2, 1, marks=pytest.mark.slow)]
)
def test_every_order_of_events_of_a_small_program_ends_well(world, queues, parcels):
    """All states that ranks can be in are visited, each once, and from each there is a way on, up to the one end."""
    ranks = begun(world, queues, [dict.fromkeys(permutations(range(world), 2), (parcels * SLOT,))])
    first = tuple(rank.state() for rank in ranks)
    seen, todo, ends = {first}, [first], 0

    def go_back(state: tuple) -> None:
        for rank, each in zip(ranks, state, strict=True):
            rank.restore(each)

    while todo:
        state = todo.pop()
        go_back(state)
        able = ready(ranks)
        ends += not able
        for rank, queue in able:
            go_back(state)
            rank.go(ranks, queue)
            reached = tuple(rank.state() for rank in ranks)
            if reached not in seen:
                seen.add(reached)
                todo.append(reached)
    assert ends == 1, "whatever runs first, all comes to one end"
    assert len(seen) > 100


def test_an_order_by_ranks_would_wait_in_a_circle():
    """The model can fail: three ranks that fill all slots for the next rank first, and read from it first."""
    ranks = begun(3, 2, [dict.fromkeys(permutations(range(3), 2), (3 * SLOT,))])
    for rank in ranks:
        for queue in rank.queues:
            peers, part = {(rank.rank + 1) % 3: [], (rank.rank + 2) % 3: []}, []
            for entry in queue:
                part.append(entry)
                if isinstance(entry[0], Write) and entry[0].rank != rank.rank:  # the last step of a parcel
                    peers[entry[0].rank] += part
                    part = []
            queue[:] = [entry for entries in peers.values() for entry in entries]
    with pytest.raises(AssertionError, match="ranks wait for ever"):
        run(ranks, lambda count: 0)


@pytest.mark.parametrize(("faulty", "error"), [("no wait", "filled while another"), ("early flag", "whole, from beginning to end")])
def test_a_protocol_without_one_of_its_steps_is_found_out(faulty, error):
    ranks = begun(2, 2, [{(0, 1): (9 * SLOT,)}])
    queue = ranks[0].queues[0]
    if faulty == "no wait":
        queue[:] = [entry for entry in queue if not isinstance(entry[0], Wait)]
    else:  # full is set before the copy has ended
        for i, (step, *_) in enumerate(queue):
            if isinstance(step, Write) and step.rank == 1:
                queue[i - 1], queue[i] = queue[i], queue[i - 1]
    with pytest.raises(AssertionError, match=error):
        run(ranks, (lambda count: 0) if faulty == "no wait" else (lambda count: count - 1))


@pytest.mark.parametrize("world", [2, 3, 8])
def test_flags_and_slots_lie_apart_and_within_the_buffer(world):
    slots = Slots(world, SLOT)
    for rank in range(world):
        others = [peer for peer in range(world) if peer != rank]
        words = [f(peer, slot) for f in (slots.full, slots.busy) for peer in others for slot in range(SLOTS)]
        spans = [(word, word + 4) for word in words]
        assert max(stop for _, stop in spans) <= slots.flag_bytes
        spans += [(place, place + SLOT) for peer in others for slot in range(SLOTS) for place in [slots.place(rank, peer, slot)]]
        assert all(a[1] <= b[0] or b[1] <= a[0] for a, b in combinations(spans, 2))
        assert min(start for start, _ in spans) >= 0
        assert max(stop for _, stop in spans) <= slots.nbytes
        assert all(start % ALIGNMENT == 0 for start, stop in spans if stop - start == SLOT)


def test_buffers_stay_within_what_they_may_take():
    assert Slots.within(2, 1 << 20, 1 << 30) == Slots(2, 1 << 20)
    shrunk = Slots.within(8, 1 << 20, 1 << 22)
    assert shrunk.size % ALIGNMENT == 0
    assert (1 << 22) - 7 * SLOTS * ALIGNMENT < shrunk.nbytes <= 1 << 22
    assert Slots.within(1, 1 << 20, 1 << 30).nbytes == ALIGNMENT
    least = Slots(8, ALIGNMENT).nbytes
    assert Slots.within(8, 1 << 20, least) == Slots(8, ALIGNMENT)
    with pytest.raises(ValueError, match=f"slots for 8 ranks need {least} bytes at least, found {least - 1}"):
        Slots.within(8, 1 << 20, least - 1)


def test_small_messages_to_one_rank_share_a_parcel_and_large_ones_are_cut():
    boxes = Mailboxes(0, Slots(3, SLOT))
    first, second, third = boxes.parcels([(1, 10), (1, ALIGNMENT), (2, SLOT + 1)], [])
    assert (first.peer, first.slot, [tuple(piece) for piece in first.pieces]) == (
        1,
        0,
        [(0, 0, 10, 0), (1, 0, ALIGNMENT, ALIGNMENT)],
    )
    assert (second.peer, second.slot, [tuple(piece) for piece in second.pieces]) == (2, 0, [(2, 0, SLOT, 0)])
    assert (third.peer, third.slot, [tuple(piece) for piece in third.pieces]) == (2, 1, [(2, SLOT, SLOT + 1, 0)])
    (again,) = boxes.parcels([(1, 1)], [])
    assert again.slot == 1, "slots are used in turn, also from call to call"
    assert boxes.parcels([], []) == []


def test_ranks_begin_with_their_neighbours():
    sent = [
        [p.peer for p in Mailboxes(rank, Slots(4, SLOT)).parcels([(r, 1) for r in range(4) if r != rank], [])] for rank in range(4)
    ]
    assert sent == [[1, 2, 3], [2, 3, 0], [3, 0, 1], [0, 1, 2]]
    read = [
        [p.peer for p in Mailboxes(rank, Slots(4, SLOT)).parcels([], [(r, 1) for r in range(4) if r != rank])] for rank in range(4)
    ]
    assert read == [[3, 2, 1], [0, 3, 2], [1, 0, 3], [2, 1, 0]]
