"""Laws of the transport over symmetric memory, with all ranks on one GPU; what it carries is compared bit by bit with gloo."""

from __future__ import annotations

import gc
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from weakref import ref

import pytest
import torch
import torch.distributed as dist
from helpers import PLACEMENTS, line, make_case, refused, share
from pool import free_port
from torch.utils.checkpoint import checkpoint

from dtensor_ring import Zigzag, distribute_tensor, from_local, full_tensor, redistribute, ring_attention
from dtensor_ring.comm import (
    Message,
    Pending,
    ProcessGroupTransport,
    SymmetricMemoryTransport,
    Transport,
    transport_along,
    transport_of,
    use_transport,
)
from dtensor_ring.comm.transport import MessageCollectives
from dtensor_ring.debug import traffic

pytestmark = pytest.mark.gpu(devices=1)
SHARED = "shared cuda"
WORLDS = [2, 4, pytest.param(8, marks=pytest.mark.slow)]


class SmallSlots(SymmetricMemoryTransport):
    """Cuts nearly everything into parcels, so that slots are used again and again."""

    name = "small_slots"
    slot_bytes = 2048


class ThroughHost(ProcessGroupTransport, MessageCollectives):
    """Carries CUDA tensors over gloo, by way of the host: what others are compared with."""

    name = "through_host"

    def _exchange(self, sends: list[Message], receives: list[Message]) -> Pending[None]:
        landed = [Message(m.rank, torch.empty_like(m.tensor, device="cpu")) for m in receives]
        pending = super()._exchange([Message(m.rank, m.tensor.detach().cpu()) for m in sends], landed)

        def finish() -> None:
            pending.wait()
            for message, there in zip(receives, landed, strict=True):
                message.tensor.detach().copy_(there.tensor)

        return Pending(finish)

    _all_gather = MessageCollectives._all_gather
    _reduce_scatter = MessageCollectives._reduce_scatter
    _all_reduce = MessageCollectives._all_reduce


def as_through_host(body, transport: type[Transport] | str = SmallSlots):
    """`body` gives tensors: the same bits over both transports, and the same count of bytes. On an NCCL group, as over NCCL."""
    mesh = line("cuda")
    try:
        use_transport(mesh, "process_group" if dist.get_backend() == "nccl" else ThroughHost)
        before = traffic(mesh)
        wanted = body(mesh)
        sent, before = traffic(mesh).since(before), traffic(mesh)
        use_transport(mesh, transport)
        assert transport_along(mesh).name == (transport if isinstance(transport, str) else transport.name)
        for _ in range(2):  # the second time slots and streams are as the first left them
            before = traffic(mesh)
            for number, (mine, other) in enumerate(zip(body(mesh), wanted, strict=True)):
                assert torch.equal(mine, other), f"tensor {number} differs in {(mine != other).sum().item()} elements"
            assert traffic(mesh).since(before) == sent
    finally:
        use_transport(mesh, None)


DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int32, torch.uint8, torch.bool)


def content(*key: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    values = torch.randint(0, 200, shape, generator=torch.Generator().manual_seed(hash(key) % (1 << 40)))
    return values.to("cuda").to(dtype)


def random_exchanges(seed: int, transport: type[Transport], calls: int):
    """Calls of any sizes, some under way at a time, waited for in any order, with work of any length between them."""
    group = dist.new_group()
    use_transport(group, transport)
    end, rank, world = transport_of(group), dist.get_rank(), dist.get_world_size()
    same, own = random.Random(seed), random.Random(seed * 100 + rank)
    under_way, wrong = [], torch.zeros((), dtype=torch.int64, device="cuda")

    def redeem(place: int) -> None:
        nonlocal wrong
        pending, sends, receives = under_way.pop(place)
        pending.wait()
        for message in sends:
            message.tensor.zero_()  # what was sent is the sender's again
        for message, key in receives:
            shape, dtype = tuple(message.tensor.shape), message.tensor.dtype
            wrong += (message.tensor != content(*key, shape=shape, dtype=dtype)).sum()

    for call in range(calls):
        sends, receives = [], []
        for source in range(world):
            for target in range(world):
                count = same.choice([0, 0, 1, 1, 2]) if source != target else 0
                for number in range(count):
                    shape = (same.choice([0, 1, 3, 17, 400]), same.choice([1, 5, 16]))
                    dtype, key = same.choice(DTYPES), (seed, call, source, target, number)
                    if rank == source:
                        sends.append(Message(target, content(*key, shape=shape, dtype=dtype)))
                    if rank == target:
                        receives.append((Message(source, torch.full(shape, 77, dtype=torch.uint8, device="cuda").to(dtype)), key))
        if own.random() < 0.4:
            torch.cuda._sleep(own.randrange(1 << 21))
        if own.random() < 0.1:
            time.sleep(own.random() * 0.02)
        under_way.append((end.exchange(sends, [message for message, _ in receives]), sends, receives))
        while len(under_way) > same.choice([1, 3, 5]):
            redeem(own.randrange(len(under_way)))
    while under_way:
        redeem(0)
    assert wrong.item() == 0
    assert end._line is transport_of(group)._line, "buffers are made once"
    dist.destroy_process_group(group)


@pytest.mark.parametrize("transport", [SmallSlots, SymmetricMemoryTransport])
@pytest.mark.parametrize("world", WORLDS)
def test_exchanges_in_any_order_deliver_every_bit(pools, world, transport):
    for seed in range(3):
        pools.run(world, random_exchanges, seed, transport, 60, device=SHARED)


def attention(layout: str, strategy: str, stages: int, length: int, kernel: str, dtype: torch.dtype):
    def body(mesh):
        heads = (8, 8) if strategy == "ulysses" else (4, 2)
        case = make_case(length, heads=heads, dim=64, dtype=dtype, device="cuda")
        mine = [share(x, layout, mesh.size(), dist.get_rank()).contiguous() for x in (*case.inputs, case.dout)]
        leaves = [x.requires_grad_() for x in mine[:3]]
        placed = [from_local(x, mesh, [PLACEMENTS[layout]], length=length) for x in leaves]
        options = {"stages": stages} if strategy == "ring" else {}
        out, lse = ring_attention(*placed, return_lse=True, strategy=strategy, kernel=kernel, **options)
        grads = torch.autograd.grad(out.to_local(), leaves, mine[3])
        # FlashAttention-2 adds up dq in another order each time
        return [out.to_local(), lse.to_local(), *grads[kernel == "torch_flash" :]]

    as_through_host(body)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(
    ("layout", "strategy", "stages"),
    [("zigzag", "ring", 1), ("contiguous", "ring", 3), ("stripe", "ring", 2), ("zigzag", "gather", 1), ("zigzag", "ulysses", 1)],
)
def test_attention_and_its_gradients_are_those_over_gloo(pools, world, layout, strategy, stages):
    stages = min(stages, world - 1)
    pools.run(world, attention, layout, strategy, stages, 301, "math", torch.float32, device=SHARED)
    if strategy == "ring":
        pools.run(world, attention, layout, strategy, stages, 2048, "torch_flash", torch.bfloat16, device=SHARED)


@pytest.mark.gpu(devices=2)
@pytest.mark.parametrize("transport", [SmallSlots, SymmetricMemoryTransport])
def test_two_gpus_deliver_every_bit(pools, transport):
    pools.run(2, random_exchanges, 0, transport, 60, device="cuda")


@pytest.mark.gpu(devices=2)
@pytest.mark.parametrize("strategy", ["ring", "gather", "ulysses"])
def test_attention_on_two_gpus_is_that_over_nccl(pools, strategy):
    pools.run(2, attention, "zigzag", strategy, 1, 2048, "torch_flash", torch.bfloat16, device="cuda")


def interleaved(checkpointed: bool):
    """Two models' forward passes, one of them checkpointed, before the backward of either, in the other order."""

    def body(mesh):
        world, rank, length = mesh.size(), dist.get_rank(), 130
        torch.manual_seed(3)
        weights = [[torch.randn(32, 96, device="cuda").mul_(0.1).requires_grad_() for _ in range(2)] for _ in range(2)]
        inputs = [share(torch.randn(2, length, 32, device="cuda"), "zigzag", world, rank) for _ in range(3)]

        def layer(x, weight):
            q, k, v = (x @ weight).view(*x.shape[:2], 3, 4, 8).unbind(2)
            placed = [from_local(y.contiguous(), mesh, [Zigzag(1)], length=length, run_check=False) for y in (q, k, v)]
            return x + ring_attention(*placed, kernel="math").to_local().flatten(2)

        def model(x, each):
            for weight in each:
                x = checkpoint(layer, x, weight, use_reentrant=False) if checkpointed else layer(x, weight)
            return x.square().sum()

        losses = [model(x, weights[i % 2]) for i, x in enumerate(inputs)]
        grads = [torch.autograd.grad(loss, weights[i % 2]) for i, loss in reversed(list(enumerate(losses)))]
        return [*losses, *(grad for each in grads for grad in each)]

    as_through_host(body)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("world", WORLDS)
def test_passes_of_several_models_may_interleave(pools, world, checkpointed):
    pools.run(world, interleaved, checkpointed, device=SHARED)


def compiled():
    def body(mesh):
        def layer(q, k, v):
            placed = [from_local(x, mesh, [Zigzag(1)], length=mesh.size() * 32, run_check=False) for x in (q, k, v)]
            return ring_attention(*placed, kernel="math").to_local() * 2

        torch.manual_seed(dist.get_rank())
        leaves = [torch.randn(1, 32, 2, 16, device="cuda", requires_grad=True) for _ in range(3)]
        out = torch.compile(layer, fullgraph=True, backend="aot_eager")(*leaves)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    as_through_host(body)


def test_compiled_attention_is_that_over_gloo(pools):
    pools.run(2, compiled, device=SHARED)


def moves():
    def body(mesh):
        x = torch.arange(3 * 13 * 4, dtype=torch.float32, device="cuda").view(3, 13, 4)
        found = []
        for placement in (Zigzag(1), PLACEMENTS["stripe"]):
            moved = redistribute(distribute_tensor(x, mesh, [placement]), [PLACEMENTS["contiguous"]])
            found += [moved.to_local(), full_tensor(moved)]
            assert torch.equal(found[-1], x)
        end = transport_along(mesh)
        mine = torch.arange(5, device="cuda") + 10 * dist.get_rank()
        for dtype in (torch.float32, torch.int64, torch.bfloat16):
            found += [end.all_reduce(mine.to(dtype), op) for op in ("sum", "max", "min", "product")]
            found += [end.all_gather(mine.to(dtype)).wait(), end.reduce_scatter(mine.to(dtype).repeat(mesh.size(), 1)).wait()]
        host = end.all_gather(mine.cpu()).wait()
        assert not host.is_cuda
        return [*found, host]

    as_through_host(body, "symmetric_memory")


@pytest.mark.parametrize("world", WORLDS)
def test_redistribution_and_collectives_are_those_over_gloo(pools, world):
    pools.run(world, moves, device=SHARED)


def replayed():
    mesh, rank, world = line("cuda"), dist.get_rank(), dist.get_world_size()
    use_transport(mesh, SmallSlots)
    end = transport_along(mesh)
    source, target = (rank - 1) % world, (rank + 1) % world
    sent, got = torch.zeros(4500, device="cuda"), torch.zeros(4500, device="cuda")  # an odd number of parcels

    def once():
        end.exchange([Message(target, sent)], [Message(source, got)]).wait()
        return got * 2

    def captured() -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got.zero_()  # PyTorch warns of a graph that is empty
            doubled = once()
        return graph, doubled

    with pytest.raises(RuntimeError, match="makes buffers, and a CUDA graph is being captured"):
        captured()
    once()
    torch.cuda.synchronize()
    graph, doubled = captured()
    for number in range(1, 8):
        sent.fill_(rank + 10 * number)
        if number % 3:
            graph.replay()
            assert (doubled == 2 * (source + 10 * number)).all(), number
        else:  # calls and replays may follow each other
            assert (once() == 2 * (source + 10 * number)).all(), number
    use_transport(mesh, None)


def test_a_captured_exchange_can_be_replayed(pools):
    pools.run(2, replayed, device=SHARED)


def groups_come_and_go():
    rank, world = dist.get_rank(), dist.get_world_size()

    class Large(SymmetricMemoryTransport):
        name, slot_bytes = "large", 64 << 20

    def one() -> None:
        group = dist.new_group()
        use_transport(group, Large)
        end = transport_of(group)
        got = torch.zeros(8, device="cuda")
        mine = torch.full((8,), float(rank), device="cuda")
        end.exchange([Message((rank + 1) % world, mine)], [Message((rank - 1) % world, got)]).wait()
        assert (got == (rank - 1) % world).all()
        gone = ref(end)
        del end
        dist.destroy_process_group(group)
        del group
        gc.collect()
        assert gone() is None

    def used() -> tuple[int, int]:
        gc.collect()
        torch.cuda.synchronize()
        dist.barrier()
        time.sleep(0.3)
        free, total = torch.cuda.mem_get_info()
        dist.barrier()
        return total - free, len(os.listdir("/proc/self/fd"))

    one()
    memory, files = used()
    for _ in range(8):
        one()
    after, files_after = used()
    assert after - memory < 8 * 128 << 20, f"{(after - memory) >> 20} MiB more after eight groups of {world} ranks and 128 MiB each"
    assert files_after <= files + 2


def test_buffers_are_freed_with_their_group(pools):
    pools.run(2, groups_come_and_go, device=SHARED)


def refusals():
    mesh, rank = line("cuda"), dist.get_rank()
    group = dist.new_group()  # of its own, since what a rank answers is kept as long as the group lives
    before = os.environ.pop("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES") if rank else None
    try:
        refused(
            lambda: use_transport(group, "symmetric_memory"),
            NotImplementedError,
            "needs a GPU for each rank: ranks 0 and 1 both use cuda:0",
            "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1",
        )
    finally:
        os.environ.update({} if before is None else {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": before})
    assert transport_of(group).name == "process_group", "it is never the default"

    class Uneven(SymmetricMemoryTransport):
        name, slot_bytes = "uneven", 4096 * (1 + rank)

    use_transport(mesh, Uneven)
    one, texts = (
        torch.zeros(1, device="cuda"),
        [f"of {4096 * (1 + r)} {'bytes ' if r == rank else ''}on rank {r}" for r in range(2)],
    )
    for _ in range(2):
        refused(lambda: transport_along(mesh).exchange([Message(1 - rank, one)], []), ValueError, *texts)
    use_transport(mesh, None)


def test_what_ranks_do_not_share_is_refused_on_all(pools):
    pools.run(2, refusals, device=SHARED)


# A rank goes away, in the midst of what the other waits for.
SCRIPT = """
    import os, sys, time, torch, torch.distributed as dist
    from dtensor_ring.comm import Message, SymmetricMemoryTransport, symmetric_memory, transport_of, use_transport

    class Impatient(SymmetricMemoryTransport):
        name, patience = "impatient", 2.0

    symmetric_memory._GRACE = 8.0
    dist.init_process_group("gloo")
    use_transport(dist.group.WORLD, Impatient if sys.argv[1] != "fail" else "symmetric_memory")
    end, rank = transport_of(dist.group.WORLD), dist.get_rank()
    x = torch.zeros(4, device="cuda")
    end.exchange([Message(1 - rank, x)], [Message(1 - rank, x.clone())]).wait()
    torch.cuda.synchronize()
    if rank:
        time.sleep(1 if sys.argv[1] == "fail" else 20)
        os._exit(3)
    for _ in range(30):  # three seconds or more: work of this rank's own is no silence of another
        torch.cuda._sleep(200_000_000)
    with end.during("a test of patience"):
        pending = end.exchange([], [Message(1, x)])
    pending.wait()
    if sys.argv[1] == "fail":
        raise ValueError("an error of this rank")
    if sys.argv[1] == "wait":
        (x + 1).sum().item()
        print("a half result was read", file=sys.stderr)
    while True:
        time.sleep(0.5)
        end.exchange([], [])
"""
WAITED = r"a test of patience: rank 0 of process group '\w+' waited \d\.\d s for rank 1\. "


@pytest.mark.parametrize(
    ("way", "code", "text"),
    [
        # the host is in a call of CUDA that does not return: the error is logged, and the process ended
        ("wait", -signal.SIGABRT, WAITED + "If the GPU still waits in 8 s, this process is ended"),
        ("go on", 1, "SilentRankError: " + WAITED + "Rank 1 says nothing"),
        ("fail", 1, "ValueError: an error of this rank"),
    ],
)
def test_a_rank_that_waits_in_vain_ends_with_an_error(way, code, text):
    started, port = [], free_port()
    for rank in range(2):
        more = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        more |= {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1", "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])}
        command = [sys.executable, "-c", textwrap.dedent(SCRIPT), way]
        started.append(subprocess.Popen(command, env={**os.environ, **more}, stderr=subprocess.PIPE, text=True))
    try:
        error = started[0].communicate(timeout=60)[1]
    finally:
        for process in started:
            process.kill()
            process.communicate()  # its end is awaited, and its pipe closed
    assert started[0].returncode == code, error
    assert re.search(text, error), error
    assert "half result" not in error
