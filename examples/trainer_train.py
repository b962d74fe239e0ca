"""transformers' Trainer with each sequence over two ranks.

    torchrun --nproc-per-node 2 examples/trainer_train.py              # on CPUs, or two GPUs
    torchrun --nproc-per-node 2 examples/trainer_train.py --fsdp       # parameters sharded over both GPUs
    python examples/trainer_train.py --cp 1                            # one process: the same numbers

A small model with random weights learns a book byte by byte. Loss, gradient norm, evaluation and accuracy are those of one process.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, EvalPrediction, LlamaConfig, Trainer, TrainingArguments, set_seed

from dtensor_ring import RingTrainerMixin

BOOK = Path(__file__).parent / "data" / "alice.txt"


class RingTrainer(RingTrainerMixin, Trainer):
    """Trainer, with sequences over ranks."""


class Bytes(Dataset[dict[str, Any]]):
    """Parts of a book as bytes; its first half, or its second."""

    def __init__(self, length: int, half: int) -> None:
        text = torch.tensor(list(BOOK.read_bytes()))
        self.rows = text.chunk(2)[half].unfold(0, length, length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """How many bytes are guessed right."""
    guesses, labels = np.asarray(prediction.predictions)[:, :-1], np.asarray(prediction.label_ids)[:, 1:]
    return {"accuracy": float((guesses == labels).mean())}


def most_likely(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The guess for each byte: all that is kept of the logits."""
    return logits.argmax(-1)


def main() -> None:
    """Train and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cp", type=int, default=2, help="ranks a sequence")
    parser.add_argument("--length", type=int, default=512, help="bytes of a row")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--fsdp", action="store_true", help="shard parameters, on GPUs")
    options = parser.parse_args()

    set_seed(0)
    config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    model = AutoModelForCausalLM.from_config(config)
    args = TrainingArguments(
        "build/trainer_train",
        max_steps=options.steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        fsdp="full_shard" if options.fsdp else None,
        fsdp_config={"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]} if options.fsdp else None,
    )
    evaluated = torch.utils.data.Subset(Bytes(options.length, half=1), range(5))
    trainer = RingTrainer(
        model=model,
        args=args,
        train_dataset=Bytes(options.length, half=0),
        eval_dataset=evaluated,
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=most_likely,
        cp_size=options.cp,
    )
    trainer.train()
    trainer.evaluate()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
