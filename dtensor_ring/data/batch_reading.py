"""What can be read off a batch: how long its rows are, which tokens belong together, and keys that are misspelled.

packed row     a a a | b b            position_ids 0 1 2 0 1, or cu_seq_lens_q 0 3 5, or seq_idx 0 0 0 1 1
padded row     - - a a a              attention_mask 0 0 1 1 1: the padding is a document of its own
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dtensor_ring.planning.documents import Documents

CUT_KEYS = ("input_ids", "inputs_embeds", "position_ids", "labels", "shift_labels")
# The longest lengths are taken out and not read: they follow from the bounds.
BOUND_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
KNOWN_KEYS = (*CUT_KEYS, *BOUND_KEYS, "attention_mask", "documents", "num_items_in_batch")
# How other packages name bounds. Read past under such a name, documents would attend to each other without an error.
_BOUND_WORDS = re.compile(r"cu_?seq|seq_?len|sequence_?len|document|doc_?id|seq_?id|segment|max_?len")
PERHAPS_A_SHARE = "If shard_batch cut this batch, it is a rank's share already: pass the whole batch, as every rank has it"


def sequence_length(batch: Mapping[str, object]) -> int:
    """Tokens of a row, checked to be the same in all tensors that are cut. Also checks that what is read has values."""
    for key in (*CUT_KEYS, *BOUND_KEYS, "attention_mask"):
        value = batch.get(key)
        if isinstance(value, Tensor) and value.is_meta:
            raise ValueError(
                f"{key} is on the meta device, which has no values to read: labels, positions and documents are read from a batch. "
                "Make the batch on a real device, or move the model there first (model.to_empty) if the batch follows its device"
            )
    sizes: dict[str, tuple[int, ...]] = {}
    for key in CUT_KEYS:
        value = batch.get(key)
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{key} must be a tensor (B, S), found {type(value).__name__}")
        if isinstance(value, Tensor):
            if value.dim() < 2:
                raise ValueError(f"{key} must have a batch and a sequence dim, found shape {tuple(value.shape)}")
            sizes[key] = tuple(value.shape)
    lengths = {shape[1] for shape in sizes.values()}
    if len(lengths) != 1:
        what = f"found shapes {sizes}" if sizes else "found neither"
        raise ValueError(f"a batch needs input_ids or inputs_embeds, all tensors of one length, {what}")
    return lengths.pop()


def find_documents(
    batch: Mapping[str, object], length: int, documents: Documents | Tensor | Sequence[int] | None = None
) -> Documents | None:
    """Reads which tokens of a row belong together: the documents given, or those that the batch describes.

    None stands for one document a row.

    A batch describes them by `cu_seq_lens_q`, by `seq_idx` (B or 1, S), where it changes, by `position_ids` (B or 1, S) that
    restart, or by an `attention_mask` (B, S) with zeros: a row's padding and its real tokens are documents.

    Raises:
        ValueError: two of these contradict each other, or one does not fit the batch.
        NotImplementedError: a mask that is not padding, or padding beside documents.
    """
    # All descriptions are read, not only the first: where two contradict each other, one of them trains on the wrong mask.
    rows = rows_of(batch)
    padding = padding_of(batch, rows, length)
    sources = {} if documents is None else {"documents": Documents.of(documents, length)}
    bounds = _cumulative(batch)
    if bounds is not None:
        sources["cu_seq_lens_q"] = Documents.of(bounds, length)
    numbers, positions = (_per_token(batch, key, rows, length) for key in ("seq_idx", "position_ids"))
    if numbers is not None and length:
        sources["seq_idx"] = _documents_at(numbers.diff(dim=1) != 0)
    jumps = torch.zeros(1, 0, dtype=torch.bool) if positions is None or not length else positions.diff(dim=1) != 1
    if padding is not None and positions is not None:
        jumps = jumps & ~padding[:, 1:] & ~padding[:, :-1]  # with a mask, positions at padding mean nothing
    if positions is not None and bool(jumps.any()):
        # Positions alone must restart at 0 at every document. Beside another source they are only compared with it, and where it is
        # wrong that error says more.
        strict = not sources and padding is None
        sources["position_ids"] = _restarting(positions) if strict else _documents_at(jumps)
    if padding is not None and sources:
        raise NotImplementedError(
            f"attention_mask has zeros and {' and '.join(sources)} tell documents: padding beside packed documents is not "
            "supported; make the padding a document of its own with labels of -100, and leave the mask out"
        )
    # Real tokens see real tokens only, and padding sees padding: a query that saw no key at all would be a case of its own.
    if padding is not None:
        return _documents_at(padding[:, 1:] != padding[:, :-1])
    _check_agree(sources, rows)
    return next(iter(sources.values()), None)


def _restarting(positions: Tensor) -> Documents:
    """Reads documents from positions that jump. Positions that do not restart at 0 may be those of a rank's share."""
    try:
        return Documents.from_position_ids(positions)
    except ValueError as failure:
        raise ValueError(f"{failure}. {PERHAPS_A_SHARE}") from None


def rows_of(batch: Mapping[str, object]) -> int:
    """Rows of a batch; position ids may have one for all."""
    return next((value.shape[0] for key in CUT_KEYS if key != "position_ids" and isinstance(value := batch.get(key), Tensor)), 1)


def padding_of(batch: Mapping[str, object], rows: int, length: int) -> Tensor | None:
    """True where `attention_mask` marks a token as padding, (B, S); None where it marks none.

    Raises:
        NotImplementedError: anything but ones at one run of tokens in each row, and zeros elsewhere.
    """
    mask = batch.get("attention_mask")
    if mask is None:
        return None
    needed = (
        f"only a mask ({rows}, {length}) of ones, with zeros at padding on the left or right, is supported: pack rows without "
        "padding and pass documents (cu_seq_lens_q, or position_ids that restart)"
    )
    if not isinstance(mask, Tensor) or tuple(mask.shape) != (rows, length):
        what = f"a {mask.dtype} tensor of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise NotImplementedError(f"attention_mask: found {what}; {needed}")
    padding = mask == 0
    begins = ~padding & torch.nn.functional.pad(padding, (1, 0), value=True)[:, :-1]  # where runs of ones begin
    # One reading for the three: each would make the host wait for a GPU.
    other, padded, holes = torch.stack([(~padding & (mask != 1)).any(), padding.any(), (begins.sum(1) > 1).any()]).tolist()
    if other or (padded and mask.is_floating_point()):
        raise NotImplementedError(f"attention_mask: found {mask.dtype} values from {mask.min()} to {mask.max()}; {needed}")
    if holes:
        runs = begins.sum(1).tolist()
        row = next(i for i, count in enumerate(runs) if count > 1)
        raise NotImplementedError(f"attention_mask: found {runs[row]} runs of ones in row {row}, with zeros between; {needed}")
    return padding if padded else None


def _cumulative(batch: Mapping[str, object]) -> Tensor | Sequence[int] | None:
    """The cumulative lengths of a packed batch, the same for queries and keys."""
    given: list[Tensor | Sequence[int] | None] = []
    for key in BOUND_KEYS[:2]:
        value = batch.get(key)
        if value is not None and not isinstance(value, (Tensor, Sequence)):
            raise TypeError(f"{key} must be a 1-D integer tensor or a list, found {type(value).__name__}")
        given.append(value)
    bounds, keys = given
    if keys is not None and (bounds is None or not torch.equal(torch.as_tensor(bounds), torch.as_tensor(keys))):
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k differ: queries and keys of a packed batch are the same tokens")
    return bounds


def _per_token(batch: Mapping[str, object], key: str, rows: int, length: int) -> Tensor | None:
    """A tensor of one integer for each token, checked to be (B, S) or (1, S)."""
    value = batch.get(key)
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.dim() != 2 or value.shape[0] not in (1, rows) or value.shape[1] != length:
        what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{key} must have shape (B, S) or (1, S), here ({rows}, {length}) or (1, {length}), found {what}")
    return value


def _documents_at(changes: Tensor) -> Documents:
    """Documents that begin at token i + 1 where `changes` (rows, S-1) is true at i."""
    length = changes.shape[1] + 1
    bounds = [(0, *(i + 1 for i, new in enumerate(row) if new), length) for row in changes.tolist()]
    return Documents((bounds[0],) if all(row == bounds[0] for row in bounds) else tuple(bounds))


def _check_agree(sources: Mapping[str, Documents], rows: int) -> None:
    """Raises ValueError unless all sources give the same documents, empty ones aside, for a batch of so many rows."""
    bounds_of: dict[str, list[list[int]]] = {}
    for name, documents in sources.items():
        if documents.rows not in (1, rows):
            raise ValueError(
                f"{name} have {documents.rows} rows, but the batch has {rows}: give one row, or one for each batch row"
            )
        # Documents without tokens are in cumulative lengths, and cannot be in positions.
        bounds_of[name] = [sorted(set(row)) for row in documents.bounds] * (rows if documents.rows == 1 else 1)
    for name, theirs in list(bounds_of.items())[1:]:
        first, ours = next(iter(bounds_of.items()))
        for row, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if a != b:
                token = min(set(a) ^ set(b))
                begins, goes_on = (first, name) if token in a else (name, first)
                raise ValueError(
                    f"{first} and {name} contradict each other: in row {row} a document begins at token {token} by {begins}, "
                    f"not by {goes_on}; give one of them, or make them agree"
                )


def refuse_lookalikes(batch: Mapping[str, object], known: Sequence[str] = ()) -> None:
    """Raises ValueError for a key that looks like one that is read here, or like document bounds, under another name.

    Args:
        batch: keys and values; what is None, or text, does not count.
        known: keys that are not read here, but are right.
    """
    for key, value in batch.items():
        if value is None or key in KNOWN_KEYS or key in known or _is_text(value):
            continue
        near = difflib.get_close_matches(key, KNOWN_KEYS, 1, 0.8)
        if near or _BOUND_WORDS.search(key.lower()):
            right = repr(near[0]) if near else "documents=, 'cu_seq_lens_q', 'seq_idx' or restarting 'position_ids'"
            raise ValueError(
                f"{key!r} is not read, and would be ignored: documents of a packed batch and its tensors come as "
                f"{', '.join(map(repr, KNOWN_KEYS))}. Is {right} meant?"
            )


def _is_text(value: object) -> bool:
    """Whether a value is a name, or a list of names: that says where a row comes from, not what belongs together in it."""
    return isinstance(value, str) or (isinstance(value, (list, tuple)) and bool(value) and all(isinstance(x, str) for x in value))


def refuse_unknown(batch: Mapping[str, object], length: int) -> None:
    """Raises NotImplementedError for a tensor with a dim as long as the sequence that it is not known how to cut."""
    for key, value in batch.items():
        if key not in KNOWN_KEYS and isinstance(value, Tensor) and length > 1 and length in value.shape:
            raise NotImplementedError(
                f"{key} of shape {tuple(value.shape)} has a dim as long as the sequence ({length}), but it is not known how to cut "
                f"it; known are {', '.join(CUT_KEYS)}: leave it out"
            )
