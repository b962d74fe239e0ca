"""The batches that `verify` runs: the user's own, cut into what one process runs alone, and batches made of it for edge cases.

packed row      a a a | b b | c c c c         one process runs each document by itself: what packing must not change
padded row      a a a a - - -                 one process runs the rows as they are, with their mask
no labels       ranks 0: labels -100          as above, but one rank has no label that counts
padding only    a a - - - - - -               as above, but ranks hold nothing but padding
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from dtensor_ring.data.batch import IGNORED
from dtensor_ring.data.batch_reading import BOUND_KEYS, CUT_KEYS, find_documents, padding_of, rows_of, sequence_length
from dtensor_ring.placements import SequencePlacement
from dtensor_ring.placements.placement import split_of
from dtensor_ring.planning.documents import Documents

LABELS = ("labels", "shift_labels", "num_items_in_batch")  # without them a model gives logits alone


class Piece(NamedTuple):
    """Rows [first, last) and tokens [start, stop) of a batch, which one process runs by themselves."""

    first: int
    last: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Case:
    """A batch with what it says of itself.

    Attributes:
        given: the arguments of the model, as the user calls it.
        rows: batch rows.
        length: tokens of a row.
        documents: bounds of packed documents; None where there are none, also in a padded batch.
        padding: (B, S), true at padding; None where there is none.
        shifted: a token predicts the label of the next one; else its own, as in masked language models.
    """

    given: Mapping[str, Any]
    rows: int
    length: int
    documents: Documents | None
    padding: Tensor | None
    shifted: bool = True

    @classmethod
    def read(cls, given: Mapping[str, Any], *, shifted: bool = True) -> Case:
        """Reads a batch.

        Raises:
            ValueError, NotImplementedError: as `shard_batch`.
        """
        length = sequence_length(given)
        rows = rows_of(given)
        padding = padding_of(given, rows, length)
        bounds = find_documents(given, length, given.get("documents"))
        return cls(given, rows, length, bounds if padding is None else None, padding, shifted)

    @property
    def real(self) -> Tensor | None:
        """(B, S), true at tokens whose logits mean something; None for all."""
        return None if self.padding is None else ~self.padding

    @property
    def bounds(self) -> list[tuple[int, ...]]:
        """Where documents begin and end, of each row."""
        if self.documents is None:
            return [(0, self.length)] * self.rows
        bounds = list(self.documents.bounds)
        return bounds * self.rows if len(bounds) == 1 else bounds

    def pieces(self) -> list[Piece]:
        """What one process runs by itself, in order: all rows at once where they end documents at the same tokens."""
        bounds = self.bounds
        if all(row == bounds[0] for row in bounds):
            spans = [(0, self.rows, bounds[0])]
        else:
            spans = [(i, i + 1, row) for i, row in enumerate(bounds)]
        return [Piece(a, b, start, stop) for a, b, row in spans for start, stop in pairwise(row) if stop > start]

    def alone(self, piece: Piece) -> dict[str, Any]:
        """The arguments with which one process runs a piece."""
        taken: dict[str, Any] = {}
        for key, value in self.given.items():
            if key in BOUND_KEYS or key in ("documents", "num_items_in_batch"):
                continue
            if key == "attention_mask" and self.padding is None:
                continue
            if isinstance(value, Tensor) and (key in CUT_KEYS or key == "attention_mask"):
                row = slice(None) if value.shape[0] == 1 else slice(piece.first, piece.last)
                value = value[row, piece.start : piece.stop].contiguous()  # losses view their labels
            taken[key] = value
        labels = taken.get("labels")
        # One process counts the label of a first real token, which padding predicts; a plan leaves it out, as documented.
        if isinstance(labels, Tensor) and self.padding is not None and self.shifted:
            first = ~self.padding & pad(self.padding, (1, 0))[:, :-1]
            taken["labels"] = labels.masked_fill(first, IGNORED)
        return {**taken, "use_cache": False}

    def targets(self) -> Tensor | None:
        """The label that each token is to predict, (B, S), -100 for none; None without labels. Made without any code of a plan."""
        shifted, labels = self.given.get("shift_labels"), self.given.get("labels")
        if isinstance(shifted, Tensor):
            targets = shifted.clone()
        elif isinstance(labels, Tensor) and not self.shifted:
            targets = labels.clone()
        elif isinstance(labels, Tensor):
            targets = torch.full_like(labels, IGNORED)
            for row, bounds in enumerate(self.bounds):
                for start, stop in pairwise(bounds):
                    targets[row, start : max(stop - 1, start)] = labels[row, start + 1 : stop]
        else:
            return None
        if self.padding is not None:
            targets[self.padding] = IGNORED
        return targets

    def count(self, piece: Piece | None = None) -> int:
        """Labels that count, in all rows or in a piece."""
        targets = self.targets()
        if targets is not None and piece is not None:
            targets = targets[piece.first : piece.last, piece.start : piece.stop]
        return 0 if targets is None else int((targets != IGNORED).sum())

    def tokens_of(self, placement: SequencePlacement, world: int) -> list[list[int]]:
        """Which tokens each rank is to hold, in its order."""
        documents = self.documents
        if placement.layout.cut and documents is None:
            # Real and padding tokens are documents to a plan, and a row without documents is one.
            documents = find_documents(self.given, self.length) or Documents.from_lengths([self.length])
        split = split_of(placement, documents)
        return [list(split.tokens(self.length, world, rank)) for rank in range(world)]


def with_labels(model: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch, with its tokens as labels where it has none and the model computes a loss."""
    given = {key: value for key, value in batch.items() if value is not None}
    ids = given.get("input_ids")
    if "labels" in given or not isinstance(ids, Tensor) or "labels" not in inspect.signature(model.forward).parameters:
        return given
    mask = given.get("attention_mask")
    labels = ids.clone() if not isinstance(mask, Tensor) else ids.masked_fill(mask == 0, IGNORED)
    return {**given, "labels": labels}


def without_labels_of(case: Case, tokens: Sequence[int]) -> Case:
    """The same batch, in which these tokens have no label to predict that counts."""
    given = dict(case.given)
    mine = torch.zeros(case.length, dtype=torch.bool)
    mine[list(tokens)] = True
    if isinstance(labels := given.get("labels"), Tensor):
        where = pad(mine, (1, 0))[:-1] if case.shifted else mine
        given["labels"] = labels.masked_fill(where.to(labels.device), IGNORED)
    if isinstance(shifted := given.get("shift_labels"), Tensor):
        given["shift_labels"] = shifted.masked_fill(mine.to(shifted.device), IGNORED)
    return replace(case, given=given)


def padded_for(case: Case, tokens_of: Sequence[Sequence[int]]) -> Case | str:
    """The same rows with so much padding on the right that a rank holds nothing else; or why there is no such batch."""
    if case.documents is not None:
        return "packed rows have no padding"
    if case.padding is not None:
        return "the batch has padding of its own"
    if "shift_labels" in case.given:
        return "the batch has shift_labels, which padding would contradict"
    real = max(min(tokens) for tokens in tokens_of)
    if real < 2:
        return "this layout gives every rank one of the first tokens"
    given = dict(case.given)
    like = next(value for key in ("input_ids", "inputs_embeds") if isinstance(value := given.get(key), Tensor))
    mask = torch.zeros(case.rows, case.length, dtype=torch.int64, device=like.device)
    mask[:, :real] = 1
    if isinstance(labels := given.get("labels"), Tensor):
        given["labels"] = labels.masked_fill(mask == 0, IGNORED)
    return Case.read({**given, "attention_mask": mask}, shifted=case.shifted)


class Change(NamedTuple):
    """A batch in which some tokens are others; and (B, S), true at the tokens whose logits must not move."""

    what: str
    given: dict[str, Any]
    still: Tensor


def changes(case: Case, vocabulary: int) -> Iterator[Change]:
    """Batches in which one document is another: the first of every row, then the last; or padding; or the first row."""
    bounds = case.bounds
    begins = torch.zeros(case.rows, case.length, dtype=torch.bool)
    ends = begins.clone()
    for row, inside in enumerate(bounds):
        parts = [(a, b) for a, b in pairwise(inside) if b > a]
        if len(parts) > 1:
            begins[row, slice(*parts[0])] = True
            ends[row, slice(*parts[-1])] = True
    if bool(begins.any()):
        yield _changed(case, "the first document", begins, ~begins, vocabulary)
        yield _changed(case, "the last document", ends, ~ends, vocabulary)
    elif case.padding is not None:
        yield _changed(case, "padding", case.padding.cpu(), ~case.padding.cpu(), vocabulary)
    elif case.rows > 1:
        begins[0] = True
        yield _changed(case, "the first row", begins, ~begins, vocabulary)


def _changed(case: Case, what: str, where: Tensor, still: Tensor, vocabulary: int) -> Change:
    given = {key: value for key, value in case.given.items() if key not in LABELS}
    if isinstance(ids := given.get("input_ids"), Tensor):
        given["input_ids"] = torch.where(where.to(ids.device), (ids + 1) % vocabulary, ids)
    if isinstance(embeds := given.get("inputs_embeds"), Tensor):
        given["inputs_embeds"] = torch.where(where.to(embeds.device)[..., None], embeds.flip(-1), embeds)
    return Change(what, given, still)
