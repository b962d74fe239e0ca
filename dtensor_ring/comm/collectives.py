"""Moving one tensor along one mesh axis: the plain-tensor steps that redistribution is made of.

per rank    x holds this rank's share of dim `dim`; `length` is the dim's length over the axis
gather      all shards to every rank          each rank sends its shard, padded to the largest, to all others
reshard     one layout to another             each rank sends exactly the tokens that change rank
exchange    shard of dim a to shard of dim b  each rank sends exactly the blocks that change rank
reduce      partial sums to shards            as a reduce-scatter of shards padded to the largest
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dtensor_ring._torch import lasting
from dtensor_ring.cache import Cache
from dtensor_ring.captures import kept_for_graphs
from dtensor_ring.comm import Message, Transport
from dtensor_ring.planning.layout import Layout, PackedLayout


class Chunks(NamedTuple):
    """How `torch.chunk` splits a dim, PyTorch's `Shard`: 5 tokens over 4 ranks are 2, 2, 1 and 0."""

    def tokens(self, length: int, world: int, rank: int) -> range:
        """The tokens of a rank."""
        size = -(-length // world)
        return range(min(rank * size, length), min((rank + 1) * size, length))


Split = Layout | PackedLayout | Chunks


# Of one problem at a time there are a handful: a rank's tokens, how they move, and where they lie when all are gathered. They are
# kept on the device that reads them: the host would wait for each copy there.
_INDICES = Cache("index tensors of moves", most_bytes=24 << 20, most_entries=64)


def _index_bytes(value: Tensor | tuple[Tensor | tuple[int, ...], ...], *key: object) -> int:
    """Bytes of index tensors, of counts for each rank, and of the documents that they were made for."""
    parts = value if isinstance(value, tuple) else (value,)
    documents = sum(split.documents.nbytes for split in key if isinstance(split, PackedLayout))
    return 500 + documents + sum(part.nbytes if isinstance(part, Tensor) else 40 * len(part) for part in parts)


def _make_tokens(split: Split, length: int, world: int, rank: int) -> Tensor:
    """The tokens of a rank as a tensor; runs are written out by PyTorch, since a Python integer takes four times the memory."""
    if isinstance(split, Chunks):
        tokens = split.tokens(length, world, rank)
        return torch.arange(tokens.start, tokens.stop)
    runs = [(run.start, run.count, run.stride, run.block) for run in split.runs(length, world, rank)]
    starts, counts, strides, blocks = torch.tensor(runs, dtype=torch.int64).view(-1, 4).unbind(1)
    run_of = torch.repeat_interleave(torch.arange(len(runs)), counts)
    place = torch.arange(len(run_of)) - (counts.cumsum(0) - counts)[run_of]  # in its run
    block = blocks[run_of]
    return starts[run_of] + place // block * strides[run_of] + place % block


@kept_for_graphs
@_INDICES.keeps(_index_bytes)
def _tokens(split: Split, length: int, world: int, rank: int, device: torch.device) -> Tensor:
    # What is kept must serve any later call. Made under `inference_mode` or while a compiler traces, it would be an inference
    # tensor or a fake one.
    with lasting():
        return _make_tokens(split, length, world, rank).to(device)


def _make_orders(split: Split, length: int, world: int) -> tuple[Tensor, tuple[int, ...]]:
    every = [_make_tokens(split, length, world, rank) for rank in range(world)]
    return torch.cat(every), tuple(len(tokens) for tokens in every)


@kept_for_graphs
@_INDICES.keeps(_index_bytes)
def _orders(split: Split, length: int, world: int, device: torch.device) -> tuple[Tensor, tuple[int, ...]]:
    """List all ranks' tokens, one rank after another, and count those of each rank."""
    with lasting():
        order, counts = _make_orders(split, length, world)
        return order.to(device), counts


@kept_for_graphs
@_INDICES.keeps(_index_bytes)
def _places(split: Split, length: int, world: int, device: torch.device) -> tuple[Tensor, tuple[int, ...]]:
    """Where each token stands in the order of `_orders`, and how many tokens each rank has."""
    with lasting():
        order, counts = _make_orders(split, length, world)
        return torch.argsort(order).to(device), counts


@kept_for_graphs
@_INDICES.keeps(_index_bytes)
def _padded_places(split: Split, length: int, world: int, device: torch.device) -> Tensor:
    """Where each token lies in shards padded to the largest and stacked: token t at rank * largest + place on the rank."""
    with lasting():
        order, counts = _make_orders(split, length, world)
        largest = max(counts)
        places = torch.empty(length, dtype=torch.int64)
        places[order] = torch.cat([rank * largest + torch.arange(count) for rank, count in enumerate(counts)])
        return places.to(device)


def local_size(split: Split, length: int, world: int, rank: int) -> int:
    """Count the tokens that a rank holds."""
    return len(split.tokens(length, world, rank)) if isinstance(split, Chunks) else split.local_length(length, world, rank)


def take_shard(x: Tensor, dim: int, split: Split, world: int, rank: int) -> Tensor:
    """Copy a rank's share out of a whole tensor. Nothing is sent."""
    return x.index_select(dim, _tokens(split, x.shape[dim], world, rank, x.device))


def _take_shards(x: Tensor, dim: int, split: Split, world: int) -> list[Tensor]:
    """Cut a whole tensor into every rank's share; the shares are copies."""
    order, counts = _orders(split, x.shape[dim], world, x.device)
    return [x.index_select(dim, tokens) for tokens in order.split(counts)]


def gather_shards(x: Tensor, dim: int, split: Split, length: int, transport: Transport) -> Tensor:
    """The whole tensor from every rank's share. Each rank sends its share, padded to the largest, to every other rank."""
    # All-gather needs shares of one size, and ranks may hold one token more or less: shares are padded, and the padding is left out
    # when tokens are put in order.
    first = x.movedim(dim, 0)
    largest = -(-length // transport.world)
    if first.shape[0] < largest:
        first = torch.cat([first, first.new_zeros((largest - first.shape[0], *first.shape[1:]))])
    stacked = transport.all_gather(first).wait().flatten(0, 1)
    return stacked.index_select(0, _padded_places(split, length, transport.world, x.device)).movedim(0, dim).contiguous()


def reduce_shards(x: Tensor, dim: int, split: Split, op: str, transport: Transport) -> Tensor:
    """This rank's share of the sum over ranks ("avg": the mean). Each rank sends every other rank its share, padded."""
    world = transport.world
    # A transport's reduce-scatter adds up; what is no sum is reduced whole, and cut.
    if op not in ("sum", "avg"):
        return take_shard(transport.all_reduce(x, op), dim, split, world, transport.rank)
    # The split dim goes first, so that a rank's share is one stretch of memory, as a reduce-scatter takes it.
    length, first = x.shape[dim], x.movedim(dim, 0)
    counts = [local_size(split, length, world, rank) for rank in range(world)]
    largest = max(counts)
    stacked = first.new_zeros((world * largest, *first.shape[1:]))
    stacked[_padded_places(split, length, world, x.device)] = first
    mine = transport.reduce_scatter(stacked.unflatten(0, (world, largest))).wait()[: counts[transport.rank]]
    return (mine / world if op == "avg" else mine).movedim(0, dim).contiguous()


@kept_for_graphs
@_INDICES.keeps(_index_bytes)
def _moves(
    old: Split, new: Split, length: int, world: int, rank: int, device: torch.device
) -> tuple[Tensor, tuple[int, ...], Tensor, tuple[int, ...]]:
    """Local tokens by target rank, how many go to each; where each arriving token belongs, how many come from each."""
    with lasting():
        leaving_order, sent, arrival, received = _make_moves(old, new, length, world, rank)
        return leaving_order.to(device), sent, arrival.to(device), received


def _make_moves(
    old: Split, new: Split, length: int, world: int, rank: int
) -> tuple[Tensor, tuple[int, ...], Tensor, tuple[int, ...]]:
    def homes(split: Split) -> tuple[Tensor, Tensor, Tensor]:
        """Each token's rank and its place on the rank, and this rank's tokens."""
        order, counts = _make_orders(split, length, world)
        owner, place = torch.empty(length, dtype=torch.int64), torch.empty(length, dtype=torch.int64)
        owner[order] = torch.repeat_interleave(torch.arange(world), torch.tensor(counts))
        place[order] = torch.cat([torch.arange(count) for count in counts])
        return owner, place, order.split(counts)[rank]

    # Sender and receiver never exchange indices: each works both sides out from the layouts, so tokens travel in an order that both
    # know, the sender's storage order.
    (old_owner, old_place, mine), (new_owner, _, wanted) = homes(old), homes(new)
    targets, sources = new_owner[mine], old_owner[wanted]
    arrival = torch.argsort(sources * max(length, 1) + old_place[wanted])  # by source, then in the source's storage order
    sent = tuple(torch.bincount(targets, minlength=world).tolist())
    received = tuple(torch.bincount(sources, minlength=world).tolist())
    return torch.argsort(targets, stable=True), sent, arrival, received


def reshard(x: Tensor, dim: int, old: Split, new: Split, length: int, transport: Transport) -> Tensor:
    """From one split of a dim to another. Each rank sends exactly the tokens that change rank."""
    leaving_order, sent, arrival, received = _moves(old, new, length, transport.world, transport.rank, x.device)
    first = x.movedim(dim, 0)
    # One copy puts what leaves in the order of its targets; each target's part is then contiguous without a copy of its own.
    leaving = first.index_select(0, leaving_order).split(sent)
    arriving = list(transport.empty((sum(received), *first.shape[1:]), x).split(received))
    _swap(list(leaving), arriving, transport)
    out = torch.empty((sum(received), *first.shape[1:]), dtype=x.dtype, device=x.device)
    out[arrival] = torch.cat(arriving)
    return out.movedim(0, dim).contiguous()


def exchange_dims(x: Tensor, gathered: tuple[int, Split, int], scattered: tuple[int, Split, int], transport: Transport) -> Tensor:
    """Gather one dim while another is scattered, each given as (dim, split, length): sequence to heads and back.

    Each rank sends exactly the blocks that change rank.
    """
    gather_dim, gather_split, gather_length = gathered
    scatter_dim, scatter_split, scatter_length = scattered
    world, rank = transport.world, transport.rank
    assert x.shape[scatter_dim] == scatter_length, "the scattered dim is whole before the exchange"
    leaving = _take_shards(x, scatter_dim, scatter_split, world)
    shape = list(leaving[rank].shape)
    places, counts = _places(gather_split, gather_length, world, x.device)
    arriving = [transport.empty((*shape[:gather_dim], count, *shape[gather_dim + 1 :]), x) for count in counts]
    _swap(leaving, arriving, transport)
    # Blocks come in the order of ranks, tokens in that of each rank's storage: the order in which `places` counts.
    stacked = torch.cat(arriving, gather_dim)
    return stacked.index_select(gather_dim, places)


def scatter_shards(x: Tensor, dim: int, split: Split, source: int, transport: Transport) -> Tensor:
    """Each rank's share of the whole tensor that rank `source` holds. The source sends every other rank its share."""
    world, rank = transport.world, transport.rank
    if rank == source:
        shards = _take_shards(x, dim, split, world)
        # Point to point and not by a collective: shares differ in size, and only these bytes travel.
        transport.exchange([Message(r, shard) for r, shard in enumerate(shards) if r != rank], []).wait()
        return shards[rank]
    shape = *x.shape[:dim], local_size(split, x.shape[dim], world, rank), *x.shape[dim + 1 :]
    received = transport.empty(shape, x)
    transport.exchange([], [Message(source, received)]).wait()
    return received


def broadcast(x: Tensor, source: int, transport: Transport) -> Tensor:
    """The tensor of rank `source` on every rank. The source sends it to every other rank."""
    if transport.rank == source:
        whole = x.contiguous()
        transport.exchange([Message(r, whole) for r in range(transport.world) if r != source], []).wait()
        return x
    received = transport.empty(x.shape, x)
    transport.exchange([], [Message(source, received)]).wait()
    return received


def _swap(leaving: Sequence[Tensor], arriving: list[Tensor], transport: Transport) -> None:
    """Send block r to rank r and receive rank r's block for this rank; the own block stays."""
    others = [r for r in range(transport.world) if r != transport.rank]
    sends = [Message(r, leaving[r].contiguous()) for r in others]
    receives = [Message(r, arriving[r]) for r in others]
    transport.exchange(sends, receives).wait()
    arriving[transport.rank] = leaving[transport.rank]
