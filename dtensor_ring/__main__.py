"""`python -m dtensor_ring plan ...` prints the plan of an attention, `estimate` what a training step takes of a GPU.

`verify` runs a model over several processes and beside them in one, `kernels` and `transports` say what each of these supports, and
`calibrate` measures a GPU. `plan` and `estimate` load no torch: see `dtensor_ring/__init__.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
from collections.abc import Sequence
from typing import get_args

from dtensor_ring.estimation import command as estimating
from dtensor_ring.planning.cost_model import CostModel
from dtensor_ring.planning.costs import LLAMA_8B, AttentionShape
from dtensor_ring.planning.devices import KNOWN
from dtensor_ring.planning.documents import Documents
from dtensor_ring.planning.layout import Layout
from dtensor_ring.planning.mask import Band, mask_text
from dtensor_ring.planning.predict import Predictor
from dtensor_ring.planning.problem import AttentionProblem, StrategyName
from dtensor_ring.tools.drawing import draw, summary
from dtensor_ring.tools.explain import shape_of_heads
from dtensor_ring.tools.facts import facts
from dtensor_ring.tools.predicted import predicted, predicted_text, predictor_for, staged_by
from dtensor_ring.tools.verify_arguments import ABOUT as ABOUT_VERIFY
from dtensor_ring.tools.verify_arguments import EXAMPLES as EXAMPLES_OF_VERIFY
from dtensor_ring.tools.verify_arguments import add_arguments as add_verify_arguments

_LENGTH = 64
_UNITS = {"": 1, "k": 1000, "M": 1000**2, "G": 1000**3, "Ki": 1024, "Mi": 1024**2, "Gi": 1024**3}

_ABOUT = """\
Look at plans of attention, what training takes, kernels and transports; verify
models.
"""
_EXAMPLES = """\
examples:
  python -m dtensor_ring plan --layout zigzag --world 4 --length 64
  python -m dtensor_ring plan --world 1024 --length 10M --summary
  python -m dtensor_ring estimate --model qwen3-8b --mesh dp=2,cp=8 --length 64k
  python -m dtensor_ring kernels
  python -m dtensor_ring transports
"""
_ABOUT_CALIBRATE = """\
Measure this machine's GPU for a minute and write its figures as JSON: kernels,
merging, copying, host time. Read them with dtensor_ring.CostModel.load, and
pass them as cost_model= to ring_attention, ring_plan or explain, or as
--cost-model to plan. Its "link" is null: then ranks take what the transport
says of theirs; write {"near": bytes a second inside a host, "far": between
hosts, "latency": seconds} there for another one.
"""
_ABOUT_PLAN = """\
Print a plan: who holds what, which step computes each score, what every step
fetches and sends, and the work of each rank; or with --strategy ulysses, which
heads each rank gets. More than 8 ranks are shown as an excerpt; --rank shows
others, --summary the totals of all.

A length is a number of tokens, also with k, M or G (1000, 1000^2, 1000^3) or
Ki, Mi or Gi (1024, 1024^2, 1024^3) after it: 10k, 1.5M, 64Ki.
"""
_EXAMPLES_OF_PLAN = """\
examples:
  python -m dtensor_ring plan --layout zigzag --world 4 --length 64
  python -m dtensor_ring plan --layout stripe:4 --world 2 --window 16 0
  python -m dtensor_ring plan --layout zigzag/documents --documents 10,20,34
  python -m dtensor_ring plan --strategy ulysses --heads 32 --kv-heads 8
  python -m dtensor_ring plan --world 64 --length 1M --rank 0,63
  python -m dtensor_ring plan --world 1024 --length 10M --summary
  python -m dtensor_ring plan --world 8 --length 64Ki --json
  python -m dtensor_ring plan --world 8 --length 64Ki --summary --device h100
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m dtensor_ring", description=_ABOUT, epilog=_EXAMPLES, formatter_class=_formatter
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    planning = commands.add_parser(
        "plan",
        help="who holds what, what each step computes and sends, work and balance",
        description=_ABOUT_PLAN,
        epilog=_EXAMPLES_OF_PLAN,
        formatter_class=_formatter,
    )
    _add_plan_arguments(planning)
    estimator = commands.add_parser(
        "estimate",
        help="memory and time of a training step, by a model's config",
        description=estimating.ABOUT,
        epilog=estimating.EXAMPLES,
        formatter_class=_formatter,
    )
    estimating.add_arguments(estimator, _length, _lengths)
    commands.add_parser("kernels", help="which kernel supports which argument, and why not", formatter_class=_formatter)
    calibrating = commands.add_parser(
        "calibrate",
        help="measure this machine's GPU, for predicting times and choosing stages",
        description=_ABOUT_CALIBRATE,
        formatter_class=_formatter,
    )
    calibrating.add_argument("--out", required=True, metavar="FILE", help="the JSON file to write")
    commands.add_parser("transports", help="which transport connects which ranks, and why not", formatter_class=_formatter)
    verifying = commands.add_parser(
        "verify",
        help="a model of yours over several processes beside one: loss, logits, gradients, modules",
        description=ABOUT_VERIFY,
        epilog=EXAMPLES_OF_VERIFY,
        formatter_class=_formatter,
    )
    add_verify_arguments(verifying, _length)
    options = parser.parse_args(arguments)
    if options.command == "calibrate":
        return _calibrate(options.out, calibrating)
    if options.command == "verify":
        return _verify(options, verifying)
    if options.command in ("kernels", "transports"):
        from dtensor_ring import debug  # it asks the kernels and transports, which need torch

        _write((debug.kernel_table() if options.command == "kernels" else debug.transport_table()) + "\n")
        return 0
    try:
        _write((_plan(options) if options.command == "plan" else estimating.run(options)) + "\n")
    except ValueError as error:
        # what the planner refuses is a wrong argument to whoever typed it: one line, and status 2
        (planning if options.command == "plan" else estimator).error(str(error))
    return 0


def _calibrate(path: str, parser: argparse.ArgumentParser) -> int:
    import torch

    from dtensor_ring.tools.calibrate import calibrate

    try:
        model = calibrate(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        model.save(path)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    _write(f"{model.device}, {', '.join(name for name, _ in model.kernels)}: {path}, digest {model.digest}\n")
    return 0


def _verify(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from dtensor_ring.integrations.verify.command import run as verified

    try:
        answer = verified(options)
    except ValueError as error:
        parser.error(str(error))
    if answer is None:
        return 0
    if answer.refused:
        parser.error(answer.text)
    _write(answer.text + "\n")
    return 0 if answer.ok else 1


def run(arguments: Sequence[str] | None = None) -> int:
    """As `main`, for a process of its own: a reader that has gone away, or Ctrl-C, ends it quietly with the shell's status."""
    try:
        try:
            return main(arguments)
        finally:
            _write("")  # what argparse printed waits in the buffer still
    except BrokenPipeError:
        # Python flushes standard output once more when it exits, and must find somewhere to write.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _write(text: str) -> None:
    print(text, end="", flush=True)  # noqa: T201  the command's output


def _formatter(prog: str) -> argparse.HelpFormatter:
    """Help of 80 columns on every terminal, with line breaks as written."""
    return argparse.RawDescriptionHelpFormatter(prog, width=80)


def _add_plan_arguments(plan: argparse.ArgumentParser) -> None:
    layouts = (
        "contiguous, zigzag, stripe, stripe:BLOCK, or zigzag/documents, which cuts each of --documents by itself (default: zigzag)"
    )
    plan.add_argument("--layout", default="zigzag", help=layouts)
    plan.add_argument("--world", type=int, default=4, metavar="RANKS", help="number of ranks (default: 4)")
    plan.add_argument(
        "--length",
        type=_length,
        metavar="TOKENS",
        help=f"tokens of the sequence, such as 4096, 10k, 1.5M or 64Ki (default: {_LENGTH}, or what --documents add up to)",
    )
    plan.add_argument("--documents", type=_lengths, metavar="LENGTHS", help="lengths of packed documents, such as 10,20,34")
    masks = plan.add_mutually_exclusive_group()
    masks.add_argument("--full", action="store_true", help="every query sees every key; causal otherwise")
    masks.add_argument("--window", type=_side, nargs=2, metavar=("L", "R"), help="keys from L back to R ahead; -1 is unbounded")
    plan.add_argument(
        "--strategy",
        choices=get_args(StrategyName),
        default="ring",
        help="who gets what: keys step by step, all keys at once, or all tokens of some heads (default: ring)",
    )
    plan.add_argument(
        "--stages",
        type=int,
        metavar="N",
        help="transfers of ring, up to one for each other rank (default: as ring_attention takes on --device, or the fewest)",
    )
    sizes = LLAMA_8B
    plan.add_argument("--heads", type=int, default=sizes.heads, help=f"query heads (default: {sizes.heads})")
    plan.add_argument(
        "--kv-heads",
        type=int,
        metavar="HEADS",
        help=f"key heads (default: {sizes.kv_heads}, or --heads where that does not divide them)",
    )
    plan.add_argument(
        "--head-dim",
        type=int,
        default=sizes.head_dim,
        metavar="DIM",
        help=f"numbers in a head, of 2 bytes (default: {sizes.head_dim})",
    )
    plan.add_argument("--device", choices=tuple(KNOWN), help="predict times on this GPU, and choose the stages as there")
    plan.add_argument("--cost-model", metavar="FILE", help="the same by figures that calibrate has measured")
    plan.add_argument("--kernel", metavar="NAME", help="a kernel of these figures (default: torch_flash, or the first)")
    plan.add_argument(
        "--ranks-per-host", type=int, default=0, metavar="N", help="ranks on each host, for the links (default: all of them)"
    )
    shown = plan.add_mutually_exclusive_group()
    shown.add_argument(
        "--rank",
        type=_ranks,
        action="append",
        metavar="R",
        help="only these ranks, with all their steps: --rank 0,3, or --rank 0 --rank 3",
    )
    shown.add_argument("--summary", action="store_true", help="only totals, for any number of ranks in a moment")
    plan.add_argument("--json", action="store_true", help="the same facts as one JSON object")


def _plan(options: argparse.Namespace) -> str:
    shape = _shape(options)
    predictor = _predictor(options, shape)
    problem = _problem(options, predictor)
    ranks = None
    if options.rank is not None:
        ranks = sorted({rank for some in options.rank for rank in some})  # a rank that is named twice is drawn once
        if ranks[-1] >= problem.world:
            raise ValueError(f"--rank {ranks[-1]}: the ranks of --world {problem.world} are 0 to {problem.world - 1}")
    if options.json:
        entries = facts(problem, ranks, only_totals=options.summary, shape=shape)
        entries |= {} if predictor is None else {"predicted": predicted(problem, predictor)}
        return json.dumps(entries, indent=2)
    text = summary(problem, shape) if options.summary else draw(problem, ranks, shape)
    return text if predictor is None else f"{text}\n\n{predicted_text(problem, predictor)}"


def _predictor(options: argparse.Namespace, shape: AttentionShape) -> Predictor | None:
    model = None
    if options.cost_model is not None:
        try:
            model = CostModel.load(options.cost_model)
        except OSError as error:
            raise ValueError(f"--cost-model: {error}") from error
    predictor = predictor_for(shape, options.device, model, options.kernel, options.ranks_per_host)
    if predictor is None and (options.kernel or options.ranks_per_host):
        raise ValueError("--kernel and --ranks-per-host are for predicted times: name a --device, or give a --cost-model")
    return predictor


def _problem(options: argparse.Namespace, predictor: Predictor | None = None) -> AttentionProblem:
    if options.world < 1:
        raise ValueError(f"need at least one rank, found --world {options.world}")
    layout = Layout.parse(options.layout)
    documents = None if options.documents is None else Documents.from_lengths(options.documents)
    if layout.cut == "documents" and documents is None:
        raise ValueError(f"--layout {layout} cuts documents: give their lengths, such as --documents 10,20,34")
    length = options.length
    if length is None:
        length = _LENGTH if documents is None else documents.length
    if documents is not None and documents.length != length:
        raise ValueError(
            f"documents end at token {documents.length}, but the sequence has {length} tokens: leave out --length, "
            "or add a document for the rest"
        )
    window = (-1, -1) if options.window is None else (options.window[0], options.window[1])
    # A window says both of its sides, so it is not causal beside: a side ahead would be refused.
    is_causal = not options.full and options.window is None
    band = Band.parse(mask_text(is_causal, window))
    problem = AttentionProblem(layout, band, length, length, options.world, options.strategy, documents)
    return staged_by(problem, predictor, options.stages)


def _shape(options: argparse.Namespace) -> AttentionShape:
    # --heads alone must always give a plan, also where the default number of key heads does not divide it.
    kv_heads = options.kv_heads
    if kv_heads is None:
        kv_heads = options.heads if options.heads % LLAMA_8B.kv_heads else LLAMA_8B.kv_heads
    return shape_of_heads(options.heads, kv_heads, options.head_dim)


def _length(text: str) -> int:
    """Tokens, from digits with at most one point and a unit."""
    match = re.fullmatch(r"([0-9]+)(?:\.([0-9]+))?(k|M|G|Ki|Mi|Gi|)", text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of tokens: write digits, and after them k, M, G (powers of 1000) or Ki, Mi, Gi (of 1024), "
            "such as 4096, 10k, 1.5M or 64Ki"
        )
    # In integers: 8.2 times a million is no whole number in floats.
    digits, fraction, unit = match[1], match[2] or "", match[3]
    tokens, rest = divmod(int(digits + fraction) * _UNITS[unit], 10 ** len(fraction))
    if rest:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of tokens, but {tokens} and a part of one")
    return tokens


def _lengths(text: str) -> list[int]:
    try:
        return [_length(part) for part in text.split(",")]
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"takes lengths between commas, such as 10,20,34, found {text!r}: {error}") from None


def _side(text: str) -> int:
    """One side of a window: a length, or a negative number, which `mask_text` judges."""
    return int(text) if re.fullmatch(r"-[0-9]+", text) else _length(text)


def _ranks(text: str) -> list[int]:
    parts = text.split(",")
    if not all(re.fullmatch(r"[0-9]+", part) for part in parts):
        raise argparse.ArgumentTypeError(f"takes ranks between commas, such as 0,3, found {text!r}")
    return [int(part) for part in parts]


if __name__ == "__main__":
    sys.exit(run())
