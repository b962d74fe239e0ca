"""Writes the tables of docs/performance.md and README.md from the JSON files of results, so that no figure is typed by hand.

    python -m benchmarks.report              # after a new file in benchmarks/results
    python -m benchmarks.report --check      # exit status 1 where a table is not what the files give

A table stands between two comments, `<!-- results: NAME -->` and `<!-- end -->`; what lies between them is replaced. The names are
the keys of `TABLES`. Of every kind of benchmark there may be several files, of several devices: each gives a table of its own,
under a line with its device, versions and date.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks import report_costs
from benchmarks.against_ring_flash_attn import NAMES, OURS, THEIRS
from benchmarks.links import Link
from benchmarks.markdown import NOTHING, Run, headline, number, pair, per_run, table
from benchmarks.record import RESULTS, load
from benchmarks.targets import TARGETS, Target, family_of

ROOT = Path(__file__).parents[1]
DOCUMENTS = (ROOT / "docs" / "performance.md", ROOT / "docs" / "estimate.md", ROOT / "README.md")
DROP_IN, BOTH = "against_ring_flash_attn", (THEIRS, OURS)
_BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> int:
    """Write the documents, or say which differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    runs, stale = all_runs(), []
    for path in DOCUMENTS:
        before = path.read_text()
        after = rendered(before, runs)
        if before != after:
            stale.append(path)
            if not options.check:
                path.write_text(after)
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'its tables are not those of benchmarks/results' if options.check else 'written'}")
    return int(options.check and bool(stale))


def all_runs(folder: Path = RESULTS) -> list[Run]:
    """The runs of a folder, in the order of their names."""
    return [load(path) for path in sorted(folder.glob("*.json"))]


def rendered(text: str, runs: Sequence[Run]) -> str:
    """A document with its tables made anew.

    Raises:
        KeyError: a comment names no table of ours.
    """
    return _BLOCK.sub(lambda block: f"{block[1]}\n{TABLES[block[2]](runs)}\n\n{block[3]}", text)


def judged(run: Run) -> Iterator[tuple[Target, tuple[float, float] | None]]:
    """Each target of a run's benchmark with what was measured for it; the worst of several cases, None where there is none."""
    for target in TARGETS:
        if target.benchmark != run["benchmark"]:
            continue
        mine = [row for row in run["rows"] if row.get("target") == target.name and not row.get("wrong")]
        if target.family != "best":
            mine = [row for row in mine if family_of(row["kernel"]) == target.family]
        worst = max if target.smaller_is_better else min
        of_kernels = [
            [worst(row[target.measure][direction] for row in mine if row["kernel"] == kernel) for direction in (0, 1)]
            for kernel in dict.fromkeys(row["kernel"] for row in mine)
        ]
        # Of several cases the worst counts, and where any kernel may be taken, the best of those.
        best = min if target.smaller_is_better else max
        yield target, (best(fwd for fwd, _ in of_kernels), best(both for _, both in of_kernels)) if of_kernels else None


def _targets(runs: Sequence[Run]) -> str:
    parts = []
    everywhere = {target for run in runs for target, pair in judged(run) if pair}
    for run in runs:
        # What another run has is not missing here.
        found = [(target, pair) for target, pair in judged(run) if pair or target not in everywhere]
        if not any(pair for _, pair in found):
            continue
        parts += [headline(run), table(("target", "kernel", "forward", "", "forward + backward", ""), map(_verdict, found))]
    return "\n\n".join(parts) or NOTHING


def _verdict(judgement: tuple[Target, tuple[float, float] | None]) -> Sequence[str]:
    target, pair = judgement
    aims = target.fwd, target.both
    cells: list[str] = []
    for aim, value in zip(aims, pair or (None, None), strict=True):
        wanted = f"{'at most' if target.smaller_is_better else 'at least'} {aim:g} {target.unit}".rstrip()
        if value is None:
            cells += [wanted, "not measured"]
        else:
            cells += [wanted, f"{target.shown(value)}, {'met' if target.met(value, aim) else '**missed**'}"]
    return target.name, target.family, *cells


def _emulated(runs: Sequence[Run]) -> str:
    header = ("case", "layout", "strategy", "W", "tokens a rank", "heads", "kernel", "link", "ratio forward; both", "ms", "TFLOP/s")
    header += ("kernels alone", "host ms", "peak MiB", "ranks")
    return per_run("emulate", runs, header, _emulated_row)


def _emulated_row(row: Run) -> Sequence[str]:
    name = f"{row['case']}{' (strict)' if row['strict'] else ''}"
    start = name, row["layout"], row["strategy"], str(row["world"]), str(row["tokens"]), row["heads"], row["kernel"], row["link"]
    if row["wrong"]:
        return *start, f"wrong: {row['wrong']}", *[""] * 6
    kernels = pair(row["kernels"], 3) if row.get("kernels") else ""
    pairs = pair(row["ratio"], row["digits"]), pair(row["ms"], 2), pair(row["tflops"], 0), kernels, pair(row["host"], 2)
    return *start, *pairs, f"{row['peak']:.0f}", f"{row['fully']} of {len(row['shortly'])}"


def _ranks(runs: Sequence[Run]) -> str:
    header = (
        "who",
        "case",
        "layout",
        "strategy",
        "tokens a rank",
        "heads",
        "kernel",
        "link",
        "ratio forward; both",
        "ms",
        "TFLOP/s",
    )
    header += ("peak MiB", "sent MiB")
    return per_run("attention", runs, header, _ranks_row)


def _ranks_row(row: Run) -> Sequence[str]:
    kernel = row["kernel"] if row["who"] == OURS else "its own"  # what a row of others names is that of the ideal
    start = row["who"], row["case"], row["layout"], row["strategy"], str(row["tokens"]), row["heads"], kernel, row["link"]
    if row["wrong"]:
        return *start, f"wrong: {row['wrong']}", *[""] * 4
    pairs = pair(row["ratio"], row["digits"]), pair(row["ms"], 2), pair(row["tflops"], 0)
    return *start, *pairs, number(row["peak"]), number(row["sent"])


def _drop_in(runs: Sequence[Run]) -> str:
    header = ("function", "heads_k_stride", "tokens a rank", "heads", *(f"{who}: ms forward; both" for who in BOTH))
    timed = [{**run, "rows": [row for row in run["rows"] if "ms" in row]} for run in runs if run["benchmark"] == DROP_IN]
    return per_run(DROP_IN, timed, (*header, "their time over ours"), _drop_in_row)


def _drop_in_row(row: Run) -> Sequence[str]:
    key_heads = "" if row["key_heads"] is None else f"{row['key_heads']}{', no more' * row.get('no_more', False)}"
    times = (f"wrong: {row['wrong'][who]}" if who in row["wrong"] else pair(row["ms"].get(who), 2) for who in BOTH)
    return f"`{row['function']}`", key_heads, str(row["tokens"]), row["heads"], *times, pair(row["ratio"], row["digits"])


def _drop_in_errors(runs: Sequence[Run]) -> str:
    lines = [
        {**run, "rows": [{"row": row, "who": who} for row in run["rows"] if "rms" in row for who in (*row["rms"], *row["wrong"])]}
        for run in runs
        if run["benchmark"] == DROP_IN
    ]
    return per_run(DROP_IN, lines, ("function", "dtype", "heads", "", *NAMES), lambda each: _errors_row(each["row"], each["who"]))


def _errors_row(row: Run, who: str) -> Sequence[str]:
    start = f"`{row['function']}`", row["dtype"], row["heads"], who
    if who in row["wrong"]:
        return *start, f"wrong: {row['wrong'][who]}", *[""] * (len(NAMES) - 1)
    return *start, *(f"{rms:.2e} ({most:.1e})" for rms, most in zip(row["rms"][who], row["most"][who], strict=True))


_NVLINK = f"{Link().gigabytes:g} GB/s"  # what real ranks of one host are emulated by


def _beside(runs: Sequence[Run]) -> str:
    """Rows of real ranks beside emulated ones of the same case, device and state of the code, which the notes tell apart."""
    emulated: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        for row in run["rows"] if run["benchmark"] == "emulate" else ():
            if not row["link"].startswith(_NVLINK):
                continue
            emulated.setdefault(_measured_alike(run, row), []).append(row)
    lines: list[Sequence[str]] = []
    for run in runs:
        for row in run["rows"] if run["benchmark"] == "attention" else ():
            for twin in emulated.get(_measured_alike(run, row), ()):
                parts = (f"{real / alone - 1:+.1%}" for real, alone in zip(row["ratio"], twin["ratio"], strict=True))
                start = f"{row['case']}, {row['layout']}, {row['strategy']}", str(row["world"]), row["link"], twin["link"]
                lines.append((*start, pair(row["ratio"], 3), pair(twin["ratio"], 3), "; ".join(parts)))
    header = ("", "ranks", "link", "emulated link", "real ratio forward; both", "emulated", "real over emulated")
    return table(header, lines) if lines else NOTHING


def _measured_alike(run: Run, row: Run) -> tuple[object, ...]:
    """What a real and an emulated row must share to be set beside each other."""
    note = run.get("note", "") if "Before" in run.get("note", "") else ""
    return run["device"], note, *(row[key] for key in ("case", "layout", "strategy", "world", "tokens", "heads", "kernel"))


def _short(runs: Sequence[Run]) -> str:
    """What README shows: ours on real ranks beside the fastest other package, and one emulated sequence over eight ranks."""
    parts = []
    for run in runs:
        if run["benchmark"] not in ("attention", "emulate"):
            continue
        every = [row for row in run["rows"] if not row["wrong"] and (run["benchmark"] == "attention" or _is_plain(row))]
        rows = [row for row in every if row.get("who", OURS) == OURS]
        others = [_fastest_other(row, every) for row in rows]
        header, lines = ("", "ranks", "kernel", "link", "forward", "forward + backward"), [_short_row(row) for row in rows]
        if any(others):
            header = (*header, "fastest other package", "forward", "forward + backward")
            lines = [(*line, *other) for line, other in zip(lines, others, strict=True)]
        if lines:
            parts += [headline(run), table(header, lines)]
    return "\n\n".join(parts) or NOTHING


def _is_plain(row: Run) -> bool:
    return row["world"] == 8 and row["heads"] == "32:8" and row["case"] in ("causal", "not causal")


def _fastest_other(row: Run, every: Sequence[Run]) -> Sequence[str]:
    """Of the other packages in a run the one that takes least for both passes, and its ratios; nothing where there is none.

    What a row of others names as its kernel is that of the ideal, which ratios of one line must share.
    """
    alike = [
        each for each in every if each.get("who", OURS) != OURS and (each["case"], each["kernel"]) == (row["case"], row["kernel"])
    ]
    if not alike:
        return ()
    best = min(alike, key=lambda other: other["ms"][1])
    return f"{best['who']}, {best['layout']}", *(f"{ratio:.2f}" for ratio in best["ratio"])


def _short_row(row: Run) -> Sequence[str]:
    name = f"{row['case']}, {row['layout']}, {row['strategy']}"
    return name, str(row["world"]), row["kernel"], row["link"], *(f"{ratio:.2f}" for ratio in row["ratio"])


TABLES: dict[str, Callable[[Sequence[Run]], str]] = {
    "targets": _targets,
    "emulated": _emulated,
    "ranks": _ranks,
    "drop_in": _drop_in,
    "drop_in_errors": _drop_in_errors,
    "beside": _beside,
    "planning": report_costs.planning,
    "layouts": report_costs.layouts,
    "train": report_costs.train,
    "estimates": report_costs.estimates,
    "host": report_costs.host,
    "short": _short,
    "host_short": report_costs.attention_host,
}


if __name__ == "__main__":
    sys.exit(main())
