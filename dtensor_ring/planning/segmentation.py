"""How a sequence is divided into parts that attend to themselves only: the interface that planning knows documents by.

    WHOLE       one part, the sequence
    Documents   packed documents, known on every rank
    Slices      what one rank knows of its own parts, in llama3's functions

A plan asks for pieces: runs of tokens that lie in one part each. Queries and keys of pieces with equal numbers see each other as
far as the band allows, others do not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from dtensor_ring.planning.runs import Bounds, Piece, Run, cut

if TYPE_CHECKING:
    from torch import Tensor


class Segmentation(ABC):
    """A frozen value that says which tokens belong together."""

    # Without it every value would have a dictionary beside the slots of its own class.
    __slots__ = ()

    @property
    @abstractmethod
    def row_bounds(self) -> tuple[Bounds, ...]:
        """Cumulative bounds of the parts, for the whole batch or for each batch row; None where they are not known by position."""
        # Not every segmentation has them: planning asks for pieces where it can, and for bounds where a layout depends on them.

    @property
    @abstractmethod
    def rows(self) -> int:
        """How many rows of bounds there are: 1 for the whole batch, or one for each batch row."""

    @property
    @abstractmethod
    def parts(self) -> int:
        """How many parts all rows have together."""

    @property
    @abstractmethod
    def is_shared(self) -> bool:
        """Whether every rank holds the same value, so that each knows which keys the others need."""
        # Where it does not, only an exchange that brings every key to every rank is planned alike on all of them.

    @property
    @abstractmethod
    def described(self) -> str:
        """The value in a few words, for errors and drawings."""
        # The same on every rank, so that errors which all ranks raise name one call. Ranks differ in their slices, which say less.

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """An estimate of the host memory that the value takes."""
        # Caches are bounded in bytes, and a problem with thousands of documents is most of what an entry holds.

    @abstractmethod
    def q_pieces(self, runs: tuple[Run, ...], row: int) -> tuple[Piece, ...]:
        """Runs of one rank's queries, in storage order, cut into parts, in one row of bounds."""
        # Queries and keys are asked for apart: a rank that knows its own parts only has other bounds for the two.

    @abstractmethod
    def k_pieces(self, runs: tuple[Run, ...], row: int) -> tuple[Piece, ...]:
        """Runs of keys, in the order of their buffer, cut into parts, in one row of bounds."""

    @abstractmethod
    def select(self, start: int, stop: int) -> Segmentation:
        """The value for batch rows [start, stop); one row of bounds for the whole batch stays as it is."""

    @abstractmethod
    def operand(self) -> Tensor:
        """What operators take and only read: the value as one int64 CPU tensor."""


class _Whole(Segmentation):
    """A sequence that is one part: a stand-in for no documents, so that planning need not ask whether there are any."""

    __slots__ = ()

    @property
    def row_bounds(self) -> tuple[Bounds, ...]:
        return (None,)

    @property
    def rows(self) -> int:
        return 1

    @property
    def parts(self) -> int:
        return 1

    @property
    def is_shared(self) -> bool:
        return True

    @property
    def described(self) -> str:
        return ""

    @property
    def nbytes(self) -> int:
        return 0

    def q_pieces(self, runs: tuple[Run, ...], row: int) -> tuple[Piece, ...]:
        return cut(runs, None)

    def k_pieces(self, runs: tuple[Run, ...], row: int) -> tuple[Piece, ...]:
        return cut(runs, None)

    def select(self, start: int, stop: int) -> _Whole:
        return self

    def operand(self) -> Tensor:
        import torch  # here, so that planning loads without it: the command line starts with integers alone

        # An operator's argument is a tensor in every call, and one without numbers stands for no documents.
        return torch.empty(0, dtype=torch.int64)


WHOLE = _Whole()
