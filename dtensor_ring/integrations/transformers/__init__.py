"""Sequence parallelism for Hugging Face models."""

from dtensor_ring.optional import MissingExtraError

try:
    from dtensor_ring.integrations.transformers.ask import ring_plan
    from dtensor_ring.integrations.transformers.materialize import materialize
    from dtensor_ring.integrations.transformers.plan import RingPlan
    from dtensor_ring.integrations.transformers.probe import check_tokenwise
except ImportError as error:
    if not (error.name or "").startswith("transformers"):
        raise  # a fault of ours, which installing transformers would not mend
    raise MissingExtraError.of("transformers", "transformers 5.0 or newer", error) from error

__all__ = ["RingPlan", "check_tokenwise", "materialize", "ring_plan"]
