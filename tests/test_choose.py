"""How the transport of a group is chosen: the first that does not refuse, or the one asked for, alike on all of its ranks."""

from __future__ import annotations

import gc
from collections import Counter
from typing import ClassVar
from weakref import ref

import pytest
import torch
import torch.distributed as dist
from helpers import grid, line

from dtensor_ring import Zigzag, distribute_tensor, full_tensor, redistribute, ring_attention
from dtensor_ring.__main__ import main
from dtensor_ring._torch_groups import store_of
from dtensor_ring.comm import (
    TRANSPORTS,
    AloneTransport,
    LoopbackTransport,
    Message,
    Pending,
    ProcessGroupTransport,
    TransportRequirements,
    choose_transport,
    explain_transport,
    transport_along,
    transport_of,
    use_transport,
)
from dtensor_ring.comm.rank_checks import meet
from dtensor_ring.debug import traffic

ONE, GLOO, THREADS = TransportRequirements(0, 1), TransportRequirements(1, 4, "gloo"), TransportRequirements(0, 4)


class StoreTransport(ProcessGroupTransport):
    """Carries messages through the key-value store of the group, slowly."""

    name = "store"
    sent = 0
    numbers: ClassVar[Counter[str]] = Counter()  # of the process: what the store of a group once had stays in it

    def _key(self, source: int, target: int) -> str:
        line = f"test/{self._group.group_name}/{source}/{target}"
        self.numbers[line] += 1
        return f"{line}/{self.numbers[line]}"

    def _exchange(self, sends: list[Message], receives: list[Message]) -> Pending[None]:
        store = store_of(self._group)
        for message in sends:
            StoreTransport.sent += 1
            store.set(self._key(self.rank, message.rank), bytes(message.tensor.detach().flatten().view(torch.uint8).tolist()))
        keys = [self._key(message.rank, self.rank) for message in receives]

        def finish() -> None:
            for message, key in zip(receives, keys, strict=True):
                values = torch.frombuffer(bytearray(store.get(key)), dtype=message.tensor.dtype)
                message.tensor.copy_(values.view(message.tensor.shape))

        return Pending(finish)


class RefusingTransport(ProcessGroupTransport):
    """Stands for symmetric memory, which needs the same of every rank's machine."""

    name = "refusing"

    @classmethod
    def refuses(cls, need: TransportRequirements) -> str | None:
        hosts = need.every_rank("host", f"host {need.rank}")
        return f"devices of different hosts: {', '.join(hosts)}" if len(set(hosts)) > 1 else None


@pytest.mark.parametrize(("need", "name"), [(ONE, "alone"), (GLOO, "process_group"), (THREADS, "loopback")])
def test_the_first_that_does_not_refuse_is_chosen(need, name):
    assert choose_transport(None, need).name == name


def test_an_unknown_name_and_what_is_no_transport_are_refused():
    with pytest.raises(
        ValueError, match="unknown transport 'nccl': choose one of alone, process_group, symmetric_memory, loopback"
    ):
        choose_transport("nccl", GLOO)
    with pytest.raises(TypeError, match=r"by its name or as a subclass of dtensor_ring\.comm\.Transport, found 3"):
        choose_transport(3, GLOO)

    class Nameless(ProcessGroupTransport):
        pass

    with pytest.raises(ValueError, match="Nameless has the name of another transport, 'process_group'"):
        choose_transport(Nameless, GLOO)


@pytest.mark.parametrize(
    ("asked", "need", "reason"),
    [
        ("alone", GLOO, "transport 'alone' refuses this group. alone: is for one rank, and the group has 4"),
        ("loopback", GLOO, r"loopback: connects threads of one process, and the ranks are processes \(gloo\)"),
        ("process_group", THREADS, "process_group: needs a process group"),
        (RefusingTransport, GLOO, None),
    ],
)
def test_what_is_asked_for_refuses_with_its_reason(asked, need, reason):
    if reason is None:
        assert choose_transport(asked, need) is asked
        return
    with pytest.raises(NotImplementedError, match=reason):
        choose_transport(asked, need)


def test_where_all_refuse_every_reason_is_listed(monkeypatch):
    some = {name: transport for name, transport in TRANSPORTS.items() if name != "process_group"}
    monkeypatch.setattr("dtensor_ring.comm.choose.TRANSPORTS", some)
    with pytest.raises(NotImplementedError, match=r"every transport refuses this group. alone: is for one rank.*; loopback: conn"):
        choose_transport(None, GLOO)


def test_without_a_group_a_rank_is_alone():
    assert isinstance(transport_of(None), AloneTransport)
    assert repr(AloneTransport("mesh axis 'cp'")) == "AloneTransport(rank 0 of 1, mesh axis 'cp')"
    with pytest.raises(RuntimeError, match="made together, by LoopbackTransport"):
        LoopbackTransport.connect(THREADS)


def group_of_one():
    mesh = line()
    x = distribute_tensor(torch.randn(1, 8, 2, 8), mesh, [Zigzag(1)])
    alone = ring_attention(x, x, x).to_local()
    assert type(transport_along(mesh)) is AloneTransport
    assert explain_transport(mesh).startswith(
        "mesh axis 'cp', 1 ranks: alone\n  process_group: does not refuse\n  symmetric_memory: needs a CUDA device for "
        "every rank, and PyTorch finds none\n  loopback: connects"
    )
    use_transport(mesh, "process_group")
    assert type(transport_along(mesh)) is ProcessGroupTransport
    assert torch.equal(ring_attention(x, x, x).to_local(), alone)
    use_transport(mesh, None)
    assert type(transport_along(mesh)) is AloneTransport


def test_a_group_of_one_rank_is_alone_and_can_be_made_to_use_its_process_group(pools):
    pools.run(1, group_of_one)


def own_transport(strategy: str):
    mesh = line()
    q, k, v = (torch.randn(1, 13, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def attend() -> list[torch.Tensor]:
        placed = [distribute_tensor(x, mesh, [Zigzag(1)], src_data_rank=None) for x in (q, k, v)]
        out = full_tensor(ring_attention(*placed, strategy=strategy))
        return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]

    start = traffic(mesh)
    wanted, before = attend(), traffic(mesh)
    try:
        use_transport(mesh, StoreTransport)
        assert traffic(mesh) == before, "what was sent so far stays counted"
        assert explain_transport(mesh).splitlines()[0] == "mesh axis 'cp', 2 ranks: store"
        sent = StoreTransport.sent
        for mine, theirs in zip(attend(), wanted, strict=True):
            assert torch.equal(mine, theirs)
        assert StoreTransport.sent > sent, "forward and backward went through the store"
        assert traffic(mesh).since(before) == before.since(start), "and are counted as any other"
        moved = redistribute(distribute_tensor(q, mesh, [Zigzag(1)]), [Zigzag(2)])
        assert torch.equal(full_tensor(moved), q)
        with pytest.raises(NotImplementedError, match=r"refuses this group\. alone: is for one rank"):
            use_transport(mesh, "alone")
        assert transport_along(mesh).name == "store", "a refused choice changes nothing"
    finally:
        use_transport(mesh, None)
    assert transport_along(mesh).name == "process_group"


@pytest.mark.parametrize("strategy", ["ring", "ulysses"])
def test_a_transport_of_a_user_carries_attention_and_its_gradients_bit_by_bit(pools, strategy):
    pools.run(2, own_transport, strategy)


def parted_choices():
    mesh, rank = line(), dist.get_rank()
    with pytest.raises(ValueError, match=r"rank \d of mesh axis 'cp' asks for '\w+', rank \d for another transport"):
        use_transport(mesh, StoreTransport if rank else "process_group")
    with pytest.raises(ValueError, match=r"unknown transport 'nccl'"):
        use_transport(mesh, "nccl" if rank else None)
    with pytest.raises(NotImplementedError, match="devices of different hosts: host 0, host 1"):
        use_transport(mesh, RefusingTransport)
    assert type(transport_along(mesh)) is ProcessGroupTransport
    assert meet(transport_along(mesh), "afterwards", [rank]) == [[0], [1]]


def test_ranks_that_ask_for_different_transports_or_for_a_refused_one_all_raise(pools):
    pools.run(2, parted_choices, timeout=60)


def parted_transports():
    """As if the choice itself had come out differently on two ranks: the next meeting says so, and no rank waits."""
    group = dist.new_group()
    transport = (StoreTransport if dist.get_rank() else ProcessGroupTransport)(group)
    with pytest.raises(RuntimeError, match=r"is in: a call, over \w+\. Rank \d is in: a call, over \w+"):
        meet(transport, "a call", [1])


def test_ranks_over_different_transports_learn_of_it_when_they_meet(pools):
    pools.run(2, parted_transports, timeout=60)


def choice_of_a_group():
    first, second = dist.new_group([0, 1]), dist.new_group([0, 1])
    use_transport(first, StoreTransport)
    assert transport_of(first).name == "store"
    assert transport_of(second).name == "process_group"
    reference = ref(transport_of(first))
    dist.destroy_process_group(first)
    del first
    gc.collect()
    assert reference() is None
    plane = grid(rows=1)
    with pytest.raises(ValueError, match=r"a transport belongs to one mesh axis, such as mesh\['cp'\], found 2 axes"):
        use_transport(plane, None)
    with pytest.raises(TypeError, match="belongs to a mesh axis or a process group, found 'cp'"):
        use_transport("cp", None)


def test_a_choice_belongs_to_its_group_and_ends_with_it(pools):
    pools.run(2, choice_of_a_group)


def test_the_command_line_has_a_table_of_transports(capsys):
    assert main(["transports"]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[0] == "| | `alone` | `process_group` | `symmetric_memory` | `loopback` |"
    here = "yes" if torch.cuda.is_available() else "no"  # the one transport that asks for the machine
    assert f"| processes with an NCCL group | no | yes | {here} | no |" in text
    assert "| threads of one process | no | no | no | yes |" in text
    assert "- `alone`: is for one rank, and the group has 4." in text
