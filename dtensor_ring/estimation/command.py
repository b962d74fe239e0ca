"""`python -m dtensor_ring estimate ...`: the options of `estimate`, for the command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import get_args

from dtensor_ring.estimation.estimate import AXES, estimate
from dtensor_ring.estimation.memory import PRECISIONS, Checkpoint, Loss, Optimizer, Parallel
from dtensor_ring.estimation.result import Estimate
from dtensor_ring.planning.cost_model import CostModel
from dtensor_ring.planning.devices import CHIPS
from dtensor_ring.planning.documents import Documents
from dtensor_ring.planning.problem import StrategyName

ABOUT = """\
Say what a training step takes of each GPU, before any is asked: memory by phase
and by what it is for, with and without checkpointing, and on a named device the
time of a step. A model is a config.json, a folder that has one, or a name such
as llama-3.1-8b; nothing is downloaded.
"""
EXAMPLES = """\
examples:
  python -m dtensor_ring estimate --model qwen3-8b --mesh dp=2,cp=8 --length 64k
  python -m dtensor_ring estimate --model ./config.json --checkpoint full
  python -m dtensor_ring estimate --model llama-3.1-8b --device h100 --json
"""


def add_arguments(parser: argparse.ArgumentParser, length: Callable[[str], int], lengths: Callable[[str], list[int]]) -> None:
    """Add the options; `length` and `lengths` read numbers of tokens, such as 256k and 10,20."""
    parser.add_argument("--model", required=True, metavar="CONFIG", help="config.json, its folder, or a known name")
    parser.add_argument("--mesh", type=_mesh, default={}, metavar="AXES", help=f"such as dp=2,cp=8; axes are {', '.join(AXES)}")
    parser.add_argument("--length", type=length, metavar="TOKENS", help="of a row, such as 256k (default: 8192, or --documents')")
    parser.add_argument("--documents", type=lengths, metavar="LENGTHS", help="lengths of packed documents, such as 10k,20k")
    parser.add_argument("--batch", type=int, default=1, metavar="ROWS", help="rows that each rank of dp has (default: 1)")
    _choices(parser, "--parallel", get_args(Parallel), "fsdp", "how weights are spread")
    parser.add_argument("--precision", choices=tuple(PRECISIONS), help="(default: mixed with fsdp, else bf16)")
    _choices(parser, "--checkpoint", get_args(Checkpoint), "none", "what is recomputed: nothing, layers, layers but for attention")
    _choices(parser, "--loss", get_args(Loss), "whole", "whether logits exist whole")
    parser.add_argument("--loss-chunk", type=length, metavar="TOKENS", help="whose logits exist at a time, of a chunked loss")
    _choices(parser, "--optimizer", get_args(Optimizer), "adamw", "its states")
    parser.add_argument("--layout", default="zigzag", help="as for plan (default: zigzag)")
    _choices(parser, "--strategy", get_args(StrategyName), "ring", "as for plan")
    parser.add_argument("--stages", type=int, metavar="N", help="as for plan")
    parser.add_argument("--device", choices=tuple(CHIPS), help="estimate times on this GPU too, and whether it fits")
    parser.add_argument("--cost-model", metavar="FILE", help="figures of attention that calibrate has measured, beside --device")
    parser.add_argument("--kernel", metavar="NAME", help="a kernel of these figures (default: the library's choice)")
    parser.add_argument("--gpus-per-host", type=int, default=8, metavar="N", help="for the links (default: 8)")
    parser.add_argument("--json", action="store_true", help="the same as one JSON object: bytes and seconds")


def _choices(parser: argparse.ArgumentParser, name: str, choices: Sequence[str], default: str, about: str) -> None:
    parser.add_argument(name, choices=tuple(choices), default=default, help=f"{about} (default: {default})")


def _mesh(text: str) -> dict[str, int]:
    axes: dict[str, int] = {}
    for part in text.split(","):
        axis, equals, ranks = part.partition("=")
        if not equals or not ranks.isdecimal() or axis in axes:
            raise argparse.ArgumentTypeError(f"takes axes once each and their ranks, such as dp=2,cp=8, found {text!r}")
        axes[axis] = int(ranks)
    return axes


def run(options: argparse.Namespace) -> str:
    """The table, or JSON.

    Raises:
        ValueError: what `estimate` refuses, or a file of figures that cannot be read.
    """
    found = _estimate(options)
    return json.dumps(found.facts(), indent=2) if options.json else str(found)


def _estimate(options: argparse.Namespace) -> Estimate:
    documents = None if options.documents is None else Documents.from_lengths(options.documents)
    length = options.length
    if length is None:
        length = 8192 if documents is None else documents.length
    model = None
    if options.cost_model is not None:
        try:
            model = CostModel.load(options.cost_model)
        except OSError as error:
            raise ValueError(f"--cost-model: {error}") from error
    return estimate(
        options.model,
        options.mesh,
        length,
        documents,
        batch=options.batch,
        parallel=options.parallel,
        precision=options.precision,
        checkpoint=options.checkpoint,
        loss=options.loss,
        loss_chunk=options.loss_chunk,
        optimizer=options.optimizer,
        layout=options.layout,
        strategy=options.strategy,
        stages=options.stages,
        device=options.device,
        cost_model=model,
        kernel=options.kernel,
        gpus_per_host=options.gpus_per_host,
    )


__all__ = ["ABOUT", "EXAMPLES", "add_arguments", "run"]
