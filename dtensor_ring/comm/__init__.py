"""How bytes move: one interface, and several transports behind it, of which `choose` gives each process group one."""

from dtensor_ring.comm.alone import AloneTransport
from dtensor_ring.comm.choose import (
    TRANSPORTS,
    TransportName,
    choose_transport,
    explain_transport,
    transport_along,
    transport_of,
    transports_of,
    use_transport,
)
from dtensor_ring.comm.loopback import LoopbackTransport
from dtensor_ring.comm.process_group import ProcessGroupTransport, axis_name, several_ranks
from dtensor_ring.comm.symmetric_memory import SymmetricMemoryTransport
from dtensor_ring.comm.transport import Message, Pending, SilentRankError, Traffic, Transfers, Transport, TransportRequirements

__all__ = [
    "TRANSPORTS",
    "AloneTransport",
    "LoopbackTransport",
    "Message",
    "Pending",
    "ProcessGroupTransport",
    "SilentRankError",
    "SymmetricMemoryTransport",
    "Traffic",
    "Transfers",
    "Transport",
    "TransportName",
    "TransportRequirements",
    "axis_name",
    "choose_transport",
    "explain_transport",
    "several_ranks",
    "transport_along",
    "transport_of",
    "transports_of",
    "use_transport",
]
