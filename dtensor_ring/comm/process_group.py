"""Transfers over a torch process group: NCCL between GPUs, gloo between CPU processes."""

from __future__ import annotations

import atexit
import gc
import socket
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import ClassVar, TypeVar
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import override

from dtensor_ring._torch_groups import all_gather_flat, coalesces, exchange_in_one, reduce_scatter_flat, store_of
from dtensor_ring.comm.rank_checks import meet, number_of
from dtensor_ring.comm.transport import Message, Pending, SilentRankError, Transport, TransportRequirements
from dtensor_ring.planning.cost_model import Link
from dtensor_ring.planning.devices import KNOWN, device_named, link_of_hosts

T = TypeVar("T")

_REDUCE = {
    "sum": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.AVG,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
    "product": dist.ReduceOp.PRODUCT,
}
_GRACE = 2.0  # seconds that a rank which waited in vain waits to hear what the others wait for
_LET_GO = 0.02  # seconds in which threads of gloo let go of the tensors of collectives that are over
_LARGEST_TAG = (1 << 31) - 1  # a tag is a C int


def axis_name(mesh: DeviceMesh, i: int) -> str:
    """Give the name of a mesh axis in quotes, such as `'cp'`, or its number where it has no name."""
    return repr(mesh.mesh_dim_names[i]) if mesh.mesh_dim_names else str(i)


def _host() -> str:
    """What tells this machine from others: two containers of one may have two names, and two machines may both be "localhost"."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()  # drawn when the machine started
    except OSError:
        return socket.gethostname()


@cache
def _end_groups_at_exit() -> None:
    """Once a process: have the groups that were destroyed end their threads while Python still runs.

    A thread of gloo that lets go of a tensor while the interpreter ends aborts the process, "terminate called without an active
    exception" (pytorch#190489): a script whose last collective was just before its end then fails, once in a hundred times or so.
    A group joins its threads when it is freed, but models and trainers that hold it often are garbage in cycles, which is freed
    too late. The threads of groups that were not destroyed get the time to let go.
    """

    def end_groups() -> None:
        gc.collect()
        if dist.is_initialized():
            time.sleep(_LET_GO)

    atexit.register(end_groups)


def several_ranks() -> bool:
    """Whether this process is one of several: a process group of more than one rank is up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class ProcessGroupTransport(Transport):
    """A transport over `torch.distributed`.

    On NCCL all messages of an exchange are issued as one group, and the first exchange begins with a meeting of every rank of
    the group, which point-to-point transfers among some of the ranks need. On gloo, where a message of an unexpected size ends
    the process, the size is part of a message's tag, so that it waits instead, and collectives compare sizes first; a wait that
    ends in vain says who waited for whom. The group is not kept alive: it ends with `destroy_process_group` as without us.

    What ranks compare always goes over the group itself, also in a class that derives from this one and carries tensors by other
    means: ranks find out that they are in different calls, or over different transports, where these means would wait in vain.
    """

    name: ClassVar[str] = "process_group"

    @classmethod
    @override
    def refuses(cls, need: TransportRequirements) -> str | None:
        """Refuses ranks without a process group, and no others."""
        return None if need.backend else "needs a process group: call torch.distributed.init_process_group"

    @classmethod
    @override
    def connect(cls, need: TransportRequirements) -> ProcessGroupTransport:
        """Make this rank's end. Nothing is sent."""
        assert need.group is not None, "a group of processes has a process group"
        return cls(need.group)

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(dist.get_rank(group), dist.get_world_size(group), f"process group {group.group_name!r}")
        self._reference = ref(group)
        self._has_met = False
        self._link: tuple[Link | None] | None = None  # in a tuple once it was asked for
        self._over_nccl = "nccl" in dist.get_backend(group) and torch.cuda.is_available()
        if not self._over_nccl:
            _end_groups_at_exit()

    @property
    def _group(self) -> dist.ProcessGroup:
        group = self._reference()
        if group is None:
            raise RuntimeError(f"the process group of {self.axis} was destroyed")
        return group

    @property
    @override
    def known_link(self) -> Link | None:
        """By the hosts and the GPUs of the ranks, which meet once for it; None on gloo, and where GPUs or links are not known."""
        if self._link is None:
            is_known = self.world > 1 and self._is_nccl()
            self._link = (self._ask_link(torch.cuda.get_device_name(self.value_device())) if is_known else None,)
        return self._link[0]

    def _ask_link(self, device: str) -> Link | None:
        """The link of ranks that each say their host and their GPU."""
        devices = ["", *KNOWN]
        mine = [number_of(_host()), devices.index(device_named(device))]
        answers = meet(self, "which hosts and GPUs ranks are on", mine)
        return link_of_hosts([host for host, _ in answers], [devices[number] for _, number in answers])

    def _is_nccl(self) -> bool:
        return self._over_nccl  # asked several times a transfer, and the answer takes as long as a launch

    @override
    def refuses_capture(self) -> str | None:
        """Refuses groups on other backends than NCCL."""
        return None if self._is_nccl() else f"is on {dist.get_backend(self._group)}, which carries tensors through the host"

    @override
    def value_device(self) -> torch.device:
        """The GPU for groups on NCCL, which moves nothing else, and the CPU for others."""
        return torch.device("cuda", torch.cuda.current_device()) if self._is_nccl() else torch.device("cpu")

    @override
    def gather_values(self, values: Sequence[int]) -> list[list[int]]:
        """As the base class, but over the group itself, whatever a derived class carries tensors by."""
        if self.world == 1:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.int64, device=self.value_device())
        return ProcessGroupTransport._all_gather(self, mine).wait().tolist()

    @override
    def offer_values(self, values: Sequence[int], patience: float) -> None:
        """This rank's part of `gather_values`; returns when all have joined, after `patience` seconds, or where the group broke."""
        mine = torch.tensor(values, dtype=torch.int64, device=self.value_device())
        gathered = mine.new_empty(self.world * len(mine))
        until = time.monotonic() + patience
        try:
            work = all_gather_flat(gathered, mine, group=self._group, async_op=True)
            # Polled and not waited for: where the others never come to this meeting, the error of this rank must still be shown.
            while work is not None and not work.is_completed() and time.monotonic() < until:
                time.sleep(0.001)
        except RuntimeError:  # the error to show is the one that the others were to be sent
            return

    @override
    def leave_note(self, number: int, text: str) -> None:
        """Leave the text in the group's store, where it waits for ranks that come later, however late."""
        try:
            store_of(self._group).set(f"dtensor_ring/note/{self.rank}/{number}", text)
        except RuntimeError:  # the store went with its process: the error to show is another
            return

    @override
    def note_of(self, rank: int, number: int) -> str:
        """Read the text out of the group's store."""
        try:
            return store_of(self._group).get(f"dtensor_ring/note/{rank}/{number}").decode()
        except RuntimeError:
            return super().note_of(rank, number)

    @override
    def _compare(self, collective: str, tensor: Tensor) -> None:
        # On gloo tensors of different sizes in one collective end the process, so sizes are compared before. On NCCL the comparison
        # would make the host wait for the GPU in every collective.
        if not self._is_nccl():
            meet(self, f"{self.activity} ({collective} of {tensor.dtype} {tuple(tensor.shape)})", [])

    def _meet_once(self) -> None:
        # NCCL makes the communicator of a group in its first operation, in which every rank must take part. A ring's first exchange
        # may be among some ranks only.
        if not self._has_met and self.world > 1 and self._is_nccl():
            dist.all_reduce(torch.zeros(1, device=self.value_device()), group=self._group)
        self._has_met = True

    @override
    def _exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending[None]:
        self._meet_once()
        if not sends and not receives:
            return Pending.ready(None)
        device, group, activity = (*sends, *receives)[0].tensor.device, self._group, self.activity
        peers: list[int | None] = [m.rank for m in (*sends, *receives)]
        if coalesces(group, device):
            messages = ([(m.tensor, m.rank) for m in each] for each in (sends, receives))
            works = [exchange_in_one(group, device, *messages)]
            peers = [peers[0] if len(set(peers)) == 1 else None]
        else:
            # A message of an unexpected size ends a gloo process. With the size as its tag it meets no receive, and waits.
            ops = [
                dist.P2POp(act, m.tensor, group=group, group_peer=m.rank, tag=m.tensor.nbytes % _LARGEST_TAG)
                for act, messages in ((dist.isend, sends), (dist.irecv, receives))
                for m in messages
            ]
            works = dist.batch_isend_irecv(ops)
        # What is sent must stay as it is until it has been: dropped earlier, the memory of a message under way would be reused.
        kept = [m.tensor for m in (*sends, *receives)]

        def finish() -> None:
            for work, peer in zip(works, peers, strict=True):
                assert work is not None, "a message is waited for"
                self._waited(work.wait, activity, peer)
            kept.clear()

        return Pending(finish)

    @override
    def _all_gather(self, tensor: Tensor) -> Pending[Tensor]:
        gathered = tensor.new_empty((self.world, *tensor.shape))
        work = all_gather_flat(gathered.view(-1), tensor.view(-1), group=self._group, async_op=True)
        return self._after(work, gathered)

    @override
    def _reduce_scatter(self, tensor: Tensor) -> Pending[Tensor]:
        out = tensor.new_empty(tensor.shape[1:])
        work = reduce_scatter_flat(out.view(-1), tensor.view(-1), group=self._group, async_op=True)
        return self._after(work, out)

    @override
    def _all_reduce(self, tensor: Tensor, op: str) -> Tensor:
        # The collective works in place, and the tensor is the caller's.
        out = tensor.clone()
        averages = op == "avg" and not self._is_nccl()  # gloo has no average
        kind = dist.ReduceOp.SUM if averages else _REDUCE[op]
        self._waited(lambda: dist.all_reduce(out, op=kind, group=self._group), self.activity)
        return out / self.world if averages else out

    def _after(self, work: dist.Work | None, result: Tensor) -> Pending[Tensor]:
        # Taken when the transfer starts: at the wait this rank may be in another activity.
        activity = self.activity

        def finish() -> Tensor:
            if work is not None:
                self._waited(work.wait, activity)
            return result

        return Pending(finish)

    def _waited(self, wait: Callable[[], T], activity: object, peer: int | None = None) -> T:
        """What `wait` returns; a failure says what this rank waited for, and what the other ranks wait for, if they do."""
        start = time.monotonic()
        try:
            return wait()
        except RuntimeError as failure:
            awaited = "the other ranks" if peer is None else f"rank {peer}"
            what = f"{activity}: rank {self.rank} of {self.axis} waited {time.monotonic() - start:.1f} s for {awaited}"
            raise SilentRankError(f"{what}. {self._whereabouts(what)} ({failure})") from failure

    def _whereabouts(self, what: str) -> str:
        """Who else waited in vain, and for what: the ranks that do not say so are those to look at."""
        # Through the store and not by another collective, which the rank that is silent would keep waiting too.
        store, others = store_of(self._group), [rank for rank in range(self.world) if rank != self.rank]
        said: dict[int, str] = {}
        try:
            store.set(f"dtensor_ring/{self.rank}", what)
            until = time.monotonic() + _GRACE
            while len(said) < len(others) and time.monotonic() < until:
                said |= {r: store.get(k).decode() for r in others if r not in said and store.check([k := f"dtensor_ring/{r}"])}
                time.sleep(0.05)
        except RuntimeError:
            return "The group's store does not answer: the process that holds it, often rank 0's, may have ended."
        silent = [str(rank) for rank in others if rank not in said]
        if silent:
            which = f"Rank {silent[0]} says nothing: it" if len(silent) == 1 else f"Ranks {', '.join(silent)} say nothing: each"
            texts = [f"{which} ended, hangs or makes other calls; read its output first."]
        else:
            texts = ["Every rank waits, so they make different calls."]
        return " ".join([*texts, *(f"[{text}]" for _, text in sorted(said.items()))])
