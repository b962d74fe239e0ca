"""Accelerate on ranks of a pool: a fresh state for each accelerator, and FSDP2 on CPUs, which it has for GPUs alone."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration

from dtensor_ring.integrations.accelerate import RingParallelismConfig


def reset() -> None:
    """Accelerate's state, which all accelerators of a process share, as in a process that has just started."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@contextmanager
def accelerator_of(mode: str = "ddp", environment: dict[str, str] | None = None, **options) -> Iterator[Accelerator]:
    """An accelerator over a sequence axis: "ddp", "plain" or "fsdp2". Options of data loaders are given apart, as `loaders=`."""
    sizes, loaders = dict(options.pop("sizes", {"cp_size": 2})), options.pop("loaders", {})
    sizes |= {name: options.pop(name) for name in ("plan", "ddp") if name in options}
    is_sharded = mode == "fsdp2"
    extra = {"LOCAL_WORLD_SIZE": os.environ["WORLD_SIZE"], **(environment or {})}
    if is_sharded:
        extra["ACCELERATE_TORCH_DEVICE"] = "cpu"
        sharding = {"auto_wrap_policy": "transformer_based_wrap", "state_dict_type": "SHARDED_STATE_DICT"}
        options.setdefault("fsdp_plugin", FullyShardedDataParallelPlugin(fsdp_version=2, **sharding))
    reset()
    with patch.dict(os.environ, extra), warnings.catch_warnings():
        # Of Accelerate and FSDP2 themselves, which use what PyTorch has new names for.
        warnings.filterwarnings("ignore", message="Slicing a flattened dim")
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
        try:
            # Accelerate looks for GPUs to find out what it runs on, when its state is made and never again.
            with patch.object(torch.cuda, "is_available", lambda: True) if is_sharded else nullcontext():
                accelerator = Accelerator(
                    cpu=not is_sharded,
                    parallelism_config=RingParallelismConfig(**{"ddp": mode != "plain", **sizes}),
                    dataloader_config=DataLoaderConfiguration(**loaders),
                    **options,
                )
            yield accelerator
        finally:
            reset()
