"""What the tables of documents are made of: one for each run, in Markdown, and pairs of figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Run = dict[str, Any]  # as `record.save` writes it
NOTHING = "No file in `benchmarks/results` has this yet."
_NAMED = ("flash-attn", "flash-attn-3", "flash-attn-4", "ring-flash-attn", "axolotl-ringmaster", "yunchang")


def headline(run: Run) -> str:
    """Device, versions and date of a run."""
    devices = f"{run['devices']} x " if run.get("devices", 1) > 1 else ""
    packages = "".join(f", {name} {version}" for name, version in run.get("packages", {}).items() if name in _NAMED)
    kind = f"**Emulated** on one {run['device']}" if run.get("emulated") else f"{devices}{run['device']}"
    note = f" {run['note']}" if run.get("note") else ""
    return f"{kind}, PyTorch {run['torch']}{packages}, {run['date']}.{note}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def per_run(benchmark: str, runs: Sequence[Run], header: Sequence[str], line: Callable[[Run], Sequence[str]]) -> str:
    """One table for each run of a benchmark that has rows."""
    parts = []
    for run in runs:
        if run["benchmark"] == benchmark and run["rows"]:
            rows = [{"digits": run.get("digits", 3), **row} for row in run["rows"]]  # of ratios; old runs kept fewer
            parts += [headline(run), table(header, map(line, rows))]
    return "\n\n".join(parts) or NOTHING


def pair(values: Sequence[float] | None, digits: int) -> str:
    """Forward and both; nothing where a run kept no figures."""
    return "" if values is None else "; ".join(f"{value:.{digits}f}" for value in values)


def number(value: float | None) -> str:
    """A whole number, or nothing."""
    return "" if value is None else f"{value:.0f}"
