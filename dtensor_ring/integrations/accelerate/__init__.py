"""Sequence parallelism for Accelerate: one argument of `Accelerator` makes training over a sequence axis that of one process."""

from dtensor_ring.optional import MissingExtraError

try:
    from dtensor_ring.integrations.accelerate.config import RingParallelismConfig
    from dtensor_ring.integrations.accelerate.ring import Ring, ring_of
except ImportError as error:
    if not (error.name or "").startswith(("accelerate", "transformers")):
        raise  # a fault of ours, which installing accelerate would not mend
    raise MissingExtraError.of("accelerate", "accelerate 1.12 and transformers 5.0, or newer", error) from error

__all__ = ["Ring", "RingParallelismConfig", "ring_of"]
