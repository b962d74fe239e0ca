"""Messages that a backend takes in one: in which order they are issued, and that the two sides of each meet."""

from __future__ import annotations

from collections import Counter
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from helpers import line
from hypothesis import given, settings
from hypothesis import strategies as st

from dtensor_ring import _torch_groups
from dtensor_ring._torch_groups import coalesces, exchange_in_one


def test_messages_of_a_group_that_takes_them_in_one_are_issued_in_the_order_of_both_sides():
    class Group:
        def __init__(self) -> None:
            self.calls: list[tuple] = []

        def size(self) -> int:
            return 2

        def __getattr__(self, name: str):
            return lambda *given: self.calls.append((name, *given)) or name

    group, (a, b, c), device = Group(), torch.zeros(3, 1), torch.device("cpu")
    assert exchange_in_one(group, device, [(a, 2), (b, 1)], [(c, 2)]) == "_end_coalescing"
    assert [(name, *given[1:]) for name, *given in group.calls[1:-1]] == [("send", 2, 0), ("send", 1, 0), ("recv", 2, 0)]
    assert [given[0][0].data_ptr() for _, *given in group.calls[1:-1]] == [x.data_ptr() for x in (a, b, c)]
    assert [group.calls[0], group.calls[-1]] == [("_start_coalescing", device), ("_end_coalescing", device)]
    group.calls.clear()
    exchange_in_one(group, device, [(torch.zeros(2, dtype=torch.complex64), 1)], [(torch.zeros(3, dtype=torch.complex128), 1)])
    numbers = [given[0][0] for _, *given in group.calls[1:-1]]
    assert [(x.dtype, x.numel()) for x in numbers] == [(torch.float32, 4), (torch.float64, 6)]  # no backend has complex ones


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.sampled_from(["bfloat16", "float32", "complex64"])), max_size=24),
)
def test_many_messages_are_issued_as_few_all_to_alls_in_which_both_sides_meet(messages):
    """Backends match what two ranks send each other by its order: the n-th that leaves is the n-th to come."""
    world, found = 4, [(source, target, getattr(torch, dtype)) for source, target, dtype in messages if source != target]

    class Group:
        def __init__(self) -> None:
            self.rounds: list[tuple[list, list]] = []

        def size(self) -> int:
            return world

        def _start_coalescing(self, _device) -> None: ...

        def _end_coalescing(self, _device) -> None: ...

        def alltoall(self, into: list, out: list) -> None:
            assert len({x.dtype for x in (*into, *out)}) == 1, "an all-to-all is of one dtype"
            self.rounds.append((into, out))

    tensors = [torch.full((i + 1,), i, dtype=dtype) for i, (*_, dtype) in enumerate(found)]  # told apart by their length
    groups = [Group() for _ in range(world)]
    for rank, group in enumerate(groups):
        sends = [(x, target) for x, (source, target, _) in zip(tensors, found, strict=True) if source == rank]
        receives = [(torch.empty_like(x), source) for x, (source, target, _) in zip(tensors, found, strict=True) if target == rank]
        with patch.object(_torch_groups, "_sends_pairwise", lambda *_: True):
            exchange_in_one(group, torch.device("cpu"), sends, receives)
        most = max(Counter(peer for _, peer in sends).values(), default=0), max(Counter(p for _, p in receives).values(), default=0)
        assert len(group.rounds) <= 2 * max(most)  # of two dtypes, complex numbers being pairs of real ones
    for source in range(world):
        for target in range(world):
            left = [(out[target].dtype, out[target].numel()) for _, out in groups[source].rounds if out[target].numel()]
            came = [(into[source].dtype, into[source].numel()) for into, _ in groups[target].rounds if into[source].numel()]
            sent = [
                torch.view_as_real(x) if x.is_complex() else x
                for x, f in zip(tensors, found, strict=True)
                if f[:2] == (source, target)
            ]
            assert left == came == [(x.dtype, x.numel()) for x in sent]


def many_messages_between_two_ranks() -> None:
    """Several messages of several dtypes and sizes each way, more of them from rank 0, as all-to-alls and one by one."""
    group, rank = line("cuda").get_group(), line("cuda").get_local_rank()
    device = torch.device("cuda", torch.cuda.current_device())
    dist.all_reduce(torch.zeros(1, device=device), group=group)  # in which NCCL makes the communicator
    assert coalesces(group, device)
    shapes = [
        [((3, 5), torch.bfloat16), ((2, 1), torch.float32), ((4,), torch.complex64), ((1 << 20,), torch.bfloat16)],
        [((7,), torch.float32), ((1, 6), torch.bfloat16)],
    ]
    contents = [
        [
            torch.arange(torch.Size(shape).numel(), device=device).remainder(97 + i).to(dtype).view(shape)
            for i, (shape, dtype) in side
        ]
        for side in map(enumerate, shapes)
    ]
    for pair in (2, 1):  # one by one, and as all-to-alls
        for _ in range(3):
            into = [torch.full_like(x, -1) for x in contents[1 - rank]]
            with patch.object(_torch_groups, "_PAIR", pair):
                work = exchange_in_one(group, device, [(x, 1 - rank) for x in contents[rank]], [(x, 1 - rank) for x in into])
            assert work is not None
            work.wait()
            assert all(torch.equal(a, b) for a, b in zip(into, contents[1 - rank], strict=True))


@pytest.mark.gpu(devices=2)
def test_many_messages_between_two_gpus_arrive_whichever_way_they_are_issued(pools):
    pools.run(2, many_messages_between_two_ranks, device="cuda")
