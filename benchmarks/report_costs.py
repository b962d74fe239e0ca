"""The tables of what is beside attention on ranks: layouts compared, plans, training steps, estimates, the host."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

from benchmarks.estimate_cases import GIB, Compared, beside
from benchmarks.markdown import NOTHING, Run, headline, pair, per_run, table
from benchmarks.targets import PLANNING


def layouts(runs: Sequence[Run]) -> str:
    """Documents cut one by one beside plain zigzag, and the host's time of a stage."""
    parts = []
    for run in runs:
        if run["benchmark"] == "layouts":
            kernels = dict.fromkeys(row["kernel"] for row in run["rows"])
            lines = [line for kernel in kernels for line in _layouts_lines([row for row in run["rows"] if row["kernel"] == kernel])]
            parts += [headline(run), table(("", "kernel", "forward", "forward + backward"), lines)]
    return "\n\n".join(parts) or NOTHING


def _layouts_lines(rows: Sequence[Run]) -> Iterator[Sequence[str]]:
    """The worst and the middle packing of one kernel, and what a stage costs the host."""
    packings = [row for row in rows if row.get("ratio") and not row["wrong"]]
    for title, choose in (("worst", min), ("median", statistics.median)):
        figures = [choose(row["ratio"][direction] for row in packings) for direction in (0, 1)]
        yield (
            f"plain zigzag's time over per document's, {title} of {len(packings)}",
            rows[0]["kernel"],
            *(f"{x:.3f}" for x in figures),
        )
    for row in rows:
        if row.get("wrong"):
            yield row["case"], row["kernel"], f"wrong: {row['wrong']}", ""
        elif row.get("over_ms"):
            name = f"host's time of a stage, ms, documents: {row['documents']}"
            yield name, row["kernel"], *(f"{x:.3f}" for x in row["over_ms"])


def planning(runs: Sequence[Run]) -> str:
    """Milliseconds of plans, bold above the target."""
    parts = []
    for run in runs:
        if run["benchmark"] == "planning":
            header = ("", "case", "documents", *(f"W={world}" for world in run["worlds"]))
            lines = [
                (row["part"], row["case"], str(row["documents"]), *(_planned(row, str(world)) for world in run["worlds"]))
                for row in run["rows"]
            ]
            parts += [headline(run), table(header, lines)]
    return "\n\n".join(parts) or NOTHING


def _planned(row: Run, world: str) -> str:
    """Milliseconds; bold where a plan takes longer than `PLANNING` allows for as many documents."""
    if row["wrong"]:
        return f"wrong: {row['wrong']}"
    if world not in row["ms"]:
        return ""
    took = row["ms"][world]
    if took is None:
        return "**given up**"
    most = next((most for documents, most in PLANNING if row["documents"] <= documents), None)
    missed = row["part"] == "plan" and most is not None and took > most
    return f"**{took:.1f}**" if missed else f"{took:.1f}"


def train(runs: Sequence[Run]) -> str:
    """Training steps of every run."""
    header = ("model", "attention", "layers", "W", "tokens a rank", "ms forward; step", "tokens/s a GPU", "MFU", "peak GiB")
    parts = []
    for run in runs:
        if run["benchmark"] == "train_step":
            # Others share the sequence on real ranks, as ring_plan does; on one GPU plain attention does the same work.
            is_shared = run.get("devices", 1) > 1
            compared = "its time over ring_plan's: forward; step" if is_shared else "plain SDPA's time over it: forward; step"
            parts.append(per_run("train_step", [run], (*header, compared), _train_row))
    return "\n\n".join(parts) or NOTHING


def _train_row(row: Run) -> Sequence[str]:
    emulated = " (emulated)" if row["emulated"] else ""
    layers = f"{row['layers']}{', FSDP2' if row.get('sharded') else ''}{', recomputed' if row['recomputed'] else ''}"
    start = row["model"], f"{row['attention']}{emulated}", layers, str(row["world"]), str(row["tokens"])
    if row.get("wrong"):
        return *start, row["wrong"], *[""] * 4
    mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
    figures = (
        pair(row["ms"], 1),
        f"{row['tokens_per_second']:.0f}",
        mfu,
        f"{row['peak_gib']:.1f}",
        pair(row["ratio"], row["digits"]),
    )
    return *start, *figures


def estimates(runs: Sequence[Run]) -> str:
    """Estimated peaks and times beside measured ones."""
    header = ("model", "tokens", "recomputed", "loss", "precision", "peak, GiB", "estimated", "step, ms", "estimated", "held out")
    compared = [{**run, "rows": [{"row": each} for each in beside(run)]} for run in runs if run["benchmark"] == "estimate"]
    return per_run("estimate", compared, header, lambda row: _estimates_row(row["row"]))


def _estimates_row(row: Compared) -> Sequence[str]:
    case = row.case
    start = case.name, str(case.rows * case.tokens), case.checkpoint, case.loss, case.precision
    memory = f"{row.measured / GIB:.2f}", f"{row.estimated / GIB:.2f} ({row.estimated / row.measured - 1:+.1%})"
    times = f"{row.ms:.0f}", f"{row.estimated_ms:.0f} ({row.estimated_ms / row.ms - 1:+.1%})"
    return *start, *memory, *times, "yes" if case.held_out else ""


def host(runs: Sequence[Run]) -> str:
    """What calls cost the host."""
    return _host_table(runs, lambda row: "us" in row)


def attention_host(runs: Sequence[Run]) -> str:
    """Of that the rows of one attention."""
    usual = [run for run in runs if not run.get("note")]
    return _host_table(usual, lambda row: row.get("table", "").startswith("attention"))


def _host_table(runs: Sequence[Run], wanted: Callable[[Run], bool]) -> str:
    timed = [{**run, "rows": [row for row in run["rows"] if wanted(row)]} for run in runs]
    return per_run("host_cost", timed, ("", "ms", "over the row above"), _host_row)


def _host_row(row: Run) -> Sequence[str]:
    return f"{row['table']}: {row['name']}", f"{row['us'] / 1e3:.2f}", f"{row['over_above_us'] / 1e3:+.2f}"
