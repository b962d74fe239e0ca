"""What `verify` has found: a table of what was compared, and where two runs of a model part. Plain values, without torch.

    verify: LlamaForCausalLM, Zigzag(1) over 2 ranks of 'cp', torch.float32, 2 x 24 tokens
    compared                                    deviation  tolerance
    weights, of 21 tensors                              0          0  ok
    loss                                          1.2e-08    4.8e-07  ok
    logits                                        9.5e-02    3.1e-06  FAIL  rank 1, 11 tokens from 12 on
    ...
    first difference: model.layers.1.self_attn (LlamaAttention): its output parts, what it was given does not

A deviation is the largest absolute difference over the largest absolute value of one process, or a count of what differs where
the tolerance is 0. Where a run goes wrong, everything behind it differs too. So a module is named by what went in: `first_culprit`
takes the first module, in forward order, whose output parts while its inputs do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

Kind = Literal["output", "loss", "output gradient", "parameter gradient", "edge case"]
# A deviation may be this many times the model's own error. Two right runs differ by the errors of both, and the largest of many
# differences varies from run to run.
FACTOR = 8.0


class VerificationError(RuntimeError):
    """A model computes something else under a plan than in one process; the text is the whole table."""


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that was compared.

    Attributes:
        name: what it is.
        deviation: largest difference over all ranks, relative to the largest value; a count where the tolerance is 0.
        tolerance: largest deviation that is right.
        note: where the largest deviation is, and what it looks like.
        left_out: why this was not compared; None where it was.
    """

    name: str
    deviation: float = 0.0
    tolerance: float = 0.0
    note: str = ""
    left_out: str | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong; NaN is."""
        return self.left_out is not None or self.deviation <= self.tolerance

    @property
    def verdict(self) -> str:
        """One word: ok, FAIL, or a dash for what was not compared."""
        return "-" if self.left_out is not None else "ok" if self.ok else "FAIL"

    def __str__(self) -> str:
        if self.left_out is not None:
            return f"{self.name:<52}{'':>9}  {'':>9}  -     {self.left_out}"
        note = f"  {self.note}" if self.note and not self.ok else ""
        return f"{self.name:<52}{_number(self.deviation):>9}  {_number(self.tolerance):>9}  {self.verdict:<4}{note}".rstrip()


@dataclass(frozen=True, slots=True)
class Difference:
    """Where the two runs part first.

    Attributes:
        module: the module's name in the model, "" for the model itself.
        class_name: its class.
        kind: what of it parts: its output; the gradient of its output, made by what comes after it; the gradient of its own
            parameter; the loss of the model; or a row that is about a batch of its own.
        deviation: relative to the largest value.
        tolerance: largest deviation that is right.
        ranks: ranks whose tokens part.
        tokens: how many tokens part, over all ranks.
        first_token: the first of them, in the whole sequence; None where it is not of tokens.
        note: what else was seen.
    """

    module: str
    class_name: str
    kind: Kind
    deviation: float
    tolerance: float
    ranks: tuple[int, ...] = ()
    tokens: int = 0
    first_token: int | None = None
    note: str = ""

    def __str__(self) -> str:
        name = f"{self.module} ({self.class_name})" if self.module else self.class_name
        size = f"by {_number(self.deviation)}, tolerance {_number(self.tolerance)}"
        where = f", {on_ranks(self.ranks)}" if self.ranks else ""
        if self.first_token is not None:
            where += f", {self.tokens} token{'s' * (self.tokens != 1)} from {self.first_token} on"
        return f"{name}: {_PHRASES[self.kind]} {size}{where}" + (f"; {self.note}" if self.note else "")


_PHRASES: dict[Kind, str] = {
    "output": "its output parts",
    "loss": "its loss parts, all modules before it do not:",
    "output gradient": "all outputs agree, and backward the gradient of its output parts first:",
    "parameter gradient": "all outputs and their gradients agree, and the gradient of its parameter parts",
    "edge case": "the batch itself agrees, and what is made of it parts:",
}


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found, the same on every rank; prints as a table.

    Attributes:
        title: the model, the plan and the batch.
        rows: everything that was compared, in the order of the table.
        first_difference: where the two runs part; None where they do not.
    """

    title: str
    rows: tuple[Row, ...]
    first_difference: Difference | None = None

    @property
    def ok(self) -> bool:
        """Whether every row is within its tolerance."""
        return all(row.ok for row in self.rows)

    @property
    def failed(self) -> tuple[Row, ...]:
        """The rows that are not."""
        return tuple(row for row in self.rows if not row.ok)

    def row(self, name: str) -> Row:
        """The row whose name begins so.

        Raises:
            KeyError: there is none.
        """
        for row in self.rows:
            if row.name.startswith(name):
                return row
        raise KeyError(f"no row {name!r}; there are {', '.join(row.name for row in self.rows)}")

    def raise_if_wrong(self) -> Verification:
        """Itself, for chaining.

        Raises:
            VerificationError: a row is not within its tolerance.
        """
        if not self.ok:
            raise VerificationError(f"the model under its plan is not that of one process\n{self}")
        return self

    def facts(self) -> dict[str, object]:
        """Everything as values that JSON can hold; numbers that it cannot (inf) as text."""
        return {
            "title": self.title,
            "ok": self.ok,
            "rows": [_plain({**asdict(row), "note": "" if row.ok else row.note, "verdict": row.verdict}) for row in self.rows],
            "first_difference": None if self.first_difference is None else _plain(asdict(self.first_difference)),
        }

    def __str__(self) -> str:
        head = f"{'compared':<52}{'deviation':>9}  {'tolerance':>9}"
        lines = [f"verify: {self.title}", head, *map(str, self.rows)]
        if self.first_difference is not None:
            lines.append(f"first difference: {self.first_difference}")
        lines.append("the same as in one process" if self.ok else f"NOT the same as in one process: {len(self.failed)} rows")
        return "\n".join(lines)


class Judged(NamedTuple):
    """A tensor that a module returned, or its gradient, compared over all ranks.

    Attributes:
        module: the module's name.
        call: how many times the module was called before, in the same pass.
        deviation: relative.
        tolerance: relative.
        inputs: the largest relative deviation of what the module was given in that call.
        ranks: ranks whose tokens part.
        tokens: how many part.
        first_token: the first of them.
        zero_on: ranks that have nothing but zeros where one process has not.
    """

    module: str
    call: int
    deviation: float
    tolerance: float
    inputs: float = 0.0
    ranks: tuple[int, ...] = ()
    tokens: int = 0
    first_token: int | None = None
    zero_on: tuple[int, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether it is within its tolerance; NaN is not."""
        return self.deviation <= self.tolerance

    @property
    def note(self) -> str:
        """Where it parts."""
        where = f"{self.module}: " if self.module else ""
        tokens = "" if self.first_token is None else f", {self.tokens} token{'s' * (self.tokens != 1)} from {self.first_token} on"
        zero = f", nothing but zeros on {on_ranks(self.zero_on)}" if self.zero_on else ""
        return f"{where}{on_ranks(self.ranks)}{tokens}{zero}"

    def difference(self, classes: Mapping[str, str], kind: Kind, note: str = "") -> Difference:
        """It as the place where runs part."""
        zero = f"nothing but zeros on {on_ranks(self.zero_on)}" if self.zero_on else ""
        return Difference(
            self.module,
            classes[self.module],
            kind,
            self.deviation,
            self.tolerance,
            self.ranks,
            self.tokens,
            self.first_token,
            "; ".join(filter(None, (note, zero))),
        )


def first_culprit(outputs: Iterable[Judged], classes: Mapping[str, str]) -> Difference | None:
    """The first output that parts though its module was given what one process gave it; None where none parts.

    Args:
        outputs: in the order in which the modules ended, so that a module comes after those inside of it.
        classes: the class of each module, by name.
    """
    apart = [judged for judged in outputs if not judged.ok]
    # A module behind a fault parts as well, and often one inside the faulty module: a projection of wrong attention. Either was
    # given what differs. Inputs are held to the tolerance of the output, which is the larger one: the module's own error is in it.
    guilty = next((judged for judged in apart if judged.inputs <= judged.tolerance), None)
    if guilty is not None:
        return guilty.difference(classes, "output", "what it was given agrees")
    return apart[0].difference(classes, "output", "what it was given parts already") if apart else None


def worst(judged: Sequence[Judged]) -> Judged | None:
    """The one that is furthest beyond its tolerance."""
    return max(judged, key=lambda each: _excess(each.deviation, each.tolerance), default=None)


def worst_row(name: str, judged: Sequence[Judged]) -> Row:
    """One row for many tensors: the one furthest beyond its tolerance, and how many part."""
    found = worst(judged)
    if found is None:
        return Row(name, left_out="none of a form that can be cut by tokens")
    apart = sum(not each.ok for each in judged)
    note = f"{apart} of {len(judged)} part, furthest {found.note}" if apart else ""
    return Row(f"{name}, of {len(judged)}", found.deviation, found.tolerance, note)


def relative(size: float, scale: float) -> float:
    """A difference over the largest value; a difference from nothing but zeros is infinite."""
    if size == 0:
        return 0.0
    return size / scale if scale > 0 else math.inf


def tolerance(own: float, scale: float, unit: float) -> float:
    """The largest relative difference that is right: a multiple of the model's own error, which is at least one unit.

    Args:
        own: how far the value moves by rounding alone; what is not finite counts as unknown.
        scale: the largest value.
        unit: one unit in the last place, relative.
    """
    return FACTOR * max(relative(own, scale) if math.isfinite(own) and scale > 0 else 0.0, unit)


def ratio_note(ratio: float, world: int) -> str:
    """What gradients that are a plain multiple of the right ones look like."""
    for factor, text in (
        (1 / world, f"1/{world}: averaged once too often, or never scaled by the ranks"),
        (world, "the ranks: added up"),
    ):
        if world > 1 and abs(ratio - factor) <= 0.02 * factor:
            return f"every gradient is {ratio:.4g} times that of one process, which is {text}"
    return f"every gradient is {ratio:.4g} times that of one process"


def on_ranks(ranks: Sequence[int]) -> str:
    """Ranks in words."""
    if not ranks:
        return "no rank"
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _excess(deviation: float, tolerance: float) -> float:
    if math.isnan(deviation):
        return math.inf
    if tolerance > 0:
        return deviation / tolerance
    return math.inf if deviation > 0 else 0.0


def _number(value: float) -> str:
    return f"{value:.0f}" if float(value).is_integer() and value < 1e6 else f"{value:.1e}"


def _plain(values: Mapping[str, object]) -> dict[str, object]:
    return {name: str(x) if isinstance(x, float) and not math.isfinite(x) else x for name, x in values.items()}
