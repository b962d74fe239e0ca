"""Are the tests able to fail? Small faults are put into the planner, the executors, the kernels and the placements, one at a time.

    python tests/mutants.py --seed 1 --count 20                # 20 faults drawn by seed 1
    python tests/mutants.py --count 10 --file 'planning/*'      # in some files only
    python tests/mutants.py --list --seed 1 --count 20         # shows them, runs nothing
    python tests/mutants.py --recorded                         # those that were killed before are killed still

A mutant is one change of one expression or statement: a comparison or an operator replaced, a condition negated, a constant off
by one, a statement left out. The tests of the mutated file run against it, cheapest first, until one fails: then the mutant is
killed. A test that hangs kills too. A mutant that survives is a fault that no test would see: write the test, show that the code
is dead and remove it, or, where the mutant computes the same, add it to `EQUIVALENT` with the reason.

Everything runs on a copy of the tree in a temporary folder. First the tests must pass there without a mutant. The same seed draws
the same mutants as long as the mutated files stay as they are. Exit status 1 if any survived, 2 if tests fail without a mutant.

`MUTANTS.jsonl` has what was killed, as the line before and after, and the test that did it: `--record` adds those of a run. A seed
means other mutants once the code has changed; a recorded one can be made again as long as its line stands somewhere in its file,
and then must be killed again, by its test or another of the file's. Those whose line is gone are counted, and new draws make up.
"""

from __future__ import annotations

import argparse
import ast
import copy
import fnmatch
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGE = "dtensor_ring"
RECORD = Path(__file__).with_name("MUTANTS.jsonl")
# Seconds that tests may take without a mutant. A minute more than four times what they took, with a mutant they hang.
PATIENCE = 600

# Mutated files, and the test files (or `file -k words`) that concern them: pure ones first, then threads, then processes.
PLANNER = ["test_mask", "test_schedule", "test_packing -k 'known or random or only_keys or one_kernel or exact'", "test_windows"]
GENERIC = [
    "test_placements",
    "test_generic_ops",
    "test_partial_sums",
    "test_ops_sweep",
    "test_pointwise",
    "test_optimizers",
    "test_refusals",
]
TESTS = {
    "integrations/trainer/generation.py": ["test_trl -m 'slow or not slow' -k GRPO"],
    "integrations/trainer/*.py": ["test_trainer", "test_trl"],
    "losses/chunked.py": ["test_losses"],
    "losses/recomputed.py": ["test_losses"],
    "losses/terms.py": ["test_losses"],
    "integrations/transformers/loss.py": ["test_model_loss", "test_loss_functions", "test_loss_states"],
    "integrations/transformers/loss_functions.py": ["test_loss_functions -k refused_by_name"],
    "integrations/transformers/router.py": ["test_model_loss -k load_balancing"],
    "planning/layout.py": ["test_layout", "test_schedule", "test_packing -k known"],
    "planning/document_sharding.py": [
        "test_dealing",
        "test_layout",
        "test_packing -k 'known or random or without_tokens or exact'",
    ],
    "planning/deck.py": ["test_dealing", "test_packing -k 'known or random'"],
    "planning/blocks.py": ["test_dealing", "test_layout"],
    "planning/documents.py": [
        "test_documents",
        "test_layout",
        "test_schedule",
        "test_batch",
        "test_packing",
        "test_attention -k 'two_axes'",
    ],
    "planning/mask.py": PLANNER,
    "planning/kernel_calls.py": PLANNER,
    "planning/runs.py": ["test_layout", "test_schedule", "test_packing -k known"],
    "planning/problem.py": [*PLANNER[:3], "test_windows"],
    "planning/steps.py": [*PLANNER[:3], "test_windows"],
    "planning/holders.py": ["test_holders", "test_schedule", "test_windows"],
    "planning/ordered.py": ["test_holders", "test_schedule"],
    "planning/halo.py": ["test_holders", "test_schedule", "test_windows"],
    "planning/stages.py": ["test_stages"],
    "estimation/*.py": ["test_estimate", "test_estimate_models"],
    "planning/totals.py": ["test_totals"],
    "planning/costs.py": ["test_explain", "test_costs"],
    "planning/cost_model.py": ["test_cost_model"],
    "planning/devices.py": ["test_cost_model", "test_stage_choice"],
    "planning/predict.py": ["test_cost_model", "test_stage_choice"],
    "planning/stage_choice.py": ["test_stage_choice"],
    "tools/calibrate.py": ["test_calibrate"],
    "tools/verification.py": ["test_verify_command", "test_verify"],
    "integrations/verify/command.py": ["test_verify_command"],
    "integrations/verify/*.py": ["test_verify"],
    "tools/predicted.py": ["test_cost_model -k explain", "test_calibrate -k plan"],
    "planning/head_sharing.py": ["test_costs -k heads", "test_ulysses"],
    "planning/segmentation.py": ["test_layout", "test_schedule", "test_totals"],
    "planning/schedule.py": [*PLANNER[:3], "test_execute -k 'bytes or packed'", "test_extras -k 'blocks or alibi'", "test_windows"],
    "ops/executors/collective.py": ["test_exchange -k together", "test_execute -k gather", "test_heads"],
    "ops/executors/plan_executor.py": [
        "test_one_call",
        "test_execute -k 'packed or bytes or unwidened or two_lengths'",
        "test_extras",
        "test_functional -k heads_k",
        "test_profiles",
    ],
    "ops/executors/exchange.py": [
        "test_exchange",
        "test_execute -k 'packed or bytes or unwidened or two_lengths'",
        "test_functional -k heads_k",
        "test_relays",
    ],
    "ops/executors/routes.py": ["test_exchange", "test_relays"],
    "ops/executors/relays.py": ["test_relays"],
    "ops/executors/protocol.py": ["test_costs"],
    "ops/executors/ulysses.py": ["test_ulysses"],
    "ops/executors/head_groups.py": ["test_heads", "test_functional -k heads_k", "test_adapter"],
    "ops/launcher.py": ["test_launcher"],
    "ops/executors/step_streams.py": ["test_step_streams"],
    "functional/llama3.py": ["test_functional -k 'heads'", "test_functional -k 'llama3 and exact'"],
    "_torch_dispatch.py": ["test_past_dispatch"],
    "_torch_groups.py": ["test_coalescing", "test_exchange -k gather"],
    "ops/kernels/_without_keys_cuda.py": ["test_without_keys"],
    "ops/executors/_merge_cuda.py": ["test_merge -k triton"],
    "ops/executors/_sum_cuda.py": ["test_merge -k triton"],
    "ops/executors/parts.py": ["test_merge", "test_launches"],
    "ops/executors/gradients.py": [
        "test_merge -k 'not triton'",
        "test_launches",
        "test_exchange",
        "test_execute -k 'packed or near'",
    ],
    "ops/executors/merge.py": ["test_merge", "test_execute -k 'packed or near'", "test_extras"],
    "ops/block_kinds.py": ["test_block_kinds", "test_execute -k packed"],
    "ops/kernels/__init__.py": ["test_kernels", "test_block_kinds"],
    "ops/kernels/cudnn.py": ["test_cudnn"],
    "ops/kernels/block.py": ["test_kernels", "test_block_kinds", "test_extras", "test_execute -k packed"],
    "ops/kernels/base.py": ["test_kernels", "test_extras", "test_execute -k packed"],
    "ops/kernels/math.py": ["test_kernels", "test_extras", "test_execute -k packed"],
    "ops/kernels/torch_cpu.py": ["test_kernels", "test_execute -k 'packed or thousand'"],
    "comm/mailboxes.py": ["test_mailboxes"],
    "comm/lanes.py": ["test_symmetric_memory"],
    "comm/stream_memory.py": ["test_symmetric_memory"],
    "captures.py": ["test_graphs -k 'held or forgotten or refused_by_name or hold'", "test_graphs"],
    "data/*.py": ["test_batch", "test_packing", "test_misuse -k 'keys or labels or share'", "test_refusals", "test_samplers"],
    "integrations/accelerate/*.py": ["test_accelerate_data", "test_accelerate"],
    "clipping.py": ["test_meshes -k norm"],
    "checkpointing.py": ["test_checkpointing"],
    "integrations/transformers/paused.py": ["test_paused"],
    "integrations/transformers/materialize.py": ["test_training -k 'meta or random'"],
    "placements/rules.py": [*GENERIC, "test_sdpa -k fit"],
    "placements/elementwise.py": GENERIC,
    "placements/lists.py": GENERIC,
    "placements/norms.py": GENERIC,
    "placements/*.py": ["test_redistribute -k without", "test_placements", "test_redistribute", "test_packing", "test_refusals"],
}

# (file, the mutated line without indentation, what the line becomes) -> why no test can tell the two apart.
EQUIVALENT: dict[tuple[str, str, str], str] = {
    ("_torch_groups.py", "counts[peer] += 1", "counts[peer] += 2"): "rounds have other numbers in the same order",
    (
        "losses/chunked.py",
        "p.scatter_add_(1, labels.masked_fill(skipped, 0)[:, None], minus)",
        "p.scatter_add_(1, labels.masked_fill(skipped, 1)[:, None], minus)",
    ): "the place of a label that does not count, to which 0 is added",
    ("planning/document_sharding.py", "continue", "pass"): "a hand that cannot win is scored all the same, and does not win",
    (
        "planning/steps.py",
        "return [(rank + i) % problem.world for i in range(problem.world)]",
        "return [(rank - i) % problem.world for i in range(problem.world)]",
    ): "which rank is served first: every pair exchanges the same rows, and sums of gradients keep an order of their own",
    (
        "ops/executors/exchange.py",
        "route = self._route(index, own.likes[0])",
        "route = self._route(index, own.likes[1])",
    ): "a route depends on batch and device, which keys and values share",
    (
        "comm/collectives.py",
        "return 500 + documents + sum((part.nbytes if isinstance(part, Tensor) else 40 * len(part) for part in parts))",
        "return 501 + documents + sum((part.nbytes if isinstance(part, Tensor) else 40 * len(part) for part in parts))",
    ): "an estimate of the bytes that Python objects take, one byte more",
}

COMPARISONS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
COMPARISONS |= {ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv}
OPERATORS |= {ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}
SWAPPED = {"min": "max", "max": "min", "any": "all", "all": "any"}


class Mutant(NamedTuple):
    """A fault: the file, the line, what changes there, and the file's text with it."""

    file: str
    line: int
    before: str
    after: str
    text: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.file, self.before, self.after


class Killed(NamedTuple):
    """A line of the record: a mutant, and the test that failed on it."""

    file: str
    before: str
    after: str
    test: str

    @property
    def run(self) -> str:
        """The test as a run of its own; of one that has a name only by its file, that file."""
        file, _, name = self.test.partition(".py::")
        return f"{file} -k '{name.partition('[')[0]}'" if name else file.split()[0]


def main() -> int:
    options = parse_options()
    tests = {}
    if options.recorded:
        chosen, tests = made_again(options.file)
    else:
        chosen = draw(options.seed, options.count, options.file)
    tests |= {mutant.key: tests_of(mutant.file) for mutant in chosen if mutant.key not in tests}
    if options.list:
        for mutant in chosen:
            print(f"{mutant.file}:{mutant.line}\n    - {mutant.before}\n    + {mutant.after}")
        return 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        needed = dict.fromkeys(test for mutant in chosen for test in tests[mutant.key][: 1 if options.recorded else None])
        limits: dict[str, float] = {}
        for test in needed:
            began = time.monotonic()
            failed = run(tree, test, PATIENCE) and run(tree, test, PATIENCE)  # ranks may be late on a busy machine: a second chance
            took = time.monotonic() - began
            limits[test] = 60 + 4 * took
            print(f"without a mutant: {test}  {failed or 'passes'}  {took:.0f} s", flush=True)
            if failed:
                return 2
        killers = {mutant: killer_of(tree, mutant, tests[mutant.key], limits) for mutant in chosen}
    if options.record:
        record(Killed(*mutant.key, killer) for mutant, killer in killers.items() if killer)
    survivors = sum(not killer for killer in killers.values())
    print(f"{len(chosen) - survivors} of {len(chosen)} killed, {100 * (len(chosen) - survivors) / max(len(chosen), 1):.0f} %")
    return 1 if survivors else 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=20, help="how many mutants")
    parser.add_argument("--file", default="*", help="mutate files of this pattern only, such as 'planning/mask.py'")
    parser.add_argument("--list", action="store_true", help="show the mutants, run nothing")
    parser.add_argument("--record", action="store_true", help="add those that are killed to the record")
    parser.add_argument("--recorded", action="store_true", help="instead of drawing, make those of the record again")
    return parser.parse_args()


def tests_of(file: str) -> list[str]:
    """The runs of tests that concern a file, by the first pattern that fits it."""
    return next(tests for pattern, tests in TESTS.items() if fnmatch.fnmatch(file, pattern))


def draw(seed: int, count: int, pattern: str) -> list[Mutant]:
    """Mutants drawn without repetition, all places of all files alike; equivalent ones are passed over."""
    files = sorted(str(path.relative_to(ROOT / PACKAGE)) for path in (ROOT / PACKAGE).rglob("*.py"))
    files = [f for f in files if any(fnmatch.fnmatch(f, p) for p in TESTS) and fnmatch.fnmatch(f, pattern) and "__init__" not in f]
    trees = {file: strip(ast.parse((ROOT / PACKAGE / file).read_text())) for file in files}
    places = [(f, i, n) for f in files for i, node in enumerate(ast.walk(trees[f])) for n, _ in enumerate(changes(node))]
    random.Random(seed).shuffle(places)
    made: list[Mutant] = []
    for file, i, number in places:
        if len(made) == count:
            break
        mutant = make(file, trees[file], i, number)
        if mutant.before != mutant.after and mutant.key not in EQUIVALENT:
            made.append(mutant)
    return sorted(made)


def make(file: str, tree: ast.Module, i: int, number: int) -> Mutant:
    """The mutant that makes change `number` at the i-th node of a stripped module."""
    mutated = copy.deepcopy(tree)
    node = next(node for j, node in enumerate(ast.walk(mutated)) if j == i)
    line = getattr(node, "lineno", 0)
    list(changes(node))[number]()
    plain, text = ast.unparse(tree).splitlines(), ast.unparse(mutated)
    lines = text.splitlines()
    at = next((k for k, (a, b) in enumerate(zip(plain, lines, strict=False)) if a != b), len(lines) - 1)
    return Mutant(file, line, plain[at].strip(), lines[at].strip(), text)


def strip(tree: ast.Module) -> ast.Module:
    """The module without docstrings; what must not change is marked: annotations, texts of errors, asserts, `__all__`, typing."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    for node in ast.walk(tree):
        kept: list[ast.AST | None] = []
        if isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)):
            kept.append(node)
        elif isinstance(node, ast.FunctionDef):
            kept += [
                node.returns,
                *node.decorator_list,
                *(arg.annotation for arg in ast.walk(node.args) if isinstance(arg, ast.arg)),
            ]
        elif isinstance(node, ast.AnnAssign):
            kept.append(node.annotation)
        elif isinstance(node, ast.ClassDef):
            kept += [*node.decorator_list, *node.bases, *node.keywords]
        elif isinstance(node, ast.Assign) and "__all__" in ast.unparse(node.targets[0]):
            kept.append(node)
        elif (
            isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant | ast.Subscript | ast.BinOp) and node in tree.body
        ):
            kept.append(node)  # constants and names of types
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            kept.append(node)
        for top in kept:
            for inner in ast.walk(top) if top is not None else ():
                inner.kept = True  # type: ignore[attr-defined]
    return tree


def changes(node: ast.AST) -> Iterator[Callable[[], None]]:
    """The changes that can be made at a node, as functions that make them."""
    if getattr(node, "kept", False):
        return
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        yield lambda: node.ops.__setitem__(0, COMPARISONS[type(node.ops[0])]())
    elif isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in OPERATORS:
        yield lambda: setattr(node, "op", OPERATORS[type(node.op)]())
    elif isinstance(node, ast.BoolOp):
        yield lambda: setattr(node, "op", ast.Or() if isinstance(node.op, ast.And) else ast.And())
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        yield lambda: setattr(node, "value", node.value + 1)
        if node.value > 0:
            yield lambda: setattr(node, "value", node.value - 1)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in SWAPPED:
        yield lambda: setattr(node.func, "id", SWAPPED[node.func.id])
    elif isinstance(node, ast.Slice):
        for side in ("lower", "upper"):
            if (bound := getattr(node, side)) is not None:
                one = ast.BinOp(bound, ast.Add(), ast.Constant(1))
                yield lambda side=side, one=one: setattr(node, side, one)
    elif isinstance(node, ast.Return) and isinstance(node.value, ast.Constant) and type(node.value.value) is bool:
        yield lambda: setattr(node.value, "value", not node.value.value)
    if isinstance(node, (ast.If, ast.IfExp, ast.While)) and not isinstance(node.test, ast.Compare):
        yield lambda: setattr(node, "test", ast.UnaryOp(ast.Not(), node.test))
    for name in ("body", "orelse"):
        block = getattr(node, name, None)
        for i, inner in enumerate(block if isinstance(block, list) else ()):
            if isinstance(inner, (ast.AugAssign, ast.Continue)) or (
                isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Call)
            ):
                yield lambda block=block, i=i: block.__setitem__(i, ast.Pass())


def recorded() -> list[Killed]:
    """The mutants that were killed before."""
    return [Killed(**json.loads(line)) for line in RECORD.read_text().splitlines()] if RECORD.exists() else []


def record(killed: Iterable[Killed]) -> None:
    """Add mutants to the record that it does not have; none is taken away."""
    every = {each[:3]: each for each in (*killed, *recorded())}
    RECORD.write_text("".join(f"{json.dumps(each._asdict())}\n" for each in sorted(every.values())))


def made_again(pattern: str) -> tuple[list[Mutant], dict[tuple[str, str, str], list[str]]]:
    """The recorded mutants whose lines still stand, and for each the runs of tests: first the one that killed it."""
    wanted = {each[:3]: each for each in recorded() if fnmatch.fnmatch(each.file, pattern)}
    made: dict[tuple[str, str, str], Mutant] = {}
    for file in sorted({each.file for each in wanted.values() if (ROOT / PACKAGE / each.file).exists()}):
        tree = strip(ast.parse((ROOT / PACKAGE / file).read_text()))
        for i, node in enumerate(ast.walk(tree)):
            for number, _ in enumerate(changes(node)):
                mutant = make(file, tree, i, number)
                if mutant.key in wanted:
                    made.setdefault(mutant.key, mutant)
    print(f"{len(made)} of {len(wanted)} recorded mutants can be made; the lines of the others are gone")
    runs = {key: [wanted[key].run, *tests_of(mutant.file)] for key, mutant in made.items()}
    return sorted(made.values()), runs


def killer_of(tree: Path, mutant: Mutant, tests: list[str], limits: dict[str, float]) -> str:
    """Run tests against a mutant, print its line of the table and return the first test that fails, or ""."""
    path, began, killer = tree / PACKAGE / mutant.file, time.monotonic(), ""
    original = path.read_text()
    path.write_text(mutant.text)
    try:
        for test in tests:
            killer = run(tree, test, limits.get(test, PATIENCE))
            if killer:
                break
    finally:
        path.write_text(original)
    print(f"{mutant.file}:{mutant.line}  {killer or 'SURVIVED'}  {time.monotonic() - began:.0f} s")
    print(f"    - {mutant.before}\n    + {mutant.after}", flush=True)
    return killer


def run(tree: Path, test: str, limit: float) -> str:
    """The first test that fails in a run of tests, or that it has no end in `limit` seconds; "" if all pass."""
    name, _, words = test.partition(" -k ")
    chosen = ["-k", words.strip("'")] if words else []
    arguments = f"-B -m pytest -q -x -p no:cacheprovider --timeout={limit:.0f} --tb=no tests/{name}.py".split()
    command = [sys.executable, *arguments, *chosen]
    examples = tree / "examples-found"  # of hypothesis: what one mutant failed on must not judge the next
    shutil.rmtree(examples, ignore_errors=True)
    environment = {**os.environ, "PYTHONPATH": str(tree), "HYPOTHESIS_STORAGE_DIRECTORY": str(examples)}
    process = subprocess.Popen(
        command, cwd=tree, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return f"{name} (no end after {limit:.0f} s)"
    if process.returncode == 0:
        return ""
    failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", output, re.MULTILINE)
    return failed[1] if failed else f"{name} (exit status {process.returncode})"


if __name__ == "__main__":
    sys.exit(main())
