"""`python -m dtensor_ring`."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import programs
import pytest
from helpers import slow, some_or_every
from hypothesis import given
from hypothesis import strategies as st
from sweeps import swept

import dtensor_ring
from dtensor_ring import __main__ as command_line
from dtensor_ring.__main__ import main
from dtensor_ring.debug import draw
from dtensor_ring.planning.costs import AttentionShape, cost_of, costs
from dtensor_ring.planning.documents import Documents
from dtensor_ring.planning.layout import Layout
from dtensor_ring.planning.mask import Band
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.schedule import plan
from dtensor_ring.planning.totals import fetched_by, totals
from dtensor_ring.tools import drawing
from dtensor_ring.tools.drawing import RANKS_OF_EXCERPT, STEPS_SHOWN, WIDTH

ROOT = Path(dtensor_ring.__file__).parents[1]


def test_plan_draws_who_does_what(capsys):
    assert main(["plan", "--layout", "zigzag", "--world", "4", "--length", "64", "--stages", "3"]) == 0
    text = capsys.readouterr().out
    assert "rank 1: 8..15 | 48..55" in text
    assert "step 0: own keys [0, 16)" in text
    assert "balance (mean work / most loaded rank): 1.0000" in text
    for rank in range(4):
        assert f"rank {rank}: 520 scores in 4 calls" in text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--layout", "stripe:2", "--world", "2", "--length", "9"], "rank 1: 2..7 2 in 4"),
        (["--full", "--length", "8"], "zigzag, full, 8 tokens"),
        (["--window", "3", "0", "--length", "64"], "halo: the keys around each chunk"),
        (["--documents", "10,20,34"], "Documents(3 in 1 row of 64 tokens"),
        (["--strategy", "gather"], "its keys to every rank"),
        (["--stages", "2", "--world", "4"], "over 4 ranks, ring in 2 stages"),
        (["--length", "0"], "sends 0 key tokens"),
        (["--world", "1"], "sends nothing"),
        (["--length", "100000", "--world", "8"], "balance"),
    ],
)
def test_every_option_of_plan(capsys, arguments, text):
    assert main(["plan", *arguments]) == 0
    assert text in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--documents", "3,4", "--length", "64"], "documents end at token 7, but the sequence has 64 tokens"),
        (["--layout", "snake"], "unknown layout 'snake'"),
        (["--world", "0"], "at least one rank"),
        (["--window", "-5", "0"], "a side is a number of tokens"),
        (["--stages", "0"], "stages are from 1 up and of strategy 'ring', found stages=0 and strategy='ring'"),
        (["--stages", "-2"], "found stages=-2"),
        (["--stages", "2", "--strategy", "gather"], "found stages=2 and strategy='gather'"),
    ],
)
def test_plan_says_what_is_wrong(capsys, arguments, text):
    with pytest.raises(SystemExit):
        main(["plan", *arguments])
    assert text in capsys.readouterr().err


def test_the_kernel_table_in_the_docs_is_the_one_the_code_prints(capsys):
    assert main(["kernels"]) == 0
    text = (Path(dtensor_ring.__file__).parents[1] / "docs" / "kernels.md").read_text()
    assert text.split("<!-- kernels: begin -->")[1].split("<!-- kernels: end -->")[0].strip() == capsys.readouterr().out.strip()


@given(
    st.sampled_from(["contiguous", "zigzag", "stripe", "stripe:2"]),
    st.integers(1, 32),
    st.integers(1, 4),
    st.sampled_from(["ring", "gather"]),
)
def test_the_picture_shows_the_step_of_every_score(layout, length, world, strategy):
    problem = AttentionProblem(
        Layout.parse(layout),
        Band(0, None),
        length,
        length,
        world,
        strategy,
        Documents.from_lengths([length // 2, length - length // 2]),
    )
    lines = draw(problem).split("queries down, keys across)\n")[1].split("\n")[:length]
    cells = [line.split() for line in lines]
    for p in range(length):
        for t in range(length):
            same = (p < length // 2) == (t < length // 2)
            assert (cells[p][t] != ".") == (t <= p and same)
    if strategy == "ring":
        for rank in range(world):
            for p in problem.layout.tokens(length, world, rank):
                for index, step in enumerate(plan(problem, rank).steps):
                    held = {
                        problem.layout.tokens(length, world, rows.owner)[i]
                        for rows in step.keys
                        for i in range(rows.start, rows.stop)
                    }
                    assert all(cells[p][t] in (".", str(index)) for t in held)


def lines_of(capsys, *arguments):
    assert main(list(arguments)) == 0
    return capsys.readouterr().out.splitlines()


def assert_narrow(lines):
    assert [line for line in lines if len(line) > WIDTH] == []


COMMON = swept(
    ("contiguous", "zigzag", "stripe", "stripe:4"),
    ((), ("--full",), ("--window", "16", "0"), ("--window", "-1", "3"), ("--window", "5", "7")),
    ("ring", "gather", "ulysses"),
)


@some_or_every
@pytest.mark.parametrize(("layout", "mask", "strategy"), COMMON)
def test_every_line_has_at_most_80_columns(capsys, layout, mask, strategy, every):
    for world, length in list(itertools.product((64, 4, 3, 1), ("1M", "2k", "23", "1", "0")))[:: 1 if every else 3]:
        arguments = ("--layout", layout, *mask, "--strategy", strategy, "--world", str(world), "--length", length, "--heads", "192")
        arguments = (*arguments, "--kv-heads", "192")
        assert_narrow(lines_of(capsys, "plan", *arguments))


PACKED = ["contiguous", "zigzag", "stripe", "stripe:4", "zigzag/documents"]


@some_or_every
@pytest.mark.parametrize("layout", PACKED)
@pytest.mark.parametrize("strategy", ["ring", "gather"])
def test_every_line_about_documents_has_at_most_80_columns(capsys, layout, strategy, every):
    """All documents, ranks and windows; or a third of them, the others in other layouts."""
    many, turn = ",".join(str(n % 37) for n in range(40)), (PACKED.index(layout) + (strategy == "ring")) % 3
    cells = list(itertools.product(("10,20,34", many, "0"), (1, 4, 20), ((), ("--window", "9", "2"))))
    for documents, world, mask in cells if every else cells[turn::3]:
        arguments = ("--layout", layout, "--documents", documents, "--world", str(world), "--strategy", strategy, *mask)
        assert_narrow(lines_of(capsys, "plan", *arguments))
        assert_narrow(lines_of(capsys, "plan", *arguments, "--rank", str(world - 1)))


COMMANDS = ("plan", "estimate", "kernels", "transports", "verify", "calibrate")


@pytest.mark.parametrize("width", ["40", "80", "200"])
@pytest.mark.parametrize("arguments", [[*command, "--help"] for command in ([], *([name] for name in COMMANDS))])
def test_help_has_at_most_80_columns_on_every_terminal(capsys, monkeypatch, arguments, width):
    monkeypatch.setenv("COLUMNS", width)
    with pytest.raises(SystemExit):
        main(arguments)
    assert_narrow(capsys.readouterr().out.splitlines())


def test_help_has_examples_that_run_and_every_layout(capsys):
    examples = []
    for arguments in (["--help"], ["plan", "--help"]):
        with pytest.raises(SystemExit):
            main(arguments)
        text = capsys.readouterr().out
        examples += re.findall(r"^  python -m dtensor_ring (.*)$", text, re.MULTILINE)
    assert "contiguous, zigzag, stripe, stripe:BLOCK, or zigzag/documents" in " ".join(text.split())
    assert len(examples) == len(command_line._EXAMPLES.splitlines()) + len(command_line._EXAMPLES_OF_PLAN.splitlines()) - 2
    for example in examples:
        assert main(shlex.split(example)) == 0


def test_every_command_of_the_readme_runs_in_80_columns(capsys):
    commands = re.findall(r"^python -m dtensor_ring (.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(commands) > 4
    for command in commands:
        assert main(shlex.split(command)) == 0
        if command not in ("kernels", "transports"):  # Markdown tables
            assert_narrow(capsys.readouterr().out.splitlines())


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "stripe", "stripe:4"])
def test_many_ranks_are_drawn_as_an_excerpt(capsys, layout):
    """Lines: holdings, steps of at most four lines each, and totals, of the first ranks and the most loaded one."""
    lines = lines_of(capsys, "plan", "--world", "64", "--length", "1000000", "--layout", layout, "--stages", "63")
    ranks = RANKS_OF_EXCERPT + 1
    assert len(lines) <= 3 + (ranks + 3) + ranks * (3 + 4 * STEPS_SHOWN) + (2 * ranks + 7)
    problem = AttentionProblem(Layout.parse(layout), Band(0, None), 10**6, 10**6, 64)
    loaded = totals(problem).most_loaded
    drawn = {0, 1, 2, loaded}
    assert lines.count(f"  ... and {64 - len(drawn)} more ranks: --rank R shows one") == 2
    assert {int(line.split()[1].rstrip(":")) for line in lines if re.match(r" *rank \d+", line)} == drawn
    if layout != "stripe:4":
        assert f"  ... and {64 - STEPS_SHOWN} more steps: --rank {loaded} shows them" in lines


def test_steps_that_take_minutes_to_plan_are_left_out_and_said_so(capsys, monkeypatch):
    monkeypatch.setattr(drawing, "plan", lambda *_: pytest.fail("a plan was made"))
    lines = lines_of(capsys, "plan", "--layout", "stripe:4", "--length", "1M")
    assert "Steps are left out, since they take long to plan here: --rank R shows a rank's." in lines
    with pytest.raises(SystemExit):
        main(["plan", "--layout", "stripe:4", "--length", "1M", "--json"])
    assert "ask for some with --rank, or for the totals with --summary" in capsys.readouterr().err


def test_ranks_asked_for_are_drawn_in_full(capsys):
    lines = lines_of(capsys, "plan", "--world", "20", "--length", "1k", "--rank", "3,17", "--rank", "5", "--stages", "19")
    assert [line for line in lines if re.fullmatch(r"rank \d+", line)] == ["rank 3", "rank 5", "rank 17"]
    assert sum(line.startswith("  step ") for line in lines) == 3 * 20


def test_a_summary_has_the_totals_of_the_plans(capsys):
    lines = lines_of(capsys, "plan", "--world", "3", "--length", "100", "--summary")
    problem = AttentionProblem(Layout("zigzag"), Band(0, None), 100, 100, 3)
    plans = [plan(problem, rank) for rank in range(3)]
    cells, fetched = [each.cells for each in plans], [fetched_by(each) for each in plans]
    text = "\n".join(lines)
    assert len(lines) == 9
    assert "zigzag, causal, 100 tokens over 3 ranks, ring in 1 stage" in lines
    assert "tokens a rank:             33 to 34" in text
    assert f"scores a rank:             mean {sum(cells) / 3:.1f}, most {max(cells)} (rank {cells.index(max(cells))})" in text
    assert f"key tokens fetched a rank: mean {sum(fetched) / 3:.1f}, most {max(fetched)}" in text
    assert f"balance (mean work / most loaded rank): {sum(cells) / 3 / max(cells):.4f}" in text


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--full", "--world", "3"],
        ["--window", "5", "-1"],
        ["--documents", "10,0,54"],
        ["--strategy", "gather"],
        ["--world", "9"],
    ],
)
def test_json_has_the_same_facts(capsys, arguments):
    assert main(["plan", "--json", *arguments]) == 0
    entries = json.loads(capsys.readouterr().out)
    problem = command_line._problem(argparse_of(arguments))
    keys = {"layout", "mask", "length", "world", "strategy", "stages", "halo", "documents", "shape", "ranks", "totals"}
    assert set(entries) == keys
    assert (entries["length"], entries["world"], entries["strategy"]) == (64, problem.world, problem.strategy)
    assert entries["stages"] == (1 if "--strategy" not in arguments else None)
    assert Band.parse(entries["mask"]) == problem.band
    assert entries["documents"] == (3 if "--documents" in arguments else None)
    counted, shape = totals(problem), AttentionShape(**entries["shape"])
    for rank, entry in enumerate(entries["ranks"]):
        made, cost = plan(problem, rank), cost_of(problem, rank, shape)
        assert entry == {
            "rank": rank,
            "tokens": counted.tokens[rank],
            "scores": made.cells,
            "calls": made.calls,
            "messages": made.messages,
            "key_tokens_sent": made.key_tokens_sent,
            "key_tokens_fetched": fetched_by(made),
            "work": cost.work,
            "forward": cost.forward._asdict(),
            "backward": cost.backward._asdict(),
        }
    work = [entry["scores"] for entry in entries["ranks"]]
    assert entries["totals"]["scores"]["mean"] == sum(work) / len(work)
    assert entries["totals"]["scores"]["most"] == work[entries["totals"]["scores"]["most_rank"]] == max(work)
    assert main(["plan", "--json", "--summary", *arguments]) == 0
    assert json.loads(capsys.readouterr().out) == {key: value for key, value in entries.items() if key != "ranks"}
    assert main(["plan", "--json", "--rank", "1", *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["ranks"] == entries["ranks"][1:2]


@pytest.mark.parametrize("arguments", [[], ["--world", "8", "--kv-heads", "2"], ["--documents", "10,0,54", "--heads", "4"]])
def test_ulysses_is_drawn_with_the_heads_and_bytes_of_its_costs(capsys, arguments):
    arguments = ["--strategy", "ulysses", *arguments]
    text = " ".join(" ".join(lines_of(capsys, "plan", *arguments)).split())
    options = argparse_of(arguments)
    problem, shape = command_line._problem(options), command_line._shape(options)
    heads, ranks_of_a_key_head = shape.heads // problem.world, max(1, problem.world // shape.kv_heads)
    for rank in range(problem.world):
        cost = cost_of(problem, rank, shape)
        drawn = text.split(f" rank {rank} to heads: ")[1].split(" messages")[0]
        first = rank * heads
        assert f"query head{'' if heads == 1 else f's {first}..{first + heads - 1}'}" in drawn
        if ranks_of_a_key_head > 1:
            assert f"with key head {rank // ranks_of_a_key_head} on" in drawn
        assert f"{cost.work // heads} scores a head in 1 call" in drawn
        assert f"out and lse of {64 - cost.tokens} tokens" in drawn
        assert drawn.endswith(f"{cost.forward.bytes} bytes in {cost.forward.messages}")
    assert "balance (mean work / most loaded rank): 1.0000" in text
    assert main(["plan", "--json", *arguments]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert [entry["work"] for entry in entries["ranks"]] == list(costs(problem, shape).work)
    assert entries["totals"]["bytes_sent"]["most"] == max(costs(problem, shape).bytes)


def argparse_of(arguments):
    """The options as the command line reads them."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command_line, "_plan", lambda options: seen.append(options) or "")
        main(["plan", *arguments])
    return seen[0]


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("0", 0),
        ("10k", 10_000),
        ("1M", 1_000_000),
        ("1.5M", 1_500_000),
        ("0.001k", 1),
        ("2G", 2 * 10**9),
        ("64Ki", 65536),
        ("1.5Ki", 1536),
        ("3Mi", 3 * 2**20),
        ("1Gi", 2**30),
    ],
)
def test_lengths_have_units(text, length):
    assert argparse_of(["--length", text]).length == length
    assert argparse_of(["--documents", f"{text},7"]).documents == [length, 7]


def test_documents_set_the_length(capsys):
    assert lines_of(capsys, "plan", "--documents", "10,20,40", "--summary")[0].startswith("zigzag, causal, 70 tokens")
    assert lines_of(capsys, "plan", "--documents", "10,20,40", "--length", "70", "--summary")[0].startswith("zigzag, causal, 70")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--length", "10K"], "'10K' is no number of tokens"),
        (["--length", "-3"], "'-3' is no number of tokens"),
        (["--length", "1.0001k"], "'1.0001k' is not a whole number of tokens"),
        (["--documents", "10,x"], "'x' is no number of tokens"),
        (["--documents", "10,20,40", "--length", "71"], "leave out --length"),
        (["--layout", "zigzag/documents"], "--layout zigzag/documents cuts documents: give their lengths"),
        (["--rank", "4"], "--rank 4: the ranks of --world 4 are 0 to 3"),
        (["--rank", "1,"], "takes ranks between commas"),
        (["--rank", "1", "--summary"], "not allowed with"),
        (["--world", "4k"], "invalid int value"),
        (
            ["--strategy", "ulysses", "--heads", "6", "--kv-heads", "2"],
            "6 query and 2 key heads cannot be shared by 4 ranks: 1, 2, 6",
        ),
        (["--heads", "6", "--kv-heads", "4"], "the 4 key heads must divide the 6 query heads"),
        (["--head-dim", "0"], "sizes are whole numbers from 1 up, found head_dim=0"),
    ],
)
def test_what_cannot_be_read_is_said(capsys, arguments, text):
    with pytest.raises(SystemExit) as ended:
        main(["plan", *arguments])
    assert ended.value.code == 2
    assert text in capsys.readouterr().err


PIPED = [(["plan"], ""), (["plan", "--json"], "1"), (["plan", "--help"], "1"), (["--help"], "")]


@pytest.mark.parametrize(
    ("arguments", "unbuffered"), [*PIPED, *(slow(arguments, "" if unbuffered else "1") for arguments, unbuffered in PIPED)]
)
def test_a_closed_pipe_ends_quietly(arguments, unbuffered):
    """A reader that is gone before the first line, as `head` is after its last."""
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "dtensor_ring", *arguments]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with os.fdopen(writer, "wb") as closed:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=closed, stderr=subprocess.PIPE)
        os.close(reader)
        _, errors = process.communicate(timeout=120)
    assert errors == b""
    # argparse itself passes over a failed write of its help, which without a buffer happens in its own hands
    status = 0 if unbuffered and "--help" in arguments else 128 + signal.SIGPIPE
    assert process.returncode == status


def test_a_reader_of_one_line_gets_it(tmp_path):
    plan = "plan --world 1024 --length 1M --stages 1023 --summary"
    command = f"{shlex.quote(sys.executable)} -m dtensor_ring {plan} 2>{tmp_path}/errors | head -1"
    ended = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert ended.stdout == "zigzag, causal, 1000000 tokens over 1024 ranks, ring\n"
    assert (tmp_path / "errors").read_text() == ""


def test_ctrl_c_ends_quietly(capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "draw", interrupted)
    assert command_line.run(["plan"]) == 128 + signal.SIGINT
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "--world", "1024", "--length", "10M", "--summary"],
        ["plan", "--documents", "10,20,34", "--json"],
        ["plan", "--layout", "zigzag/documents", "--documents", "9,8"],
        ["estimate", "--model", "llama-3.1-8b", "--mesh", "cp=4", "--device", "h100"],
    ],
)
def test_plan_does_not_import_torch(arguments):
    command = [sys.executable, "-X", "importtime", "-m", "dtensor_ring", *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    imported = {
        line.rsplit("|", 1)[1].strip().split(".")[0] for line in ended.stderr.splitlines() if line.startswith("import time:")
    }
    assert "dtensor_ring" in imported
    assert not imported & {"torch", "numpy", "transformers"}


def test_the_kernels_command_runs_as_a_program():
    code = "import runpy; runpy.run_module('dtensor_ring', run_name='__main__', alter_sys=True)"
    assert "| bfloat16 |" in programs.check(code, ["dtensor_ring", "kernels"])
