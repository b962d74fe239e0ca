"""What a plan is made for."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from dtensor_ring.planning.documents import Documents, Slices
from dtensor_ring.planning.layout import Layout
from dtensor_ring.planning.mask import Band
from dtensor_ring.planning.runs import Piece, Run, cut


@dataclass(frozen=True, slots=True)
class AttentionProblem:
    """Everything a plan depends on but the rank."""

    layout: Layout
    band: Band
    q_length: int
    k_length: int
    world: int
    strategy: str = "ring"
    documents: Documents | Slices | None = None
    _halo_rows: int | None = field(init=False, repr=False, compare=False, default=None)  # worked out when first asked for

    def __str__(self) -> str:
        """In one line, for errors; the same on every rank, so slices of documents, which differ, are not told apart."""
        lengths = f"{self.q_length}" if self.q_length == self.k_length else f"{self.q_length} queries and {self.k_length} keys"
        documents = f", {self.documents}" if isinstance(self.documents, Documents) else ", documents" if self.documents else ""
        return f"{self.strategy}, {self.layout}, {self.band}, {lengths} tokens over {self.world} ranks{documents}"

    @property
    def nbytes(self) -> int:
        """Host memory that the value takes, estimated: that of its documents."""
        return 300 + (0 if self.documents is None else self.documents.nbytes)

    @property
    def position_band(self) -> Band:
        """The band of positions: queries count from `k_length - q_length`, flash-attn's bottom-right alignment."""
        return self.band.shifted(self.k_length - self.q_length)

    @property
    def bounds(self) -> tuple[tuple[int, ...] | None, ...]:
        """Document bounds, one entry for the batch or one a batch row."""
        return self.documents.bounds if isinstance(self.documents, Documents) else (None,)

    def q_pieces(self, rank: int, row: int) -> tuple[Piece, ...]:
        """A rank's queries cut into documents, in one batch row."""
        runs = self.q_runs(rank)
        if isinstance(self.documents, Slices):
            first = runs[0].start if runs else 0
            return tuple(Piece(Run(first + a, b - a), a, i) for i, (a, b) in enumerate(pairwise(self.documents.cu_q)) if b > a)
        return cut(runs, self.bounds[row])

    def k_pieces(self, runs: tuple[Run, ...], row: int) -> tuple[Piece, ...]:
        """Keys in runs cut into documents, in one batch row."""
        if isinstance(self.documents, Slices):
            start, cu_k = self.documents.k_start, self.documents.cu_k
            return tuple(Piece(Run(start + a, b - a), start + a, i) for i, (a, b) in enumerate(pairwise(cu_k)) if b > a)
        return cut(runs, self.bounds[row])

    def q_runs(self, rank: int) -> tuple[Run, ...]:
        """Runs of a rank's queries, in storage order."""
        return self.layout.runs(self.q_length, self.world, rank, self.bounds[0])

    def k_runs(self, rank: int) -> tuple[Run, ...]:
        """Runs of a rank's keys, in storage order."""
        return self.layout.runs(self.k_length, self.world, rank, self.bounds[0])

    def q_rows(self, rank: int) -> int:
        """Queries on a rank."""
        return self.layout.local_length(self.q_length, self.world, rank)

    def k_rows(self, rank: int) -> int:
        """Keys on a rank."""
        return self.layout.local_length(self.k_length, self.world, rank)

    def q_tokens(self, rank: int) -> list[int]:
        """Tokens of a rank's queries, in storage order."""
        return [token for run in self.q_runs(rank) for token in run.tokens()]

    def k_tokens(self, rank: int) -> list[int]:
        """Tokens of a rank's keys, in storage order."""
        return [token for run in self.k_runs(rank) for token in run.tokens()]

    @property
    def in_order(self) -> bool:
        """Whether keys are gathered into position order, which needs local runs of neighbouring tokens."""
        return self.layout.kind != "stripe" or self.world == 1

    @property
    def is_halo(self) -> bool:
        """Whether a window is served by fetching the keys just around each local run, at most twice the local keys."""
        if not self.band.bounded or not self.in_order or self.world == 1 or isinstance(self.documents, Slices):
            return False
        return self.halo_rows * self.world <= 2 * self.k_length

    @property
    def halo_rows(self) -> int:
        """Key rows that the most loaded rank fetches for a window, at most."""
        if self._halo_rows is None:
            object.__setattr__(self, "_halo_rows", self._count_halo_rows())
        assert self._halo_rows is not None, "counted above"
        return self._halo_rows

    def _count_halo_rows(self) -> int:
        band = self.position_band
        assert band.lo is not None and band.hi is not None, "a halo needs a window"
        reach = max(0, band.hi - min(band.lo, 0))
        if not self.layout.cut:
            return reach * (2 if self.layout.kind == "zigzag" else 1)
        bounds = self.bounds[0] or (0, self.q_length)
        return max(
            sum(min(reach, run.start - bounds[Documents.find(bounds, run.start)] - min(band.lo, 0)) for run in self.q_runs(rank))
            for rank in range(self.world)
        )

    @property
    def collective(self) -> bool:
        """Whether the keys of all ranks are fetched by one all-gather; otherwise exact rows go from rank to rank."""
        whole = self.documents is None or isinstance(self.documents, Slices)
        return self.strategy == "gather" and self.world > 1 and whole and not self.is_halo
