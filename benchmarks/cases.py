"""What is measured: shapes, masks, packings, worlds and links, by name."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from benchmarks.links import Link

# Cumulative bounds of ring-flash-attn's own varlen benchmark, for one rank; a case has each times the number of ranks.
LISTS = ((0, 8192), (0, 256, 7648, 8192), (0, 4096, 8192), (0, 3104, 6304, 7904, 8064, 8192))

NVLINK = Link()


@dataclass(frozen=True, slots=True)
class Case:
    """One attention of one model layer over `world` ranks.

    Attributes:
        name: what the table calls it.
        layout: a `Layout`'s text.
        mask: "causal", "full", or "window:BACK,AHEAD".
        world: ranks.
        tokens: a rank.
        link: how ranks exchange.
        lengths: of packed documents; empty for one sequence.
        strategy: "ring", "gather" or "ulysses"; None is the library's choice, as is None for `stages`.
        stages: transfers of "ring".
        heads: of queries.
        kv_heads: of keys and values.
        head_dim: of all.
        kernel: that computes; None is the library's choice.
        target: what `benchmarks.targets` calls what is to be reached; empty for nothing.
        strict: whether the ideal is the kernel on the whole sequence over the number of ranks; otherwise it is the number of ranks
            times the kernel on one rank's tokens, as for causal attention of one sequence.
    """

    name: str
    layout: str = "zigzag"
    mask: str = "causal"
    world: int = 8
    tokens: int = 8192
    link: Link = NVLINK
    lengths: tuple[int, ...] = ()
    strategy: str | None = None
    stages: int | None = None
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    kernel: str | None = None
    target: str = ""
    strict: bool = False

    @property
    def length(self) -> int:
        """Tokens of all ranks."""
        return self.world * self.tokens


def ideal_of(case: Case) -> tuple[Case, float]:
    """What one rank's kernel would compute alone, and how often that time goes into the ideal time of the case."""
    if case.strict:
        return replace(case, layout="zigzag", world=1, tokens=case.length), 1 / case.world
    return replace(case, layout="zigzag", world=1, lengths=()), float(case.world)


def long_tail(seed: int, tokens: int, median: float = 7.2, spread: float = 1.3) -> tuple[int, ...]:
    """Lengths of documents that add up to `tokens`: log-normal, most around exp(median), a few very long."""
    drawn, left = random.Random(seed), tokens
    lengths: list[int] = []
    while left:
        lengths.append(min(int(drawn.lognormvariate(median, spread)) + 8, left))
        left -= lengths[-1]
    return tuple(lengths)


def lists(world: int, tokens: int = 8192, **fields: object) -> Iterator[Case]:
    """The four packings of ring-flash-attn's benchmark, whose ranks hold 8192 tokens, or smaller ones of the same proportions."""
    for number, bounds in enumerate(LISTS, 1):
        lengths = tuple(b - a for a, b in pairwise(bound * world * tokens // bounds[-1] for bound in bounds))
        yield replace(Case(f"list {number}", world=world, tokens=tokens, lengths=lengths, strict=True), **fields)


def tails(world: int, seeds: Iterable[int], tokens: int = 8192, **fields: object) -> Iterator[Case]:
    """Long-tailed packings."""
    for seed in seeds:
        case = Case(f"long tail {seed}", world=world, tokens=tokens, lengths=long_tail(seed, world * tokens), strict=True)
        yield replace(case, **fields)


def batch(world: int, **fields: object) -> Case:
    """One causal sequence."""
    return replace(Case("causal", world=world), **fields)


def full(world: int, **fields: object) -> Case:
    """One sequence, every token sees all."""
    return replace(Case("not causal", mask="full", world=world), **fields)


def window(world: int, back: int = 4095, tokens: int = 32768, **fields: object) -> Case:
    """One sequence, every token sees itself and `back` before it."""
    return replace(Case(f"window {back + 1}", mask=f"window:{back},0", world=world, tokens=tokens, strict=True), **fields)
