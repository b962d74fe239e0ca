"""Sequence parallelism for `Trainer` of transformers and the trainers of TRL: a mixin."""

from dtensor_ring.optional import MissingExtraError

try:
    from dtensor_ring.integrations.trainer.mixin import RingTrainerMixin
except ImportError as error:
    if not (error.name or "").startswith(("accelerate", "transformers")):
        raise  # a fault of ours, which installing them would not mend
    raise MissingExtraError.of("accelerate", "accelerate 1.12 and transformers 5.0, or newer", error) from error

__all__ = ["RingTrainerMixin"]
