"""What `curves.py` shows: curves beside those of one process, as a table, as a picture and as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

ALONE, SFT, SFT_ALONE = "one process", "SFTTrainer, cp=2", "SFTTrainer, one process"
# What a set-up is compared with, if not with transformers' training in one process. TRL computes the same loss by other sums: of
# 49,152 logits PyTorch's float32 cross entropy on a CPU is off by 3e-6, and TRL's by 1e-7.
REFERENCES = {SFT: SFT_ALONE}
ALLOWED = {"adamw": 1e-5, "sgd": 1e-6}  # relative differences of losses
ALLOWED_OTHER_SUMS = 1e-5  # between TRL and transformers in one process, by any optimizer
ALLOWED_NORM = 1e-4  # of norms of gradients
TITLES = {"adamw": "AdamW", "sgd": "SGD"}


@dataclass
class Curve:
    """What a training gave at each step: the loss, the norm of gradients, and which batch it saw.

    Attributes:
        losses: before each step.
        norms: of gradients.
        batches: checksums.
        seconds: that it took.
        by_document: of one process, the loss of the first batch whose documents ran one by one.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    seconds: float = 0.0
    by_document: float | None = None

    def add(self, loss: Tensor, norm: Tensor, batch: int) -> None:
        """One step."""
        self.losses.append(loss.item())
        self.norms.append(norm.item())
        self.batches.append(batch)


Curves = dict[str, Curve]


def largest_gap(values: list[float], wanted: list[float]) -> float:
    """The largest relative difference at any step; infinite where a step is missing or not a number."""
    if len(values) != len(wanted):
        return float("inf")
    gaps = [abs(a - b) / abs(b) for a, b in zip(values, wanted, strict=True)]
    return max(float("inf") if math.isnan(gap) else gap for gap in gaps)


def compare(found: dict[str, Curves], layers: int) -> tuple[str, bool]:
    """The table in Markdown, and whether every set-up keeps to the one process."""
    steps = len(next(iter(found.values()))[ALONE].losses)
    lines = [
        f"Largest relative difference from one process at any of {steps} steps, {layers} layers, float32:",
        "",
        "| set-up | optimizer | first loss | last loss | loss (allowed) | norm of gradients (allowed) | seconds | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    is_good = True
    for optimizer, curves in found.items():
        for name, curve in curves.items():
            row, is_right = compare_one(name, curve, curves[REFERENCES.get(name, ALONE)], optimizer)
            lines.append(row)
            is_good &= is_right
    lines += ["", "\\* the first loss, beside that of its documents run one by one"]
    return "\n".join(lines), is_good


def compare_one(name: str, curve: Curve, alone: Curve, optimizer: str) -> tuple[str, bool]:
    """The row of a set-up, and whether it keeps to the one process; that one is compared with its documents run one by one."""
    is_same = curve.batches == alone.batches
    allowed = ALLOWED_OTHER_SUMS if name == SFT_ALONE else ALLOWED[optimizer]
    if curve is alone:
        assert alone.by_document is not None, "the one process runs documents one by one"
        loss, norm, allowed = largest_gap(alone.losses[:1], [alone.by_document]), 0.0, ALLOWED["sgd"]
    else:
        loss, norm = largest_gap(curve.losses, alone.losses), largest_gap(curve.norms, alone.norms)
    is_right = is_same and loss <= allowed and norm <= ALLOWED_NORM
    verdict = "ok" if is_right else "PARTS" if is_same else "OTHER BATCHES"
    gaps = f"{loss:.1e} ({allowed:.0e}){'*' if curve is alone else ''} | {norm:.1e} ({ALLOWED_NORM:.0e})"
    ends = f"{curve.losses[0]:.6f} | {curve.losses[-1]:.6f}"
    return f"| {name} | {TITLES[optimizer]} | {ends} | {gaps} | {curve.seconds:.0f} | {verdict} |", is_right


def draw(found: dict[str, Curves], out: Path) -> None:
    """For each optimizer the losses of all set-ups, and below how far they are from those of one process."""
    import matplotlib as mpl

    mpl.use("Agg")  # draws without a display
    from matplotlib import pyplot as plt

    size = (6.5 * len(found), 7)
    figure, panels = plt.subplots(2, len(found), figsize=size, sharex=True, squeeze=False, layout="constrained")
    for (upper, lower), (optimizer, curves) in zip(panels.T, found.items(), strict=True):
        steps = range(1, len(curves[ALONE].losses) + 1)
        for number, (name, curve) in enumerate(curves.items()):
            # Curves lie on each other: wide lines below, narrow ones above.
            upper.plot(steps, curve.losses, color=f"C{number}", linewidth=10 - 1.4 * number, label=name)
            if name not in (ALONE, SFT_ALONE):
                alone = curves[REFERENCES.get(name, ALONE)].losses
                gaps = [max(abs(a - b) / b, 1e-9) for a, b in zip(curve.losses, alone, strict=True)]
                lower.semilogy(steps, gaps, "o-", markersize=3, color=f"C{number}", label=name)
        lower.axhline(ALLOWED[optimizer], color="black", linestyle=":", label="allowed")
        upper.set(title=f"{TITLES[optimizer]}: loss at each step")
        lower.set(title="relative difference from one process", xlabel="step")
        lower.xaxis.get_major_locator().set_params(integer=True)
        upper.legend(fontsize="small")
        lower.legend(fontsize="small", loc="lower right")
    figure.savefig(out, dpi=110)


def around_table(page: Path) -> tuple[str, str]:
    """What a page has before its table and after it."""
    begin, end = "<!-- table -->\n", "<!-- end of table -->"
    before, found, rest = page.read_text().partition(begin)
    if not found or end not in rest:
        raise SystemExit(f"{page} has no place for the table: it needs the lines {begin.strip()} and {end}")
    return before + begin, end + rest.partition(end)[2]


def write_table(page: Path, table: str) -> None:
    """Put the table in place of the one that the page has."""
    before, after = around_table(page)
    page.write_text(f"{before}{table}\n{after}")


def keep(found: dict[str, Curves], layers: int, out: Path) -> None:
    """Write all curves as JSON, a line each."""
    rows = [{"optimizer": key, "set-up": name, **vars(curve)} for key, curves in found.items() for name, curve in curves.items()]
    out.write_text(f'{{"layers": {layers}, "curves": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]}\n")


def kept(path: Path) -> tuple[dict[str, Curves], int]:
    """Curves and layers as they were written."""
    run, found = json.loads(path.read_text()), {}
    for row in run["curves"]:
        optimizer, name = row.pop("optimizer"), row.pop("set-up")
        found.setdefault(optimizer, {})[name] = Curve(**row)
    return found, run["layers"]
