"""A Trainer in one process and the same over ranks: arguments, data and what was logged, alike for both.

Trainers, TRL and datasets are imported by the ranks that run them: no other test needs them.
"""

from __future__ import annotations

import logging
import os
import warnings
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from models import CONFIGS, build

RANK_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
FSDP = {
    "fsdp": "full_shard",
    "fsdp_config": {"fsdp_version": 2, "version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
}


@contextmanager
def fresh_accelerate(kind: str = "ddp"):
    """Accelerate's state as in a process that has just started, and forgotten afterwards.

    With "alone" it is one process, with "fsdp" it takes gloo and CPUs for GPUs, since it refuses FSDP2 on CPUs.
    """
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DistributedType

    def reset():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    logging.getLogger("transformers").setLevel(logging.ERROR)
    threads = torch.get_num_threads()
    reset()
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        stack.callback(reset)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(patch.dict(os.environ))
        if kind == "alone":
            for name in RANK_NAMES:
                os.environ.pop(name, None)
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"  # and not "cpu:0", which torch.load knows no place for
        if kind == "fsdp":
            stack.enter_context(patch.object(PartialState, "_prepare_backend", lambda *_: ("gloo", DistributedType.MULTI_GPU)))
        yield


def ring(base):
    """A trainer's class with the mixin."""
    from dtensor_ring import RingTrainerMixin

    return type(f"Ring{base.__name__}", (RingTrainerMixin, base), {})


def make_model():
    return build(CONFIGS["llama"]()).float()


def samples(count, length=17, seed=1):
    """Samples whose labels count unlike often."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        ids = torch.randint(1, 64, (length,), generator=generator)
        labels = ids.clone()
        labels[: 2 + i % 5] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def options(folder, kind="ddp", **changed):
    """Arguments of a short training with plain SGD, whose differences are those of gradients."""
    given = {
        "output_dir": str(folder),
        "use_cpu": kind != "fsdp",
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "seed": 3,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    return given | (FSDP if kind == "fsdp" else {}) | changed


_TIMES = ("runtime", "per_second", "step_time", "epoch", "preparation", "profiling")


def outcome(trainer):
    """All that was logged, times aside, and the weights: values of one process, on every rank."""
    from torch.distributed.tensor import DTensor

    history = [
        {name: value for name, value in entry.items() if not any(time in name for time in _TIMES)}
        for entry in trainer.state.log_history
    ]
    weights = [p.full_tensor() if isinstance(p, DTensor) else p for p in trainer.model.parameters()]
    return history, torch.cat([p.detach().flatten() for p in weights])


def assert_same(mine, reference, rtol=1e-5, atol=1e-6):
    """Logs and weights of a rank beside those of one process."""
    for step, wanted in zip(mine[0], reference[0], strict=True):
        assert step.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(
                torch.tensor(step[name], dtype=torch.float64),
                torch.tensor(value, dtype=torch.float64),
                rtol=rtol,
                atol=atol,
                msg=lambda text, name=name: f"{name}: {text}",
            )
    torch.testing.assert_close(mine[1], reference[1], rtol=rtol, atol=atol)
