"""Adding up what blocks contribute to attention outputs, weighted by their lse.

    out, lse of keys 0..3      out, lse of keys 4..7      together
    o1, l1                     o2, l2                     l = log(e^l1 + e^l2),  o = (e^l1 * o1 + e^l2 * o2) / e^l

Arithmetic is in float32 (float64 for float64). The first block's out is the running value, and later blocks are merged into it in
place, where they have queries: nothing is filled, converted or copied. What rounding to 16 bits drops of the running value stands
in a second tensor of 16 bits, `rest`, until the last merge, so that out is rounded once however many blocks there are:

    value 0.70710678      out (bfloat16) 0.70703125      rest (bfloat16) 0.0000755      out + rest is right to 2^-17 of the value

A query without keys has out 0 and lse -inf, and two such results merge to that again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dtensor_ring.ops.dtypes import accumulate_dtype
from dtensor_ring.ops.executors.parts import MOST_OUTPUTS, OutputPart, Rests, is_fused

_NO_RESTS = Rests()


def merge_(
    out_BSHD: Tensor, lse_BHS: Tensor, parts: Sequence[OutputPart], rests: Rests = _NO_RESTS, sinks_H: Tensor | None = None
) -> Tensor | None:
    """Merge blocks, and sinks if given, into `out_BSHD` and `lse_BHS` in place.

    Args:
        out_BSHD: contiguous, the running out.
        lse_BHS: float32, or float64 with a float64 out; the queries of a head lie together.
        parts: up to `MOST_OUTPUTS` blocks.
        rests: what rounding dropped of `out_BSHD`, and whether what it drops now is needed.
        sinks_H: a score of each head that every query also sees, with no value.

    Returns:
        What rounding drops of the new values, where it is needed: in place in `rests.kept` if that is given.
    """
    assert len(parts) <= MOST_OUTPUTS, "a merge takes in as many blocks as its kernel has arguments for"
    if is_fused(out_BSHD):
        from dtensor_ring.ops.executors._merge_cuda import fused_merge_

        return fused_merge_(out_BSHD, lse_BHS, parts, rests, sinks_H)
    # With a new rest, and with sinks, no query stays as it was.
    every = sinks_H is not None or (rests.needed and rests.kept is None)
    low = 0 if every or not parts else min(part.start for part in parts)
    high = out_BSHD.shape[1] if every else max((part.stop for part in parts), default=0)
    out, lse, kept = out_BSHD[:, low:high], lse_BHS[:, :, low:high], None if rests.kept is None else rests.kept[:, low:high]
    wide = out.to(accumulate_dtype(out.dtype))
    if kept is not None:
        wide = wide + kept
    for part in parts:
        queries = slice(part.start - low, part.stop - low)
        _merge(wide[:, queries], lse[:, :, queries], part.out, part.lse)
    if sinks_H is not None:
        _merge(wide, lse, None, sinks_H.to(lse.dtype)[:, None])
    if wide is not out:
        out.copy_(wide)
    if not rests.needed:
        return None
    dropped = wide.sub_(out).to(out.dtype)
    if kept is None:
        return dropped
    kept.copy_(dropped)
    return rests.kept


def _merge(wide: Tensor, lse: Tensor, block: Tensor | None, block_lse: Tensor) -> None:
    """Merge a block of the same queries, whose out is 0 where `block` is None, in place."""
    # The sigmoid of a difference cannot overflow, as the exponentials of the two lse would. The difference of two -inf is NaN: that
    # query has keys in neither, and with weight 0 its out stays 0. Any other NaN is one of the input, and stays to be seen.
    # `logaddexp` keeps -inf by itself.
    weight = torch.sigmoid(block_lse - lse).masked_fill_(block_lse == -math.inf, 0.0).transpose(1, 2)[..., None].to(wide.dtype)
    wide.lerp_(torch.zeros_like(wide) if block is None else block.to(wide.dtype), weight)
    lse.copy_(torch.logaddexp(lse, block_lse))


class OutputSum:
    """The running out (B, S, H, Dv) and lse (B, H, S) of one rank's queries.

    Args:
        q_BSHD: the queries, for shape, device and dtype.
        v_head_dim: last dim of out.
        parts: the most contributions any query gets.
        blocks: how many blocks will be added.
        sinks_H: a score of each head that every query also sees, with no value; taken in once, at the end.
    """

    def __init__(self, q_BSHD: Tensor, v_head_dim: int, parts: int, blocks: int, sinks_H: Tensor | None = None) -> None:
        self._q = q_BSHD
        self._v_head_dim = v_head_dim
        self._sinks = sinks_H
        self._coming = blocks
        # One merge is computed in float32 and rounded once, as one kernel would. A second merge of a query would start from a
        # rounded value and round it again: then what rounding drops is kept until the last.
        self._rounds_twice = parts + (sinks_H is not None) > 2
        self._waiting: list[OutputPart] = []
        self._out: Tensor | None = None
        self._lse: Tensor | None = None
        self._rest: Tensor | None = None

    def add(self, part: OutputPart, *, more: bool = False) -> None:
        """Take in what one block gives; `more` says that the next block is there soon, and both may be merged at once.

        The sum may take the block's tensors over and change them.
        """
        self._coming -= 1
        if self._out is None or self._lse is None:
            # A first block of all queries becomes the running value itself, which saves a fill and a merge: a kernel's results are
            # new tensors that nobody else holds.
            if part.out.shape[1] == self._q.shape[1]:
                self._out, self._lse = part.out.contiguous(), part.lse
                return
            self._start(part.out.dtype)
        self._waiting.append(part)
        # The last merge is that of `result`, which drops the rest and takes in the sinks.
        if self._coming and (not more or len(self._waiting) == MOST_OUTPUTS):
            self._merge(needed=self._rounds_twice)

    def _start(self, dtype: torch.dtype) -> None:
        batch, length, heads, _ = self._q.shape
        # Out 0 and lse -inf are what merging leaves unchanged, so queries that no block reaches keep them as their result.
        self._out = torch.zeros((batch, length, heads, self._v_head_dim), dtype=dtype, device=self._q.device)
        work = accumulate_dtype(self._q.dtype)
        self._lse = torch.full((batch, heads, length), -math.inf, dtype=work, device=self._q.device)

    def _merge(self, *, needed: bool, sinks: Tensor | None = None) -> None:
        assert self._out is not None and self._lse is not None, "blocks wait only beside a running value"
        rests = Rests(self._rest, needed and self._out.dtype.itemsize == 2)
        self._rest = merge_(self._out, self._lse, self._waiting, rests, sinks)
        self._waiting.clear()

    def result(self) -> tuple[Tensor, Tensor]:
        """Out in the dtype of q and lse in float32 (float64 for float64), both contiguous."""
        if self._out is None or self._lse is None:
            self._start(self._q.dtype)
        # Sinks come after all blocks: in the lse of every block they would be counted once for each of them.
        if self._waiting or self._sinks is not None:
            self._merge(needed=False, sinks=self._sinks)
        assert self._out is not None and self._lse is not None, "started above"
        return self._out.to(self._q.dtype), self._lse.contiguous()


def sink_gradient(dout_BSHD: Tensor, out_BSHD: Tensor, lse_BHS: Tensor, sinks_H: Tensor) -> Tensor:
    """This rank's part of the gradient of the sinks: -sum of exp(sink - lse) * (dout . out) over its queries."""
    # As for a key whose value is 0: its score gets p * (dout . 0 - delta), where p = exp(sink - lse) and lse includes the sink.
    delta_BHS = (dout_BSHD.to(lse_BHS.dtype) * out_BSHD.to(lse_BHS.dtype)).sum(-1).transpose(1, 2)
    weight = torch.exp(sinks_H.to(lse_BHS.dtype)[:, None] - lse_BHS.nan_to_num(neginf=0.0))
    return -(weight * delta_BHS).sum((0, 2)).to(sinks_H.dtype)
