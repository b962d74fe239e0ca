"""DTensor placements for a sequence, and the functions that make and move such DTensors."""

from dtensor_ring.placements.placement import Contiguous, SequencePlacement, Stripe, Zigzag
from dtensor_ring.placements.redistribute import distribute_tensor, from_local, full_tensor, redistribute

__all__ = [
    "Contiguous",
    "SequencePlacement",
    "Stripe",
    "Zigzag",
    "distribute_tensor",
    "from_local",
    "full_tensor",
    "redistribute",
]
