"""The placements: how a tensor dim is spread over a mesh axis, as part of a DTensor's type.

    Contiguous(1), 4 ranks, 16 tokens    Zigzag(1)                 Stripe(1)              Stripe(1, block=2)
    rank 0:  0  1  2  3                  0  1 | 14 15               0  4  8 12             0  1 |  8  9
    rank 1:  4  5  6  7                  2  3 | 12 13               1  5  9 13             2  3 | 10 11
    rank 2:  8  9 10 11                  4  5 | 10 11               2  6 10 14             4  5 | 12 13
    rank 3: 12 13 14 15                  6  7 |  8  9               3  7 11 15             6  7 | 14 15

Placements are values: equal when they say the same layout of the same dim, hashable, and `repr` is the code that makes them.
They never carry lengths or documents, since PyTorch keeps placements in caches for ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar, NoReturn

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import Placement
from typing_extensions import override

from dtensor_ring._torch import PlacementBase
from dtensor_ring.comm import transport_along
from dtensor_ring.comm.collectives import Chunks, Split, gather_shards, take_shard
from dtensor_ring.planning.documents import Documents
from dtensor_ring.planning.layout import Layout, PackedLayout


# Why the base class is PyTorch's `_StridedShard`, and not `Shard` or a bare `Placement`, stands at `PlacementBase`.
class SequencePlacement(PlacementBase):
    """What the three placements share; use `Contiguous`, `Zigzag` or `Stripe`.

    Any global length from 0 up can be placed; rank totals differ by at most one token.

    Raises:
        ValueError: `dim` is negative.
        TypeError: `dim` is not an int.
    """

    short: ClassVar[str]

    def __init__(self, dim: int) -> None:
        if not isinstance(dim, int) or isinstance(dim, bool):
            raise TypeError(f"{type(self).__name__}(dim): dim must be an int, found {dim!r}")
        if dim < 0:
            raise ValueError(f"{type(self).__name__}(dim={dim}): count the dim from the front; a tensor's last dim is x.ndim - 1")
        super().__init__(dim)

    @property
    def layout(self) -> Layout:
        """The layout of this placement: a map of integers that planning understands without PyTorch."""
        raise NotImplementedError

    @property
    def _arguments(self) -> tuple[int, ...]:
        """The arguments that make this placement, the dim first. Equality, hash and pickle know nothing else."""
        return (self.dim,)

    def moved_to(self, dim: int) -> SequencePlacement:
        """The placement that lays out another tensor dim in the same manner."""
        return type(self)(dim, *self._arguments[1:])

    # The base class compares and hashes by `split_factor` too, which raises here. DTensor's caches look placements up by both.
    @override
    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and isinstance(other, SequencePlacement) and other._arguments == self._arguments

    @override
    def __ne__(self, other: object) -> bool:
        return not self == other

    @override
    def __hash__(self) -> int:
        return hash((type(self).__name__, self._arguments))

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.dim})"

    @override
    def __str__(self) -> str:
        return f"{self.short}({', '.join(map(str, self._arguments))})"

    # The base class is made by C++ from a dim and a split factor; checkpoints and copies must come back as the class they were.
    @override
    def __reduce__(self) -> tuple[type[SequencePlacement], tuple[int, ...]]:
        return type(self), self._arguments

    def __copy__(self) -> SequencePlacement:
        return self  # a value

    def __deepcopy__(self, memo: object) -> SequencePlacement:
        return self

    @override
    def __fx_repr__(self) -> tuple[str, dict[str, type]]:
        """How compiled graphs write the placement down: as code, with the class that the code names."""
        return repr(self), {type(self).__name__: type(self)}

    # What DTensor's own redistribute and full_tensor call. They are right on meshes of one axis, where users may well call them;
    # on larger meshes PyTorch orders the moves of several axes as it would for its own placements, so there they are refused.

    @override
    def _to_replicate_tensor(  # pyrefly: ignore[bad-override]
        self, local_tensor: Tensor, mesh: DeviceMesh, mesh_dim: int, current_logical_shape: Sequence[int]
    ) -> Tensor:
        self._one_dimensional(mesh)
        transport = transport_along(mesh, mesh_dim)
        return gather_shards(local_tensor, self.dim, self.layout, int(current_logical_shape[self.dim]), transport)

    @override
    def _replicate_to_strided_shard(  # pyrefly: ignore[bad-override]
        self, local_tensor: Tensor, mesh: DeviceMesh, mesh_dim: int, shard_index: int
    ) -> Tensor:
        self._one_dimensional(mesh)
        return take_shard(local_tensor, self.dim, self.layout, mesh.size(mesh_dim), int(shard_index))

    def _one_dimensional(self, mesh: DeviceMesh) -> None:
        if mesh.ndim > 1:
            raise NotImplementedError(
                f"DTensor.redistribute and DTensor.full_tensor do not order moves of {self!r} rightly on a mesh of {mesh.ndim} "
                "axes: use dtensor_ring.redistribute or dtensor_ring.full_tensor"
            )

    @override
    def _split_tensor(
        self, tensor: Tensor, num_chunks: int, *, with_padding: bool = True, contiguous: bool = True
    ) -> tuple[list[Tensor], list[int]]:
        shards = [take_shard(tensor, self.dim, self.layout, num_chunks, rank) for rank in range(num_chunks)]
        # PyTorch scatters shards of one size. Ours sends each as it is, so there is no padding to be taken off again.
        if with_padding and len({shard.shape for shard in shards}) > 1:
            raise NotImplementedError(f"{self!r} is not padded: use dtensor_ring.distribute_tensor")
        return shards, [0] * num_chunks

    @override
    def _select_split_tensor(  # pyrefly: ignore[bad-override]
        self,
        tensor: Tensor,
        num_chunks: int,
        index: int,
        *,
        with_padding: bool = True,
        contiguous: bool = True,
        clone: bool = True,
    ) -> Tensor:
        return take_shard(tensor, self.dim, self.layout, num_chunks, int(index))

    @override
    def _local_shard_size_and_offset(self, *_args: object, **_options: object) -> NoReturn:
        raise RuntimeError(
            f"a shard of {self!r} is not one block of the global tensor, so it cannot be saved by offset: save "
            "dtensor_ring.redistribute(x, placements) with Shard or Replicate placements, or x.to_local() with the same world size"
        )

    # PyTorch calls both names, from different places.
    local_shard_size_and_offset = _local_shard_size_and_offset


class Contiguous(SequencePlacement):
    """One chunk a rank, in order. As `Shard(dim)`, but rank totals differ by at most one token at any length."""

    short: ClassVar[str] = "C"

    @property
    @override
    def layout(self) -> Layout:
        """`contiguous`."""
        return Layout("contiguous")


class Zigzag(SequencePlacement):
    """Chunks r and 2W-1-r of 2W on rank r: causal attention is the same work on every rank.

    With `per_document=True` packed documents are dealt out, so that work is balanced where documents end anywhere: long ones in
    nested pairs of chunks over neighbouring ranks, short ones whole (`dtensor_ring.planning.document_sharding` has a picture).
    Every rank has as many tokens as without. Then everything that maps tokens takes `documents=`, one row for the whole batch,
    always the same: neither placement nor tensor remembers them.

    Raises:
        ValueError: `dim` is negative.
        TypeError: `dim` is not an int, or `per_document` not a bool.
    """

    short: ClassVar[str] = "Z"

    def __init__(self, dim: int, per_document: bool = False) -> None:
        if not isinstance(per_document, bool | int) or per_document not in (False, True):
            raise TypeError(f"Zigzag(dim, per_document): per_document must be a bool, found {per_document!r}")
        super().__init__(dim)
        self._per_document = bool(per_document)

    # Read-only, as every field of a placement: DTensor's caches hold placements as keys.
    @property
    def per_document(self) -> bool:
        """Whether every document is cut by itself."""
        return self._per_document

    @property
    @override
    def layout(self) -> Layout:
        """`zigzag`, or `zigzag/documents`."""
        return Layout("zigzag", cut="documents" if self._per_document else "")

    @property
    @override
    def _arguments(self) -> tuple[int, ...]:
        return (self.dim, True) if self._per_document else (self.dim,)

    @override
    def __repr__(self) -> str:
        return f"Zigzag({self.dim}, per_document=True)" if self._per_document else f"Zigzag({self.dim})"

    @override
    def __str__(self) -> str:
        return f"Z({self.dim}, per document)" if self._per_document else f"Z({self.dim})"


class Stripe(SequencePlacement):
    """Blocks of `block` tokens dealt to the ranks in turn: token t lies on rank t // block % W.

    The last round, where it is not whole, is dealt as evenly as possible.

    Raises:
        ValueError: `block` is below 1, or `dim` is negative.
        TypeError: `dim` or `block` is not an int.
    """

    short: ClassVar[str] = "Stripe"

    def __init__(self, dim: int, block: int = 1) -> None:
        if not isinstance(block, int) or isinstance(block, bool):
            raise TypeError(f"Stripe(dim, block): block must be an int, found {block!r}")
        if block < 1:
            raise ValueError(f"Stripe(dim={dim}, block={block}): a block has at least one token")
        super().__init__(dim)
        self._block = block

    @property
    def block(self) -> int:
        """Tokens dealt at a time."""
        return self._block

    @property
    @override
    def layout(self) -> Layout:
        """`stripe:block`."""
        return Layout("stripe", self._block)

    @property
    @override
    def _arguments(self) -> tuple[int, ...]:
        return (self.dim, self._block)

    @override
    def __repr__(self) -> str:
        return f"Stripe({self.dim}, block={self._block})"


def register() -> None:
    """Let `torch.load(weights_only=True)` load the placements, of which checkpoints of DTensors have some."""
    torch.serialization.add_safe_globals(SequencePlacement.__subclasses__())


def holds_sequence(placements: Iterable[Placement]) -> bool:
    """Whether one of the placements is ours."""
    return any(isinstance(placement, SequencePlacement) for placement in placements)


def dim_of(placement: Placement) -> int:
    """The tensor dim that a placement splits, -1 for none."""
    # `Shard` is asked by name: our placements are no subclass of it, on purpose.
    return placement.dim if isinstance(placement, (Shard, SequencePlacement)) else -1


def split_of(placement: Placement, documents: Documents | None = None) -> Split:
    """How a placement splits its dim. Which tokens a rank holds under `Zigzag(per_document=True)` depends on the documents.

    Without documents the split of such a placement still knows how many tokens each rank holds, and raises where it is asked which.

    Raises:
        ValueError: documents differ from batch row to batch row.
    """
    if not isinstance(placement, SequencePlacement):
        return Chunks()
    if placement.layout.cut and documents is not None:
        return PackedLayout(placement.layout, documents)
    return placement.layout
