"""Cutting a language-model batch: every rank has the whole batch and keeps the tokens its layout gives it.

    Zigzag, 2 ranks, 8 tokens    input_ids      position_ids    shift_labels
    the batch                    a b c d e f g h                b c d e f g h -
    rank 0                       a b | g h      0 1 | 6 7       b c | h -
    rank 1                       c d | e f      2 3 | 4 5       d e | f g

Labels are shifted before they are cut, so that the label of a rank's last token is the next token wherever that one lies, and
never across documents. Documents are found in what Hugging Face collators send: position ids that restart, cumulative lengths,
sequence numbers, or a mask of padding.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import struct
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dtensor_ring.comm import Transport, transport_along
from dtensor_ring.comm.rank_checks import checksum, meet, refused_together
from dtensor_ring.documents import Documents
from dtensor_ring.placements.moves import take_shard
from dtensor_ring.placements.placement import SequencePlacement, Zigzag, split_of

IGNORED = -100
CUT_KEYS = ("input_ids", "inputs_embeds", "position_ids", "labels", "shift_labels")
BOUND_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
KNOWN_KEYS = (*CUT_KEYS, *BOUND_KEYS, "attention_mask", "documents", "num_items_in_batch")
_BOUND_WORDS = re.compile(r"cu_?seq|seq_?len|document|doc_?id|seq_?id|segment|max_?len")  # names that other packages give bounds


_PERHAPS_A_SHARE = "If shard_batch cut this batch, it is a rank's share already: pass the whole batch, as every rank has it"


class ShardedBatch(dict[str, object]):
    """This rank's share of a batch: tensors cut, everything else as it was.

    Attributes:
        length: global tokens of a row.
        documents: bounds of packed documents, or of real and padding tokens; or None.
        num_items: labels that count in the whole batch, None without labels.
    """

    length: int
    documents: Documents | None
    num_items: Tensor | None


def shard_batch(
    batch: Mapping[str, object],
    mesh: DeviceMesh,
    placement: SequencePlacement | None = None,
    *,
    documents: Documents | Tensor | Sequence[int] | None = None,
    check: bool = True,
) -> ShardedBatch:
    """Cut a batch that every rank of the mesh axis holds whole into this rank's share.

        batch = shard_batch({"input_ids": ids, "labels": ids}, mesh["cp"], Zigzag(1))
        hidden = model(batch["input_ids"], batch["position_ids"])           # attention through from_local, ring_attention
        loss = cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten(), reduction="sum") / batch.num_items

    `input_ids` (B, S), `inputs_embeds` (B, S, E), `position_ids` (B or 1, S), `labels` and `shift_labels` (B, S) are cut in dim 1.
    Missing `position_ids` are made: positions in the sequence, or in the document where documents are given. `labels` also give
    `shift_labels`, the label of the next token, -100 at the end of each document. `loss` as above is this rank's part: the
    parts of all ranks add up to the loss of the batch, and so do their gradients.

    An `attention_mask` (B, S) of ones, with zeros at padding on the left or right of rows, is read and taken out: real tokens
    attend to real tokens only, their positions stay those in the row, and what padding tokens give is unspecified. Labels at
    padding must be -100; a label at the first real token after padding is ignored, as no real token predicts it.

    Args:
        batch: the whole batch, the same on every rank of the axis.
        mesh: the mesh axis that holds the sequence, such as `mesh["cp"]`.
        placement: how to cut; `Zigzag(1)` by default.
        documents: bounds of packed documents. Without it they are read from `cu_seq_lens_q`, `seq_idx` or restarting
            `position_ids`; what is given must agree.
        check: compare the batch over the axis by a checksum, for which the host waits once.

    Raises:
        ValueError: the mesh has more than one axis, the placement is not of dim 1, shapes do not fit, documents do not end at
            the length or contradict each other, labels contradict shift_labels, labels at padding count, a key looks like a
            misspelled one, tensors are on the meta device, the batch is a share already, or ranks hold different batches. Every
            rank raises.
        NotImplementedError: an attention mask that is not padding, or is beside documents; or an unknown tensor with a dim as
            long as the sequence.
    """
    placement = Zigzag(1) if placement is None else placement
    check_axis(mesh, placement)
    wire = transport_along(mesh)
    with refused_together(lambda: [wire] if check else []):
        if isinstance(batch, ShardedBatch):
            raise ValueError("this batch is a share already, made by shard_batch: pass the whole batch")
        refuse_lookalikes(batch)
        length = sequence_length(batch)
        _refuse_unknown(batch, length)
        found = find_documents(batch, length, documents)
    if check:
        check_same(batch, length, found, wire)
    return cut_batch(batch, placement, wire, length, found)


def check_axis(mesh: DeviceMesh, placement: SequencePlacement) -> None:
    """Raises ValueError unless the mesh has one axis and the placement cuts dim 1."""
    if mesh.ndim != 1:
        raise ValueError(
            f"give the one mesh axis that holds the sequence, such as mesh['cp'], found a mesh of {mesh.ndim} axes: {mesh}"
        )
    if not isinstance(placement, SequencePlacement) or placement.dim != 1:
        raise ValueError(f"a batch (B, S) is cut in dim 1 by Contiguous(1), Zigzag(1) or Stripe(1), found {placement!r}")


def sequence_length(batch: Mapping[str, object]) -> int:
    """Tokens of a row, checked to be the same in all tensors that are cut; and that what is read of a batch has values."""
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
    """What belongs together in a row: the documents given, or those that the batch tells; None for one document a row.

    A batch tells them by `cu_seq_lens_q`, by `seq_idx` (B or 1, S), where it changes, by `position_ids` (B or 1, S) that restart,
    or by an `attention_mask` (B, S) with zeros: a row's padding and its real tokens are documents.

    Raises:
        ValueError: two of these contradict each other, or one does not fit the batch.
        NotImplementedError: a mask that is not padding, or padding beside documents.
    """
    rows = _rows(batch)
    padding = padding_of(batch, rows, length)
    found = {} if documents is None else {"documents": Documents.of(documents, length)}
    bounds = _cumulative(batch)
    if bounds is not None:
        found["cu_seq_lens_q"] = Documents.of(bounds, length)
    numbers, positions = (_per_token(batch, key, rows, length) for key in ("seq_idx", "position_ids"))
    if numbers is not None and length:
        found["seq_idx"] = _documents_at(numbers.diff(dim=1) != 0)
    jumps = torch.zeros(1, 0, dtype=torch.bool) if positions is None or not length else positions.diff(dim=1) != 1
    if padding is not None and positions is not None:
        jumps = jumps & ~padding[:, 1:] & ~padding[:, :-1]  # with a mask, positions at padding mean nothing
    if positions is not None and bool(jumps.any()):
        strict = not found and padding is None
        found["position_ids"] = _restarting(positions) if strict else _documents_at(jumps)
    if padding is not None and found:
        raise NotImplementedError(
            f"attention_mask has zeros and {' and '.join(found)} tell documents: padding beside packed documents is not supported; "
            "make the padding a document of its own with labels of -100, and leave the mask out"
        )
    if padding is not None:
        return _documents_at(padding[:, 1:] != padding[:, :-1])
    _check_agree(found, rows)
    return next(iter(found.values()), None)


def _restarting(positions: Tensor) -> Documents:
    """Documents of positions that jump; positions that do not restart at 0 are perhaps those of a rank's share."""
    try:
        return Documents.from_position_ids(positions)
    except ValueError as failure:
        raise ValueError(f"{failure}. {_PERHAPS_A_SHARE}") from None


def _rows(batch: Mapping[str, object]) -> int:
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
    found: list[Tensor | Sequence[int] | None] = []
    for key in BOUND_KEYS[:2]:
        value = batch.get(key)
        if value is not None and not isinstance(value, (Tensor, Sequence)):
            raise TypeError(f"{key} must be a 1-D integer tensor or a list, found {type(value).__name__}")
        found.append(value)
    bounds, keys = found
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


def _check_agree(found: Mapping[str, Documents], rows: int) -> None:
    """Raises ValueError unless all sources tell the same documents, empty ones aside, for a batch of so many rows."""
    told: dict[str, list[list[int]]] = {}
    for name, documents in found.items():
        if documents.rows not in (1, rows):
            raise ValueError(
                f"{name} have {documents.rows} rows, but the batch has {rows}: give one row, or one for each batch row"
            )
        told[name] = [sorted(set(row)) for row in documents.bounds] * (rows if documents.rows == 1 else 1)
    for name, theirs in list(told.items())[1:]:
        first, ours = next(iter(told.items()))
        for row, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if a != b:
                token = min(set(a) ^ set(b))
                begins, goes_on = (first, name) if token in a else (name, first)
                raise ValueError(
                    f"{first} and {name} contradict each other: in row {row} a document begins at token {token} by {begins}, "
                    f"not by {goes_on}; give one of them, or make them agree"
                )


def check_same(batch: Mapping[str, object], length: int, documents: Documents | None, wire: Transport) -> None:
    """Raises ValueError on every rank unless all ranks hold the same batch and number of items; the host waits once."""
    tensors = [(key, value) for key in (*CUT_KEYS, "attention_mask") if isinstance(value := batch.get(key), Tensor)]
    rows = tensors[0][1].shape[0] if tensors else 0
    words = "|".join(
        [f"{key} {value.dtype} {tuple(value.shape)}" for key, value in tensors] + [documents.digest if documents else ""]
    )
    number = int.from_bytes(hashlib.blake2b(words.encode(), digest_size=7).digest(), "big")
    sums = [checksum(value) for _, value in tensors]
    items = batch.get("num_items_in_batch")
    count = float(items) if isinstance(items, (Tensor, int, float)) else -1.0
    mine = [rows, length, number, sum(sums) % (1 << 61), *struct.unpack("q", struct.pack("d", count))]
    for rank, theirs in enumerate(meet(wire, "a batch that every rank holds whole", mine)):
        if theirs[:2] != mine[:2]:
            raise ValueError(
                f"rank {wire.rank} has a batch of {rows} rows of {length} tokens, rank {rank} one of {theirs[0]} rows of "
                f"{theirs[1]} tokens: every rank of the sequence axis needs the same whole batch"
            )
        if theirs[:4] != mine[:4]:
            raise ValueError(
                f"ranks {wire.rank} and {rank} of the sequence axis hold different batches ({words}): give all of them the same "
                f"data, as a sampler does that shards over the data-parallel axis only. {_PERHAPS_A_SHARE}"
            )
        if theirs != mine:
            (its_count,) = struct.unpack("d", struct.pack("q", theirs[4]))
            raise ValueError(
                f"num_items_in_batch is {count:g} on rank {wire.rank}, {its_count:g} on rank {rank} of the sequence axis (-1: not "
                "given): it counts the labels of the whole batch, so every rank of the axis passes the same number"
            )


def cut_batch(
    batch: Mapping[str, object], placement: SequencePlacement, wire: Transport, length: int, documents: Documents | None
) -> ShardedBatch:
    """This rank's share of a checked batch."""
    whole = dict(batch)
    for key in (*BOUND_KEYS, "attention_mask"):
        whole.pop(key, None)
    device = next(value.device for key in CUT_KEYS if isinstance(value := whole.get(key), Tensor))
    padding = padding_of(batch, _rows(batch), length)
    packed = documents if padding is None else None
    if not isinstance(whole.get("position_ids"), Tensor):
        positions = torch.arange(length)[None] if packed is None else packed.position_ids()
        whole["position_ids"] = positions.to(device)
    labels = whole.get("labels")
    shifted = whole.get("shift_labels")
    if isinstance(labels, Tensor):
        if isinstance(shifted, Tensor):
            _check_shifted(labels, shifted, packed)
        else:
            shifted = whole["shift_labels"] = shift_labels(labels, packed)
    if isinstance(shifted, Tensor) and padding is not None:
        shifted = whole["shift_labels"] = _predicted_by_real_tokens(shifted, padding)
    if placement.layout.cut and documents is None:
        documents = Documents.from_lengths([length])
    split = split_of(placement, documents)
    found = ShardedBatch()
    for key, value in whole.items():
        is_cut = key in CUT_KEYS and isinstance(value, Tensor)
        found[key] = take_shard(value, 1, split, wire.world, wire.rank) if is_cut and isinstance(value, Tensor) else value
    found.length, found.documents = length, documents
    found.num_items = (shifted != IGNORED).sum() if isinstance(shifted, Tensor) else None
    return found


def shift_labels(labels: Tensor, documents: Documents | None) -> Tensor:
    """The label of the next token for every token (B, S), -100 at the end of the row and of each document."""
    shifted = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:].contiguous()
    if documents is not None:
        ends = torch.zeros((documents.rows, documents.length + 1), dtype=torch.bool)
        for row, bounds in enumerate(documents.bounds):
            ends[row, list(bounds)] = True
        shifted = shifted.masked_fill(ends[:, 1:].to(labels.device), IGNORED)
    return shifted


def _check_shifted(labels: Tensor, shifted: Tensor, documents: Documents | None) -> None:
    """Raises ValueError unless shifted labels are the labels of the next tokens; ends of documents may count or not."""
    wrong = (shifted != shift_labels(labels, None)) & (shifted != shift_labels(labels, documents))
    if bool(wrong.any()):
        row, token = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"labels and shift_labels contradict each other: in row {row} the label of token {token + 1} is "
            f"{shift_labels(labels, None)[row, token]}, but shift_labels[{row}, {token}] is {shifted[row, token]}: pass labels, "
            "which are shifted here, or shift_labels alone"
        )


def _predicted_by_real_tokens(shifted: Tensor, padding: Tensor) -> Tensor:
    """Shifted labels (B, S) without that of each row's first real token, where padding before it would predict it.

    Raises:
        ValueError: a label that a padding token would predict: its logits are not those of one process.
    """
    last = padding & ~torch.nn.functional.pad(padding, (0, 1), value=True)[:, 1:]
    wrong = int((padding & ~last & (shifted != IGNORED)).sum())
    if wrong:
        raise ValueError(
            f"{wrong} labels count that padding tokens would predict, whose logits mean nothing: set labels to {IGNORED} where "
            "attention_mask is 0"
        )
    return shifted.masked_fill(last, IGNORED)


def refuse_lookalikes(batch: Mapping[str, object], known: Sequence[str] = ()) -> None:
    """Raises ValueError for a key that looks like one that is read here, or like document bounds, under another name.

    Args:
        batch: keys and values; what is None does not count.
        known: keys that are not read here, but are right.
    """
    for key, value in batch.items():
        if value is None or key in KNOWN_KEYS or key in known:
            continue
        near = difflib.get_close_matches(key, KNOWN_KEYS, 1, 0.8)
        if near or _BOUND_WORDS.search(key.lower()):
            right = repr(near[0]) if near else "documents=, 'cu_seq_lens_q', 'seq_idx' or restarting 'position_ids'"
            raise ValueError(
                f"{key!r} is not read, and would be ignored: documents of a packed batch and its tensors come as "
                f"{', '.join(map(repr, KNOWN_KEYS))}. Is {right} meant?"
            )


def _refuse_unknown(batch: Mapping[str, object], length: int) -> None:
    for key, value in batch.items():
        if key not in KNOWN_KEYS and isinstance(value, Tensor) and length > 1 and length in value.shape:
            raise NotImplementedError(
                f"{key} of shape {tuple(value.shape)} has a dim as long as the sequence ({length}), but it is not known how to cut "
                f"it; known are {', '.join(CUT_KEYS)}: leave it out"
            )
