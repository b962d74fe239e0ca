"""TRL's SFTTrainer on packed texts, with each packed row over two ranks.

    torchrun --nproc-per-node 2 examples/sft_train.py                  # on CPUs, or two GPUs
    python examples/sft_train.py --cp 1                                # one process: the same numbers

A small model with random weights learns the lines of a book, packed into rows; a line attends to itself only.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

from dtensor_ring import RingTrainerMixin, Zigzag, ring_plan

BOOK = Path(__file__).parent / "data" / "alice.txt"


class RingSFTTrainer(RingTrainerMixin, SFTTrainer):
    """SFTTrainer, with sequences over ranks."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer made here, so that the example needs no download: a token for each byte."""
    alphabet = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cp", type=int, default=2, help="ranks a sequence")
    parser.add_argument("--length", type=int, default=512, help="tokens of a packed row")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()

    set_seed(0)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    lines = [line for line in BOOK.read_text().split("\n\n") if line.strip()]
    args = SFTConfig(
        "build/sft_train",
        packing=True,
        max_length=options.length,
        max_steps=options.steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = RingSFTTrainer(
        model=AutoModelForCausalLM.from_config(config),
        args=args,
        train_dataset=Dataset.from_dict({"text": lines}),
        processing_class=tokenizer,
        cp_size=options.cp,
        make_plan=partial(ring_plan, placement=Zigzag(1, per_document=True)),
    )
    trainer.train()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
