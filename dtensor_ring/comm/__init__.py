"""How bytes move: one interface, carried out by a process group or by threads in one process."""

from dtensor_ring.comm.alone import AloneTransport
from dtensor_ring.comm.loopback import LoopbackTransport
from dtensor_ring.comm.process_group import (
    ProcessGroupTransport,
    axis_name,
    several_ranks,
    transport_along,
    transport_of,
    transports_of,
)
from dtensor_ring.comm.transport import Message, Pending, SilentRankError, Traffic, Transport

__all__ = [
    "AloneTransport",
    "LoopbackTransport",
    "Message",
    "Pending",
    "ProcessGroupTransport",
    "SilentRankError",
    "Traffic",
    "Transport",
    "axis_name",
    "several_ranks",
    "transport_along",
    "transport_of",
    "transports_of",
]
