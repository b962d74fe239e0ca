"""`explain`: what an attention costs each rank, before any tensor exists.

    >>> print(explain("zigzag", 16, 4))
    zigzag, causal, 16 tokens over 4 ranks, ring in 1 stage

    per forward pass, bytes for 32 query and 8 key heads of 128, 2 bytes a number
      tokens a rank:             4
      scores a rank:             mean 34.0, most 34 (rank 0)
      key tokens fetched a rank: mean 9.0, most 12 (rank 0)
      key tokens sent a rank:    mean 9.0, most 12 (rank 3)
      bytes sent a rank:         mean 36864.0, most 49152 (rank 3)
      balance (mean work / most loaded rank): 1.0000

No torch is loaded for texts and layouts: the command line starts with these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, get_args

from dtensor_ring.planning.cost_model import CostModel
from dtensor_ring.planning.costs import AttentionShape, Costs, RankCost, cost_of, costs
from dtensor_ring.planning.documents import Documents
from dtensor_ring.planning.layout import Layout, work_balance
from dtensor_ring.planning.mask import Band, mask_text
from dtensor_ring.planning.predict import Predictor, Seconds
from dtensor_ring.planning.problem import AttentionProblem, StrategyName
from dtensor_ring.tools.drawing import draw, summary
from dtensor_ring.tools.predicted import predicted_text, predictor_for, staged_by

if TYPE_CHECKING:
    from torch import Tensor


# A protocol, since the class itself is a class of PyTorch's, and this file must load without it.
class HasLayout(Protocol):
    """A placement of ours, such as `Zigzag(1)`."""

    @property
    def layout(self) -> Layout:
        """How it spreads a sequence."""
        ...


@dataclass(frozen=True, slots=True)
class Explanation:
    """What an attention costs; prints as a summary of all ranks.

    Attributes:
        problem: the layout, mask, lengths, documents, ranks and strategy.
        shape: the sizes of the tensors.
        costs: what each rank holds, computes and sends in a forward pass.
        predictor: what predicts times; None where no device and no cost model was named.
    """

    problem: AttentionProblem
    shape: AttentionShape
    costs: Costs
    predictor: Predictor | None = None

    @property
    def balance(self) -> float:
        """Mean work, in scores, over the most loaded rank's: 1 is perfect."""
        return self.costs.balance

    @property
    def block_balance(self) -> float | None:
        """As `balance`, of what kernels compute: blocks of 128 x 128 scores, where ranks hold chunks of causal attention.

        It is nearer to time where documents are short: a text of 10 tokens takes a block, as one of 128 does. This is what
        `Zigzag(dim, per_document=True)` balances. None where queries see keys ahead of them.
        """
        problem, band = self.problem, self.problem.band
        if problem.strategy == "ulysses":  # all ranks compute the same tokens, of as many heads each
            return 1.0
        if band.lo != 0:
            return None
        documents = problem.documents if isinstance(problem.documents, Documents) else Documents.from_lengths([problem.q_length])
        return work_balance(problem.layout, documents, problem.world, None if band.hi is None else band.hi + 1)

    @property
    def work(self) -> tuple[int, ...]:
        """Scores that each rank computes in a forward pass, over all batch rows and heads."""
        return self.costs.work

    @property
    def bytes(self) -> tuple[int, ...]:
        """Bytes that each rank sends in a forward pass."""
        return self.costs.bytes

    @property
    def tokens(self) -> tuple[int, ...]:
        """Queries that each rank holds."""
        return self.costs.tokens

    def rank(self, rank: int) -> RankCost:
        """One rank's work, kernel calls, messages and bytes, forward and backward."""
        # A plan is made for this rank alone; the totals of all ranks do without any.
        return cost_of(self.problem, rank, self.shape)

    def seconds(self, rank: int | None = None) -> Seconds:
        """What a rank, or the most loaded one, is predicted to take: `forward`, `backward` and `both`, in seconds.

        Raises:
            ValueError: `explain` was given neither a device nor a cost model.
        """
        if self.predictor is None:
            raise ValueError("times are predicted for a device: explain(..., device='h100'), or cost_model=CostModel.load(path)")
        return self.predictor.rank(self.problem, self.costs.most_loaded if rank is None else rank)

    def plot(self, ranks: Sequence[int] | None = None) -> str:
        """A drawing in text of 80 columns: who holds what, and what each rank computes and exchanges in each step.

        Args:
            ranks: ranks whose steps are drawn, all of them; None draws up to 8 ranks, or an excerpt of more.
        """
        return draw(self.problem, ranks, self.shape)

    def __str__(self) -> str:
        text = summary(self.problem, self.shape)
        return text if self.predictor is None else f"{text}\n\n{predicted_text(self.problem, self.predictor)}"


def explain(
    placement: HasLayout | Layout | str,
    length: int,
    world: int,
    documents: Documents | Tensor | Sequence[int] | None = None,
    *,
    is_causal: bool = True,
    window: tuple[int, int] = (-1, -1),
    strategy: StrategyName = "ring",
    stages: int | None = None,
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    v_head_dim: int | None = None,
    batch: int = 1,
    itemsize: int = 2,
    device: str | None = None,
    cost_model: CostModel | None = None,
    kernel: str | None = None,
    ranks_per_host: int = 0,
) -> Explanation:
    """Says what `ring_attention` would compute and send, rank by rank. Makes no tensors and asks no other rank.

        print(explain(Zigzag(1, per_document=True), 65536, 8, documents))        # a summary
        explain(Zigzag(1), 65536, 8).balance, .work, .bytes                      # of all ranks, without a plan
        explain(Zigzag(1), 65536, 8, device="h100").seconds().both               # predicted, of the most loaded rank
        print(explain(Zigzag(1), 64, 4, strategy="gather").plot())               # a drawing

    Args:
        placement: a placement such as `Zigzag(1)`, its layout, or the layout's text: "contiguous", "zigzag", "stripe:BLOCK",
            "zigzag/documents".
        length: tokens of the sequence, of queries and keys alike.
        world: ranks that share it.
        documents: bounds of packed documents, a `Documents` or a cu_seqlens, as for `ring_attention`.
        is_causal: as for `ring_attention`, and by the same default.
        window: as for `ring_attention`.
        strategy: as for `ring_attention`.
        stages: as for `ring_attention`: None is what it takes by default on `device` or by `cost_model`, and without these where
            no machine is known: the fewest that its memory allows.
        heads: query heads.
        kv_heads: key heads, which divide the query heads.
        head_dim: numbers in a query or key.
        v_head_dim: numbers in a value; None is `head_dim`.
        batch: batch rows.
        itemsize: bytes of a number; the default is that of bfloat16.
        device: "h100", "h200" or "a100", to predict times on it, and to choose the stages as there.
        cost_model: figures of one's own, in place of the device's.
        kernel: a kernel of these figures; None is "torch_flash", or the first.
        ranks_per_host: ranks on each host; 0 is all of them.

    Raises:
        TypeError: a placement that has no layout, or a window of no integers.
        ValueError: numbers, a window, documents or heads that do not fit; or a device or kernel without figures.
    """
    layout = _layout_of(placement)
    if world < 1 or length < 0:
        raise ValueError(f"need a length of 0 tokens or more and at least one rank, found length={length} and world={world}")
    if strategy not in get_args(StrategyName):
        raise ValueError(f"unknown strategy {strategy!r}: use one of {', '.join(map(repr, get_args(StrategyName)))}")
    packed = None if documents is None else Documents.of(documents, length)
    # `ring_attention` would refuse it too, but by the time it is called the batch is cut.
    if layout.cut and (packed is None or packed.rows != 1):
        raise ValueError(f"{layout} is cut document by document: pass documents=, one row for the whole batch, found {packed}")
    band = Band.parse(mask_text(is_causal, window))
    shape = shape_of_heads(heads, kv_heads, head_dim, v_head_dim, batch, itemsize)
    predictor = predictor_for(shape, device, cost_model, kernel, ranks_per_host)
    problem = staged_by(AttentionProblem(layout, band, length, length, world, strategy, packed), predictor, stages)
    return Explanation(problem, shape, costs(problem, shape), predictor)


def shape_of_heads(
    heads: int, kv_heads: int, head_dim: int, v_head_dim: int | None = None, batch: int = 1, itemsize: int = 2
) -> AttentionShape:
    """The sizes, checked.

    Raises:
        ValueError: a size below 1, or key heads that do not divide the query heads.
    """
    shape = AttentionShape(heads, kv_heads, head_dim, v_head_dim or head_dim, batch, itemsize, itemsize)
    wrong = [f"{name}={size}" for name, size in shape._asdict().items() if size < 1]
    if wrong:
        raise ValueError(f"sizes are whole numbers from 1 up, found {', '.join(wrong)}")
    if heads % kv_heads:
        raise ValueError(f"the {kv_heads} key heads must divide the {heads} query heads")
    return shape


def _layout_of(placement: HasLayout | Layout | str) -> Layout:
    if isinstance(placement, str):
        return Layout.parse(placement)
    # Asked by its layout and not by its class, which only PyTorch's module knows.
    layout = placement if isinstance(placement, Layout) else getattr(placement, "layout", None)
    if not isinstance(layout, Layout):
        raise TypeError(f"placement must be Contiguous, Zigzag or Stripe, a layout or its text, found {placement!r}")
    return layout
