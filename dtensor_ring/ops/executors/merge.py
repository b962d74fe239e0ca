"""Adding up what blocks contribute: attention outputs weighted by their lse, gradients plainly.

    out, lse of keys 0..3      out, lse of keys 4..7      together
    o1, l1                     o2, l2                     l = log(e^l1 + e^l2),  o = o1 + sigmoid(l2 - l1) * (o2 - o1)

Arithmetic is in float32 (float64 for float64). Queries that get at most two contributions are rounded once, straight into the
output dtype; where more come the running value is kept in float32 to the end. A query without keys has out 0 and lse -inf, and
two such results merge to that again.
"""

from __future__ import annotations

import math
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from dtensor_ring.ops.dtypes import accumulate_dtype


def merge_(out_BSHD: Tensor, lse_BHS: Tensor, block_BSHD: Tensor, block_lse_BHS: Tensor) -> None:
    """Merge a block's out and lse into `out_BSHD` and `lse_BHS` in place; all four cover the same queries."""
    if out_BSHD.is_cuda and out_BSHD.dtype != torch.float64 and _has_triton():
        from dtensor_ring.ops.executors._merge_cuda import fused_merge_

        fused_merge_(out_BSHD, lse_BHS, block_BSHD, block_lse_BHS)
        return
    work = accumulate_dtype(out_BSHD.dtype)
    # The sigmoid of a difference cannot overflow, as the exponentials of the two lse would. The difference of two -inf is NaN: that
    # query has keys in neither, and with weight 0 its out stays 0. `logaddexp` keeps -inf by itself.
    weight_BHS = torch.sigmoid(block_lse_BHS - lse_BHS).nan_to_num_(0.0)
    weight = weight_BHS.transpose(1, 2)[..., None].to(work)
    out_BSHD.copy_(torch.lerp(out_BSHD.to(work), block_BSHD.to(work), weight))
    lse_BHS.copy_(torch.logaddexp(lse_BHS, block_lse_BHS))


# Asked in every merge, and each time the import system would search the whole path.
@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


class OutputSum:
    """The running out (B, S, H, Dv) and lse (B, H, S) of one rank's queries.

    Args:
        q_BSHD: the queries, for shape, device and dtype.
        v_head_dim: last dim of out.
        parts: the most contributions any query gets.
        sinks_H: a score of each head that every query also sees, with no value; taken in once, at the end.
    """

    def __init__(self, q_BSHD: Tensor, v_head_dim: int, parts: int, sinks_H: Tensor | None = None) -> None:
        self._q = q_BSHD
        self._v_head_dim = v_head_dim
        self._sinks = sinks_H
        # One merge is computed in float32 and rounded once, as one kernel would. A second merge, or the factor of a sink, would
        # start from a rounded value and round it again: then the running value stays in float32.
        self._keep_wide = parts > 2 or sinks_H is not None
        self._work = accumulate_dtype(q_BSHD.dtype)
        self._out: Tensor | None = None
        self._lse: Tensor | None = None

    def add(self, start: int, stop: int, block_BSHD: Tensor, block_lse_BHS: Tensor) -> None:
        """Take in the out and lse that one block gives queries [start, stop)."""
        if self._out is None or self._lse is None:
            # A first block of all queries becomes the running value itself, which saves a fill and a merge. Later merges change it
            # in place: a kernel's results are new tensors that nobody else holds.
            if (start, stop) == (0, self._q.shape[1]):
                self._out = block_BSHD.to(self._work) if self._keep_wide else block_BSHD
                self._lse = block_lse_BHS
                return
            self._start(block_BSHD.dtype)
        assert self._out is not None and self._lse is not None, "started above"
        merge_(self._out[:, start:stop], self._lse[:, :, start:stop], block_BSHD, block_lse_BHS)

    def _start(self, dtype: torch.dtype) -> None:
        batch, length, heads, _ = self._q.shape
        dtype = self._work if self._keep_wide else dtype
        # Out 0 and lse -inf are what merging leaves unchanged, so queries that no block reaches keep them as their result.
        self._out = torch.zeros((batch, length, heads, self._v_head_dim), dtype=dtype, device=self._q.device)
        self._lse = torch.full((batch, heads, length), -math.inf, dtype=self._work, device=self._q.device)

    def result(self) -> tuple[Tensor, Tensor]:
        """Out in the dtype of q and lse in float32 (float64 for float64), both contiguous."""
        if self._out is None or self._lse is None:
            self._start(self._q.dtype)
        assert self._out is not None and self._lse is not None, "started above"
        out, lse = self._out, self._lse
        if self._sinks is not None:
            # After all merges: a sink in the lse of every block would be counted once for each of them.
            out, lse = with_sinks(out, lse, self._sinks)
        return out.to(self._q.dtype).contiguous(), lse.contiguous()


def with_sinks(out_BSHD: Tensor, lse_BHS: Tensor, sinks_H: Tensor) -> tuple[Tensor, Tensor]:
    """Out and lse after each query also saw the score of its head's sink (attention sinks as in gpt-oss)."""
    with_sink = torch.logaddexp(lse_BHS, sinks_H.to(lse_BHS.dtype)[:, None])
    # Where neither keys nor a sink are seen both are -inf, whose difference is NaN; with 0 for one of them the share is 0.
    share = torch.exp(lse_BHS - with_sink.nan_to_num(neginf=0.0)).transpose(1, 2)[..., None]
    return out_BSHD.to(share.dtype) * share, with_sink


def sink_gradient(dout_BSHD: Tensor, out_BSHD: Tensor, lse_BHS: Tensor, sinks_H: Tensor) -> Tensor:
    """This rank's part of the gradient of the sinks: -sum of exp(sink - lse) * (dout . out) over its queries."""
    # As for a key whose value is 0: its score gets p * (dout . 0 - delta), where p = exp(sink - lse) and lse includes the sink.
    delta_BHS = (dout_BSHD.to(lse_BHS.dtype) * out_BSHD.to(lse_BHS.dtype)).sum(-1).transpose(1, 2)
    weight = torch.exp(sinks_H.to(lse_BHS.dtype)[:, None] - lse_BHS.nan_to_num(neginf=0.0))
    return -(weight * delta_BHS).sum((0, 2)).to(sinks_H.dtype)


class GradSum:
    """A running gradient (B, S, H, D), in float32 where a token gets more than two contributions.

    Args:
        like: the tensor whose gradient it is.
        parts: the most contributions any token gets.
    """

    def __init__(self, like: Tensor, parts: int) -> None:
        self.like = like
        # Adding two parts rounds once, as a kernel rounds its own sum; from the third on every addition would round again.
        self._keep_wide = parts > 2
        self._total: Tensor | None = None
        self._waiting: list[tuple[int, Tensor]] = []

    def add(self, start: int, part: Tensor) -> None:
        """Add `part` (B, n, H, D) to tokens [start, start + n). The sum may take `part` over and change it.

        A part of all tokens becomes the running sum, which saves a fill with zeros. So parts of some tokens that come first wait
        for one, unless sums are kept in float32: then most parts need a copy anyway, and waiting would only hold their memory.
        """
        whole = part.shape[1] == self.like.shape[1]
        if self._total is None and whole:
            self._total = part.to(accumulate_dtype(part.dtype)) if self._keep_wide else part
            for rest in self._waiting:
                self._add(*rest)
            self._waiting.clear()
        elif self._total is None and not self._keep_wide:
            self._waiting.append((start, part))
        else:
            self._add(start, part)

    def _add(self, start: int, part: Tensor) -> None:
        if self._total is None:
            dtype = accumulate_dtype(part.dtype) if self._keep_wide else part.dtype
            self._total = torch.zeros(self.like.shape, dtype=dtype, device=part.device)
        # A part that other ranks summed in float32 must not be rounded before it is added.
        if self._total.dtype.itemsize < part.dtype.itemsize:
            self._total = self._total.to(part.dtype)
        self._total[:, start : start + part.shape[1]] += part

    def result(self, dtype: torch.dtype | None = None) -> Tensor:
        """The gradient, contiguous, in `dtype` or else as it was summed."""
        for rest in self._waiting:
            self._add(*rest)
        self._waiting.clear()
        if self._total is None:
            return torch.zeros(self.like.shape, dtype=dtype or self.like.dtype, device=self.like.device)
        return self._total.to(dtype or self._total.dtype).contiguous()
