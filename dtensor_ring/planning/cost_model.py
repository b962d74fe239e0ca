"""How fast a machine is: what kernels, merges, copies and links take. Numbers only; `predict` makes times of plans with them.

    kernel call     call + heads * (rows * row + edges * edge + columns * column + blocks * block)      nanoseconds
    300 tokens of one causal segment            rows 3    edges 3    columns 3    blocks 6      in units of 128 tokens
    merge, copy     bytes / rate
    transfer        latency + bytes / rate, inside a host and between hosts at once

Kernels compute blocks of 128 queries and 128 keys, a block with one needed score whole. A row of blocks has costs of its own (its
queries are loaded, its results written), and one that the edge of a mask crosses some more: so short segments and masks cost more
than their scores. So has a column: where heads share keys, backward writes gradients of keys for every query head and adds them up.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

BLOCK = 128  # queries and keys of a block


class Work(NamedTuple):
    """What one head of a kernel call computes.

    Attributes:
        rows: rows of blocks, of 128 queries each.
        edges: rows that the edge of a mask crosses.
        columns: columns of blocks, of 128 keys each.
        blocks: blocks of 128 x 128 scores, one with a single needed score counted whole.
        longest: blocks of the longest row, which one multiprocessor computes alone.
    """

    rows: int = 0
    edges: int = 0
    columns: int = 0
    blocks: int = 0
    longest: int = 0

    @classmethod
    def of_segment(cls, queries: int, keys: int, window: tuple[int, int] = (-1, -1)) -> Work:
        """That of `queries` against `keys` under a bottom-right window (left, right), -1 for an unbounded side."""
        left, right = window
        rows, columns = -(-queries // BLOCK), -(-keys // BLOCK)
        if left < 0 and right < 0:
            return cls(rows, 0, columns, rows * columns, columns)
        lengths = []
        for first in range(0, queries, BLOCK):
            last = min(first + BLOCK, queries) - 1
            low = 0 if left < 0 else max(0, first + keys - queries - left)
            high = keys - 1 if right < 0 else min(keys - 1, last + keys - queries + right)
            lengths.append(max(0, high // BLOCK - low // BLOCK + 1))
        return cls(rows, rows, columns, sum(lengths), max(lengths, default=0))

    def plus(self, other: Work) -> Work:
        """Both in one call."""
        return Work(
            self.rows + other.rows,
            self.edges + other.edges,
            self.columns + other.columns,
            self.blocks + other.blocks,
            max(self.longest, other.longest),
        )


@dataclass(frozen=True, slots=True)
class Speed:
    """A kernel in one direction, in nanoseconds; those of rows, edges, columns and blocks are of one head on the whole GPU.

    Attributes:
        call: of a call, whatever it computes.
        row: of a row of blocks.
        edge: more, where a mask's edge crosses the row.
        column: of a column of blocks.
        block: of a block, with head dim 128.
        narrow: how long the same takes with head dim 64, in parts of what it takes with 128.
        wide: the same of head dim 256.
    """

    call: float
    row: float
    edge: float
    column: float
    block: float
    narrow: float = 0.6
    wide: float = 2.2

    def nanoseconds(self, work: Work, heads: int, head_dim: float, multiprocessors: int) -> float:
        """The time of a call on `heads` query heads of all batch rows together; `head_dim` is the mean of keys' and values'."""
        if not work.blocks or not heads:
            return 0.0
        # With few rows the longest one ends last, while other multiprocessors have nothing left to do.
        longest = multiprocessors * (self.row + (self.edge if work.edges else 0.0) + work.longest * self.block)
        rows = work.rows * self.row + work.edges * self.edge
        spread = heads * (rows + work.columns * self.column + work.blocks * self.block)
        return self.call + self._of_dim(head_dim) * max(spread, longest)

    def _of_dim(self, head_dim: float) -> float:
        """Head dims between those measured are interpolated; below 64 a kernel pads, and saves little."""
        if head_dim <= 128:
            return self.narrow + (1 - self.narrow) * max(head_dim - 64, 0) / 64
        return 1 + (self.wide - 1) * (head_dim - 128) / 128


@dataclass(frozen=True, slots=True)
class KernelSpeed:
    """A kernel in both directions."""

    forward: Speed
    backward: Speed


@dataclass(frozen=True, slots=True)
class Link:
    """How the ranks of a group exchange; equal on all of them.

    Attributes:
        near: bytes a second that a rank sends and receives, each way, among the ranks of its host.
        far: the same between hosts.
        latency: seconds of a transfer beside its bytes.
        host: ranks of the group on each host, which follow one another; 0 is all of them.
        device: the GPU of every rank, as `KNOWN` of `devices` names it; "" for one that is not known, or for several kinds.
    """

    near: float
    far: float
    latency: float
    host: int = 0
    device: str = ""

    def __str__(self) -> str:
        """`200 GB/s, 20 us`, or with several hosts `200 GB/s among 8 ranks of a host, 45 GB/s between hosts, 20 us`."""
        speed = f"{self.near / 1e9:g} GB/s"
        if self.host:
            speed += f" among {self.host} ranks of a host, {self.far / 1e9:g} GB/s between hosts"
        return f"{speed}, {self.latency * 1e6:g} us"

    def seconds(self, near: float, far: float = 0.0) -> float:
        """Time of a transfer of bytes inside the host and between hosts; both kinds of link work at once."""
        if not near and not far:
            return 0.0
        return self.latency + max(near / self.near, far / self.far)


@dataclass(frozen=True, slots=True)
class CostModel:
    """The figures of one kind of machine: what stages are chosen by, and `explain` predicts milliseconds from.

        python -m dtensor_ring calibrate --out mine.json          measured on this machine
        model = dtensor_ring.CostModel.load("mine.json")          the same on every rank
        ring_attention(q, k, v, cost_model=model)

    Attributes:
        device: the GPU.
        source: where the figures come from.
        kernels: by name, in the order of names, how fast each kernel is.
        multiprocessors: of the GPU.
        merge: bytes a second that merging reads and writes.
        copy: bytes a second that copies and sums read and write.
        step: nanoseconds of a step on the GPU beside its calls and bytes: kernels that start one after the other.
        host_forward: nanoseconds of host time of a step, forward.
        host_backward: the same, backward.
        link: the link, in place of what the transport says of it; None keeps that.
        text: all of it in one text without spaces: what operators take, and `of_text` reads.
    """

    device: str
    source: str
    kernels: tuple[tuple[str, KernelSpeed], ...]
    multiprocessors: int
    merge: float
    copy: float
    step: float
    host_forward: float
    host_backward: float
    link: Link | None = None
    text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        facts = {name: value for name, value in _as_json(self).items() if name != "text"}
        # Spaces stand only inside names, since the separators have none: escaped, the text is one word of a call's text.
        object.__setattr__(self, "text", json.dumps(facts, separators=(",", ":")).replace(" ", "\\u0020"))

    @property
    def digest(self) -> str:
        """Twelve letters that differ for models that differ: ranks compare them."""
        return hashlib.blake2b(self.text.encode(), digest_size=6).hexdigest()

    def kernel(self, name: str) -> KernelSpeed:
        """A kernel's speed; one that was not measured is taken for the slowest of those that were."""
        known = dict(self.kernels)
        return known[name] if name in known else max(known.values(), key=lambda speed: speed.forward.block)

    def over(self, link: Link | None) -> Link | None:
        """The link that counts: the model's own, with the hosts of the transport's; or else the transport's."""
        if self.link is None or link is None:
            return self.link or link
        return replace(self.link, host=link.host, device=link.device)

    def save(self, path: str | Path) -> None:
        """Write the model as JSON."""
        Path(path).write_text(json.dumps(json.loads(self.text), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> CostModel:
        """Read a model that `save` or `python -m dtensor_ring calibrate` wrote.

        Raises:
            ValueError: the file is none, or has figures that are missing, unknown, or no numbers from 0 up.
            OSError: the file cannot be read.
        """
        try:
            return _of_json(json.loads(Path(path).read_text()))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path} holds no cost model: {type(error).__name__}: {error}. "
                "python -m dtensor_ring calibrate --out FILE writes one"
            ) from error

    @classmethod
    def of_text(cls, text: str) -> CostModel:
        """The model of a text."""
        return _of_json(json.loads(text))


def _as_json(model: CostModel) -> dict[str, object]:
    names = [name for name in CostModel.__dataclass_fields__ if name not in ("text", "kernels", "link")]
    facts: dict[str, object] = {name: getattr(model, name) for name in names}
    facts["kernels"] = {name: asdict(speed) for name, speed in model.kernels}
    facts["link"] = None if model.link is None else asdict(model.link)
    return facts


def _of_json(facts: dict[str, Any]) -> CostModel:
    kernels = tuple(
        (name, KernelSpeed(_numbers(Speed, speed["forward"]), _numbers(Speed, speed["backward"])))
        for name, speed in sorted(facts["kernels"].items())
    )
    if not kernels:
        raise ValueError("it names no kernel")
    link = None if facts["link"] is None else Link(**facts["link"])
    numbers = {name: facts[name] for name in facts.keys() - {"kernels", "link", "device", "source"}}
    model = CostModel(device=str(facts["device"]), source=str(facts["source"]), kernels=kernels, link=link, **numbers)
    rates = [model.multiprocessors, model.merge, model.copy, *((link.near, link.far) if link else ())]
    times = [model.step, model.host_forward, model.host_backward, *((link.latency, link.host) if link else ())]
    wrong = [rate for rate in rates if not (math.isfinite(rate) and rate > 0)]
    wrong += [time for time in times if not (math.isfinite(time) and time >= 0)]
    if wrong:
        raise ValueError(f"rates are numbers above 0, and times from 0 up, found {wrong} in {model}")
    return model


def _numbers(kind: type[Speed], facts: dict[str, float]) -> Speed:
    speed = kind(**facts)
    wrong = {name: value for name, value in asdict(speed).items() if not (math.isfinite(value) and value >= 0)}
    if wrong or not speed.block:
        raise ValueError(f"times are numbers from 0 up, and a block's is above 0, found {wrong or speed}")
    return speed


__all__ = ["BLOCK", "CostModel", "KernelSpeed", "Link", "Speed", "Work"]
