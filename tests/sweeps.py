"""Sweeps over several arguments of a law: by default as few cases as let any two values meet, the others as slow tests."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

from helpers import slow


def pairs_of(cell: Sequence[object]) -> set[tuple[int, object, int, object]]:
    """Every two values of a case, each with its place."""
    return {(i, repr(a), j, repr(b)) for (i, a), (j, b) in itertools.combinations(enumerate(cell), 2)}


def covering(cells: Iterable[Sequence[object]]) -> list[Sequence[object]]:
    """Few of the cases, in which every two values of two arguments meet that meet in any of them; always the same ones."""
    left = {tuple(map(repr, cell)): (cell, pairs_of(cell)) for cell in cells}
    missing = set().union(*(pairs for _, pairs in left.values()))
    chosen = []
    while missing:
        name = max(left, key=lambda name: len(left[name][1] & missing))  # the first of several
        cell, pairs = left.pop(name)
        missing -= pairs
        chosen.append(cell)
    return chosen


def swept(*arguments: Iterable[object], kept: Callable[..., bool] = lambda *_: True) -> list:
    """All combinations of the arguments' values that are `kept`; those that are not in a covering of pairs run as slow tests."""
    cells = [cell for cell in itertools.product(*map(list, arguments)) if kept(*cell)]
    names = {tuple(map(repr, cell)) for cell in covering(cells)}
    return [cell if tuple(map(repr, cell)) in names else slow(*cell) for cell in cells]
