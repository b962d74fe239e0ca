"""A Trainer in one process and the same over ranks: arguments, data and what was logged, alike for both."""

from __future__ import annotations

import logging
import os
import warnings
from contextlib import contextmanager
from unittest.mock import patch

import torch
from models import CONFIGS, build
from transformers import Trainer, TrainingArguments

from dtensor_ring import RingTrainerMixin


class RingTrainer(RingTrainerMixin, Trainer):
    pass


@contextmanager
def fresh_accelerate(fsdp: bool = False):
    """Accelerate's state as in a process that has just started; with `fsdp` it takes gloo and CPUs for GPUs."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DistributedType

    def reset():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    logging.getLogger("transformers").setLevel(logging.ERROR)
    threads = torch.get_num_threads()
    reset()
    try:
        with warnings.catch_warnings(), patch.dict(os.environ, ACCELERATE_TORCH_DEVICE="cpu" if fsdp else ""):
            if not fsdp:
                del os.environ["ACCELERATE_TORCH_DEVICE"]
            warnings.simplefilter("ignore")
            as_gpus = ("gloo", DistributedType.MULTI_GPU)
            with patch.object(PartialState, "_prepare_backend", lambda *_: as_gpus) if fsdp else patch.dict({}):
                yield
    finally:
        reset()
        torch.set_num_threads(threads)


def rows(count=8, length=17, seed=1):
    """Samples of unlike lengths, whose labels are counted otherwise in each."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for i in range(count):
        ids = torch.randint(1, 64, (length,), generator=generator)
        labels = ids.clone()
        labels[: 2 + i % 5] = -100
        samples.append({"input_ids": ids, "labels": labels})
    return samples


def make_model():
    return build(CONFIGS["llama"]()).float()


def arguments(folder, **changed) -> TrainingArguments:
    given = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "seed": 3,
    }
    return TrainingArguments(**(given | changed))


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]
