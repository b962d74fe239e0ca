"""Sliding windows: only the keys around each chunk travel, whatever the length, and results are exact."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from helpers import assert_exact, line, make_case, once, some_or_every

from dtensor_ring import Contiguous, Documents, Stripe, Zigzag, distribute_tensor, full_tensor, ring_attention
from dtensor_ring.debug import traffic

LENGTH, WORLD, WINDOW = 800, 4, 100  # chunks of zigzag are as long as the window


def key_tokens_sent(layout: str, rank: int, length: int, window: int) -> int:
    """Keys just before a chunk come from the ranks that hold them: contiguous chunks from the rank before; in zigzag the early
    chunk from the rank before, the late one from the rank after, but for the last rank, whose two chunks are neighbours."""
    if layout == "contiguous":
        return window if rank < WORLD - 1 else 0
    return window * ((rank < WORLD - 1) + (rank > 0))


def window_of_a_hundred(layout: str, length: int, dtype: torch.dtype):
    mesh = line()
    placement = {"contiguous": Contiguous(1), "zigzag": Zigzag(1)}[layout]
    case = make_case(length, heads=(4, 2), dtype=dtype, batch=1)
    case.window = (WINDOW, 0)
    leaves = [x.clone().requires_grad_() for x in case.inputs]
    placed = [distribute_tensor(x, mesh, [placement], src_data_rank=None) for x in leaves]
    ring_attention(*placed, window=case.window)  # the ranks agree on the first call of a kind
    before = traffic(mesh)
    out, lse = ring_attention(*placed, window=case.window, return_lse=True)
    forward = traffic(mesh).since(before).bytes
    dout = distribute_tensor(case.dout, mesh, [placement], src_data_rank=None)
    before = traffic(mesh)
    grads = torch.autograd.grad(out, placed, dout)
    backward = traffic(mesh).since(before).bytes
    row = 2 * 2 * 8 * dtype.itemsize  # keys and values of 2 heads of 8
    sent, received = (key_tokens_sent(layout, rank, length, WINDOW) for rank in (dist.get_rank(), WORLD - 1 - dist.get_rank()))
    assert forward == sent * row
    assert backward == (sent + received) * row  # the keys again, and the gradients of those that came
    found = full_tensor(out).detach(), full_tensor(lse.detach()), *(full_tensor(x) for x in grads)
    assert_exact(found, once(case.exact))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_a_window_of_100_sends_100_keys_at_each_border_however_long_the_sequence(pools, layout):
    for length in (LENGTH, 2 * LENGTH):
        pools.run(WORLD, window_of_a_hundred, layout, length, torch.float64)


def other_windows(placement, window, lengths, strategies):
    """Longer than a chunk, ahead as well as back, with documents: exact."""
    mesh = line()
    documents = None if lengths is None else Documents.from_lengths(lengths)
    case = make_case(90 if documents is None else documents.length, documents=documents)
    case.is_causal, case.window = window[1] == 0, window
    places = {"documents": documents} if placement.layout.cut else {}
    leaves = [x.clone().requires_grad_() for x in case.inputs]
    placed = [distribute_tensor(x, mesh, [placement], src_data_rank=None, **places) for x in leaves]
    exact = once(case.exact)
    for strategy in strategies:
        out, lse = ring_attention(
            *placed, is_causal=case.is_causal, window=window, documents=documents, strategy=strategy, return_lse=True
        )
        whole = full_tensor(out, **places)
        grads = torch.autograd.grad(whole, leaves, case.dout)
        assert_exact((whole.detach(), full_tensor(lse.detach(), **places), *grads), exact)


PLACEMENTS = [Contiguous(1), Zigzag(1), Stripe(1), Zigzag(1, per_document=True)]
WINDOWS = [(40, 0), (0, 0), (7, 3), (-1, 5), (60, 30)]
STRATEGIES = ("ring", "gather")


@some_or_every
@pytest.mark.parametrize("placement", PLACEMENTS, ids=repr)
@pytest.mark.parametrize("window", WINDOWS)
def test_any_window_is_exact(pools, placement, window, every):
    """With documents and without, by both strategies; or by one, and with or without: each pair of values in some case."""
    i, j = PLACEMENTS.index(placement), WINDOWS.index(window)
    packed, strategies = (i + j) % 2 == 1, STRATEGIES if every else (STRATEGIES[(i // 2 + j // 2) % 2],)
    for lengths in (None, [30, 1, 50, 9]):
        if (lengths or not placement.layout.cut) and (every or placement.layout.cut or packed == bool(lengths)):
            pools.run(3, other_windows, placement, window, lengths, strategies)
