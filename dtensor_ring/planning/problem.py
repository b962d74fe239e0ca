"""What a plan is made for: everything that it depends on but the rank."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Literal

from dtensor_ring.planning.holders import Holders, holders
from dtensor_ring.planning.layout import Layout, PackedLayout
from dtensor_ring.planning.mask import Band
from dtensor_ring.planning.runs import Bounds, Piece, Run, document_at
from dtensor_ring.planning.segmentation import WHOLE, Segmentation
from dtensor_ring.planning.stages import BUFFERED_TOKENS, fewest_stages, stage_sizes

StrategyName = Literal["ring", "gather", "ulysses"]


@dataclass(frozen=True, slots=True)
class AttentionProblem:
    """Everything that a plan depends on but the rank."""

    layout: Layout
    band: Band
    q_length: int
    k_length: int
    world: int
    strategy: str = "ring"
    documents: Segmentation | None = None
    stages: int = 0  # of "ring"; 0 is one for each other rank
    _halo_tokens: int | None = field(init=False, repr=False, compare=False, default=None)  # worked out when first asked for

    def __str__(self) -> str:
        """The problem in one line, for errors; the text is the same on every rank."""
        lengths = f"{self.q_length}" if self.q_length == self.k_length else f"{self.q_length} queries and {self.k_length} keys"
        documents = "" if self.documents is None else f", {self.documents.described}"
        return f"{self.exchange}, {self.layout}, {self.band}, {lengths} tokens over {self.world} ranks{documents}"

    @property
    def exchange(self) -> str:
        """The strategy, with the number of its stages where they are fewer than the other ranks."""
        if self.strategy != "ring" or self.transfers == self.world - 1:
            return self.strategy
        return f"ring in {self.transfers} {'stage' if self.transfers == 1 else 'stages'}"

    def staged(self, stages: int = 0, most_tokens: int = BUFFERED_TOKENS) -> AttentionProblem:
        """The problem with as many stages, or for 0 with as few as keep their buffers within the keys of `most_tokens`.

        Stripes of several ranks make no larger tiles together, and halo and gather have one transfer in any case: left open, these
        keep the buffers of a ring, the smallest.
        """
        if self.strategy != "ring" or self.world == 1:
            return self
        if not stages and self.in_order:
            stages = fewest_stages(self.world - 1, -(-self.k_length // self.world), most_tokens)
        return replace(self, stages=min(stages, self.world - 1))

    @property
    def transfers(self) -> int:
        """Transfers in which "ring" fetches the other ranks' keys: as many as stages, but none that would fetch nothing."""
        others = self.world - 1
        return min(self.stages, others) if self.stages else others

    @property
    def distances(self) -> tuple[range, ...]:
        """How far away the ranks are whose keys each stage of "ring" fetches: rank - distance, modulo the world.

        The distances are the same for all ranks: so in each stage every rank sends to as many ranks as it receives from.
        """
        others = self.world - 1
        sizes = [1] * others if self.transfers == others else stage_sizes(others, self.transfers)
        return tuple(range(stop - size + 1, stop + 1) for stop, size in zip(accumulate(sizes), sizes, strict=True))

    @property
    def planned(self) -> AttentionProblem:
        """The attention that plans are made for: this one, or where heads are shared out, that of one device on each rank."""
        # Over one rank every layout is position order, which is also the order that the exchange of heads puts tokens into.
        return replace(self, world=1, strategy="ring") if self.strategy == "ulysses" else self

    @property
    def segmentation(self) -> Segmentation:
        """The documents, or a value that stands for none, so that planning need not tell the two apart."""
        return WHOLE if self.documents is None else self.documents

    @property
    def nbytes(self) -> int:
        """An estimate of the host memory that the value takes, which is that of its documents."""
        return 300 + self.segmentation.nbytes

    @property
    def position_band(self) -> Band:
        """The band of positions: queries count from `k_length - q_length`, flash-attn's bottom-right alignment."""
        return self.band.shifted(self.k_length - self.q_length)

    @property
    def bounds(self) -> tuple[Bounds, ...]:
        """Document bounds, one entry for the batch or one a batch row."""
        return self.segmentation.row_bounds

    @property
    def split(self) -> Layout | PackedLayout:
        """How tensors of this problem are spread over the ranks: the layout, with the documents where it depends on them."""
        # Other layouts stand without documents: every batch then has the same split, and the indices of its tokens are kept.
        return PackedLayout(self.layout, self.documents) if self.layout.cut and self.documents is not None else self.layout

    def q_pieces(self, rank: int, row: int) -> tuple[Piece, ...]:
        """The runs of a rank's queries in one batch row, cut where documents begin."""
        return self.segmentation.q_pieces(self.q_runs(rank), row)

    def k_pieces(self, runs: tuple[Run, ...], row: int) -> tuple[Piece, ...]:
        """Runs of keys in one batch row, cut where documents begin."""
        return self.segmentation.k_pieces(runs, row)

    def q_runs(self, rank: int) -> tuple[Run, ...]:
        """Runs of a rank's queries, in storage order."""
        # Layouts that depend on documents take one row of bounds for the whole batch: tokens lie alike in all of its rows.
        return self.layout.runs(self.q_length, self.world, rank, self.bounds[0])

    def k_runs(self, rank: int) -> tuple[Run, ...]:
        """Runs of a rank's keys, in storage order."""
        return self.layout.runs(self.k_length, self.world, rank, self.bounds[0])

    @property
    def holders(self) -> tuple[Holders, Holders]:
        """Who holds which queries, and who holds which keys; for layouts in order."""
        of_queries = holders(self.layout, self.q_length, self.world, self.documents)
        if self.q_length == self.k_length:
            return of_queries, of_queries
        return of_queries, holders(self.layout, self.k_length, self.world, self.documents)

    def q_local(self, rank: int) -> int:
        """How many queries a rank holds."""
        return self.layout.local_length(self.q_length, self.world, rank)

    def k_local(self, rank: int) -> int:
        """How many keys a rank holds."""
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
        return self.layout.in_order or self.world == 1

    @property
    def tiles_of_stripes(self) -> int:
        """About how many tiles planning one rank of stripes looks at, its own and those of ranks that it sends to; 0 for others."""
        # A stripe has a part of every document on every rank: no document is left out, as most are for layouts of chunks.
        if self.in_order or self.collective:
            return 0
        # A window or causal mask cuts the corners of block pairs off, one tile each.
        corners = self.k_length // self.layout.block if self.layout.block > 1 else 0
        own = self.world * self.segmentation.parts + corners
        return own * (1 + self.world) if self.strategy == "gather" else 2 * own

    @property
    def is_halo(self) -> bool:
        """Whether a window is served by fetching the keys just around each local run, at most twice the local keys."""
        # A halo is one step, without merging. It needs runs of neighbours, since around scattered tokens lies everything; and every
        # rank must know what the others need, since they send it unasked.
        if (
            self.strategy == "ulysses"
            or not self.band.bounded
            or not self.in_order
            or self.world == 1
            or not self.segmentation.is_shared
        ):
            return False
        # A ring holds two ranks' keys beside its own, one computed on while another arrives. A wide window would hold more than
        # that in its single step, and the ring's steps serve it with bounded memory.
        return self.halo_tokens * self.world <= 2 * self.k_length

    @property
    def halo_tokens(self) -> int:
        """Keys that the most loaded rank fetches for a window, at most."""
        # Every step of every rank asks, and where documents are cut one by one the count goes over the runs of all ranks.
        if self._halo_tokens is None:
            object.__setattr__(self, "_halo_tokens", self._count_halo_tokens())
        assert self._halo_tokens is not None, "counted above"
        return self._halo_tokens

    def _count_halo_tokens(self) -> int:
        band = self.position_band
        assert band.lo is not None and band.hi is not None, "a halo needs a window"
        # Keys before and after a chunk; a window that begins ahead of its query reaches over some keys in between too.
        reach = max(0, band.hi - min(band.lo, 0))
        if not self.layout.cut:
            return reach * self.layout.chunks
        bounds = self.bounds[0] or (0, self.q_length)
        # Before a chunk a window reaches no farther than to the beginning of its document: a document that is whole on its rank
        # fetches nothing, however long the window.
        return max(
            sum(min(reach, run.start - bounds[document_at(bounds, run.start)] - min(band.lo, 0)) for run in runs)
            for runs in self.holders[0].of_rank
        )

    @property
    def collective(self) -> bool:
        """Whether one all-gather brings the keys of all ranks; otherwise exactly the keys that are needed travel."""
        # An exact exchange pays where documents leave keys out, and can be planned where every rank knows what the others need.
        needs_all = self.documents is None or not self.documents.is_shared
        return self.strategy == "gather" and self.world > 1 and needs_all and not self.is_halo
