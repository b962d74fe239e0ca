"""Differences of this rank become judgements of all: tolerances from the model's own error, and where tokens part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dtensor_ring.integrations.verify.batches import Case
from dtensor_ring.integrations.verify.runs import Run, local_gradients
from dtensor_ring.integrations.verify.state import Ranks
from dtensor_ring.integrations.verify.watch import Compared, Key, Part, difference, largest_values
from dtensor_ring.tools.verification import Judged, Row, ratio_note, relative, tolerance, worst

Apart = dict[Key, tuple[list[int], bool]]  # the tokens of this rank that part, and whether all its values are 0


class Pair(NamedTuple):
    """A case under the plan and in one process, and what nudged weights made of the latter."""

    case: Case
    ring: Run
    alone: Run
    nudges: list[Run]


class Judge:
    """Judges over all ranks.

    Args:
        ranks: who must come to one verdict.
        unit: one unit in the last place, relative, of the coarsest dtype of the model.
    """

    def __init__(self, ranks: Ranks, unit: float) -> None:
        self._ranks, self.unit = ranks, unit

    def number(self, own: Sequence[float], value: float, wanted: float, unit: float) -> tuple[float, float]:
        """The deviation and tolerance of one number.

        Args:
            own: what one process gave with nudged weights.
            value: under the plan.
            wanted: in one process.
            unit: the least error of such a number, relative.
        """
        moved = max((abs(each - wanted) for each in own), default=0.0)
        size, moved, scale, unit = self._ranks.most({"": (abs(value - wanted), moved, abs(wanted), unit)})[""]
        return relative(size, scale), tolerance(moved, scale, unit)

    def modules(self, compared: Compared, tokens: Sequence[int]) -> tuple[list[Judged], list[Judged]]:
        """Outputs in the order in which modules end, and their gradients in that of backward.

        Args:
            compared: one process beside the plan's run, on this rank.
            tokens: that this rank holds, in its order.
        """
        mine = largest_values(compared.deviations)
        # Ranks may have other keys, as where an expert of some got no token. All judge by one list.
        order = dict.fromkeys(key for _, theirs in self._ranks.tell(list(mine)) for key in theirs)
        most = self._ranks.most(mine)
        sizes = {key: relative(most[key][0], most[key][1]) for key in order}
        bounds = {key: tolerance(most[key][2], most[key][1], self.unit) for key in order}
        apart = {key for key in order if key.part != "input" and not sizes[key] <= bounds[key]}
        here: Apart = {}
        for key, one in compared.deviations.items():
            if key in apart:
                places = (~(one.tokens <= bounds[key] * most[key][1])).nonzero()[:, 0].tolist()
                here[key] = [tokens[i] for i in places], bool(one.mine == 0)
        told = self._ranks.tell(here)
        inputs: dict[tuple[str, int], float] = {}
        for key in order:
            if key.part == "input":
                inputs[key[:2]] = max(inputs.get(key[:2], 0.0), sizes[key])
        judged: dict[Part, list[Judged]] = {"output": [], "gradient": []}
        for key in order:
            if key.part != "input":
                found = Judged(key.module, key.call, sizes[key], bounds[key], inputs.get(key[:2], 0.0))
                judged[key.part].append(_placed(found, key, told) if key in apart else found)
        return judged["output"], judged["gradient"]

    def gradients(self, name: str, pair: Pair) -> tuple[list[Judged], Row]:
        """Every parameter's gradient, and the row of all."""
        ours, theirs = local_gradients(pair.ring), local_gradients(pair.alone)
        nudges = [local_gradients(run) for run in pair.nudges]
        mine: dict[str, tuple[float, ...]] = {}
        product = square = 0.0
        # A gradient that one of the runs lacks (an expert without tokens) is zeros there.
        for parameter, like in {**ours, **theirs}.items():
            zeros = torch.zeros_like(like)
            a, b = ours.get(parameter, zeros), theirs.get(parameter, zeros)
            own = max((_most(difference(run.get(parameter, zeros), b)) for run in nudges), default=0.0)
            mine[parameter] = _most(difference(a, b)), _most(b.abs()), own
            product += float((a.double() * b.double()).sum())
            square += float((b.double() ** 2).sum())
        judged = [
            Judged(parameter, 0, relative(size, scale), tolerance(own, scale, self.unit))
            for parameter, (size, scale, own) in self._ranks.most(mine).items()
        ]
        told = self._ranks.tell((product, square))
        found = worst(judged)
        if found is None:
            return judged, Row(name, left_out="no parameter has one")
        apart = sum(not each.ok for each in judged)
        note = f"{apart} of {len(judged)} part, furthest {found.module}"
        whole = sum(square for _, (_, square) in told)
        ratio = sum(product for _, (product, _) in told) / whole if whole else 0.0
        multiple = [float(_is_multiple(ours, theirs, ratio))]
        if apart == len(judged) and all(one for _, (one,) in self._ranks.tell(multiple)):
            note += f"; {ratio_note(ratio, self._ranks.mesh.size())}"
        return judged, Row(f"{name}, of {len(judged)} parameters", found.deviation, found.tolerance, note)


def _placed(found: Judged, key: Key, told: Sequence[tuple[int, Apart]]) -> Judged:
    """With the ranks and tokens where it parts."""
    here = {rank: theirs[key] for rank, theirs in told if key in theirs and theirs[key][0]}
    tokens = {token for apart, _ in here.values() for token in apart}
    zero = tuple(rank for rank, (_, is_zero) in here.items() if is_zero)
    return found._replace(ranks=tuple(sorted(here)), tokens=len(tokens), first_token=min(tokens, default=None), zero_on=zero)


def _is_multiple(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], ratio: float) -> bool:
    """Whether every gradient is one multiple of the right one."""
    allowed = 0.01 * abs(ratio)
    return all(_most(difference(ours[n], ratio * grad)) <= allowed * _most(grad.abs()) for n, grad in theirs.items() if n in ours)


def _most(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0
