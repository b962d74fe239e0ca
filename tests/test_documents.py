from __future__ import annotations

import copy
import hashlib
import math
import pickle
from array import array
from pathlib import Path

import programs
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import dtensor_ring
from dtensor_ring import Documents, ring_attention
from dtensor_ring.planning.documents import Slices

lengths = st.lists(st.integers(0, 9), max_size=8)


@st.composite
def rows_of_bounds(draw):
    """One to three rows of up to 200 documents each, of one length."""
    rows = draw(st.lists(st.lists(st.integers(0, 9), max_size=200), min_size=1, max_size=3))
    longest = max(sum(row) for row in rows)
    return Documents(tuple(Documents.from_lengths([*row, longest - sum(row)]).bounds[0] for row in rows))


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


@given(rows_of_bounds())
def test_encoding_equality_hash_pickle_and_repr_round_trip(documents):
    assert Documents.unpack(documents.encoded) == documents
    assert eval(repr(documents)) == documents
    for other in (pickle.loads(pickle.dumps(documents)), copy.deepcopy(documents)):
        assert other == documents
        assert hash(other) == hash(documents)
    assert documents != Documents.from_lengths([documents.length + 1])


@given(rows_of_bounds())
@example(Documents.from_lengths([1] * 126))  # 128 numbers
def test_the_encoded_length_is_a_power_of_two_that_just_holds_the_bounds(documents):
    numbers = sum(1 + len(row) for row in documents.bounds)
    encoded = documents.encoded
    assert Documents.unpack(encoded) == documents
    assert Documents.unpack(encoded).bounds == documents.bounds
    assert len(encoded) == max(64, 2 ** math.ceil(math.log2(numbers)))
    assert not encoded[numbers:].any()


@given(rows_of_bounds(), st.integers(0, 1000))
def test_slices_are_told_from_documents_and_encoded_alike(documents, k_start):
    q_bounds = documents.bounds[0]
    slices = Slices(q_bounds, tuple(2 * bound for bound in q_bounds), k_start)
    assert Documents.unpack(slices.encoded) == slices
    assert len(slices.encoded) == max(64, 2 ** math.ceil(math.log2(3 + 2 * len(q_bounds))))


def test_as_many_lengths_as_powers_of_two_for_all_numbers_of_documents():
    lengths = {len(Documents.from_lengths([1] * count).encoded) for count in range(3000)}
    assert lengths == {64, 128, 256, 512, 1024, 2048, 4096}


@given(rows_of_bounds(), st.integers(0, 200))
def test_zeros_after_the_bounds_change_nothing(documents, zeros):
    numbers = sum(1 + len(row) for row in documents.bounds)
    bare = documents.encoded[:numbers]
    assert Documents.unpack(torch.cat([bare, bare.new_zeros(zeros)])) == documents


@given(rows_of_bounds())
def test_length_and_rows_are_those_of_the_bounds(documents):
    for value in (documents, pickle.loads(pickle.dumps(documents)), copy.copy(documents)):
        assert (value.length, value.rows) == (documents.bounds[0][-1], len(documents.bounds))


def test_compiled_code_that_reads_documents_does_not_depend_on_how_many_there_are():
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    act = torch.compile(lambda x, documents: x * documents.length + documents.rows, backend=count, fullgraph=True)
    for number in (1, 2, 5, 40, 300):
        documents = Documents.from_lengths([1] * number + [400 - number])
        assert act(torch.ones(1), documents).item() == 401
    assert len(graphs) == 1


def test_the_digest_is_that_of_the_bounds_alone():
    bounds = array("q", [4, 0, 3, 7, 9])
    assert Documents.from_lengths([3, 4, 2]).digest == hashlib.blake2b(bounds.tobytes(), digest_size=16).hexdigest()


def test_documents_of_a_process_without_torch_are_encoded_when_asked():
    """The module alone, as the command line loads it; the tensor is the same."""
    code = f"""
{programs.WITHOUT_TORCH}
import copy, pickle, types
package = types.ModuleType("dtensor_ring")
package.__path__ = sys.argv[1:]
sys.modules["dtensor_ring"] = package
from dtensor_ring.planning.documents import Documents
documents = Documents.from_lengths([3, 4, 2])
assert copy.deepcopy(documents) == documents == pickle.loads(pickle.dumps(documents))
assert not hasattr(documents, "unpacked")
assert "torch" not in sys.modules
{programs.WITH_TORCH}
assert documents.encoded.tolist() == [4, 0, 3, 7, 9] + [0] * 59
assert (documents.length, documents.rows) == (9, 1)
assert documents._encoded is documents._encoded
assert Documents.unpack(documents.encoded) == documents
later = Documents.from_lengths([3, 4, 2])
assert later == documents and hash(later) == hash(documents) and later.encoded.equal(documents.encoded)
"""
    programs.check(code, ["-c", str(Path(dtensor_ring.__file__).parent)])


def test_writing_into_an_encoded_tensor_changes_no_documents():
    documents = Documents.from_lengths([3, 4])
    documents.encoded.zero_()
    assert documents.encoded[:4].tolist() == [3, 0, 3, 7]
    assert Documents.unpack(documents.encoded) == documents
    x = torch.randn(1, 7, 1, 8)
    apart = torch.cat([ring_attention(part, part, part) for part in x.split([3, 4], dim=1)], dim=1)
    torch.testing.assert_close(ring_attention(x, x, x, documents=documents), apart)


def test_unpacking_reads_any_memory_order():
    documents = Documents.from_lengths([3, 4])
    spread = torch.stack([documents.encoded, documents.encoded], dim=1)[:, 0]
    assert not spread.is_contiguous()
    assert Documents.unpack(spread) == documents


def test_no_documents_are_an_empty_tensor():
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


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float32])
def test_position_ids_of_any_dtype_count_up_from_0(dtype):
    assert Documents.from_position_ids(torch.tensor([0, 1, 2, 0, 1], dtype=dtype)) == Documents.from_lengths([3, 2])
    with pytest.raises(ValueError, match=r"row 0 goes from 127(\.0)? to -128(\.0)? at token 128"):
        Documents.from_position_ids(torch.cat([torch.arange(128), torch.tensor([-128])]).to(dtype))


def test_documents_must_end_at_the_length():
    with pytest.raises(ValueError, match="documents end at token 9, but the sequence has 12 tokens"):
        Documents.of([0, 4, 9], 12)
    assert Documents.of(torch.tensor([0, 4, 9]), 9) == Documents.from_lengths([4, 5])


@pytest.mark.parametrize("value", [torch.tensor([[0, 4]]), torch.tensor([0.0, 4.0]), torch.tensor([True, False])])
def test_a_cu_seqlens_is_one_dimensional_integers(value):
    with pytest.raises(TypeError, match="1-D integer tensor"):
        Documents.from_cu_seqlens(value)


def test_documents_made_in_inference_mode_can_be_trained_on():
    x = torch.randn(1, 8, 2, 4, requires_grad=True)
    with torch.inference_mode():
        documents = Documents.from_lengths([3, 5])
    (found,) = torch.autograd.grad(ring_attention(x, x, x, documents=documents).sum(), x)
    (wanted,) = torch.autograd.grad(ring_attention(x, x, x, documents=[0, 3, 8]).sum(), x)
    assert torch.equal(found, wanted)
