from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dtensor_ring
from dtensor_ring import Documents, ring_attention

lengths = st.lists(st.integers(0, 9), max_size=8)


def test_lengths_cu_seqlens_and_position_ids_tell_the_same_documents():
    documents = Documents.from_lengths([3, 4, 2])
    assert documents.bounds == ((0, 3, 7, 9),)
    assert Documents.from_cu_seqlens(torch.tensor([0, 3, 7, 9], dtype=torch.int32)) == documents
    assert Documents.from_cu_seqlens([0, 3, 7, 9]) == documents
    assert Documents.from_position_ids(torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1]])) == documents
    assert documents.longest == 4
    assert documents.length == 9


@given(lengths)
def test_position_ids_and_documents_are_inverse_but_for_empty_documents(parts):
    documents = Documents.from_lengths(parts)
    positions = documents.position_ids()
    assert positions.shape == (1, sum(parts))
    assert Documents.from_position_ids(positions) == Documents.from_lengths([part for part in parts if part])


def test_rows_that_differ_keep_their_own_bounds():
    documents = Documents.from_position_ids(torch.tensor([[0, 1, 2, 0], [0, 1, 0, 1]]))
    assert documents.bounds == ((0, 3, 4), (0, 2, 4))
    assert documents.rows == 2
    assert documents.select(1, 2).bounds == ((0, 2, 4),)


@given(st.lists(lengths, min_size=1, max_size=3))
def test_packing_equality_hash_pickle_and_repr_round_trip(rows):
    longest = max(sum(row) for row in rows)
    documents = Documents(tuple(Documents.from_lengths([*row, longest - sum(row)]).bounds[0] for row in rows))
    assert Documents.unpack(documents.packed) == documents
    assert eval(repr(documents)) == documents
    for other in (pickle.loads(pickle.dumps(documents)), copy.deepcopy(documents)):
        assert other == documents
        assert hash(other) == hash(documents)
    assert documents != Documents.from_lengths([longest + 1])


def test_documents_of_a_process_without_torch_are_packed_when_asked():
    """The module alone, as the command line loads it; the tensor is the same."""
    code = """
import copy, pickle, sys, types
package = types.ModuleType("dtensor_ring")
package.__path__ = sys.argv[1:]
sys.modules["dtensor_ring"] = package
from dtensor_ring.documents import Documents
documents = Documents.from_lengths([3, 4, 2])
assert copy.deepcopy(documents) == documents == pickle.loads(pickle.dumps(documents))
assert not hasattr(documents, "unpacked")
assert "torch" not in sys.modules
assert documents.packed.tolist() == [4, 0, 3, 7, 9]
assert documents._packed is documents._packed
assert Documents.unpack(documents.packed) == documents
later = Documents.from_lengths([3, 4, 2])
assert later == documents and hash(later) == hash(documents) and later.packed.equal(documents.packed)
"""
    subprocess.run([sys.executable, "-c", code, str(Path(dtensor_ring.__file__).parent)], check=True)


def test_writing_into_packed_changes_no_documents():
    documents = Documents.from_lengths([3, 4])
    documents.packed.zero_()
    assert documents.packed.tolist() == [3, 0, 3, 7]
    assert Documents.unpack(documents.packed) == documents
    x = torch.randn(1, 7, 1, 8)
    apart = torch.cat([ring_attention(part, part, part) for part in x.split([3, 4], dim=1)], dim=1)
    torch.testing.assert_close(ring_attention(x, x, x, documents=documents), apart)


def test_unpacking_reads_any_memory_order():
    documents = Documents.from_lengths([3, 4])
    spread = torch.stack([documents.packed, documents.packed], dim=1)[:, 0]
    assert not spread.is_contiguous()
    assert Documents.unpack(spread) == documents


def test_no_documents_pack_to_none():
    assert Documents.unpack(torch.empty(0, dtype=torch.int64)) is None


@pytest.mark.parametrize(
    ("bounds", "text"),
    [
        (((1, 3),), r"start at 0, row 0 starts with \(1, 3\)"),
        (((0, 5, 3),), "must not decrease, row 0 goes from 5 to 3 at index 2"),
        (((0, 5), (0, 6)), "end at the same length: row 0 at 5, row 1 at 6"),
        ((), "at least one row"),
    ],
)
def test_bounds_that_are_none_are_refused(bounds, text):
    with pytest.raises(ValueError, match=text):
        Documents(bounds)


@pytest.mark.parametrize(
    ("positions", "text"),
    [
        ([[1, 2, 3]], "row 0 starts at 1 at token 0"),
        ([[0, 1, 3]], "goes from 1 to 3 at token 2"),
        ([[0, 1, 2], [0, 2, 3]], "row 1 goes from 0 to 2 at token 1"),
    ],
)
def test_position_ids_that_jump_are_refused(positions, text):
    with pytest.raises(ValueError, match=text):
        Documents.from_position_ids(torch.tensor(positions))


def test_documents_must_end_at_the_length():
    with pytest.raises(ValueError, match="documents end at token 9, but the sequence has 12 tokens"):
        Documents.of([0, 4, 9], 12)
    assert Documents.of(torch.tensor([0, 4, 9]), 9) == Documents.from_lengths([4, 5])


@pytest.mark.parametrize("value", [torch.tensor([[0, 4]]), torch.tensor([0.0, 4.0]), torch.tensor([True, False])])
def test_a_cu_seqlens_is_one_dimensional_integers(value):
    with pytest.raises(TypeError, match="1-D integer tensor"):
        Documents.from_cu_seqlens(value)
