"""What the attention of one layer holds on a rank beside what is kept for backward: workspaces of kernels, and other ranks' keys.

    bytes with q of the queries, kv of this rank's keys and values together, all in bfloat16

    kernel, backward       2q in float32, 2q more where heads share keys (gradients for each query head), lse
    ring, forward          keys of a stage, of the next one, and the copies that others are sent; the running out
    ring, backward         the same; gradients that are computed, that go back, and that come in, in float32; dq in float32
    gather                 all keys; in backward their gradients in float32
    ulysses                q, k, v and out again, by heads

Workspaces are those of `torch_flash`, and of `cudnn` within 1 %, as measured on H200: `benchmarks/estimate.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from dtensor_ring.planning.costs import AttentionShape
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.stages import stage_sizes
from dtensor_ring.planning.totals import totals

_STRIPS = 4 * 64 * 2**20  # what `math` holds of scores at a time: a few strips of 64 MiB


@dataclass(frozen=True, slots=True)
class AttentionBytes:
    """Bytes beside q, k, v, out, lse, and the gradients of q, k and v.

    Attributes:
        forward: at most, in the forward pass.
        backward: at most, in the backward pass.
    """

    forward: int
    backward: int


def attention_bytes(problem: AttentionProblem, shape: AttentionShape, flash: bool = True) -> AttentionBytes:
    """Those of the rank with the most tokens.

    Args:
        problem: the attention, in the stages in which it runs.
        shape: the sizes of the tensors.
        flash: whether the kernel is a flash kernel; else it is `math`, which computes strips of scores.
    """
    tokens = max(problem.q_local(rank) for rank in (0, problem.world - 1)) * shape.batch
    q = tokens * shape.heads * max(shape.head_dim, shape.v_head_dim) * shape.itemsize
    lse = tokens * shape.heads * shape.sum_itemsize
    wide = shape.sum_itemsize // shape.itemsize
    keys = max(problem.k_local(rank) for rank in (0, problem.world - 1))
    shard = keys * shape.kv_numbers * shape.itemsize
    kernel_forward, kernel = _kernel(shape, q, lse, flash)
    if problem.world == 1:
        return AttentionBytes(kernel_forward, kernel)
    if problem.strategy == "ulysses":
        moved = 2 * (q + shard)  # what is sent, and what has come
        return AttentionBytes(kernel_forward + moved + q, kernel + moved + 3 * q)
    merged = q * wide + q + 2 * lse  # the running out, a block's, and their lse
    summed = q * wide + q  # the running dq, and a block's
    if problem.collective:
        every = problem.world * shard
        return AttentionBytes(kernel_forward + 2 * every + shard + merged, kernel + 2 * every + 2 * wide * (every + shard) + summed)
    part = _fetched_part(problem, keys)
    if problem.is_halo or problem.strategy == "gather":
        fetched = round(part * (problem.world - 1) * shard)
        return AttentionBytes(kernel_forward + shard + 2 * fetched + merged, kernel + shard + (2 + 3 * wide) * fetched + summed)
    sizes = stage_sizes(problem.world - 1, problem.transfers)
    # Each stage beside the one before it and the one after it, and at the end this rank's own keys.
    each = [part * n for n in sizes]
    steps = zip([0.0, *each[:-1]], each, [*each[1:], 0.0], strict=True)
    in_chunks = problem.layout.chunks != 1  # then the keys that others need are copied, and several calls are summed in float32
    of_calls = wide if in_chunks else 1
    forward = [merged + shard * (now + after + in_chunks * now) for _, now, after in steps]
    steps = zip([0.0, *each[:-1]], each, [*each[1:], 0.0], strict=True)
    expanded = _expanded(shape, q) if flash else 0
    backward = [
        # A kernel gives keys of n ranks a gradient; where heads are shared it makes one for each query head first.
        kernel + expanded * (now - 1) + summed + shard * (now + after + of_calls * (now + 2 * before) + wide)
        for before, now, after in steps
    ]
    last = kernel + summed + shard * (1 + of_calls * 2 * each[-1] + wide)
    return AttentionBytes(kernel_forward + round(max(forward)), round(max(*backward, last)))


def _expanded(shape: AttentionShape, q: int) -> int:
    """Gradients of keys and values for each query head, which a flash kernel makes where heads share keys."""
    return 2 * q if shape.kv_heads < shape.heads else 0


def _kernel(shape: AttentionShape, q: int, lse: int, flash: bool) -> tuple[int, int]:
    """Workspaces of one call on this rank's own queries and keys, forward and backward."""
    if not flash:
        return _STRIPS, _STRIPS + q
    wide = shape.sum_itemsize // shape.itemsize
    return lse, q * wide + _expanded(shape, q) + lse


def _fetched_part(problem: AttentionProblem, keys: int) -> float:
    """How much of all other ranks' keys the rank that fetches the most does fetch: less than 1 with windows and documents."""
    return min(1.0, max(totals(problem).fetched) / max(1, (problem.world - 1) * keys))


__all__ = ["AttentionBytes", "attention_bytes"]
