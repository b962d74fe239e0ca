"""Sequence parallelism for Hugging Face models."""

from dtensor_ring.integrations.transformers.plan import RingPlan, ring_plan

__all__ = ["RingPlan", "ring_plan"]
