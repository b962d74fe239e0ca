"""A plan as values that JSON can hold."""

from __future__ import annotations

from collections.abc import Sequence

from dtensor_ring.planning.costs import LLAMA_8B, AttentionShape, Costs, cost_of, costs
from dtensor_ring.planning.mask import Band, mask_text
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.schedule import plan
from dtensor_ring.planning.totals import fetched_by

Facts = dict[str, object]

# Blocks of scores that plans are made of without being asked for by rank: more take Python longer than somebody waits.
MOST_TILES = 65536


def asks_too_much(problem: AttentionProblem, ranks: int) -> bool:
    """Whether plans of so many ranks take more than moments: one block of scores a step, or one for each block of a stripe."""
    # An estimate from above, made before any plan. Blocked stripes have a corner tile for each block; other layouts have few tiles.
    steps = problem.world if problem.strategy == "ring" else 1
    block = problem.layout.block
    blocks = problem.q_length // block if block > 1 and problem.world > 1 else 1
    return ranks * max(steps, blocks) > MOST_TILES


def facts(
    problem: AttentionProblem,
    ranks: Sequence[int] | None = None,
    *,
    only_totals: bool = False,
    shape: AttentionShape = LLAMA_8B,
) -> Facts:
    """Says what is planned, the totals of all ranks, and unless `only_totals`, what each rank, or each one of `ranks`, does.

    Keys stay as they are from one version to the next; new ones may come. Key tokens travel with their values; for "ulysses", where
    heads travel, nothing is said of key tokens. Scores are those of one head, work those of all heads and batch rows; bytes are
    those of tensors of `shape`.

    Raises:
        ValueError: the layout cannot be laid out, the heads cannot be shared out, or plans of all ranks would take minutes.
    """
    entries: Facts = {
        "layout": str(problem.layout),
        "mask": _mask(problem.band),
        "length": problem.q_length,
        "world": problem.world,
        "strategy": problem.strategy,
        "stages": problem.transfers if problem.strategy == "ring" and not problem.is_halo else None,
        "halo": problem.is_halo,
        "shape": shape._asdict(),
        "documents": None if problem.documents is None else problem.documents.parts,
    }
    if not only_totals:
        if ranks is None and asks_too_much(problem, problem.world):
            raise ValueError(
                f"plans of all {problem.world} ranks take too long for {problem.layout} and {problem.q_length} tokens: "
                "ask for some with --rank, or for the totals with --summary"
            )
        entries["ranks"] = [_rank(problem, rank, shape) for rank in (range(problem.world) if ranks is None else ranks)]
    entries["totals"] = _totals(costs(problem, shape))
    return entries


def _mask(band: Band) -> str:
    """The text that `Band.parse` reads."""
    if band == Band(0, None):
        return "causal"
    return mask_text(False, (-1 if band.hi is None else band.hi, -1 if band.lo is None else -band.lo))


def _rank(problem: AttentionProblem, rank: int, shape: AttentionShape) -> Facts:
    cost = cost_of(problem, rank, shape)
    entries: Facts = {"rank": rank, "tokens": cost.tokens, "work": cost.work, "calls": cost.calls}
    if problem.strategy != "ulysses":
        each = plan(problem, rank)
        entries |= {
            "scores": each.cells,
            "messages": each.messages,
            "key_tokens_sent": each.key_tokens_sent,
            "key_tokens_fetched": fetched_by(each),
        }
    return entries | {"forward": cost.forward._asdict(), "backward": cost.backward._asdict()}


def _totals(spent: Costs) -> Facts:
    entries: Facts = {"tokens": {"least": min(spent.tokens), "most": max(spent.tokens)}}
    if spent.totals is not None:
        entries |= {
            "scores": _spread(spent.totals.scores) | {"balance": spent.balance},
            "key_tokens_fetched": _spread(spent.totals.fetched),
            "key_tokens_sent": _spread(spent.totals.sent),
        }
    return entries | {"work": _spread(spent.work) | {"balance": spent.balance}, "bytes_sent": _spread(spent.bytes)}


def _spread(numbers: Sequence[int]) -> Facts:
    most = max(numbers)
    return {"mean": sum(numbers) / len(numbers), "most": most, "most_rank": numbers.index(most)}
