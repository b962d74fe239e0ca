"""`RingParallelismConfig`: Accelerate's own argument for parallelism, with our attention over its sequence axis.

    accelerator = Accelerator(parallelism_config=RingParallelismConfig(cp_size=2))

    4 processes, DDP      mesh (dp_replicate 2, cp 2)     ranks 0 1 | 2 3: each pair shares a sequence
    4 processes, FSDP2    mesh (dp_shard 2, cp 2)         the same, parameters sharded over all four

Accelerate hands every `Accelerator` that is made with it to the configuration, which gives that one instance methods of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import override

from dtensor_ring.integrations.accelerate.checks import check_accelerator, check_processes, check_sizes, sizes_of
from dtensor_ring.integrations.accelerate.ring import Ring
from dtensor_ring.integrations.transformers.ask import ring_plan
from dtensor_ring.integrations.transformers.plan import RingPlan


@dataclass(repr=False)
class RingParallelismConfig(ParallelismConfig):
    """How an `Accelerator` spreads training: over a sequence axis of `cp_size` ranks, and the other processes as data parallel.

        from dtensor_ring.integrations.accelerate import RingParallelismConfig

        accelerator = Accelerator(parallelism_config=RingParallelismConfig(cp_size=2))
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)        # everything else as ever

    Sizes that are not given are those of `accelerate launch --use_parallelism_config --parallelism_config_cp_size 2`. With
    `cp_size` 1 the script runs as with Accelerate alone, on one process too.

    Then, for this accelerator and what it prepares:

    - `prepare` applies `plan` to every model: with an FSDP plugin of version 2 before it shards them over data and sequence ranks;
      else before DDP over all processes.
    - Data loaders give the ranks of a sequence axis one batch, which its first rank has read.
    - The loss of a model is that of the whole batch on every rank of the axis, also where `num_items_in_batch` is passed, and
      gradients are averaged over all processes. So a script is right that is right for as many DDP processes: a sequence axis
      is a number of processes with the same batch.
    - `gather_for_metrics` counts the samples of a sequence axis once; schedulers step as often as batches are read side by side.

    Args:
        dp_replicate_size: processes that hold the same parameters. Data axes left at 1 become what the processes come to.
        dp_shard_size: processes that parameters are sharded over, beside the sequence axis: needs FSDP2.
        tp_size: must be 1 beside a sequence axis.
        cp_size: ranks that share a sequence.
        cp_backend: as in Accelerate, whose own sequence parallelism is not used: `cp_enabled` is False.
        sp_size: must be 1 beside a sequence axis.
        sp_backend: as in Accelerate.
        tp_handler: as in Accelerate.
        cp_handler: must be left out: it says how Accelerate's own attention exchanges keys.
        sp_handler: as in Accelerate.
        plan: makes the plan of a model that is prepared, or None for one that every rank runs on whole sequences.
            `ring_plan` by default; `lambda model: ring_plan(model, Stripe(1), stages=2)` passes arguments.
        ddp: False leaves models without a wrapper: `accelerator.backward` averages gradients, where it would synchronize them.

    Raises (where an `Accelerator` is made with it, on every rank):
        ValueError: sizes do not fit each other or the number of processes.
        NotImplementedError: tensor parallelism, DeepSpeed, Megatron-LM, FSDP1 or XLA beside a sequence axis.
    """

    plan: Callable[[Any], RingPlan | None] = ring_plan
    ddp: bool = True

    @override
    def __post_init__(self) -> None:
        # Accelerate refuses replicas beside a sequence axis, since its own attention needs FSDP: they are set after its checks.
        replicas = self.dp_replicate_size
        if replicas is None:
            replicas = int(os.environ.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "1"))
        self.dp_replicate_size = min(replicas, 1)  # a size below 1 is its to refuse
        handler = self.cp_handler
        super().__post_init__()
        self._set_size("dp_replicate", replicas)
        self.cp_handler = handler
        check_sizes(self)

    @property
    @override
    def cp_enabled(self) -> bool:
        """Whether Accelerate's own sequence parallelism is on: never, so that it attaches no hooks and asks for no FSDP plugin."""
        return False

    @property
    def _cp_axis(self) -> list[str]:
        return ["cp"] if sizes_of(self)["cp"] > 1 else []

    @property
    @override
    def non_dp_dim_names(self) -> list[str]:
        """Axes whose ranks receive the same batch."""
        return [*self._cp_axis, *super().non_dp_dim_names]

    @property
    @override
    def non_data_parallel_size(self) -> int:
        """By what Trainer divides its count of labels and not its factor for the loss: 1, as a sequence axis counts as data."""
        return super().non_data_parallel_size // sizes_of(self)["cp"]

    @property
    @override
    def dp_shard_cp_dim_names(self) -> list[str]:
        """Axes over which FSDP2 shards parameters."""
        return [*super().dp_shard_cp_dim_names, *self._cp_axis]

    @property
    @override
    def dp_cp_dim_names(self) -> list[str]:
        """Axes over which gradients are averaged."""
        return [*super().dp_cp_dim_names, *self._cp_axis]

    @override
    def build_device_mesh(self, device_type: str) -> DeviceMesh | None:
        """The mesh, in Accelerate's order of axes; data axes that were left at 1 take the processes that remain."""
        processes = PartialState().num_processes
        check_processes(self, processes)
        if self.data_parallel_size == 1 and self.total_size < processes:
            is_sharded = AcceleratorState().distributed_type == DistributedType.FSDP
            self._set_size("dp_shard" if is_sharded else "dp_replicate", processes // self.total_size)
        return super().build_device_mesh(device_type)

    @override
    def _validate_accelerator(self, accelerator: Accelerator) -> None:
        """What Accelerate calls with every accelerator that is made with this configuration."""
        if sizes_of(self)["cp"] > 1:
            check_accelerator(self, accelerator)
        elif accelerator.distributed_type != DistributedType.MULTI_CPU:
            super()._validate_accelerator(accelerator)
        Ring(accelerator, self.plan, ddp=self.ddp).install()
