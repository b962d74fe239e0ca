"""`python -m dtensor_ring plan ...` prints the plan of an attention, `python -m dtensor_ring kernels` what each kernel supports."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dtensor_ring.debug import draw, kernel_table
from dtensor_ring.documents import Documents
from dtensor_ring.layout import Layout
from dtensor_ring.ops.mask import Band, mask_text
from dtensor_ring.ops.schedule import Problem


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m dtensor_ring", description="Look at dtensor_ring.")
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan", help="who holds what, what each step computes and sends, work and balance")
    plan.add_argument("--layout", default="zigzag", help="contiguous, zigzag, stripe or stripe:BLOCK")
    plan.add_argument("--world", type=int, default=4, help="ranks")
    plan.add_argument("--length", type=int, default=64, help="tokens of the sequence")
    masks = plan.add_mutually_exclusive_group()
    masks.add_argument("--full", action="store_true", help="every query sees every key; causal otherwise")
    masks.add_argument("--window", type=int, nargs=2, metavar=("L", "R"), help="keys from L back to R ahead; -1 is unbounded")
    plan.add_argument("--documents", metavar="LENGTHS", help="lengths of packed documents, such as 10,20,34")
    plan.add_argument("--strategy", choices=("ring", "gather"), default="ring", help="ulysses makes no plan: heads change places")
    commands.add_parser("kernels", help="which kernel supports which argument, and why not")
    options = parser.parse_args(arguments)
    if options.command == "kernels":
        print(kernel_table())  # noqa: T201  the command's output
        return 0
    try:
        print(draw(_problem(options)))  # noqa: T201  the command's output
    except ValueError as error:
        parser.error(str(error))
    return 0


def _problem(options: argparse.Namespace) -> Problem:
    if options.world < 1 or options.length < 0:
        raise ValueError(f"need at least one rank and no negative length, found --world {options.world} --length {options.length}")
    documents = None
    if options.documents is not None:
        parts = options.documents.split(",")
        if not all(part.isdecimal() for part in parts):
            raise ValueError(f"--documents takes lengths between commas, such as 10,20,34, found {options.documents!r}")
        documents = Documents.of(Documents.from_lengths(map(int, parts)), options.length)
    window = (-1, -1) if options.window is None else (options.window[0], options.window[1])
    is_causal = not options.full and options.window is None
    band = Band.parse(mask_text(is_causal, window))
    return Problem(Layout.parse(options.layout), band, options.length, options.length, options.world, options.strategy, documents)


if __name__ == "__main__":
    sys.exit(main())
