"""What a Trainer can be told that would be silently wrong where ranks share sequences, refused by name.

Everything is read off arguments, which every process has alike: all refuse, and none waits for another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import Trainer, TrainingArguments

_TRIED = ("SFTTrainer", "DPOTrainer", "GRPOTrainer")  # of TRL


def cp_size_of(accelerator: Accelerator, cp_size: int | None) -> int:
    """How many ranks share a sequence: the trainer's argument, or ParallelismConfig's.

    Raises:
        TypeError: cp_size is no whole number.
        ValueError: neither says it, they contradict each other, it does not divide the processes, or Accelerate does not see them.
    """
    config: Any = accelerator.parallelism_config
    theirs = config.cp_size if config is not None and config.cp_size > 1 else None
    if cp_size is None and theirs is None:
        raise ValueError("say how many ranks share a sequence: cp_size=, an argument of this trainer")
    size = theirs if cp_size is None else cp_size
    if not isinstance(size, int) or isinstance(size, bool):
        raise TypeError(f"cp_size must be a whole number of ranks, found {type(size).__name__}")
    if theirs is not None and size != theirs:
        raise ValueError(f"cp_size={size}, but ParallelismConfig has cp_size={theirs}: leave one of them out")
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if world != accelerator.num_processes:
        raise ValueError(
            f"the process group has {world} ranks, but Accelerate sees {accelerator.num_processes} processes, so that gradients "
            "would not be averaged: start the script with torchrun or accelerate launch"
        )
    if size < 1 or world % size:
        raise ValueError(
            f"cp_size={size} does not divide the {world} processes: start the script with torchrun --nproc-per-node, a multiple of "
            f"{max(size, 1)}"
        )
    return size


def check_trainer(trainer: Trainer, cp_size: int) -> None:
    """Refuse wrappers, data loading and arguments that would be wrong where several ranks share a sequence.

    Raises:
        NotImplementedError: the text names the argument, and what to do.
    """
    for reason in (*_of_wrapper(trainer.accelerator, trainer.args), *_of_arguments(trainer.args), *_of_trl(trainer, cp_size)):
        raise NotImplementedError(f"{type(trainer).__name__} over {cp_size} ranks a sequence: {reason}")


def check_made(trainer: Trainer) -> None:
    """Refuse what a trainer has found out of its model and data by the end of its constructor.

    Raises:
        NotImplementedError: the text says what, and what to do.
    """
    if getattr(trainer, "aux_loss_enabled", False):
        raise NotImplementedError(
            f"{type(trainer).__name__} computes the routers' loss itself, from a rank's tokens: set router_aux_loss_coef=0.0"
        )


def _of_wrapper(accelerator: Accelerator, args: TrainingArguments) -> list[str]:
    """Why gradients would not be averaged over all processes as DDP and FSDP2 do it."""
    reasons = []
    kind = str(accelerator.distributed_type.value)
    if accelerator.distributed_type.name != "FSDP" and not accelerator.distributed_type.name.startswith("MULTI_"):
        reasons.append(f"processes of type {kind} were not tried: use DDP (torchrun, no plugin) or FSDP2 (fsdp_version 2)")
    if accelerator.distributed_type.name == "FSDP" and not accelerator.is_fsdp2:
        reasons.append("FSDP1 was not tried: use FSDP2 (fsdp_version 2 in fsdp_config)")
    config: Any = accelerator.parallelism_config
    if type(config).__name__ == "RingParallelismConfig":
        reasons.append("RingParallelismConfig plans models too: leave it out, and pass cp_size= to this trainer")
    for name in ("tp_size", "sp_size"):
        if config is not None and getattr(config, name) > 1:
            reasons.append(f"ParallelismConfig({name}={getattr(config, name)}) was not tried beside it: set it to 1")
    if args.n_gpu > 1:
        reasons.append(f"nn.DataParallel over {args.n_gpu} GPUs: start one process for each GPU, with torchrun")
    return reasons


def _of_arguments(args: TrainingArguments) -> list[str]:
    """Why batches would differ among the ranks of a sequence, or what is computed from a part of it."""
    reasons = []
    config: Any = args.accelerator_config
    if config.dispatch_batches:
        reasons.append("accelerator_config dispatch_batches=True gives every process another slice: set it to False or None")
    if not config.use_seedable_sampler:
        reasons.append("accelerator_config use_seedable_sampler=False lets every process draw its own order: set it to True")
    if args.train_sampling_strategy == "batch_rebalance":
        reasons.append(
            "train_sampling_strategy='batch_rebalance' gives every process other samples: use 'random', 'sequential' or "
            "'group_by_length'"
        )
    if args.neftune_noise_alpha is not None:
        reasons.append("neftune_noise_alpha scales its noise by how many tokens a rank has, and not a row: leave it out")
    return reasons


def _of_trl(trainer: Trainer, cp_size: int) -> list[str]:
    """Why a trainer of TRL would compute something from a part of a sequence, or differently on its ranks."""
    theirs = [c.__name__ for c in type(trainer).__mro__ if c.__module__.startswith("trl.") and not c.__name__.startswith("_")]
    if theirs and not set(theirs) & set(_TRIED):
        return [f"{theirs[0]} was not tried: of TRL's, {', '.join(_TRIED)} are supported"]
    return _of_grpo(trainer.args, cp_size) if "GRPOTrainer" in theirs else []


def _of_grpo(args: Any, cp_size: int) -> list[str]:  # noqa: ANN401
    """What generates otherwise than the model itself, or cannot be dealt out to fewer batches than processes."""
    reasons = []
    if args.use_vllm:
        reasons.append("use_vllm=True was not tried: set it to False, so that the model itself generates")
    if args.use_transformers_continuous_batching:
        reasons.append("use_transformers_continuous_batching=True sets an attention of its own: set it to False")
    evaluated = args.per_device_eval_batch_size * args.world_size
    for rows, per_prompt, name in (
        (args.generation_batch_size, args.num_generations, "num_generations"),
        (evaluated, args.num_generations_eval or args.num_generations, "num_generations_eval"),
    ):
        if rows // cp_size % per_prompt:
            reasons.append(
                f"{name}={per_prompt} does not divide the {rows // cp_size} completions that all processes have of different "
                f"prompts ({rows} over {cp_size}): change it or the batch sizes"
            )
    return reasons
