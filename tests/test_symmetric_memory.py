"""When symmetric memory refuses, what it is made of where there is no GPU, and how a rank that stands still is noticed."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import permutations
from typing import NamedTuple
from weakref import ref

import pytest
import torch
import torch.distributed as dist
from helpers import line, refused

from dtensor_ring import _torch_symmetric
from dtensor_ring.comm import (
    Message,
    SilentRankError,
    SymmetricMemoryTransport,
    Transport,
    TransportRequirements,
    choose_transport,
    explain_transport,
    use_transport,
)
from dtensor_ring.comm import symmetric_memory as module
from dtensor_ring.comm.lanes import Halt, Lane, Stage, Watch
from dtensor_ring.comm.mailboxes import Slots
from dtensor_ring.comm.stream_memory import StreamMemory
from dtensor_ring.comm.symmetric_memory import _Line, _Mapped, _misplaced, _Place, _unreadable

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
NEED = TransportRequirements(0, 2, "gloo")


def places(*changes: dict) -> list[_Place]:
    whole = [_Place("", "a", rank, f"GPU-{rank}", False) for rank in range(len(changes))]
    return [place._replace(**change) for place, change in zip(whole, changes, strict=True)]


@pytest.mark.parametrize(
    ("ranks", "reason"),
    [
        (places({}, {}, {}), None),
        (places({}, {"reason": "needs a CUDA driver"}), "rank 1 needs a CUDA driver"),
        (places({}, {}, {"host": "b"}), "needs all ranks on one machine: rank 0 is on a, rank 2 on b"),
        (places({}, {}, {"device": 1}), "needs a GPU for each rank: ranks 1 and 2 both use cuda:1"),
        (places({"device": 1, "shares": True}, {}), "needs a GPU for each rank: ranks 0 and 1 both use cuda:1"),
        (places({"device": 1, "shares": True}, {"shares": True}), None),
        (places({"shares": True}, {"shares": True, "host": "b"}), "needs all ranks on one machine"),
    ],
)
def test_ranks_that_cannot_share_memory_are_refused_with_a_reason(ranks, reason):
    found = _misplaced([_Place.read(place.text()) for place in ranks])
    assert found == reason if reason is None else found.startswith(reason)


def test_gpus_that_cannot_read_each_other_are_refused_by_the_rank_that_sees_both(monkeypatch):
    class Properties(NamedTuple):
        uuid: str

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: Properties(f"GPU-{i}"))
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda mine, other: {mine, other} != {0, 2})
    ranks = places({}, {}, {}, {"uuid": "another's", "device": 2})
    assert _unreadable(1, ranks) is None
    assert _unreadable(0, ranks[:2]) is None
    assert _unreadable(0, ranks) == "needs GPUs that read each other's memory, and cuda:0 cannot read cuda:2 of rank 2"
    assert _unreadable(0, [ranks[0], ranks[1], ranks[3]]) is None, "of a GPU that this process does not see it cannot say"


@no_gpu
def test_without_a_gpu_it_is_refused_by_name_and_needs_no_answers():
    with pytest.raises(NotImplementedError, match="symmetric_memory: needs a CUDA device for every rank, and PyTorch finds none"):
        choose_transport("symmetric_memory", NEED)
    assert "needs a process group" in SymmetricMemoryTransport.refuses(TransportRequirements(0, 2))


def test_a_machine_is_asked_for_its_gpu_then_for_pytorch_then_for_the_driver(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module, "lacks_symmetric_memory", lambda: "lacks a module")
    monkeypatch.setattr(StreamMemory, "lacks", lambda: "lacks a driver")
    assert SymmetricMemoryTransport.refuses(NEED) == "lacks a module"
    monkeypatch.setattr(module, "lacks_symmetric_memory", lambda: None)
    assert SymmetricMemoryTransport.refuses(NEED) == "lacks a driver"
    monkeypatch.setattr(StreamMemory, "lacks", lambda: None)
    assert SymmetricMemoryTransport.refuses(NEED) is None, "without a group there is nobody else to ask"


def test_a_pytorch_without_symmetric_memory_and_one_with_another_backend_are_refused(monkeypatch):
    from torch.distributed import _symmetric_memory as symmetric

    monkeypatch.setattr(symmetric, "get_backend", lambda device: None)
    assert _torch_symmetric.lacks_symmetric_memory() is None
    monkeypatch.setattr(symmetric, "get_backend", lambda device: "CUDA")
    assert _torch_symmetric.lacks_symmetric_memory() is None
    monkeypatch.setattr(symmetric, "get_backend", lambda device: "NVSHMEM")
    assert "backend 'CUDA', and this program has set 'NVSHMEM'" in _torch_symmetric.lacks_symmetric_memory()
    monkeypatch.delattr("torch.distributed._symmetric_memory")
    monkeypatch.setitem(__import__("sys").modules, "torch.distributed._symmetric_memory", None)
    assert "needs torch.distributed._symmetric_memory, which torch" in _torch_symmetric.lacks_symmetric_memory()


def test_a_driver_without_the_operations_is_refused(monkeypatch):
    def load(name):
        if name != "libcuda.so.1":
            raise OSError(name)
        return object()

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert StreamMemory.lacks() == "needs a CUDA driver of version 12 or later: libcuda.so.1 has no cuStreamWaitValue32_v2"

    def fail(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", fail)
    assert StreamMemory.lacks() == "needs the CUDA driver, and libcuda.so.1 cannot be loaded"


class Driver:
    """The driver's functions, which note their arguments."""

    def __init__(self, status: int) -> None:
        self.calls = []

        def function(name):
            def call(*args):
                self.calls.append((name, *args))
                return status

            return call

        self.cuStreamWaitValue32_v2, self.cuStreamWriteValue32_v2 = function("wait"), function("write")


class FakeStream(NamedTuple):
    cuda_stream: int = 5


def test_waits_are_for_equal_values_and_an_error_of_the_driver_is_raised(monkeypatch):
    driver = Driver(0)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    memory = StreamMemory()
    memory.wait_for(FakeStream(), 4096, 1)
    memory.write(FakeStream(), 8192, 0)
    assert driver.calls == [("wait", 5, 4096, 1, 1), ("write", 5, 8192, 0, 0)]
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(801))
    memory = StreamMemory()
    with pytest.raises(RuntimeError, match="refuses to wait a word of memory on a stream: error 801"):
        memory.wait_for(FakeStream(), 0, 0)
    with pytest.raises(RuntimeError, match="refuses to write a word of memory on a stream: error 801"):
        memory.write(FakeStream(), 0, 0)


@no_gpu
def test_on_cpus_a_group_refuses_on_all_ranks_and_one_rank_may_ask_alone(pools):
    pools.run(2, asked_for)


def asked_for():
    mesh = line()
    refused(lambda: use_transport(mesh, "symmetric_memory"), NotImplementedError, "needs a CUDA device for every rank")
    if dist.get_rank() == 0:
        text = explain_transport(mesh)
        assert "symmetric_memory: needs a CUDA device for every rank" in text


class HostMemory:
    """Stream memory operations on the host's own memory, done at once: a wait blocks the thread that asks for it.

    So a rank does all its work in one order, as where all streams of a process share one queue of the GPU.
    """

    def wait_for(self, stream: object, address: int, value: int) -> None:
        until = time.monotonic() + 30
        while ctypes.c_uint32.from_address(address).value != value:
            assert time.monotonic() < until, "a flag never came"
            time.sleep(0)

    def write(self, stream: object, address: int, value: int) -> None:
        ctypes.c_uint32.from_address(address).value = value


class HostStream:
    def __init__(self, *args, **keywords) -> None:
        self.waited = []

    def wait_event(self, event: object) -> None:
        self.waited.append(event)


@pytest.fixture
def on_host(monkeypatch):
    """Lets `_Line` run on tensors of the host."""
    monkeypatch.setattr(module, "StreamMemory", HostMemory)
    monkeypatch.setattr(module, "Stream", HostStream)
    monkeypatch.setattr(module, "_now", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "current")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def lines_of(world: int, size: int) -> list[_Line]:
    slots = Slots(world, size)
    buffers = [torch.full((slots.nbytes,), 99, dtype=torch.uint8) for _ in range(world)]
    for buffer in buffers:
        buffer[: slots.flag_bytes] = 0
    mapped = [_Mapped([*buffers], [buffer.data_ptr() for buffer in buffers], [*buffers]) for _ in range(world)]
    return [_Line(rank, torch.device("cpu"), slots, mapped[rank], 1000.0) for rank in range(world)]


DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool)


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("world", [2, 3, 5, pytest.param(8, marks=pytest.mark.slow)])
def test_ranks_as_threads_deliver_every_bit_of_random_calls(on_host, monkeypatch, world, alike):
    """Of any sizes; or of few, so that calls meet again whose parcels are kept, each time with other slots in turn."""
    monkeypatch.setattr(module, "_MOST_KEPT", 16)
    lines, calls, pairs = lines_of(world, 512), [], list(permutations(range(world), 2))
    generator, choices = torch.Generator().manual_seed(world), random.Random(world)
    for _ in range(60):
        sent = {}
        for pair in pairs:
            shapes = [(choices.choice([1, 7, 300]), choices.choice([1, 3])) for _ in range(choices.choice([0, 1, 2]))]
            if alike:
                shapes = [(100, 1)] * choices.choice([0, 1]) if pair in pairs[:3] else [(7, 1)]
            sent[pair] = [
                torch.randint(0, 99, s, generator=generator).to(torch.float32 if alike else choices.choice(DTYPES)) for s in shapes
            ]
        calls.append(sent)
    got = [{pair: [torch.zeros_like(x) for x in each] for pair, each in sent.items()} for sent in calls]

    def work(line: _Line) -> None:
        for sent, arrived in zip(calls, got, strict=True):
            out = [Message(target, x) for (source, target), each in sent.items() if source == line.rank for x in each]
            into = [Message(source, x) for (source, target), each in arrived.items() if target == line.rank for x in each]
            ended = line.start(out, into, "call", "axis")
            assert ended == [lane.stream for lane, used in ((line._out, out), (line._in, into)) if used]

    try:
        with ThreadPoolExecutor(world) as threads:
            list(threads.map(work, lines))
        for sent, arrived in zip(calls, got, strict=True):
            for pair in pairs:
                assert all(torch.equal(a, b) for a, b in zip(sent[pair], arrived[pair], strict=True)), pair
        for line in lines:
            assert line._out.look(0.0) is None
            assert line._in.look(0.0) is None, "every stage is over"
            assert 0 < len(line._kept) <= 16
            assert set(line._in.stream.waited) == {"current"}, "it begins after what the caller did before"
    finally:
        for line in lines:
            line.close()


def test_a_message_on_another_device_is_refused(on_host):
    line, other = lines_of(2, 512)
    try:
        with pytest.raises(
            RuntimeError, match=r"a call: symmetric memory of axis lies on cpu, and a message on meta: call torch\.cuda"
        ):
            line.start([], [Message(1, torch.empty(3, device="meta"))], "a call", "axis")
    finally:
        line.close()
        other.close()


def test_a_line_ends_with_its_transport_and_frees_what_it_mapped(on_host):
    class Owner:
        pass

    line, other = lines_of(2, 512)
    other.close()
    owner, buffer = Owner(), ref(line._mapped.kept[0])
    line.closes_with(owner)
    assert buffer() is not None
    del owner
    gc.collect()
    assert line.watch.stop.is_set()
    assert buffer() is None


def test_a_line_that_halts_logs_what_it_waited_for_and_frees_nothing(on_host, monkeypatch, caplog):
    kept = []
    monkeypatch.setattr(module, "never_free", kept.append)
    line, other = lines_of(2, 512)
    line._halted(Halt(Stage(3, 1, "a call", "mesh axis 'cp'"), 12.34))
    assert caplog.messages == [
        "a call: rank 0 of mesh axis 'cp' waited 12.3 s for rank 1. If the GPU still waits in 60 s, this process is ended."
    ]
    (held,) = kept
    assert len(held) == 3, "the buffers, and the words that the device may still write"
    assert held[-1] is line._words
    line.close()
    other.close()


def test_after_a_halt_transfers_and_waits_raise(on_host, monkeypatch):
    """On a transport without a group, as far as it goes: a halt is raised before anything is sent or waited for."""
    line, other = lines_of(2, 512)
    transport = object.__new__(SymmetricMemoryTransport)
    Transport.__init__(transport, 0, 2, "mesh axis 'cp'")
    transport._line, transport._lock = line, threading.Lock()
    monkeypatch.setattr(transport, "_whereabouts", lambda what: "Rank 1 says nothing.")
    pending = transport.exchange([], [])
    line.watch.halt = Halt(Stage(3, 1, "a call", "mesh axis 'cp'"), 12.34)
    text = r"a call: rank 0 of mesh axis 'cp' waited 12\.3 s for rank 1\. Rank 1 says nothing\."
    with pytest.raises(SilentRankError, match=text):
        pending.wait()
    with pytest.raises(SilentRankError, match=text):
        transport.exchange([], [])
    line.close()
    other.close()


class Writes:
    """Stands for the driver: writes at once, unless held back."""

    def __init__(self) -> None:
        self.held = False
        self.waiting = []

    def write(self, stream: object, address: int, value: int) -> None:
        self.waiting.append((address, value))
        if not self.held:
            self.release()

    def release(self, count: int | None = None) -> None:
        for address, value in self.waiting[:count]:
            ctypes.c_uint32.from_address(address).value = value
        del self.waiting[:count]


@pytest.fixture
def lane():
    writes, word = Writes(), torch.zeros(1, dtype=torch.int32)
    lane = Lane(FakeStream(), writes, word.data_ptr())
    lane.writes, lane.word = writes, word
    return lane


def test_a_lane_is_in_the_first_stage_that_it_has_not_passed(lane):
    assert lane.look(0.0) is None
    lane.writes.held = True
    for peer in (None, 1, 2, None):
        lane.passes(peer, "an exchange", "axis")
    assert lane.look(10.0) is None, "it waits for work of this rank itself"
    lane.writes.release(1)
    assert lane.look(20.0) == Halt(Stage(2, 1, "an exchange", "axis"), 0.0)
    assert lane.look(25.0) == Halt(Stage(2, 1, "an exchange", "axis"), 5.0)
    lane.writes.release(1)
    assert lane.look(26.0) == Halt(Stage(3, 2, "an exchange", "axis"), 0.0), "another stage, seen for the first time"
    lane.writes.release(1)
    assert lane.look(40.0) is None
    lane.writes.release()
    assert lane.look(50.0) is None
    assert not lane._ahead, "what is over is forgotten"


def test_a_lane_counts_on_where_its_word_wraps(lane):
    lane._count = (1 << 32) - 2
    lane.writes.release()
    lane.word.fill_(-2)
    lane.writes.held = True
    for peer in (1, 2, 3):
        lane.passes(peer, "call", "axis")
    assert lane.look(0.0).stage.peer == 1
    lane.writes.release(2)  # the second writes 0
    assert lane.word.item() == 0
    assert lane.look(1.0).stage.peer == 3


@pytest.mark.parametrize("goes_on", [False, True])
def test_the_watch_reports_a_lane_that_stands_still_once_and_ends_the_process_if_it_still_does(lane, monkeypatch, goes_on):
    halts, reported, ended = [], threading.Event(), []
    monkeypatch.setattr(os, "abort", lambda: ended.append(time.monotonic()))

    def report(halt: Halt) -> None:
        halts.append(halt)
        reported.set()

    lane.writes.held = True
    watch = Watch([lane], 0.4, 0.3, report)
    watch.start()
    lane.passes(None, "begun", "axis")
    assert not reported.wait(0.8), "own work may take as long as it likes"
    lane.passes(3, "a call", "axis")
    lane.writes.release(1)
    start = time.monotonic()
    assert reported.wait(10)
    assert time.monotonic() - start >= 0.35
    if goes_on:
        lane.writes.release()
        time.sleep(0.6)
        assert not ended
        assert watch._thread.is_alive(), "what has stood once may stand again"
        lane.passes(3, "a later call", "axis")
    watch._thread.join(10)
    assert not watch._thread.is_alive()
    assert watch.halt is halts[0]
    assert (watch.halt.stage.peer, watch.halt.stage.activity) == (3, "a call")
    assert watch.halt.seconds >= 0.4
    assert len(halts) == 1
    assert len(ended) == 1
    assert all(time - start >= 0.7 for time in ended), "after its grace"


def test_a_watch_that_is_stopped_ends(lane):
    watch = Watch([lane], 1000.0, 1000.0, lambda halt: None)
    watch.start()
    watch.stop.set()
    watch._thread.join(10)
    assert not watch._thread.is_alive()
    assert watch.halt is None
