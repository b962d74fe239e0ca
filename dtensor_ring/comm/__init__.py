"""How bytes move: one interface, carried out by a process group or by threads in one process."""

from dtensor_ring.comm.alone import AloneTransport
from dtensor_ring.comm.loopback import LoopbackTransport
from dtensor_ring.comm.process_group import ProcessGroupTransport, transport_of
from dtensor_ring.comm.transport import Message, Pending, Traffic, Transport

__all__ = [
    "AloneTransport",
    "LoopbackTransport",
    "Message",
    "Pending",
    "ProcessGroupTransport",
    "Traffic",
    "Transport",
    "transport_of",
]
