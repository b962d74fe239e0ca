"""Bytes that are held while a step runs, by what they are for, and the moment at which they are most.

ledger.hold("activations", 8 * h)         made, or kept for backward
ledger.release("activations", 8 * h)      no longer needed
with ledger.passing("temporaries", n):    held for a moment
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

Part = Literal[
    "parameters",
    "gradients",
    "optimizer",
    "sharding buffers",
    "activations",
    "logits and loss",
    "attention buffers",
    "temporaries",
    "batch",
    "libraries",
]
PARTS: tuple[Part, ...] = get_args(Part)


class Ledger:
    """What is held now, and what was held at the largest moment since the last `turn`.

    Attributes:
        now: bytes by part.
        most: bytes by part at the largest moment.
        moment: what was going on then.
    """

    def __init__(self) -> None:
        self.now: Counter[Part] = Counter()
        self._total = 0
        self.turn("")

    def turn(self, what: str) -> None:
        """Begin to look for the largest moment anew, and name what goes on from here."""
        self._doing = what
        self.most: Counter[Part] = Counter(self.now)
        self._most_total, self.moment = self._total, what

    def doing(self, what: str) -> None:
        """Name what goes on from here."""
        self._doing = what

    def hold(self, part: Part, count: float) -> None:
        """Hold so many bytes more."""
        whole = round(count)
        self.now[part] += whole
        self._total += whole
        if self._total > self._most_total:
            self._most_total, self.most, self.moment = self._total, Counter(self.now), self._doing

    def release(self, part: Part, count: float) -> None:
        """Hold so many bytes less."""
        whole = round(count)
        assert whole <= self.now[part], f"{part} has {self.now[part]} bytes, of which {whole} cannot be released"
        self.now[part] -= whole
        self._total -= whole

    @contextmanager
    def passing(self, part: Part, count: float) -> Iterator[None]:
        """Hold bytes for as long as the block lasts."""
        self.hold(part, count)
        yield
        self.release(part, count)

    @property
    def total(self) -> int:
        """Bytes held now."""
        return self._total

    @property
    def most_total(self) -> int:
        """Bytes at the largest moment."""
        return self._most_total


__all__ = ["PARTS", "Ledger", "Part"]
