"""Moving one tensor along one mesh axis: the plain-tensor steps that redistribution is made of.

per rank    x holds this rank's share of dim `dim`; `length` is the dim's length over the axis
gather      all shards to every rank          each rank sends its shard, padded to the largest, to all others
reshard     one layout to another             each rank sends exactly the tokens that change rank
exchange    shard of dim a to shard of dim b  each rank sends exactly the blocks that change rank
reduce      partial sums to shards            as a reduce-scatter of shards padded to the largest
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dtensor_ring._torch import lasting
from dtensor_ring.comm import Message, Transport
from dtensor_ring.layout import Layout, PackedLayout


class Chunks(NamedTuple):
    """How `torch.chunk` splits a dim, PyTorch's `Shard`: 5 tokens over 4 ranks are 2, 2, 1 and 0."""

    def tokens(self, length: int, world: int, rank: int) -> range:
        """The tokens of a rank."""
        size = -(-length // world)
        return range(min(rank * size, length), min((rank + 1) * size, length))


Split = Layout | PackedLayout | Chunks


@lru_cache(maxsize=256)
def _tokens(split: Split, length: int, world: int, rank: int) -> Tensor:
    with lasting():
        return torch.tensor(list(split.tokens(length, world, rank)), dtype=torch.int64)


@lru_cache(maxsize=256)
def _orders(split: Split, length: int, world: int) -> tuple[Tensor, tuple[int, ...]]:
    """All ranks' tokens one after another, and how many each rank holds."""
    every = [_tokens(split, length, world, rank) for rank in range(world)]
    with lasting():
        return torch.cat(every), tuple(len(tokens) for tokens in every)


@lru_cache(maxsize=256)
def _padded_places(split: Split, length: int, world: int) -> Tensor:
    """Where each token lies in shards padded to the largest and stacked: token t at rank * largest + place on the rank."""
    order, counts = _orders(split, length, world)
    largest = max(counts)
    with lasting():
        stacked = torch.cat([rank * largest + torch.arange(count) for rank, count in enumerate(counts)])
        return stacked[torch.argsort(order)]


def local_size(split: Split, length: int, world: int, rank: int) -> int:
    """How many tokens a rank holds."""
    return len(split.tokens(length, world, rank)) if isinstance(split, Chunks) else split.local_length(length, world, rank)


def take_shard(x: Tensor, dim: int, split: Split, world: int, rank: int) -> Tensor:
    """A rank's share of a whole tensor, a copy. Sends nothing."""
    return x.index_select(dim, _tokens(split, x.shape[dim], world, rank).to(x.device))


def gather_shards(x: Tensor, dim: int, split: Split, length: int, wire: Transport) -> Tensor:
    """The whole tensor from every rank's share. Each rank sends its share, padded to the largest, to every other rank."""
    first = x.movedim(dim, 0)
    largest = -(-length // wire.world)
    if first.shape[0] < largest:
        first = torch.cat([first, first.new_zeros((largest - first.shape[0], *first.shape[1:]))])
    stacked = wire.all_gather(first).wait().flatten(0, 1)
    return stacked.index_select(0, _padded_places(split, length, wire.world).to(x.device)).movedim(0, dim).contiguous()


def reduce_shards(x: Tensor, dim: int, split: Split, op: str, wire: Transport) -> Tensor:
    """This rank's share of the sum over ranks ("avg": the mean). Each rank sends every other rank its share, padded."""
    world = wire.world
    if op not in ("sum", "avg"):
        return take_shard(wire.all_reduce(x, op), dim, split, world, wire.rank)
    length, first = x.shape[dim], x.movedim(dim, 0)
    counts = _orders(split, length, world)[1]
    largest = max(counts)
    stacked = first.new_zeros((world * largest, *first.shape[1:]))
    stacked[_padded_places(split, length, world).to(x.device)] = first
    mine = wire.reduce_scatter(stacked.unflatten(0, (world, largest))).wait()[: counts[wire.rank]]
    return (mine / world if op == "avg" else mine).movedim(0, dim).contiguous()


@lru_cache(maxsize=256)
def _reshard_rows(
    old: Split, new: Split, length: int, world: int, rank: int
) -> tuple[Tensor, tuple[int, ...], Tensor, tuple[int, ...]]:
    """Local rows by target rank, how many go to each; where each arriving token belongs, how many come from each."""
    with lasting():
        return _make_reshard_rows(old, new, length, world, rank)


def _make_reshard_rows(
    old: Split, new: Split, length: int, world: int, rank: int
) -> tuple[Tensor, tuple[int, ...], Tensor, tuple[int, ...]]:
    def owners(split: Split) -> Tensor:
        order, counts = _orders(split, length, world)
        owner = torch.empty(length, dtype=torch.int64)
        owner[order] = torch.repeat_interleave(torch.arange(world), torch.tensor(counts))
        return owner

    mine, wanted = _tokens(old, length, world, rank), _tokens(new, length, world, rank)
    targets, sources = owners(new)[mine], owners(old)[wanted]
    place = torch.empty(length, dtype=torch.int64)
    for r in range(world):
        tokens = _tokens(old, length, world, r)
        place[tokens] = torch.arange(len(tokens))
    arrival = torch.argsort(sources * max(length, 1) + place[wanted])  # by source, then in the source's storage order
    sent = tuple(torch.bincount(targets, minlength=world).tolist())
    received = tuple(torch.bincount(sources, minlength=world).tolist())
    return torch.argsort(targets, stable=True), sent, arrival, received


def reshard(x: Tensor, dim: int, old: Split, new: Split, length: int, wire: Transport) -> Tensor:
    """From one split of a dim to another. Each rank sends exactly the tokens that change rank."""
    rows, sent, arrival, received = _reshard_rows(old, new, length, wire.world, wire.rank)
    first = x.movedim(dim, 0)
    leaving = first.index_select(0, rows.to(x.device)).split(sent)
    arriving = list(wire.empty((sum(received), *first.shape[1:]), x).split(received))
    _swap(list(leaving), arriving, wire)
    out = torch.empty((sum(received), *first.shape[1:]), dtype=x.dtype, device=x.device)
    out[arrival.to(x.device)] = torch.cat(arriving)
    return out.movedim(0, dim).contiguous()


def exchange_dims(x: Tensor, gathered: tuple[int, Split, int], scattered: tuple[int, Split, int], wire: Transport) -> Tensor:
    """Gather one dim while another is scattered, each given as (dim, split, length): sequence to heads and back.

    Each rank sends exactly the blocks that change rank.
    """
    gather_dim, gather_split, gather_length = gathered
    scatter_dim, scatter_split, scatter_length = scattered
    world, rank = wire.world, wire.rank
    assert x.shape[scatter_dim] == scatter_length, "the scattered dim is whole before the exchange"
    leaving = [take_shard(x, scatter_dim, scatter_split, world, r).contiguous() for r in range(world)]
    shape = list(leaving[rank].shape)
    order, counts = _orders(gather_split, gather_length, world)
    arriving = [wire.empty((*shape[:gather_dim], count, *shape[gather_dim + 1 :]), x) for count in counts]
    _swap(leaving, arriving, wire)
    stacked = torch.cat(arriving, gather_dim)
    return stacked.index_select(gather_dim, torch.argsort(order).to(x.device))


def scatter_shards(x: Tensor, dim: int, split: Split, source: int, wire: Transport) -> Tensor:
    """Each rank's share of the whole tensor that rank `source` holds. The source sends every other rank its share."""
    world, rank = wire.world, wire.rank
    mine = take_shard(x, dim, split, world, rank).contiguous()
    if rank == source:
        others = [r for r in range(world) if r != rank]
        wire.exchange([Message(r, take_shard(x, dim, split, world, r).contiguous()) for r in others], []).wait()
        return mine
    received = wire.empty(mine.shape, mine)
    wire.exchange([], [Message(source, received)]).wait()
    return received


def broadcast(x: Tensor, source: int, wire: Transport) -> Tensor:
    """The tensor of rank `source` on every rank. The source sends it to every other rank."""
    if wire.rank == source:
        whole = x.contiguous()
        wire.exchange([Message(r, whole) for r in range(wire.world) if r != source], []).wait()
        return x
    received = wire.empty(x.shape, x)
    wire.exchange([], [Message(source, received)]).wait()
    return received


def _swap(leaving: Sequence[Tensor], arriving: list[Tensor], wire: Transport) -> None:
    """Send block r to rank r and receive rank r's block for this rank; the own block stays."""
    others = [r for r in range(wire.world) if r != wire.rank]
    sends = [Message(r, leaving[r].contiguous()) for r in others]
    receives = [Message(r, arriving[r]) for r in others]
    wire.exchange(sends, receives).wait()
    arriving[wire.rank] = leaving[wire.rank]
