"""Draws the ratios of one or more result files as bars, with the targets as marks: how much of the kernel's speed is kept.

pip install 'dtensor-ring[plot]'
python -m benchmarks.plot benchmarks/results/emulate-h100.json --out ratios.png
python -m benchmarks.plot before.json after.json --out change.png        # rows of one name beside each other
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import load
from benchmarks.targets import TARGETS, family_of

Run = dict[str, Any]
PASSES = ("forward", "forward + backward")


def main() -> None:
    """Draw what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("ratios.png"), help="a PNG file")
    options = parser.parse_args()
    draw([load(path) for path in options.files], [path.stem for path in options.files], options.out)
    print(options.out)


def draw(runs: Sequence[Run], names: Sequence[str], out: Path) -> None:
    """Write the picture of runs of `emulate` or `attention`, called by `names`, to a PNG file.

    Raises:
        ValueError: no run has a row with a ratio.
    """
    import matplotlib as mpl

    mpl.use("Agg")  # draws without a display
    from matplotlib import pyplot as plt

    bars = [(name, dict(ratios(run))) for name, run in zip(names, runs, strict=True)]
    labels = list(dict.fromkeys(label for _, found in bars for label in found))
    if not labels:
        raise ValueError(
            f"{', '.join(names)}: no row has a ratio: pass files that benchmarks.emulate or benchmarks.attention wrote"
        )
    goals = {label: goal for run in runs for label, goal in aims(run)}
    figure, panels = plt.subplots(1, 2, sharey=True, figsize=(13, 1.5 + 0.3 * len(labels) * len(names)), layout="constrained")
    height = 0.8 / len(names)
    for direction, (title, panel) in enumerate(zip(PASSES, panels, strict=True)):
        for number, (name, found) in enumerate(bars):
            places = [labels.index(label) + (number - (len(names) - 1) / 2) * height for label in found]
            panel.barh(places, [pair[direction] for pair in found.values()], height, label=name)
        for label, goal in goals.items():
            place = labels.index(label)
            panel.plot([goal[direction]] * 2, [place - 0.45, place + 0.45], color="black", linewidth=1.5)
        panel.axvline(1.0, color="grey", linestyle=":")
        panel.set(title=title, yticks=range(len(labels)), yticklabels=labels)
    panels[0].invert_yaxis()
    if len(names) > 1:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names))
    emulated = ", emulated" if any(run.get("emulated") for run in runs) else ""
    figure.suptitle(
        "Share of the kernel's speed, targets as marks; "
        + ", ".join(dict.fromkeys(f"{run['device']}, PyTorch {run['torch']}" for run in runs))
        + emulated
    )
    figure.savefig(out, dpi=110)
    plt.close(figure)


def ratios(run: Run) -> list[tuple[str, tuple[float, float]]]:
    """The label and the two ratios of every row that has them."""
    return [(_label(row), tuple(row["ratio"])) for row in _rows(run)]


def aims(run: Run) -> list[tuple[str, tuple[float, float]]]:
    """The label and the two targets of every row that has some."""
    goals = {(target.name, target.family): (target.fwd, target.both) for target in TARGETS if target.measure == "ratio"}
    rows = [(_label(row), (row.get("target"), family_of(row["kernel"]))) for row in _rows(run)]
    return [(label, goals[key]) for label, key in rows if key in goals]


def _rows(run: Run) -> list[Run]:
    return [row for row in run["rows"] if row.get("ratio") and row.get("layout") and not row.get("wrong")]


def _label(row: Run) -> str:
    who = row.get("who", "dtensor_ring")
    mine = "" if who == "dtensor_ring" else f"{who}: "
    sizes = f"W={row['world']} x {row['tokens']}, {row['heads']}"
    return f"{mine}{row['case']}, {row['layout']}, {row['strategy']}, {sizes}, {row['kernel']}, {row['link']}"


if __name__ == "__main__":
    main()
