"""Where the documents of a packed batch begin and end.

    three documents of 3, 4 and 2 tokens        Documents.from_lengths([3, 4, 2])
    a a a b b b b c c                           bounds ((0, 3, 7, 9),)

A query attends to keys of its own document only. The bounds are host-side integers: they are worked out once a batch and
every layer of a model reads the same value, so that no layer waits for a GPU.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from operator import index
from typing import TYPE_CHECKING

from dtensor_ring.cache import cached
from dtensor_ring.planning.runs import Bounds, Piece, Run, cut, document_at
from dtensor_ring.planning.segmentation import WHOLE, Segmentation

# Plans are integers: this file and those above it that make plans load torch only where a tensor is made.
if TYPE_CHECKING:
    from torch import Tensor

# An encoded tensor has at least so many numbers, and else a power of two. Its size is a part of DTensor's and the compiler's keys:
# if it followed the number of documents, every packing would leave objects behind and make a graph of its own.
_LEAST_NUMBERS = 64


@dataclass(frozen=True, slots=True, eq=False)
class Documents(Segmentation):
    """The cumulative bounds of packed documents: one row of bounds for the whole batch, or one for each batch row.

    Every row starts at 0, never decreases and ends at the same length; equal neighbours are empty documents. Two values are
    equal when their bounds are; hashing and comparing read the digest only.

    Args:
        bounds: the rows; a `Documents` of one row counts for every row of a batch.

    Attributes:
        digest: a hash of the bounds, in hexadecimal digits.
        length: tokens in a row.

    Raises:
        ValueError: a row does not start at 0, decreases, or ends elsewhere than the others.
    """

    bounds: tuple[tuple[int, ...], ...]
    digest: str = field(init=False, repr=False)
    length: int = field(init=False, repr=False)  # no property: compiled code that looks into a row depends on its bounds
    _encoded: Tensor = field(init=False, repr=False)  # never handed out: what is written into it would belong to another value

    def __post_init__(self) -> None:
        rows = tuple(tuple(index(bound) for bound in row) for row in self.bounds)
        if not rows:
            raise ValueError("Documents needs at least one row of bounds, found none")
        for i, row in enumerate(rows):
            _check_row(i, row, rows[0])
        flat = _pack(rows)
        # Every layer of every step compares and hashes documents as part of a problem: it must not read thousands of bounds.
        object.__setattr__(self, "bounds", rows)
        object.__setattr__(self, "digest", hashlib.blake2b(flat, digest_size=16).hexdigest())
        object.__setattr__(self, "length", rows[0][-1])
        # Where torch is loaded the tensor is made at once: asked for later, inside a compiled function or under a fake mode, it
        # would be a tensor of theirs. Without torch `__getattr__` makes it, when it is first asked for.
        if "torch" in sys.modules:
            object.__setattr__(self, "_encoded", _tensor(flat))

    if not TYPE_CHECKING:  # a checker would take every misspelt attribute for one that this makes

        def __getattr__(self, name: str) -> object:
            if name != "_encoded":
                raise AttributeError(f"'Documents' object has no attribute {name!r}")
            object.__setattr__(self, "_encoded", _tensor(_pack(self.bounds)))
            return self._encoded

    @classmethod
    def from_lengths(cls, lengths: Iterable[int]) -> Documents:
        """One row from document lengths in tokens: `[3, 4, 2]` has the bounds `(0, 3, 7, 9)`."""
        bounds = [0]
        for length in lengths:
            bounds.append(bounds[-1] + index(length))
        return cls((tuple(bounds),))

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor | Sequence[int]) -> Documents:
        """One row from cumulative lengths as the flash-attn varlen functions take them; a GPU tensor is copied to the host.

        Raises:
            TypeError: not one-dimensional integers.
            ValueError: does not start at 0 or decreases.
        """
        import torch

        if isinstance(cu_seqlens, torch.Tensor):
            if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point() or cu_seqlens.dtype == torch.bool:
                raise TypeError(f"cu_seqlens must be a 1-D integer tensor, found {cu_seqlens.dim()}-D {cu_seqlens.dtype}")
            return cls((tuple(cu_seqlens.tolist()),))
        return cls((tuple(cu_seqlens),))

    @classmethod
    def from_position_ids(cls, position_ids: Tensor) -> Documents:
        """Bounds from position ids of shape (S,) or (B, S) that restart at 0 with each document.

        Rows that agree give one row of bounds. A GPU tensor is copied to the host.

        Raises:
            ValueError: a row does not start at 0, or jumps to anything but the next position or 0.
        """
        rows = position_ids if position_ids.dim() == 2 else position_ids[None]
        if rows.dim() != 2:
            raise ValueError(f"position_ids must have shape (S,) or (B, S), found {tuple(position_ids.shape)}")
        # Rows that agree need one row of bounds: the batch is then planned once, and layouts that cut documents can take it.
        bounds = [_restarts(i, row) for i, row in enumerate(rows.cpu())]
        return cls((bounds[0],) if all(row == bounds[0] for row in bounds) else tuple(bounds))

    @classmethod
    def of(cls, value: Documents | Tensor | Sequence[int], length: int) -> Documents:
        """Reads what a caller passed as `documents=`: a `Documents`, or a cu_seqlens, checked to end at `length`.

        Raises:
            ValueError: the bounds end elsewhere.
        """
        documents = value if isinstance(value, Documents) else cls.from_cu_seqlens(value)
        if documents.length != length:
            raise ValueError(
                f"documents end at token {documents.length}, but the sequence has {length} tokens: "
                "the last bound must be the sequence length (add a document for padding at the end)"
            )
        return documents

    @property
    def rows(self) -> int:
        """How many rows of bounds there are: 1, or the batch size."""
        # A property and not a field: compiled code takes it for a constant, which a field would not be.
        return len(self.bounds)

    @property
    def encoded(self) -> Tensor:
        """The bounds as one int64 CPU tensor, made anew: for each row, how many bounds it has, then the bounds; then zeros.

        This is what operators take, so that compiled graphs and caches do not depend on the values. They do depend on the number
        of elements, which is therefore a power of two, at least 64.
        """
        return self._encoded.clone()

    @property
    def nbytes(self) -> int:
        """An estimate of the host memory that the bounds take, as Python integers and as a tensor."""
        bounds = sum(map(len, self.bounds))
        return 500 + 40 * bounds + 8 * _padded(bounds + self.rows)

    @property
    def row_bounds(self) -> tuple[Bounds, ...]:
        """The bounds themselves: documents are known by position."""
        return self.bounds

    @property
    def parts(self) -> int:
        """How many documents all rows have together, counting those without tokens."""
        return sum(len(row) - 1 for row in self.bounds)

    @property
    def is_shared(self) -> bool:
        """True: all ranks pass the same documents, which they compare."""
        return True

    @property
    def described(self) -> str:
        """How many documents there are, and the digest that tells them apart."""
        return str(self)

    def q_pieces(self, runs: tuple[Run, ...], row: int) -> tuple[Piece, ...]:
        """Runs of one rank's queries cut where documents begin."""
        return cut(runs, self.bounds[row])

    def k_pieces(self, runs: tuple[Run, ...], row: int) -> tuple[Piece, ...]:
        """Runs of keys cut where documents begin."""
        return cut(runs, self.bounds[row])

    def operand(self) -> Tensor:
        """The tensor of `encoded` itself, which nobody may write to."""
        # Every call of every layer passes it, and operators only read it: a copy would be made for nothing.
        return self._encoded

    def select(self, start: int, stop: int) -> Documents:
        """Rows [start, stop) of a batch; one row for the whole batch stays as it is, and so do all rows."""
        # The value itself where that is enough: compilers cannot trace how another is made, and every layer would make it anew.
        return self if self.rows == 1 or (start == 0 and stop == self.rows) else Documents(self.bounds[start:stop])

    @property
    def longest(self) -> int:
        """Tokens of the longest document in any row."""
        return max((b - a for row in self.bounds for a, b in pairwise(row)), default=0)

    def position_ids(self) -> Tensor:
        """Positions inside the documents, int64 of shape (rows, S): 0 1 2 0 1 2 3 0 1 for lengths 3, 4, 2."""
        import torch

        return torch.stack([_positions(row) for row in self.bounds])

    @staticmethod
    def unpack(encoded: Tensor) -> Documents | Slices | None:
        """Reads the documents, or slices, from their `encoded` tensor; an empty one stands for no documents."""
        if not encoded.numel():
            return None
        import torch

        memory = bytearray(encoded.nbytes)  # PyTorch copies into it: no NumPy, and no Python integer for each bound
        torch.frombuffer(memory, dtype=torch.int64).copy_(encoded)
        return _unpack(bytes(memory))

    @staticmethod
    def find(bounds: tuple[int, ...], token: int) -> int:
        """The index of the document in which `token` lies."""
        return document_at(bounds, token)

    # Saved and sent as bounds alone: digest and tensor follow from them.
    def __reduce__(self) -> tuple[type[Documents], tuple[tuple[tuple[int, ...], ...]]]:
        return Documents, (self.bounds,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Documents) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __str__(self) -> str:
        return f"Documents({self.parts} in {self.rows} row{'s' * (self.rows > 1)} of {self.length} tokens, {self.digest[:8]})"


@dataclass(frozen=True, slots=True)
class Slices(Segmentation):
    """What one rank knows of documents packed over all ranks: its part of each, and the keys that each part may see.

    Part i holds this rank's tokens [cu_q[i], cu_q[i+1]) and sees positions [k_start + cu_k[i], k_start + cu_k[i+1]) of the whole
    row. This is what `llama3_flash_attn_prepare_cu_seqlens` returns.

    Raises:
        ValueError: the two do not have the same number of parts, do not start at 0 or decrease.
    """

    cu_q: tuple[int, ...]
    cu_k: tuple[int, ...]
    k_start: int

    def __post_init__(self) -> None:
        if len(self.cu_q) != len(self.cu_k):
            raise ValueError(
                f"cu_seqlens_q has {len(self.cu_q) - 1} documents, cu_seqlens_k has {len(self.cu_k) - 1}: they must match"
            )
        for bounds in (self.cu_q, self.cu_k):
            _check_row(0, bounds, bounds)

    @property
    def encoded(self) -> Tensor:
        """As `Documents.encoded`: -1, by which `unpack` knows slices, `k_start`, the number of bounds, `cu_q`, `cu_k`."""
        return _tensor(array("q", (-1, self.k_start, len(self.cu_q), *self.cu_q, *self.cu_k)).tobytes())

    @property
    def nbytes(self) -> int:
        """Host memory that the bounds take, estimated."""
        return 300 + 80 * len(self.cu_q)

    @property
    def row_bounds(self) -> tuple[Bounds, ...]:
        """No bounds by position: where documents begin on other ranks is not known here."""
        return (None,)

    @property
    def rows(self) -> int:
        """Always one row, since the functions that make slices take one packed row."""
        return 1

    @property
    def parts(self) -> int:
        """How many parts this rank has, counting those without tokens."""
        return len(self.cu_q) - 1

    @property
    def is_shared(self) -> bool:
        """False: every rank knows its own parts only."""
        return False

    @property
    def described(self) -> str:
        """No more than that there are documents, since ranks differ in all else."""
        return "documents"

    def q_pieces(self, runs: tuple[Run, ...], row: int) -> tuple[Piece, ...]:
        """This rank's tokens, part by part: one run of neighbours, since slices come with contiguous layouts only."""
        first = runs[0].start if runs else 0
        return tuple(Piece(Run(first + a, b - a), a, i) for i, (a, b) in enumerate(pairwise(self.cu_q)) if b > a)

    def k_pieces(self, runs: tuple[Run, ...], row: int) -> tuple[Piece, ...]:
        """The keys that each part may see, in a buffer of all keys in position order, whatever `runs` it is made of."""
        # Slices are planned with strategy "gather" only, whose buffer has every key at its position.
        start = self.k_start
        return tuple(Piece(Run(start + a, b - a), start + a, i) for i, (a, b) in enumerate(pairwise(self.cu_k)) if b > a)

    def select(self, start: int, stop: int) -> Slices:
        """The slices themselves: there is one row for whatever part of the batch."""
        return self

    def operand(self) -> Tensor:
        """The tensor of `encoded`, made at each call."""
        return self.encoded


def encoded_of(documents: Segmentation | None) -> Tensor:
    """What operators take and only read: the bounds as one tensor, empty for no documents."""
    return (WHOLE if documents is None else documents).operand()


def _check_row(i: int, row: tuple[int, ...], first: tuple[int, ...]) -> None:
    if not row or row[0] != 0:
        raise ValueError(f"document bounds must start at 0, row {i} starts with {row[:3]}")
    for j, (a, b) in enumerate(pairwise(row)):
        if b < a:
            raise ValueError(f"document bounds must not decrease, row {i} goes from {a} to {b} at index {j + 1}")
    if row[-1] != first[-1]:
        raise ValueError(f"every row of document bounds must end at the same length: row 0 at {first[-1]}, row {i} at {row[-1]}")


def _restarts(i: int, positions: Tensor) -> tuple[int, ...]:
    """The bounds of the documents in which positions of shape (S,), on the CPU, count up from 0."""
    import torch

    if not len(positions):
        return (0,)
    # Compared by PyTorch: a loop over a million tokens would take longer than planning their attention. In 64 bits, since after the
    # largest number of a small dtype comes its smallest.
    wide = positions.to(torch.float64 if positions.is_floating_point() else torch.int64)
    begins = wide == 0
    follows = torch.cat([begins[:1], begins[1:] | (wide[1:] == wide[:-1] + 1)])
    if not bool(follows.all()):
        token = int(follows.logical_not().nonzero()[0])
        before = "starts at" if token == 0 else f"goes from {positions[token - 1].item()} to"
        raise ValueError(
            f"position_ids row {i} {before} {positions[token].item()} at token {token}: "
            "positions must count up from 0 in every document"
        )
    return (*begins.nonzero().flatten().tolist(), len(positions))


def _positions(bounds: tuple[int, ...]) -> Tensor:
    import torch

    edges = torch.tensor(bounds, dtype=torch.int64)
    starts = torch.repeat_interleave(edges[:-1], edges.diff())
    return torch.arange(bounds[-1]) - starts


def _pack(rows: tuple[tuple[int, ...], ...]) -> bytes:
    flat = array("q")
    for row in rows:
        flat.append(len(row))
        flat.extend(row)
    return flat.tobytes()


def _padded(numbers: int) -> int:
    """How many numbers an encoded tensor has that holds so many."""
    return max(_LEAST_NUMBERS, 1 << (numbers - 1).bit_length())


def _tensor(flat: bytes) -> Tensor:
    import torch

    memory = bytearray(8 * _padded(len(flat) // 8))
    memory[: len(flat)] = flat
    with torch.inference_mode(False):  # an inference tensor cannot be saved for backward, and documents outlive the mode
        return torch.frombuffer(memory, dtype=torch.int64)


def _unpacked_bytes(documents: Documents | Slices, encoded: bytes) -> int:
    return documents.nbytes + len(encoded)


# The operators of every layer get the same tensor: equal bytes give the same value, whose digest was worked out once.
@cached("documents of operators", most_bytes=6 << 20, most_entries=32, size=_unpacked_bytes)
def _unpack(encoded: bytes) -> Documents | Slices:
    flat = array("q")
    flat.frombytes(encoded)
    if flat[0] < 0:
        _, k_start, count = flat[:3]
        return Slices(tuple(flat[3 : 3 + count]), tuple(flat[3 + count : 3 + 2 * count]), k_start)
    rows: list[tuple[int, ...]] = []
    at = 0
    while at < len(flat) and flat[at]:  # every row has a bound: a row of none ends them
        rows.append(tuple(flat[at + 1 : at + 1 + flat[at]]))
        at += 1 + flat[at]
    return Documents(tuple(rows))
