"""The arguments of `python -m dtensor_ring verify`, read without torch: see `dtensor_ring/__init__.py`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import get_args

from dtensor_ring.planning.problem import StrategyName

DTYPES = ("float32", "bfloat16", "float64")
ABOUT = """\
Run a Hugging Face model in one process and sequence-parallel over --cp
processes of this machine (gloo, no GPU needed), with random tokens, and
compare loss, logits, every gradient and every module. Prints a table, and the
first module where the two part. Exit status 0 if they are the same, 1 if not.

--model is a folder with a config.json and weights, a config.json (then the
weights are random), or a .gguf file. Nothing is downloaded. Each process holds
the whole model; --layers 2 makes a large one small.

Under torchrun the processes are torchrun's, and --cp is their number.
"""
EXAMPLES = """\
examples:
  python -m dtensor_ring verify --model ~/models/my-llama --cp 4
  python -m dtensor_ring verify --model config.json --layers 2 --packed
  python -m dtensor_ring verify --model my-llama --layout contiguous --json
  torchrun --nproc-per-node 4 -m dtensor_ring verify --model my-llama
"""


def add_arguments(parser: argparse.ArgumentParser, length: Callable[[str], int]) -> None:
    """Adds the options.

    Args:
        parser: of the command.
        length: reads a number of tokens, such as 64Ki.
    """
    parser.add_argument("--model", required=True, metavar="PATH", help="a folder, a config.json or a .gguf file")
    parser.add_argument("--cp", type=int, metavar="RANKS", help="processes that share the sequence (default: 2)")
    parser.add_argument("--length", type=length, metavar="TOKENS", help="tokens of a row (default: 64 for each process)")
    parser.add_argument("--batch", type=int, default=2, metavar="ROWS", help="rows (default: 2)")
    parser.add_argument("--packed", action="store_true", help="pack five documents of different lengths into each row")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: float32)")
    parser.add_argument(
        "--layout", default="zigzag", help="contiguous, zigzag, stripe, stripe:BLOCK or zigzag/documents (default: zigzag)"
    )
    parser.add_argument("--strategy", choices=get_args(StrategyName), help="as in ring_plan (default: ring)")
    parser.add_argument("--layers", type=int, metavar="N", help="only the first N layers of the model")
    parser.add_argument("--unlisted", action="store_true", help="a type of model that is not listed, as in ring_plan")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of tokens and random weights (default: 0)")
    parser.add_argument("--no-edge-cases", action="store_true", help="only the batch itself, not those that are made of it")
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")
