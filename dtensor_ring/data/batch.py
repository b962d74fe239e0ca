"""Cutting a language-model batch: every rank has the whole batch and keeps the tokens its layout gives it.

    Zigzag, 2 ranks, 8 tokens    input_ids      position_ids    shift_labels
    the batch                    a b c d e f g h                b c d e f g h -
    rank 0                       a b | g h      0 1 | 6 7       b c | h -
    rank 1                       c d | e f      2 3 | 4 5       d e | f g

Labels are shifted before they are cut, so that the label of a rank's last token is the next token wherever that one lies, and
never across documents. Documents are read off what Hugging Face collators send: position ids that restart, cumulative lengths,
sequence numbers, or a mask of padding.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dtensor_ring._renamed import renamed
from dtensor_ring.comm import Transport, transport_along
from dtensor_ring.comm.collectives import take_shard
from dtensor_ring.comm.rank_checks import checksum, meet, number_of, refused_together
from dtensor_ring.data.batch_reading import (
    BOUND_KEYS,
    CUT_KEYS,
    PERHAPS_A_SHARE,
    find_documents,
    padding_of,
    refuse_lookalikes,
    refuse_unknown,
    rows_of,
    sequence_length,
)
from dtensor_ring.losses import IGNORED
from dtensor_ring.placements.placement import SequencePlacement, Zigzag, split_of
from dtensor_ring.planning.documents import Documents
from dtensor_ring.planning.layout import work_balance

GOOD_BALANCE = 0.8  # mean work over the most loaded rank's, below which a packed batch is worth a warning
_BATCHES_LOOKED_AT = 16  # counting is host work for every packed batch, and a warning comes in the first ones or not at all


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


@renamed(mesh="device_mesh", check="run_check")
def shard_batch(
    batch: Mapping[str, object],
    device_mesh: DeviceMesh,
    placement: SequencePlacement | None = None,
    *,
    documents: Documents | Tensor | Sequence[int] | None = None,
    run_check: bool = True,
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
        device_mesh: the mesh axis that holds the sequence, such as `mesh["cp"]`.
        placement: how to cut; `Zigzag(1)` by default.
        documents: bounds of packed documents. Without it they are read from `cu_seq_lens_q`, `seq_idx` or restarting
            `position_ids`; what is given must agree.
        run_check: compare the batch over the axis by a checksum, for which the host waits once.

    Raises:
        ValueError: the mesh has more than one axis, the placement is not of dim 1, shapes do not fit, documents do not end at
            the length or contradict each other, labels contradict shift_labels, labels at padding count, a key looks like a
            misspelled one, tensors are on the meta device, the batch is a share already, or ranks hold different batches. Every
            rank raises.
        NotImplementedError: an attention mask that is not padding, or is beside documents; or an unknown tensor with a dim as
            long as the sequence.
    """
    placement = Zigzag(1) if placement is None else placement
    # A wrong mesh raises without the other ranks: it is what says who they are.
    check_mesh(device_mesh)
    transport = transport_along(device_mesh)
    with refused_together(lambda: [transport] if run_check else []):
        check_placement(placement)
        # A share has the form of a whole batch, and cut twice it would train on a part of the tokens without a word.
        if isinstance(batch, ShardedBatch):
            raise ValueError("this batch is a share already, made by shard_batch: pass the whole batch")
        refuse_lookalikes(batch)
        length = sequence_length(batch)
        refuse_unknown(batch, length)
        bounds = find_documents(batch, length, documents)
    if run_check:
        check_same(batch, length, bounds, placement, transport)
    warn_of_imbalance(bounds, batch, placement, transport)
    return cut_batch(batch, placement, transport, length, bounds)


def is_packed(documents: Documents | None, batch: Mapping[str, object]) -> bool:
    """Whether documents are packed texts. Those of a batch with a mask are its real tokens and its padding instead."""
    return documents is not None and batch.get("attention_mask") is None


def warn_of_imbalance(
    documents: Documents | None,
    batch: Mapping[str, object],
    placement: SequencePlacement,
    transport: Transport,
    reach: int | None = None,
) -> None:
    """Warns once, on rank 0, where documents give the most loaded rank far more work than the mean, and says what helps.

    The first packed batches of a group are looked at, since packing is alike from batch to batch; padding does not count.
    """
    if (
        documents is None
        or not is_packed(documents, batch)
        or transport.rank
        or transport.world == 1
        or transport.batches >= _BATCHES_LOOKED_AT
    ):
        return
    # Counted on rank 0 alone, and never compared: a warning is no part of what ranks agree on.
    transport.batches += 1
    balance = work_balance(placement.layout, documents, transport.world, reach)
    if balance < GOOD_BALANCE:
        transport.batches = _BATCHES_LOOKED_AT
        remedy = balance_remedy(documents, placement, transport.world, reach)
        warnings.warn(
            f"attention on this packed batch keeps its ranks busy for {balance:.0%} of the time that the most loaded one takes: "
            f"{documents} under {placement!r} over {transport.world} ranks. {remedy}",
            stacklevel=4,
        )


def balance_remedy(documents: Documents, placement: SequencePlacement, world: int, reach: int | None = None) -> str:
    """Says what would balance the work of a packed batch better, with the figure that it would reach."""
    if placement.layout.cut:
        return "Longer rows, or fewer ranks, would balance better"
    if documents.rows > 1:
        return "Pack the rows into one (B=1), which Zigzag(1, per_document=True) cuts document by document"
    better = work_balance(Zigzag(1, per_document=True).layout, documents, world, reach)
    return f"Zigzag(1, per_document=True) would reach {better:.0%}"


def check_mesh(mesh: DeviceMesh) -> None:
    """Raises ValueError unless the mesh has one axis."""
    if mesh.ndim != 1:
        raise ValueError(
            f"give the one mesh axis that holds the sequence, such as mesh['cp'], found a mesh of {mesh.ndim} axes: {mesh}"
        )


def check_placement(placement: SequencePlacement) -> None:
    """Raises ValueError unless the placement cuts dim 1."""
    if not isinstance(placement, SequencePlacement) or placement.dim != 1:
        raise ValueError(f"a batch (B, S) is cut in dim 1 by Contiguous(1), Zigzag(1) or Stripe(1), found {placement!r}")


def check_same(
    batch: Mapping[str, object], length: int, documents: Documents | None, placement: SequencePlacement, transport: Transport
) -> None:
    """Raises ValueError on every rank unless all hold the same batch and cut it alike; the host waits once."""
    # Every rank cuts its share out of its own copy: ranks with other batches would attend to one another's unrelated tokens, and
    # the loss would look like a loss.
    tensors = [(key, value) for key in (*CUT_KEYS, "attention_mask") if isinstance(value := batch.get(key), Tensor)]
    rows = tensors[0][1].shape[0] if tensors else 0
    words = "|".join(
        [f"{key} {value.dtype} {tuple(value.shape)}" for key, value in tensors]
        + [documents.digest if documents else "", repr(placement)]
    )
    number = number_of(words)
    sums = [checksum(value) for _, value in tensors]
    items = batch.get("num_items_in_batch")
    count = float(items) if isinstance(items, (Tensor, int, float)) else -1.0
    # The count may be a float, and a record holds integers: its bits travel, which are equal where the numbers are.
    mine = [rows, length, number, sum(sums) % (1 << 61), *struct.unpack("q", struct.pack("d", count))]
    for rank, theirs in enumerate(meet(transport, "a batch that every rank holds whole", mine)):
        if theirs[:2] != mine[:2]:
            raise ValueError(
                f"rank {transport.rank} has a batch of {rows} rows of {length} tokens, rank {rank} one of {theirs[0]} rows of "
                f"{theirs[1]} tokens: every rank of the sequence axis needs the same whole batch"
            )
        if theirs[:4] != mine[:4]:
            raise ValueError(
                f"ranks {transport.rank} and {rank} of the sequence axis hold different batches, or cut them otherwise ({words}): "
                "give all of them the same data, as a sampler does that shards over the data-parallel axis only, and the same "
                f"placement. {PERHAPS_A_SHARE}"
            )
        if theirs != mine:
            (its_count,) = struct.unpack("d", struct.pack("q", theirs[4]))
            raise ValueError(
                f"num_items_in_batch is {count:g} on rank {transport.rank}, {its_count:g} on rank {rank} of the sequence axis (-1: "
                "not given): it counts the labels of the whole batch, so every rank of the axis passes the same number"
            )


def cut_batch(
    batch: Mapping[str, object], placement: SequencePlacement, transport: Transport, length: int, documents: Documents | None
) -> ShardedBatch:
    """This rank's share of a checked batch: labels are shifted first, while the next token of each token is still at hand."""
    whole = dict(batch)
    # Bounds of the whole row mean nothing beside a share, and a model that read them would cut its tokens by them. What they say
    # is in `documents` now.
    for key in (*BOUND_KEYS, "attention_mask"):
        whole.pop(key, None)
    device = next(value.device for key in CUT_KEYS if isinstance(value := whole.get(key), Tensor))
    padding = padding_of(batch, rows_of(batch), length)
    packed = documents if padding is None else None  # padding does not restart positions, as it does not in one process
    if not isinstance(whole.get("position_ids"), Tensor):
        positions = torch.arange(length)[None] if packed is None else packed.position_ids()
        whole["position_ids"] = positions.to(device)
    # A rank's next token is on another rank at the end of each of its chunks, so a model that shifted its share would predict
    # the wrong token there. Losses read `shift_labels` where they are given.
    labels = whole.get("labels")
    shifted = whole.get("shift_labels")
    if isinstance(labels, Tensor):
        if isinstance(shifted, Tensor):
            _check_shifted(labels, shifted, packed)
        else:
            shifted = whole["shift_labels"] = shift_labels(labels, packed)
    if isinstance(shifted, Tensor) and padding is not None:
        shifted = whole["shift_labels"] = _predicted_by_real_tokens(shifted, padding)
    # A layout that cuts documents needs them from everyone, later too (`gather`): a row without documents is one.
    if placement.layout.cut and documents is None:
        documents = Documents.from_lengths([length])
    split = split_of(placement, documents)
    share = ShardedBatch()
    for key, value in whole.items():
        is_cut = key in CUT_KEYS and isinstance(value, Tensor)
        share[key] = take_shard(value, 1, split, transport.world, transport.rank) if is_cut and isinstance(value, Tensor) else value
    share.length, share.documents = length, documents
    # Counted in the whole batch, which every rank has here: the parts of the loss add up without asking the other ranks.
    share.num_items = (shifted != IGNORED).sum() if isinstance(shifted, Tensor) else None
    return share


def mask_share(
    batch: Mapping[str, object], placement: SequencePlacement, transport: Transport, documents: Documents | None
) -> Tensor | None:
    """This rank's part (B, S/W) of a checked batch's attention mask, None without one."""
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor):
        return None
    return take_shard(mask, 1, split_of(placement, documents), transport.world, transport.rank)


def shift_labels(labels: Tensor, documents: Documents | None) -> Tensor:
    """The label of the next token for every token (B, S), -100 at the end of the row and of each document."""
    shifted = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:].contiguous()
    if documents is not None:
        # The last token of a document would be asked for the first of the next, of which it cannot know.
        ends = torch.zeros((documents.rows, documents.length + 1), dtype=torch.bool)
        for row, bounds in enumerate(documents.bounds):
            ends[row, list(bounds)] = True
        shifted = shifted.masked_fill(ends[:, 1:].to(labels.device), IGNORED)
    return shifted


def _check_shifted(labels: Tensor, shifted: Tensor, documents: Documents | None) -> None:
    """Raises ValueError unless shifted labels are the labels of the next tokens; ends of documents may count or not."""
    # Some collators leave the label of a document's last token in, some take it out: both are what labels say.
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
    # The last padding token before real ones predicts the first of them, in one process too, from nothing that means anything: that
    # label is dropped in silence. Any other label that padding predicts is the user's mistake.
    last = padding & ~torch.nn.functional.pad(padding, (0, 1), value=True)[:, 1:]
    wrong = int((padding & ~last & (shifted != IGNORED)).sum())
    if wrong:
        raise ValueError(
            f"{wrong} labels count that padding tokens would predict, whose logits mean nothing: set labels to {IGNORED} where "
            "attention_mask is 0"
        )
    return shifted.masked_fill(last, IGNORED)
