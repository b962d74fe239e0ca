"""`verify`: a model under its plan beside one process, module by module."""

from dtensor_ring.optional import MissingExtraError

try:
    from dtensor_ring.integrations.verify.verifying import verify
except ImportError as error:
    if not (error.name or "").startswith("transformers"):
        raise  # a fault of ours, which installing transformers would not mend
    raise MissingExtraError.of("transformers", "transformers 5.0 or newer", error) from error

__all__ = ["verify"]
