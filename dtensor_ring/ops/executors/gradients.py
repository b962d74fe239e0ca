"""Adding up gradients: what several blocks, and several ranks, found for the same tokens becomes one tensor.

    keys of this rank             0 1 2 3 4 5 6 7
    from this rank's own block    * * * * * * * *      a whole part: the sum is written into it
    from rank 1, all              * * * *              a part of some tokens
    from ranks 2 and 3            * . * . . *          an indexed part: each token has its own list of contributions

What is added waits, and is summed in one go: by `flush` into a total in float32, where its memory is needed for something else,
and by `result`, which adds what waits to the total and rounds once. Both take one kernel, for dK and dV together. A token's total
comes first, then this rank's own part, and then what came in its order, an indexed part last and by its lists: no atomics, so that
every run gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from dtensor_ring.ops.dtypes import accumulate_dtype
from dtensor_ring.ops.executors.parts import MOST_GRADIENTS, GradPart, Indexed, Tensors, is_fused


class GradSum:
    """The running gradients of some tensors (B, S, H, D) that are summed alike: of dq alone, or of dk and dv.

    Args:
        likes: the tensors whose gradients they are; of one length.
    """

    def __init__(self, likes: Sequence[Tensor]) -> None:
        self.likes = tuple(likes)
        self._length = likes[0].shape[1]
        self._total: Tensors | None = None  # in float32, of all tokens
        self._parts: list[GradPart] = []
        self._indexed: Indexed | None = None

    def add(self, start: int, tensors: Tensors, *, owned: bool = True) -> None:
        """Add gradients of tokens [start, start + n); if they are `owned` the sum may take them over and change them."""
        if len(self._parts) == MOST_GRADIENTS:
            self.flush()
        self._parts.append(GradPart(start, tensors, owned))

    def add_indexed(self, part: Indexed) -> None:
        """Add gradients by index; the buffers must stay as they are until `flush` or `result`."""
        if self._indexed is not None:
            self.flush()
        self._indexed = part

    def flush(self) -> None:
        """Add what waits to a total in float32, after which nothing that was added is needed any more."""
        if not self._parts and self._indexed is None:
            return
        wide = accumulate_dtype(self.likes[0].dtype)
        if self._total is not None:
            add_up(self._total, self._total, self._parts, self._indexed)
        else:
            self._total = self._alone(wide) or self._new(wide)
        self._parts.clear()
        self._indexed = None

    def result(self, dtype: torch.dtype) -> Tensors:
        """The gradients, contiguous, in `dtype`.

        It is to be called once: the total and what was added may become the result.
        """
        total, parts = self._total, self._parts
        if not parts and self._indexed is None:
            if total is not None:
                return tuple(x.to(dtype) for x in total)
            return tuple(torch.zeros(like.shape, dtype=dtype, device=like.device) for like in self.likes)
        alone = self._alone(dtype) if total is None else None
        if alone is not None:
            return alone
        # A whole part of that dtype becomes the result: only tokens that get something else are touched.
        own = next((part for part in parts if part.owned and self._is_whole(part) and _is(part.tensors, dtype)), None)
        if own is None:
            return self._new(dtype)
        add_up(own.tensors, total, [own, *(part for part in parts if part is not own)], self._indexed)
        return own.tensors

    def _is_whole(self, part: GradPart) -> bool:
        return part.tensors[0].shape[1] == self._length

    def _alone(self, dtype: torch.dtype) -> Tensors | None:
        """What waits, if nothing need be added up: one part of all tokens, or several side by side."""
        if self._indexed is not None:
            return None
        if len(self._parts) == 1 and self._is_whole(self._parts[0]):
            _, tensors, owned = self._parts[0]
            # Results of an operator must not share memory with what others hold, as they would where no conversion makes a copy.
            return tuple((x.to(dtype) if owned else x.to(dtype, copy=True)).contiguous() for x in tensors)
        parts = sorted(self._parts, key=lambda part: part.start)
        ends = [0, *(part.stop for part in parts)]
        if ends != [*(part.start for part in parts), self._length]:
            return None
        return tuple(torch.cat(pieces, 1).to(dtype) for pieces in zip(*(part.tensors for part in parts), strict=True))

    def _new(self, dtype: torch.dtype) -> Tensors:
        """Add total and what waits up in new tensors."""
        made = tuple(torch.empty(like.shape, dtype=dtype, device=like.device) for like in self.likes)
        add_up(made, self._total, self._parts, self._indexed)
        return made


def _is(tensors: Tensors, dtype: torch.dtype) -> bool:
    return all(x.dtype == dtype and x.is_contiguous() for x in tensors)


def add_up(sums: Tensors, total: Tensors | None, parts: Sequence[GradPart], indexed: Indexed | None) -> None:
    """Write the sum of `total`, up to `MOST_GRADIENTS` parts and an indexed part into `sums`, each token's in this order.

    Args:
        sums: contiguous (B, S, H, D). They may be `total`, or the tensors of the first part.
        total: of all tokens, or None for nothing; it is used up.
        parts: of some tokens.
        indexed: of some tokens, or None for nothing.
    """
    if total is sums and indexed is None and len(parts) == 1:
        # PyTorch adds one part in place and converts it on the way, and calling it costs the host a quarter of a Triton kernel.
        for x, part in zip(sums, parts[0].tensors, strict=True):
            x[:, parts[0].start : parts[0].stop].add_(part)
        return
    low, high = changed_tokens(sums, total, parts, indexed)
    if is_fused(sums[0]):
        from dtensor_ring.ops.executors._sum_cuda import fused_add_up

        fused_add_up(sums, total, parts, indexed, (low, high))
        return
    has_first = total is None and bool(parts) and parts[0].tensors is sums
    for i, into in enumerate(sums):
        out = into[:, low:high]
        summed = None if indexed is None else _by_index(indexed, i, accumulate_dtype(out.dtype))
        if total is not None:
            wide = total[i][:, low:high]
        elif has_first:
            wide = out.to(accumulate_dtype(out.dtype))
        elif summed is not None and not parts and summed.numel() == out.numel():
            wide, summed = summed.view(out.shape), None
        else:
            wide = torch.zeros(out.shape, dtype=accumulate_dtype(out.dtype), device=out.device)
        for part in parts[has_first:]:
            wide[:, part.start - low : part.stop - low] += part.tensors[i]
        if indexed is not None and summed is not None:
            wide[:, indexed.low - low : indexed.high - low] += summed.view(len(out), indexed.high - indexed.low, *out.shape[2:])
        if total is not sums and wide is not out:
            out.copy_(wide)


def changed_tokens(sums: Tensors, total: Tensors | None, parts: Sequence[GradPart], indexed: Indexed | None) -> tuple[int, int]:
    """The tokens of `sums` that adding up changes: all, unless the sum begins with what stands there."""
    in_place = total is sums or (total is None and bool(parts) and parts[0].tensors is sums)
    if not in_place:
        return 0, sums[0].shape[1]
    ranges = [(part.start, part.stop) for part in parts if part.tensors is not sums]
    if indexed is not None:
        ranges.append((indexed.low, indexed.high))
    return min((low for low, _ in ranges), default=0), max((high for _, high in ranges), default=0)


def _by_index(indexed: Indexed, number: int, dtype: torch.dtype) -> Tensor:
    """The sums of an indexed part as rows (tokens, H * D), for the tensor of that number."""
    buffers = [indexed.wide[number]] if indexed.narrow is None else [indexed.wide[number], indexed.narrow[number]]
    pieces = [x.flatten(1).to(dtype) for x in buffers]
    if indexed.offsets is None:
        nothing = pieces[0].new_zeros((1, pieces[0].shape[1]))  # what places past the end read
        return torch.cat([*pieces, nothing]).index_select(0, indexed.index)
    # `embedding_bag` adds the contributions of a key in the order of the index, in one kernel and without atomics, so that a
    # gradient is bitwise the same in every run.
    rows = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return embedding_bag(indexed.index, rows, indexed.offsets, mode="sum", include_last_offset=True)
