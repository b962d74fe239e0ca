"""What an attention costs each rank: scores, kernel calls, messages and bytes, worked out without running it.

    per rank and pass         forward sends                                 backward sends, beside the same again
    ring, halo, packed        the keys and values that others need          their gradients, to the ranks they came from
    gather                    its keys and values to all, padded            all gradients but its own, padded, in float32
    ulysses                   (W-1)/W of its q, k, v, out and lse           out of dout, dq, dk, dv the same part

`cost_of` counts one rank exactly, from its plan; `costs` counts the work and the forward bytes of all ranks without making a plan,
for any number of ranks in a moment. Both equal what the executors count while they run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dtensor_ring.planning.document_sharding import balance_of
from dtensor_ring.planning.head_sharing import copies_of_key_heads, refuses
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.schedule import Plan, plan
from dtensor_ring.planning.totals import Totals, totals


class AttentionShape(NamedTuple):
    """What costs depend on beside the problem: the tensors' sizes. The defaults are those of an 8B Llama model in bfloat16.

    Attributes:
        heads: query heads.
        kv_heads: key heads.
        head_dim: numbers in a query or key.
        v_head_dim: numbers in a value.
        batch: batch rows.
        itemsize: bytes of a number.
        grad_itemsize: bytes of a number in the gradients that the kernel returns for keys and values.
    """

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    v_head_dim: int = 128
    batch: int = 1
    itemsize: int = 2
    grad_itemsize: int = 2

    @property
    def sum_itemsize(self) -> int:
        """Bytes of a number that is summed up, and of the log-sum-exp: float64 for float64, else float32."""
        return 8 if self.itemsize == 8 else 4

    @property
    def kv_numbers(self) -> int:
        """Numbers in the key and the value of one token, over all batch rows and key heads."""
        return self.batch * self.kv_heads * (self.head_dim + self.v_head_dim)


LLAMA_8B = AttentionShape()


class Sent(NamedTuple):
    """What one rank sends in one pass."""

    messages: int
    bytes: int


@dataclass(frozen=True, slots=True)
class RankCost:
    """What one rank holds, computes and sends.

    Attributes:
        rank: the rank that is meant.
        tokens: queries that it holds, in one batch row.
        work: scores that it computes in a forward pass, over all batch rows and heads.
        calls: kernel calls in a forward pass.
        forward: what it sends in a forward pass.
        backward: what it sends in a backward pass.
    """

    rank: int
    tokens: int
    work: int
    calls: int
    forward: Sent
    backward: Sent


@dataclass(frozen=True, slots=True)
class Costs:
    """What each rank computes and sends in a forward pass, one number a rank.

    Attributes:
        tokens: as `RankCost.tokens`.
        work: as `RankCost.work`.
        bytes: as `RankCost.forward.bytes`.
        totals: the same in scores of one head and in key tokens; None for "ulysses", where no keys go from rank to rank by plan.
    """

    tokens: tuple[int, ...]
    work: tuple[int, ...]
    bytes: tuple[int, ...]
    totals: Totals | None = None

    @property
    def most_loaded(self) -> int:
        """The first of the ranks with the most work."""
        return self.work.index(max(self.work))

    @property
    def balance(self) -> float:
        """Mean work over the most loaded rank's: 1 is perfect."""
        return balance_of(self.work)


def cost_of(problem: AttentionProblem, rank: int, shape: AttentionShape) -> RankCost:
    """The cost of one rank, whatever the strategy.

    Raises:
        ValueError: the heads cannot be shared out for "ulysses", or the layout cannot be laid out.
    """
    if problem.strategy == "ulysses":
        return cost_by_heads(problem, rank, shape)
    return cost_of_plan(plan(problem, rank), shape)


def cost_of_plan(each: Plan, shape: AttentionShape) -> RankCost:
    """The cost of the rank of a plan, forward and backward as the plan's executor walks it."""
    problem, numbers = each.problem, shape.kv_numbers
    keys = each.key_tokens_sent * numbers * shape.itemsize
    if problem.collective:
        # One all-gather carries keys and values together, one reduce-scatter their gradients, which are summed on the go.
        forward = Sent(problem.world - 1, keys)
        returned = Sent(problem.world - 1, each.key_tokens_sent * numbers * shape.sum_itemsize)
    else:
        # A message of keys and one of values for each owner and peer, and the same in the other direction for their gradients.
        forward = Sent(2 * each.messages, keys)
        messages = total = 0
        for step in each.steps:
            fetched = [keys for keys in step.keys if keys.owner != each.rank]
            messages += 2 * len({(keys.owner, keys.peer) for keys in fetched})
            # Gradients that were summed are sent as they are: rounding them before the owner adds its own would lose the sum.
            total += sum(keys.size for keys in fetched) * (shape.sum_itemsize if step.sums else shape.grad_itemsize)
        returned = Sent(messages, total * numbers)
    backward = Sent(forward.messages + returned.messages, forward.bytes + returned.bytes)
    work = each.cells * _rows_a_score_counts_for(problem, shape) * shape.heads
    return RankCost(each.rank, problem.q_local(each.rank), work, each.calls, forward, backward)


def cost_by_heads(problem: AttentionProblem, rank: int, shape: AttentionShape) -> RankCost:
    """The cost of a rank that gets all tokens of some heads: all-to-alls before and after an attention of one device.

    Raises:
        ValueError: the heads cannot be shared out, as `refuses` says.
    """
    _check_heads(problem, shape)
    queries = [problem.q_local(r) for r in range(problem.world)]
    keys = queries if problem.q_length == problem.k_length else [problem.k_local(r) for r in range(problem.world)]
    to_heads_q, to_tokens_q = _exchanges(queries, rank)
    to_heads_k, to_tokens_k = _exchanges(keys, rank)
    sizes = _HeadBytes.of(problem, shape)
    forward = _sum([(to_heads_q, (sizes.q,)), (to_heads_k, (sizes.k, sizes.v)), (to_tokens_q, (sizes.out, sizes.lse))])
    backward = _sum(
        [
            # Between the passes a rank keeps its own tokens only, so all that backward reads goes to the heads again.
            (to_heads_q, (sizes.q, sizes.out, sizes.out, sizes.lse)),  # q, out, dout and lse
            (to_heads_k, (sizes.k, sizes.v)),
            (to_tokens_q, (sizes.q,)),  # dq
            (to_tokens_k, (sizes.k, sizes.v)),  # dk and dv
        ]
    )
    inner = plan(problem.planned, 0)
    work = inner.cells * _rows_a_score_counts_for(problem, shape) * shape.heads // problem.world
    return RankCost(rank, queries[rank], work, inner.calls, forward, backward)


def costs(problem: AttentionProblem, shape: AttentionShape) -> Costs:
    """Work and forward bytes of all ranks, equal to those of `cost_of`; no plan is made but for slices of documents.

    Raises:
        ValueError: the heads cannot be shared out for "ulysses", or the layout cannot be laid out.
    """
    factor = _rows_a_score_counts_for(problem, shape) * shape.heads
    if problem.strategy == "ulysses":
        _check_heads(problem, shape)
        (scores,), sizes = totals(problem.planned).scores, _HeadBytes.of(problem, shape)
        queries = tuple(problem.q_local(rank) for rank in range(problem.world))
        keys = [problem.k_local(rank) for rank in range(problem.world)]
        # A rank's own tokens leave for W - 1 ranks, and the tokens of all others come back to them.
        sent = tuple(
            (problem.world - 1) * (mine * sizes.q + k * (sizes.k + sizes.v)) + (problem.q_length - mine) * (sizes.out + sizes.lse)
            for mine, k in zip(queries, keys, strict=True)
        )
        return Costs(queries, (scores * factor // problem.world,) * problem.world, sent)
    counted = totals(problem)
    numbers = shape.kv_numbers * shape.itemsize
    return Costs(counted.tokens, tuple(n * factor for n in counted.scores), tuple(n * numbers for n in counted.sent), counted)


class _HeadBytes(NamedTuple):
    """Bytes of one token in one rank's share of the heads, over all batch rows, of each tensor that is exchanged."""

    q: int
    k: int
    v: int
    out: int
    lse: int

    @classmethod
    def of(cls, problem: AttentionProblem, shape: AttentionShape) -> _HeadBytes:
        heads = shape.batch * shape.heads // problem.world
        kv_heads = shape.batch * shape.kv_heads * copies_of_key_heads(problem.world, shape.kv_heads) // problem.world
        key, value = shape.head_dim * shape.itemsize, shape.v_head_dim * shape.itemsize
        return cls(heads * key, kv_heads * key, kv_heads * value, heads * value, heads * shape.sum_itemsize)


def _check_heads(problem: AttentionProblem, shape: AttentionShape) -> None:
    reason = refuses(problem.world, shape.heads, shape.kv_heads)
    if reason is not None:
        raise ValueError(reason)


def _exchanges(held: Sequence[int], rank: int) -> tuple[Sent, Sent]:
    """Counts messages, and tokens in them, that a rank sends in an all-to-all from tokens to heads, and in one back."""
    others = [count for r, count in enumerate(held) if r != rank]
    # Messages of no elements are left out: a rank without tokens sends none, and gets none back.
    to_heads = Sent(len(others) if held[rank] else 0, len(others) * held[rank])
    return to_heads, Sent(sum(count > 0 for count in others), sum(others))


def _sum(exchanges: Sequence[tuple[Sent, tuple[int, ...]]]) -> Sent:
    """Adds up all-to-alls, each given as messages and tokens, and the bytes of a token in each tensor that it carries."""
    messages = sum(sent.messages * len(sizes) for sent, sizes in exchanges)
    return Sent(messages, sum(sent.bytes * sum(sizes) for sent, sizes in exchanges))


def _rows_a_score_counts_for(problem: AttentionProblem, shape: AttentionShape) -> int:
    """How many batch rows a plan counts once: all of them, unless each has documents of its own and is counted by itself."""
    return shape.batch if problem.segmentation.rows == 1 else 1
