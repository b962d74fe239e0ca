"""What a training step takes of a GPU, in memory and time, from a model's config alone."""

from __future__ import annotations

from dtensor_ring.estimation.estimate import estimate
from dtensor_ring.estimation.result import Estimate

__all__ = ["Estimate", "estimate"]
