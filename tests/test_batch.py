from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from helpers import grid, line, refused
from torch.nn.functional import cross_entropy

from dtensor_ring import Contiguous, Documents, Stripe, Zigzag, shard_batch
from dtensor_ring.data.batch import shift_labels

IGNORED = -100


def cut(length: int, packed: bool):
    mesh, rank, world = line(), dist.get_rank(), dist.get_world_size()
    ids = torch.arange(2 * length).view(2, length)
    labels = ids.masked_fill(ids % 5 == 0, IGNORED)
    documents = Documents.from_lengths([2, 0, length - 2]) if packed else None
    for placement in (Zigzag(1), Contiguous(1), Stripe(1)):
        tokens = torch.tensor(placement.layout.tokens(length, world, rank), dtype=torch.int64)
        batch = shard_batch({"input_ids": ids, "labels": labels, "name": "x"}, mesh, placement, documents=documents)
        assert torch.equal(batch["input_ids"], ids[:, tokens])
        assert torch.equal(batch["labels"], labels[:, tokens])
        assert batch["name"] == "x"
        assert batch.length == length
        positions = documents.position_ids() if documents is not None else torch.arange(length)[None]
        assert torch.equal(batch["position_ids"], positions[:, tokens])
        shifted = torch.cat([labels[:, 1:], torch.full((2, 1), IGNORED)], 1)
        if packed:
            shifted[:, 1] = IGNORED
        assert torch.equal(batch["shift_labels"], shifted[:, tokens])
        assert batch.num_items.item() == (shifted != IGNORED).sum().item()
    return True


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("packed", [False, True])
def test_every_tensor_is_cut_alike_after_labels_are_shifted(pools, world, packed):
    for length in (2, 7, 16):
        pools.run(world, cut, length, packed)


def parts_of_the_loss():
    mesh = line()
    logits = torch.randn(2, 13, 5, dtype=torch.float64)
    labels = torch.randint(0, 5, (2, 13))
    labels[0, 4:9] = IGNORED
    whole = cross_entropy(logits.flatten(0, 1), shift_labels(labels, None).flatten())
    batch = shard_batch({"inputs_embeds": logits, "labels": labels}, mesh, Stripe(1))
    mine = cross_entropy(batch["inputs_embeds"].flatten(0, 1), batch["shift_labels"].flatten(), reduction="sum") / batch.num_items
    dist.all_reduce(mine)
    torch.testing.assert_close(mine, whole)


def test_the_parts_of_the_loss_add_up(pools):
    pools.run(4, parts_of_the_loss)


def documents_found():
    mesh = line()
    ids = torch.arange(9)[None]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1]])
    bounds = torch.tensor([0, 3, 7, 9], dtype=torch.int32)
    wanted = Documents.from_lengths([3, 4, 2])
    assert shard_batch({"input_ids": ids, "position_ids": positions}, mesh).documents == wanted
    flat = {"input_ids": ids, "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 4, "max_length_k": 4}
    batch = shard_batch(flat, mesh)
    assert batch.documents == wanted
    assert set(batch) == {"input_ids", "position_ids"}
    assert shard_batch({"input_ids": ids, "position_ids": torch.arange(9)[None]}, mesh).documents is None
    assert shard_batch({"input_ids": ids, "position_ids": torch.arange(5, 14)[None]}, mesh).documents is None


def test_documents_are_read_from_what_collators_send(pools):
    pools.run(2, documents_found)


def refusals():
    mesh, rank = line(), dist.get_rank()
    plane = grid(rows=1)
    ids = torch.arange(16).view(2, 8)
    cases = [
        (lambda: shard_batch({"input_ids": ids}, plane), ValueError, "such as mesh['cp']"),
        (lambda: shard_batch({"input_ids": ids}, mesh, Zigzag(0)), ValueError, "cut in dim 1"),
        (lambda: shard_batch({"name": 1}, mesh), ValueError, "needs input_ids or inputs_embeds"),
        (lambda: shard_batch({"input_ids": ids, "labels": ids[:, 1:]}, mesh), ValueError, "all tensors of one length"),
        (lambda: shard_batch({"input_ids": ids[0]}, mesh), ValueError, "must have a batch and a sequence dim"),
        (
            lambda: shard_batch({"input_ids": ids, "attention_mask": torch.ones(2, 1, 8, 8)}, mesh),
            NotImplementedError,
            "(2, 1, 8, 8)",
        ),
        (
            lambda: shard_batch({"input_ids": ids, "bbox": torch.zeros(2, 8, 4)}, mesh),
            NotImplementedError,
            "bbox of shape (2, 8, 4)",
        ),
        (lambda: shard_batch({"input_ids": ids}, mesh, documents=[0, 7]), ValueError, "documents end at token 7"),
        (lambda: shard_batch({"input_ids": ids, "position_ids": ids + 1}, mesh), None, ""),
        (lambda: shard_batch({"input_ids": ids, "position_ids": ids * 2}, mesh), ValueError, "positions must count up from 0"),
        (lambda: shard_batch({"input_ids": ids + rank}, mesh), ValueError, "hold different batches"),
        (lambda: shard_batch({"input_ids": ids[:, : 8 - rank]}, mesh), ValueError, "2 rows of 7 tokens"),
        (lambda: shard_batch({"input_ids": ids}, mesh, documents=[0, 3 + rank, 8]), ValueError, "hold different batches"),
    ]
    for act, error, text in cases:
        if error is None:
            act()
            continue
        refused(act, error, text)
    assert "attention_mask" not in shard_batch({"input_ids": ids, "attention_mask": torch.ones(2, 8)}, mesh)


def test_what_cannot_be_cut_rightly_is_refused_on_every_rank(pools):
    pools.run(2, refusals)


def padding_is_cut():
    mesh, rank, world = line(), dist.get_rank(), dist.get_world_size()
    ids = torch.arange(36).view(4, 9)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0, 0], [1] * 9, [0, 1, 1, 0, 0, 0, 0, 0, 0]])
    labels = ids.masked_fill(mask == 0, IGNORED)
    shifted = shift_labels(labels, None)
    shifted[0, 1] = shifted[3, 0] = IGNORED  # predicted by padding
    for placement in (Zigzag(1), Contiguous(1), Stripe(1)):
        tokens = torch.tensor(placement.layout.tokens(9, world, rank), dtype=torch.int64)
        for given in (mask, mask.bool(), mask.to(torch.int32)):
            batch = shard_batch({"input_ids": ids, "labels": labels, "attention_mask": given}, mesh, placement)
            assert batch.documents == Documents(((0, 2, 9), (0, 6, 9), (0, 9), (0, 1, 3, 9)))
            assert set(batch) == {"input_ids", "labels", "shift_labels", "position_ids"}
            assert torch.equal(batch["position_ids"], torch.arange(9)[None, tokens])  # positions in the row, as in one process
            assert torch.equal(batch["shift_labels"], shifted[:, tokens])
            assert batch.num_items.item() == (shifted != IGNORED).sum().item()
    alike = shard_batch({"input_ids": ids, "attention_mask": mask[1:2].expand(4, -1)}, mesh)
    assert alike.documents == Documents.from_lengths([6, 3])
    given = shard_batch({"input_ids": ids, "shift_labels": shift_labels(labels, None), "attention_mask": mask}, mesh, Contiguous(1))
    assert given.num_items.item() == (shifted != IGNORED).sum().item()


def test_padding_and_real_tokens_of_a_row_are_documents(pools):
    for world in (1, 2, 3):
        pools.run(world, padding_is_cut)


def told_documents():
    mesh = line()
    ids = torch.arange(18).view(2, 9)
    bounds, wanted = torch.tensor([0, 3, 7, 9], dtype=torch.int32), Documents.from_lengths([3, 4, 2])
    positions, numbers = wanted.position_ids(), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2]], dtype=torch.int32)
    counting = torch.arange(9)[None]
    for told in [
        {"seq_idx": numbers},
        {"seq_idx": numbers.expand(2, -1)},
        {"seq_idx": numbers, "position_ids": positions},
        {"seq_idx": numbers, "position_ids": counting},  # counting up tells nothing
        {"seq_idx": numbers, "position_ids": positions + 2},  # as with position_ids_start=2
        {"seq_idx": numbers, "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "position_ids": positions},
        {"cu_seq_lens_q": [0, 3, 7, 9]},
        {"cu_seq_lens_q": bounds, "position_ids": positions},
        {"attention_mask": torch.ones(2, 9), "position_ids": positions},
    ]:
        batch = shard_batch({"input_ids": ids, **told}, mesh)
        assert batch.documents == wanted, told
        assert set(batch) == {"input_ids", "position_ids"}
    rows = torch.cat([numbers, torch.zeros_like(numbers)])
    assert shard_batch({"input_ids": ids, "seq_idx": rows}, mesh).documents == Documents(((0, 3, 7, 9), (0, 9)))


def test_documents_are_read_from_sequence_numbers_and_any_that_agree(pools):
    pools.run(2, told_documents)


def told_wrongly():
    mesh, rank = line(), dist.get_rank()
    ids = torch.arange(16).view(2, 8)
    ones, padded = torch.ones(2, 8, dtype=torch.int64), torch.ones(2, 8, dtype=torch.int64)
    padded[1, 5:] = 0
    holes, numbered = ones.clone(), ones.clone()
    holes[1, 3] = 0
    numbered[:, 4:] = 2
    restart = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    late = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1]])
    agree, unfit, lacking = ValueError, ValueError, NotImplementedError
    for told, error, text in [
        ({"seq_idx": late, "position_ids": restart}, agree, "seq_idx and position_ids contradict each other: in row 0"),
        ({"seq_idx": late, "position_ids": restart}, agree, "begins at token 4 by position_ids, not by seq_idx"),
        ({"cu_seq_lens_q": [0, 5, 8], "position_ids": restart}, agree, "begins at token 4 by position_ids, not by cu_seq_lens_q"),
        ({"cu_seq_lens_q": [0, 4, 8], "seq_idx": late}, agree, "begins at token 4 by cu_seq_lens_q, not by seq_idx"),
        ({"documents": [0, 5, 8], "position_ids": restart}, agree, "documents and position_ids contradict"),
        ({"seq_idx": late[:, 1:]}, unfit, "seq_idx must have shape (B, S) or (1, S), here (2, 8) or (1, 8), found (1, 7)"),
        ({"cu_seq_lens_k": [0, 8]}, unfit, "cu_seq_lens_q and cu_seq_lens_k differ"),
        ({"documents": Documents(((0, 4, 8), (0, 8), (0, 8)))}, unfit, "documents have 3 rows, but the batch has 2"),
        ({"attention_mask": holes}, lacking, "found 2 runs of ones in row 1, with zeros between"),
        ({"attention_mask": numbered}, lacking, "found torch.int64 values from 1 to 2"),
        ({"attention_mask": padded.double()}, lacking, "found torch.float64 values from 0.0 to 1.0"),
        ({"attention_mask": padded[:, 1:]}, lacking, "found a torch.int64 tensor of shape (2, 7); only a mask (2, 8) of ones"),
        ({"attention_mask": {"full_attention": None}}, lacking, "attention_mask: found a dict"),
        ({"attention_mask": padded, "position_ids": restart}, lacking, "attention_mask has zeros and position_ids tell documents"),
        ({"attention_mask": padded, "seq_idx": late}, lacking, "make the padding a document of its own"),
        ({"attention_mask": padded, "documents": [0, 5, 8]}, lacking, "has zeros and documents tell documents"),
        ({"attention_mask": padded, "labels": ids}, ValueError, "2 labels count that padding tokens would predict"),
        ({"attention_mask": ones - rank * (ones - padded)}, ValueError, "hold different batches"),
        (
            {"documents": Documents(((0, 8), (0, 5, 8)))} if rank else {"attention_mask": padded},
            ValueError,
            "hold different batches",
        ),
    ]:
        documents = told.pop("documents", None)
        refused(
            lambda told=told, documents=documents: shard_batch({"input_ids": ids, **told}, mesh, documents=documents), error, text
        )


def test_masks_and_documents_that_contradict_are_refused_in_words(pools):
    pools.run(2, told_wrongly)


def batches_without_values():
    mesh, rank = line(), dist.get_rank()
    ids, absent = torch.arange(16).view(2, 8), torch.empty(2, 8, dtype=torch.int64, device="meta")
    for batch, name in [
        ({"input_ids": absent}, "input_ids"),
        ({"input_ids": ids, "labels": absent}, "labels"),
        ({"input_ids": ids, "attention_mask": absent}, "attention_mask"),
        ({"input_ids": ids, "cu_seq_lens_q": absent[0]}, "cu_seq_lens_q"),
    ]:
        for check in (True, False):
            with pytest.raises(ValueError, match=f"{name} is on the meta device, which has no values to read"):
                shard_batch(batch, mesh, run_check=check)
    assert shard_batch({"input_ids": ids}, mesh)["input_ids"].shape == (2, 4), rank


def test_a_batch_on_the_meta_device_is_refused_in_words(pools):
    pools.run(2, batches_without_values)
