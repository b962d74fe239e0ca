"""Links that do not exist: a transport whose transfers take the time of a stated link, on one GPU.

One rank of W runs alone. What it would receive is random numbers, since constant ones let the chip run 2 to 18 % faster (it draws
less power). A transfer of n bytes takes `latency + n / bandwidth` on a stream of its own. Two models of who carries it:

    copy engine   a real copy from pinned host memory that takes that long: no streaming multiprocessor (SM) is used, as with
                  NVLink copies between symmetric memories
    nccl          a kernel that holds a stated number of SMs that long, as NCCL's do; on a GPU whose SMs are all taken it starts
                  late, as NCCL's would

Neither sees contention between ranks, nor a peer that is late. Figures measured through a link here are called emulated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dtensor_ring.comm import Message, Pending, Transport, TransportRequirements
from dtensor_ring.comm.choose import _transports
from dtensor_ring.planning import cost_model
from dtensor_ring.planning.devices import device_named

Model = Literal["copy_engine", "nccl"]


@dataclass(frozen=True, slots=True)
class Link:
    """How fast ranks exchange.

    Attributes:
        gigabytes: a second, each way, within a node.
        node: ranks in a node; 0 is all of them.
        between: gigabytes a second, each way, between nodes.
        latency: of a transfer, in seconds.
        model: what carries bytes.
        multiprocessors: that the "nccl" model holds.
    """

    gigabytes: float = 200.0
    node: int = 0
    between: float = 45.0
    latency: float = 20e-6
    model: Model = "copy_engine"
    multiprocessors: int = 16

    def __str__(self) -> str:
        """`200 GB/s copy_engine`, `200/45 GB/s nccl 16 SMs`."""
        speed = f"{self.gigabytes:g}" + (f"/{self.between:g}" if self.node else "")
        return f"{speed} GB/s {self.model}" + (f" {self.multiprocessors} SMs" if self.model == "nccl" else "")

    def known(self, device: str = "") -> cost_model.Link:
        """The link as a transport says it of itself, between GPUs of a kind that `devices` knows."""
        return cost_model.Link(self.gigabytes * 1e9, self.between * 1e9, self.latency, self.node, device)

    def seconds(self, rank: int, sizes: Sequence[tuple[int, int]]) -> float:
        """Time of the transfers of one step, given as (peer, bytes): both kinds of link work at once."""
        if not any(nbytes for _, nbytes in sizes):
            return 0.0
        near = sum(nbytes for peer, nbytes in sizes if not self.node or peer // self.node == rank // self.node)
        far = sum(nbytes for _, nbytes in sizes) - near
        return self.latency + max(near / self.gigabytes, far / self.between) / 1e9


class EmulatedTransport(Transport):
    """One rank of `world`, whose transfers take the time of `link`.

    Buffers to receive into are pieces of one large random tensor, so that no kernel of ours has to fill them: on a real link
    the bytes arrive without one. With `allocate=True` they are allocated instead, for measuring memory.
    """

    name: ClassVar[str] = "emulated"

    @classmethod
    def refuses(cls, need: TransportRequirements) -> str | None:
        """Always: it stands in for ranks that do not exist."""
        return "emulates ranks that do not exist"

    @classmethod
    def connect(cls, need: TransportRequirements) -> NoReturn:
        """Raises RuntimeError: no process group has emulated ranks."""
        raise RuntimeError("an emulated transport is made by itself, without a process group")

    def __init__(self, rank: int, world: int, link: Link, device: torch.device, *, allocate: bool = False) -> None:
        super().__init__(rank, world, "an emulated axis")
        self.link, self.allocate = link, allocate
        self._carrier = carrier(device, link.model, link.multiprocessors)

    @property
    def known_link(self) -> cost_model.Link:
        """The emulated link, between GPUs like the one that this runs on."""
        return self.link.known(device_named(torch.cuda.get_device_name()) if torch.cuda.is_available() else "")

    def empty(self, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A random buffer."""
        if self.allocate:
            return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
        return _pool(like.device, dtype or like.dtype).piece(shape)

    def gather_values(self, values: Sequence[int]) -> list[list[int]]:
        """Every rank answers as this one."""
        return [list(values)] * self.world

    def _exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending[None]:
        if not sends and not receives:  # as of a process group: it does not wait for transfers under way
            return Pending.ready(None)
        out = self.link.seconds(self.rank, [(message.rank, message.tensor.nbytes) for message in sends])
        back = self.link.seconds(self.rank, [(message.rank, message.tensor.nbytes) for message in receives])
        kept = [message.tensor for message in sends]  # what is being sent must not be freed before it is sent
        done = self._carrier(max(out, back))

        def finish() -> None:
            done()
            kept.clear()

        return Pending(finish)

    def _all_gather(self, tensor: Tensor) -> Pending[Tensor]:
        gathered = self.empty((self.world, *tensor.shape), tensor)
        peers = [(peer, tensor.nbytes) for peer in range(self.world) if peer != self.rank]
        done = self._carrier(self.link.seconds(self.rank, peers))
        return Pending(lambda: (done(), gathered)[1])

    def _reduce_scatter(self, tensor: Tensor) -> Pending[Tensor]:
        summed = self.empty(tensor.shape[1:], tensor)
        peers = [(peer, summed.nbytes) for peer in range(self.world) if peer != self.rank]
        done = self._carrier(self.link.seconds(self.rank, peers))
        return Pending(lambda: (done(), summed)[1])

    def _all_reduce(self, tensor: Tensor, op: str) -> Tensor:
        return tensor.clone()


def emulated_axis(world: int, rank: int, link: Link, device: torch.device) -> DeviceMesh:
    """A mesh axis "cp" of `world` ranks, of which this process is one and the others are emulated; for what takes a mesh.

    It makes the default process group, which sends nothing; only what goes through the axis' transport takes time.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    mesh = init_device_mesh(device.type, (world,), mesh_dim_names=("cp",))
    # Past `use_transport`, which compares the choices of all ranks over the transport before: here are no other ranks to ask.
    _transports[mesh.get_group()] = EmulatedTransport(rank, world, link, device, allocate=True)
    return mesh


class _Pool:
    """A large random tensor that buffers are cut from, one after the other, again and again.

    Pieces overlap where more is asked for than the pool holds. That is harmless: what is written into a buffer is as random.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.numbers = torch.randn(_POOL_BYTES // dtype.itemsize, device=device, dtype=dtype)
        self.at = 0

    def piece(self, shape: Sequence[int]) -> Tensor:
        count = math.prod(shape)
        assert count <= self.numbers.numel(), f"the pool of {_POOL_BYTES >> 20} MiB is smaller than one buffer {tuple(shape)}"
        if self.at + count > self.numbers.numel():
            self.at = 0
        piece = self.numbers[self.at : self.at + count].view(*shape)
        self.at += -(-count // 128) * 128  # kernels load 16 bytes at a time, from addresses that are multiples of it
        return piece


_POOL_BYTES = 4 << 30 if torch.cuda.is_available() else 1 << 26


@cache
def _pool(device: torch.device, dtype: torch.dtype) -> _Pool:
    return _Pool(device, dtype)


Carrier = Callable[[float], Callable[[], None]]


@cache
def carrier(device: torch.device, model: Model, multiprocessors: int) -> Carrier:
    """What keeps a stream of its own busy for some seconds, and returns what makes the current stream wait for it."""
    if device.type != "cuda":
        return lambda seconds: lambda: None
    side = torch.cuda.Stream(device, priority=-1)  # NCCL's streams, too, go first where a multiprocessor becomes free
    busy = _copying(device) if model == "copy_engine" else _holding(device, multiprocessors)

    index = side.device_index  # a look-up by number takes the host a third of one by device

    def carry(seconds: float) -> Callable[[], None]:
        done, here = torch.cuda.Event(), torch.cuda.current_stream(index)
        side.wait_stream(here)  # what is sent must have been computed
        if seconds:
            torch.cuda.set_stream(side)
            busy(seconds)
            torch.cuda.set_stream(here)
        done.record(side)
        return lambda: torch.cuda.current_stream(index).wait_event(done)

    return carry


def _copying(device: torch.device) -> Callable[[float], None]:
    """A copy from pinned host memory that takes as long as asked, by the measured speed of such copies."""
    size = 512 << 20
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    here = torch.empty(size, dtype=torch.uint8, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(2):  # the first one touches the pages
        start.record()
        here.copy_(host, non_blocking=True)
        end.record()
        end.synchronize()
    rate = size / (start.elapsed_time(end) * 1e-3)

    def busy(seconds: float) -> None:
        left = int(seconds * rate)
        while left > 0:
            count = min(left, size)
            here[:count].copy_(host[:count], non_blocking=True)
            left -= count

    return busy


def _holding(device: torch.device, multiprocessors: int) -> Callable[[float], None]:
    """A kernel of `multiprocessors` blocks, each of 1,024 threads, that wait for the clock of the GPU."""
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import globaltimer

    @triton.jit
    def hold(out, nanoseconds):  # noqa: ANN001, ANN202  as Triton wants it
        start = globaltimer()
        now = start
        while now - start < nanoseconds:
            now = globaltimer()
        tl.store(out + tl.program_id(0), now)

    out = torch.zeros(multiprocessors, dtype=torch.int64, device=device)
    hold[(multiprocessors,)](out, 1000, num_warps=32)
    return lambda seconds: hold[(multiprocessors,)](out, int(seconds * 1e9), num_warps=32)
