"""What would be silently wrong, or hang, with a sequence axis under Accelerate: refused by name, alike on every rank."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

_REMEDY = "use FSDP2 (FullyShardedDataParallelPlugin(fsdp_version=2)) or DDP"


def sizes_of(config: ParallelismConfig) -> dict[str, int]:
    """The number of ranks of each axis, by its name; after `__post_init__` no size is open."""
    return {name: getattr(config, f"{name}_size") or 1 for name in ("dp_replicate", "dp_shard", "cp", "sp", "tp")}


def check_sizes(config: ParallelismConfig) -> None:
    """Refuse what no number of processes makes right.

    Raises:
        ValueError: a handler for Accelerate's own sequence parallelism.
        NotImplementedError: tensor parallelism beside a sequence axis.
    """
    if config.cp_handler is not None:
        raise ValueError(
            f"cp_handler={config.cp_handler!r} says how Accelerate's own attention exchanges keys, which is not used: leave it "
            "out, and pass plan=lambda model: ring_plan(model, strategy=...) for ours"
        )
    sizes = sizes_of(config)
    if sizes["cp"] > 1 and sizes["tp"] > 1:
        raise NotImplementedError(
            f"cp_size={config.cp_size} with tp_size={config.tp_size} is not supported under Accelerate, which prepares models "
            "with tensor parallelism in its own way: set tp_size=1, or apply parallelize_module and ring_plan in a loop of your own"
        )


def check_processes(config: ParallelismConfig, processes: int) -> None:
    """Raises ValueError unless the sizes can make up the processes."""
    total = config.total_size
    if total == processes or (config.data_parallel_size == 1 and processes % total == 0):
        return
    alone = " Accelerate found one process: start the script with accelerate launch or torchrun, and on CPUs pass cpu=True"
    raise ValueError(
        f"cp_size={config.cp_size}, dp_replicate_size={config.dp_replicate_size}, dp_shard_size={config.dp_shard_size} and "
        f"tp_size={config.tp_size} make {total} processes, found {processes}: start a multiple of {total}, or change the sizes."
        + (alone if processes == 1 else "")
    )


def check_accelerator(config: ParallelismConfig, accelerator: Accelerator) -> None:
    """Refuse engines that gradients of parts of a sequence were not tried with.

    Raises:
        NotImplementedError: DeepSpeed, Megatron-LM, XLA, FSDP1.
        ValueError: sharded parameters without FSDP2.
    """
    kind = accelerator.distributed_type
    sharded = kind == DistributedType.FSDP
    if not (sharded or kind == DistributedType.MULTI_CPU or accelerator.multi_device):
        raise NotImplementedError(f"cp_size={config.cp_size} with {kind.value} is not supported: {_REMEDY}")
    if sharded and not accelerator.is_fsdp2:
        raise NotImplementedError(f"cp_size={config.cp_size} with FSDP1 is not supported: {_REMEDY}")
    if not sharded and sizes_of(config)["dp_shard"] > 1:
        raise ValueError(
            f"dp_shard_size={config.dp_shard_size} shards parameters, which needs "
            "fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2); without it leave dp_shard_size out"
        )


def check_data_loader(loader: DataLoader[object], accelerator: Accelerator) -> None:
    """Refuse loaders whose batches would be lost or come twice.

    Raises:
        ValueError: a sampler that shares samples out over ranks, which Accelerate does again.
        NotImplementedError: a stateful data loader.
    """
    samplers = [loader.sampler, getattr(loader.sampler, "sampler", None)]
    batches = loader.batch_sampler
    samplers += [batches, getattr(batches, "sampler", None)] if isinstance(batches, BatchSampler) else [batches]
    for sampler in samplers:
        if isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
            raise ValueError(
                f"this data loader has a {type(sampler).__name__} over {sampler.num_replicas} ranks, and Accelerate shares samples "
                "out once more, so that most would never be read: prepare a loader with shuffle=True or a plain sampler"
            )
    if accelerator.use_stateful_dataloader:
        raise NotImplementedError(
            "use_stateful_dataloader=True is not supported beside a sequence axis, whose other ranks read nothing: set it to "
            "False, and resume with accelerator.skip_first_batches"
        )
