"""The transports, and how that of a process group is chosen: the first that does not refuse, in this order, or the one asked for.

    transport_of(group)                       chosen at the first call, kept with the group, gone with it
    use_transport(mesh["cp"], "alone")        every rank: the transport that the group has from now on, by name
    use_transport(mesh["cp"], Mine)           the same with a class of one's own
    use_transport(mesh["cp"], None)           back to the first that does not refuse

All ranks of a group come to the same choice: `Transport.refuses` answers alike on each, `use_transport` compares what ranks ask
for, and every meeting of `rank_checks` compares the names of the transports.
"""

from __future__ import annotations

from threading import Lock
from typing import Literal
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dtensor_ring.comm.alone import AloneTransport
from dtensor_ring.comm.loopback import LoopbackTransport
from dtensor_ring.comm.process_group import ProcessGroupTransport, axis_name
from dtensor_ring.comm.rank_checks import meet, number_of, refused_together
from dtensor_ring.comm.symmetric_memory import SymmetricMemoryTransport
from dtensor_ring.comm.transport import Transport, TransportRequirements

TransportName = Literal["alone", "process_group", "symmetric_memory", "loopback"]

# Symmetric memory comes after the process group, which refuses no ranks that are processes: it carries what asks for it by name,
# until it is measured on several GPUs.
TRANSPORTS: dict[str, type[Transport]] = {
    transport.name: transport for transport in (AloneTransport, ProcessGroupTransport, SymmetricMemoryTransport, LoopbackTransport)
}
# By group, and gone with it: a group that is made again, also under the name of one that ended, chooses and compares anew.
_transports: WeakKeyDictionary[dist.ProcessGroup, Transport] = WeakKeyDictionary()
_LOCK = Lock()


def choose_transport(asked: str | type[Transport] | None, need: TransportRequirements) -> type[Transport]:
    """The transport asked for, by name or as a class, or with None the first in `TRANSPORTS` that does not refuse.

    Raises:
        TypeError: what is asked for is neither a name nor a class of transports.
        ValueError: no transport has that name, or a class has the name of another transport.
        NotImplementedError: the transport, or with None every transport, refuses; the text lists each with its reason.
    """
    reasons = {}
    for candidate in TRANSPORTS.values() if asked is None else (_transport_class(asked),):
        reason = candidate.refuses(need)
        if reason is None:
            return candidate
        reasons[candidate.name] = reason
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    who = "every transport refuses this group" if asked is None else f"transport {next(iter(reasons))!r} refuses this group"
    raise NotImplementedError(f"{who}. {listed}")


def _transport_class(asked: str | type[Transport]) -> type[Transport]:
    if isinstance(asked, str):
        if asked not in TRANSPORTS:
            raise ValueError(
                f"unknown transport {asked!r}: choose one of {', '.join(TRANSPORTS)}, a class of your own, or None for the first "
                "that does not refuse"
            )
        return TRANSPORTS[asked]
    if not isinstance(asked, type) or not issubclass(asked, Transport):
        raise TypeError(f"a transport is chosen by its name or as a subclass of dtensor_ring.comm.Transport, found {asked!r}")
    if TRANSPORTS.get(asked.name, asked) is not asked:
        raise ValueError(f"{asked.__name__} has the name of another transport, {asked.name!r}: give the class a name of its own")
    return asked


def transport_of(group: dist.ProcessGroup | None, axis: str | None = None) -> Transport:
    """The transport of a process group: one for each, kept as long as the group lives, with its traffic count.

    Sends nothing, so that a rank may ask for it alone. `axis` is what errors call the group from now on. Without a group this
    rank is alone.
    """
    if group is None:
        return AloneTransport()
    # One for each group and not one for each call: what ranks have compared, the count of bytes and a first meeting belong to the
    # group, and must be the same whichever layer or function asks.
    transport = _transports.get(group)
    if transport is None:
        need = TransportRequirements.of(group)
        # Two threads may both come here first. They choose without the lock, since a choice may wait for other ranks; the transport
        # that is there first counts for both, or each thread would compare and count by itself.
        chosen = choose_transport(None, need).connect(need)
        with _LOCK:
            transport = _transports.setdefault(group, chosen)
    if axis is not None:
        transport.axis = axis
    return transport


def transport_along(mesh: DeviceMesh, i: int = 0) -> Transport:
    """Give the transport of a mesh axis, which errors name after it from now on."""
    return transport_of(mesh.get_group(i), f"mesh axis {axis_name(mesh, i)}")


def transports_of(mesh: DeviceMesh) -> list[Transport]:
    """Give the transports of all axes of a mesh, in the order of the axes."""
    return [transport_along(mesh, i) for i in range(mesh.ndim)]


def use_transport(where: DeviceMesh | dist.ProcessGroup, transport: TransportName | type[Transport] | None) -> None:
    """Choose what carries the tensors of a group from now on; every rank of the group makes this call.

        use_transport(mesh["cp"], "process_group")
        out = ring_attention(q, k, v)                 # and its backward, and redistribute, over that transport

    The choice belongs to the group and ends with it; other groups, also of the same ranks, keep theirs. Bytes counted so far stay
    counted. What the ranks have compared before is compared again.

    Args:
        where: a mesh of one axis, such as `mesh["cp"]`, or a process group.
        transport: a name in `dtensor_ring.comm.TRANSPORTS`, or a class of your own: a subclass of `Transport`, best of
            `ProcessGroupTransport`, with a `name` and whatever methods carry tensors in another manner. None is the first of
            `TRANSPORTS` that does not refuse.

    Raises:
        TypeError: not a mesh or group, or not a transport.
        ValueError: the mesh has more than one axis, no transport has that name, or ranks ask for different ones. On every rank.
        NotImplementedError: the transport refuses the group; the text has its reason. On every rank.
    """
    before = _transport_at(where)
    group = where.get_group(0) if isinstance(where, DeviceMesh) else where
    # Ranks meet over the transport that all of them still have. Over the new one a rank that refuses, or asks for another, could
    # not say so.
    with refused_together(lambda: [before]):
        need = TransportRequirements.of(group)
        chosen = choose_transport(transport, need)
    for rank, (number,) in enumerate(meet(before, "use_transport", [number_of(chosen.name)])):
        if number != number_of(chosen.name):
            raise ValueError(
                f"use_transport: rank {before.rank} of {before.axis} asks for {chosen.name!r}, rank {rank} for another transport: "
                "every rank of a group must use the same"
            )
    # A new end has compared nothing yet. That is the same on all ranks, so they meet again at their next call, all of them.
    if type(before) is not chosen:
        after = _transports[group] = chosen.connect(need)
        # The count goes on, so that `traffic(mesh).since(before)` holds across the change.
        after.axis, after.traffic, after.batches = before.axis, before.traffic, before.batches


def explain_transport(where: DeviceMesh | dist.ProcessGroup) -> str:
    """Which transport carries the tensors of a group, and why the others do not: one line each, in the order of the choice.

    On GPUs every rank of the group makes this call: a transport may ask what machines the others are on, and waits for them.
    """
    transport = _transport_at(where)
    need = TransportRequirements.of(where.get_group(0) if isinstance(where, DeviceMesh) else where)
    lines = [f"{transport.axis}, {transport.world} ranks: {transport.name}"]
    for name, candidate in TRANSPORTS.items():
        if name != transport.name:
            lines.append(f"  {name}: {candidate.refuses(need) or 'does not refuse'}")
    return "\n".join(lines)


def _transport_at(where: DeviceMesh | dist.ProcessGroup) -> Transport:
    if isinstance(where, DeviceMesh):
        if where.ndim != 1:
            raise ValueError(f"a transport belongs to one mesh axis, such as mesh['cp'], found {where.ndim} axes")
        return transport_along(where)
    if not isinstance(where, dist.ProcessGroup):
        raise TypeError(f"a transport belongs to a mesh axis or a process group, found {where!r}")
    return transport_of(where)
