"""Packed documents dealt out to ranks: every token once, the same number and the same work for every rank, and few cuts."""

from __future__ import annotations

import random
import sys
from itertools import accumulate, pairwise

import pytest
from helpers import blocks_touched, slow
from hypothesis import given
from hypothesis import strategies as st

from dtensor_ring.planning.blocks import BLOCK, half_blocks
from dtensor_ring.planning.deck import Deck, Part
from dtensor_ring.planning.document_sharding import Chunks, _held, share_documents
from dtensor_ring.planning.documents import Documents

# Lengths at which blocks and pairs of pieces begin and end, and those between and far beyond.
lengths = st.one_of(
    st.integers(0, 5),
    st.sampled_from([127, 128, 129, 255, 256, 257]),
    st.integers(1, 3000),
    st.integers(1, 40).map(lambda n: n * BLOCK),
)
packings = st.lists(lengths, min_size=1, max_size=25)


def even(length: int, world: int) -> tuple[int, ...]:
    """As every layout spreads tokens."""
    return tuple(length // world + (rank < length % world) for rank in range(world))


def dealt(lengths: list[int], world: int) -> tuple[tuple[int, ...], tuple[Chunks, ...]]:
    """Bounds of documents, and each rank's even share of the tokens."""
    bounds = tuple(accumulate(lengths, initial=0))
    return bounds, share_documents(bounds, even(bounds[-1], world))


def pieces_of(bounds: tuple[int, ...], chunks: Chunks) -> list[tuple[int, int, int]]:
    """Document, first token in it, and tokens, of each part of a document in a rank's chunks."""
    pieces = []
    for start, count in chunks:
        while count:
            document = Documents.find(bounds, start)
            size = min(count, bounds[document + 1] - start)
            pieces.append((document, start - bounds[document], size))
            start, count = start + size, count - size
    return pieces


def over_the_even_share(lengths: list[int], world: int) -> tuple[float, float, float]:
    """Blocks of the most loaded rank; of all documents, uncut, a rank; and of a row of the longest document."""
    bounds, shared = dealt(lengths, world)
    most = max(blocks_touched(bounds, chunks) for chunks in shared)
    whole = sum(blocks_touched(bounds, [(a, b - a)]) for a, b in pairwise(bounds))
    return most, whole / world, -(-max(lengths) // BLOCK)


def long_tail(generator: random.Random, length: int) -> list[int]:
    """Lengths that add up to `length`: most around 1,300 tokens, a few a hundred times as long."""
    lengths = []
    while length:
        lengths.append(min(int(generator.lognormvariate(7.2, 1.3)) + 8, length))
        length -= lengths[-1]
    return lengths


def test_the_documents_of_the_picture_are_dealt_as_pictured():
    bounds, shared = dealt([12 * BLOCK, 3 * BLOCK, 2 * BLOCK, BLOCK], 3)
    in_blocks = [[(d, first // BLOCK, size // BLOCK) for d, first, size in pieces_of(bounds, chunks)] for chunks in shared]
    assert in_blocks == [[(0, 0, 1), (0, 10, 2), (2, 0, 2), (3, 0, 1)], [(0, 1, 5), (0, 9, 1)], [(0, 6, 3), (1, 0, 3)]]
    assert [2 * blocks_touched(bounds, chunks) for chunks in shared] == [54, 56, 56]
    assert sum(half_blocks(0, b - a) for a, b in pairwise(bounds)) // 3 == 54


@given(st.integers(0, 2000), st.integers(0, 2000), st.one_of(st.none(), st.integers(1, 2500)))
def test_half_blocks_are_those_that_hold_a_score_that_is_needed(first, count, reach):
    wanted = int(count > 0)
    for start in range(first, first + count, BLOCK):
        queries = range(start, min(start + BLOCK, first + count))
        seen = {key // BLOCK for q in (queries[0], queries[-1]) for key in (q, 0 if reach is None else max(0, q - reach + 1))}
        wanted += 2 * (max(seen) - min(seen) + 1) - 1
    assert half_blocks(first, count, reach) == wanted


@given(packings)
def test_the_deck_is_sorted_by_what_a_token_costs(lengths):
    costs = [part.work / part.length for part in Deck(lengths, 0).parts]
    assert all(a <= b + 2**-20 for a, b in pairwise(costs))
    # A text of few tokens takes a block alone: each of its tokens is dearer than one of a text that is long by far.
    assert [part.length for part in Deck([1, 3000, 16, 0, 128, 64], 0).parts] == [128, 64, 16, 3000, 1]


def walked(parts: list[Part], tokens: int) -> tuple[int, int]:
    """Half blocks of the parts that `tokens` cover whole, and tokens of the next."""
    work = 0
    for part in parts:
        if tokens < part.size:
            break
        tokens, work = tokens - part.size, work + part.work
    return work, tokens


@given(packings.filter(any), st.integers(0, 2000), st.randoms(use_true_random=False))
def test_a_look_is_what_a_walk_over_what_is_left_finds(lengths, pair_above, drawn):
    deck = Deck(lengths, pair_above)
    while deck.tokens:
        parts = deck.parts[deck.low : deck.high]
        assert deck.tokens == sum(part.size for part in parts)
        assert deck.work == sum(part.work for part in parts)
        assert [part.size for part in parts[1:-1]] == [part.length for part in parts[1:-1]]
        total = drawn.randint(1, deck.tokens)
        cheap = drawn.randint(*deck.span(total)) if total < deck.tokens else total
        looks = deck.look_from_cheap_end(cheap), deck.look_from_dear_end(total - cheap)
        for look, order, tokens in ((looks[0], parts, cheap), (looks[1], parts[::-1], total - cheap)):
            if tokens < deck.tokens:
                assert (look.work, look.count) == walked(order, tokens)
        counts = {looks[0].index: looks[0].count}
        counts[looks[1].index] = counts.get(looks[1].index, 0) + looks[1].count
        cuts = [deck.cut(index, count, drawn.randint(-1, 1)) for index, count in counts.items()]
        left, taken = deck.tokens, list(deck.take(*looks, cuts))
        assert sum(count for _, _, count in taken) == total == left - deck.tokens


@given(st.integers(1, 60_000), st.integers(2 * BLOCK, 5000))
def test_nested_pairs_leave_the_middle_of_a_document(length, count):
    deck = Deck([length], 0)
    while deck.tokens > count:
        cut = deck.cut(0, count, 0)
        # Cuts are rounded to a block's end, half a block at most, and a piece of less than half a block goes to the other.
        assert abs(cut.rest.first - (length - cut.rest.last)) <= 3 * BLOCK
        assert len(cut.pieces) == 2 or count < 3 * BLOCK
        assert cut.odd <= 1
        # So a token costs what it costs in the whole document, but for rows that are not full.
        whole = half_blocks(0, length)
        assert abs(cut.work * length - whole * count) <= 3 * (2 * length // BLOCK + 2) * length
        list(deck.take(deck.look_from_cheap_end(count), deck.look_from_dear_end(0), [cut]))


@given(packings, st.lists(st.integers(0, 50), min_size=2, max_size=9))
def test_every_token_is_dealt_once_and_every_rank_gets_its_total(lengths, weights):
    bounds = tuple(accumulate(lengths, initial=0))
    ends = [bounds[-1] * part // max(1, sum(weights)) for part in accumulate(weights, initial=0)]
    totals = [b - a for a, b in pairwise(ends)]
    totals[-1] += bounds[-1] - ends[-1]
    shared = share_documents(bounds, tuple(totals))
    assert [sum(count for _, count in chunks) for chunks in shared] == totals
    assert sorted(token for chunks in shared for start, count in chunks for token in range(start, start + count)) == list(
        range(bounds[-1])
    )
    for chunks in shared:
        assert all(a + size < b for (a, size), (b, _) in pairwise(chunks)), "in order, and neighbours are one chunk"


@given(packings, st.integers(2, 9))
def test_cuts_are_few_and_at_whole_blocks_but_for_one_a_rank(lengths, world):
    bounds, shared = dealt(lengths, world)
    pieces = [piece for chunks in shared for piece in pieces_of(bounds, chunks)]
    documents = len([length for length in lengths if length])
    # A rank cuts two documents, at two places each; the last takes what is left.
    assert len(pieces) <= documents + 4 * (world - 1)
    assert len({document for document, first, _ in pieces if first}) <= 2 * (world - 1)
    assert sum(first % BLOCK > 0 for _, first, _ in pieces) <= world - 1


@given(packings, st.integers(2, 9))
def test_ranks_that_share_a_document_are_neighbours(lengths, world):
    bounds, shared = dealt([length + 2 * world for length in lengths], world)  # a rank of one token may have to leave one out
    holders: dict[int, list[int]] = {}
    for rank, chunks in enumerate(shared):
        for document in dict.fromkeys(document for document, _, _ in pieces_of(bounds, chunks)):
            holders.setdefault(document, []).append(rank)
    for ranks in holders.values():
        assert ranks == list(range(ranks[0], ranks[-1] + 1))


@given(packings, st.integers(2, 9))
def test_no_rank_is_a_row_of_blocks_over_its_share_and_what_cuts_add(lengths, world):
    # From a thousand tokens a rank on; with fewer, what cuts add is a large part of a rank's few blocks.
    lengths = [*lengths, 1024 * world]
    most, share, row = over_the_even_share(lengths, world)
    assert most <= 1.05 * share + row


@pytest.mark.parametrize(("world", "allowed", "packings"), [(8, 1.05, 40), (64, 1.08, 6), slow(256, 1.12, 6), slow(1024, 1.15, 2)])
def test_the_most_loaded_rank_of_long_tails_is_near_its_even_share(world, allowed, packings):
    generator = random.Random(world)
    for _ in range(packings):
        lengths = long_tail(generator, 8192 * world)
        most, share, _ = over_the_even_share(lengths, world)
        assert most <= allowed * share, lengths


@pytest.mark.parametrize("documents", [1, 100, 10000])
@pytest.mark.parametrize("world", [8, slow(64), slow(1024)])
def test_the_deck_is_looked_at_a_bounded_number_of_times_a_rank(monkeypatch, documents, world):
    looks = 0

    def counted(look):
        def count(deck, tokens):
            nonlocal looks
            looks += 1
            return look(deck, tokens)

        return count

    for name in ("look_from_cheap_end", "look_from_dear_end"):
        monkeypatch.setattr(Deck, name, counted(getattr(Deck, name)))
    length = 4096 * world
    lengths = [length // documents + i % 7 for i in range(documents)]
    share_documents.__wrapped__(tuple(accumulate(lengths, initial=0)), even(sum(lengths), world))
    # Twice dealt: a bisection over a rank's tokens, one look each for good places, then at eight of them from each end, and at two
    # where the bisection ended, from both ends.
    a_rank = 2 * (max(even(sum(lengths), world)).bit_length()) + 2 + 2 * (8 + 8 + 2)
    assert world <= looks <= 2 * world * a_rank


def test_the_bytes_of_what_is_kept_of_a_dealing_are_estimated_honestly():
    bounds, totals = tuple(range(1000, 3001)), (500,) * 4
    shared = share_documents(bounds, totals)
    integers = [number for chunks in shared for chunk in chunks for number in chunk] + list(bounds)
    held = sum(map(sys.getsizeof, [bounds, *shared, *(chunk for chunks in shared for chunk in chunks), *integers]))
    assert held / 2 < _held(shared, bounds, totals) < 2 * held
