from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import programs
import pytest
import torch
import torch.distributed as dist

from dtensor_ring.comm import AloneTransport, LoopbackTransport, Message, Pending, Transport, choose, transport_of


def exercise(transport: Transport) -> list[object]:
    """Every operation, with results a rank can know by itself."""
    world, rank = transport.world, transport.rank
    mine = torch.arange(6.0).view(2, 3) + 10 * rank
    following, previous = (rank + 1) % world, (rank - 1) % world
    received = transport.empty((2, 3), mine)
    others = world > 1
    before = transport.traffic.copy()
    transport.exchange([Message(following, mine)] if others else [], [Message(previous, received)] if others else []).wait()
    if others:
        assert torch.equal(received, torch.arange(6.0).view(2, 3) + 10 * previous)
        assert transport.traffic.since(before).bytes == mine.nbytes
        assert transport.traffic.since(before).messages == 1
    gathered = transport.all_gather(mine).wait()
    assert torch.equal(gathered, torch.stack([torch.arange(6.0).view(2, 3) + 10 * r for r in range(world)]))
    rows = torch.stack([torch.full((2,), float(r + rank)) for r in range(world)])
    assert transport.reduce_scatter(rows).wait().tolist() == [rank * world + sum(range(world))] * 2
    for dtype in (torch.int32, torch.bool, torch.float16):  # a sum keeps its dtype
        assert transport.all_reduce(torch.ones(2, dtype=dtype)).dtype == dtype
        assert transport.reduce_scatter(torch.ones(world, 2, dtype=dtype)).wait().dtype == dtype
    for op, value in (("sum", sum(range(world))), ("avg", sum(range(world)) / world), ("max", world - 1), ("min", 0)):
        assert transport.all_reduce(torch.tensor([float(rank)]), op).item() == value
    assert transport.gather_values([rank, 7]) == [[r, 7] for r in range(world)]
    empty = torch.empty(0, 3)
    transport.exchange([Message(following, empty)] if others else [], [Message(previous, empty)] if others else []).wait()
    return [rank]


def over_gloo():
    return exercise(transport_of(dist.group.WORLD))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_threads_exchange_gather_and_reduce(world):
    assert LoopbackTransport.run(world, exercise) == [[rank] for rank in range(world)]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_exchange_gather_and_reduce(pools, world):
    assert pools.run(world, over_gloo) == [[rank] for rank in range(world)]


def test_alone_nothing_moves():
    assert exercise(AloneTransport()) == [0]
    assert AloneTransport().traffic.bytes == 0


def test_a_transport_is_the_group_s_own(pools):
    pools.run(2, one_transport_a_group)


def one_transport_a_group():
    assert transport_of(dist.group.WORLD) is transport_of(dist.group.WORLD)
    other = dist.new_group([0, 1])
    assert transport_of(other) is not transport_of(dist.group.WORLD)


def test_a_silent_rank_is_named():
    def body(transport: LoopbackTransport) -> None:
        if transport.rank == 0:
            transport.exchange([], [Message(2, torch.empty(1))]).wait()

    with pytest.raises(TimeoutError, match=r"rank 0 waits for a message of rank 2, which sent none \(after 0 s\)"):
        LoopbackTransport.run(3, body, timeout=0.2)


def test_a_failing_rank_fails_the_run_at_once():
    def body(transport: LoopbackTransport) -> None:
        if transport.rank == 1:
            raise ValueError("rank 1 is broken")
        transport.exchange([], [Message(1, torch.empty(1))]).wait()

    with pytest.raises(ValueError, match="rank 1 is broken"):
        LoopbackTransport.run(2, body, timeout=30)


def test_what_is_sent_is_read_late_so_that_early_changes_show():
    def body(transport: LoopbackTransport) -> float:
        mine, received = torch.full((1,), float(transport.rank)), transport.empty((1,), torch.empty(1))
        pending = transport.exchange([Message(1 - transport.rank, mine)], [Message(1 - transport.rank, received)])
        if transport.rank == 0:
            mine.fill_(99.0)  # wrong: the transfer is under way
        pending.wait()
        return received.item()

    assert LoopbackTransport.run(2, body)[1] == 99.0


def test_fresh_buffers_are_poisoned():
    (buffer,) = LoopbackTransport.run(1, lambda transport: transport.empty((2, 2), torch.empty(1)))
    assert buffer.isnan().all()


def test_a_pending_transfer_is_redeemed_once():
    pending = Pending.ready(3)
    assert pending.wait() == 3
    with pytest.raises(AssertionError, match="redeemed once"):
        pending.wait()


def test_messages_must_be_contiguous_and_to_others():
    def body(transport: LoopbackTransport) -> None:
        with pytest.raises(AssertionError, match="contiguous"):
            transport.exchange([Message(1 - transport.rank, torch.empty(4, 4).t())], [])
        with pytest.raises(AssertionError, match="does not send to itself"):
            transport.exchange([Message(transport.rank, torch.empty(4))], [])

    LoopbackTransport.run(2, body)


def two_threads_ask_first():
    group, both, stock = dist.new_group(), threading.Barrier(2, timeout=30), choose.choose_transport

    def choose_together(*arguments):
        both.wait()  # neither is done before both have begun
        return stock(*arguments)

    choose.choose_transport = choose_together
    try:
        with ThreadPoolExecutor(2) as threads:
            one, other = threads.map(transport_of, [group, group])
    finally:
        choose.choose_transport = stock
    assert one is other is transport_of(group)


def test_threads_that_ask_for_a_group_at_once_get_one_transport(pools):
    pools.run(1, two_threads_ask_first)


ENDS_WITH_GROUP_IN_A_CYCLE = """
import atexit, gc
from weakref import ref
import torch.distributed as dist
from dtensor_ring.comm import ProcessGroupTransport

class Trainer:
    pass

def train():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    trainer = Trainer()
    trainer.itself, trainer.group = trainer, dist.group.WORLD
    ProcessGroupTransport(trainer.group).gather_values([1])
    dist.destroy_process_group()
    return ref(trainer.group)

gc.disable()
atexit.register(lambda: print("group ended:", group() is None))
group = train()
print("group ended:", group() is None)
"""


def test_a_destroyed_group_that_is_garbage_ends_its_threads_before_the_interpreter_ends():
    # One that lets go of a tensor later aborts the process.
    assert programs.check(ENDS_WITH_GROUP_IN_A_CYCLE).splitlines() == ["group ended: False", "group ended: True"]
