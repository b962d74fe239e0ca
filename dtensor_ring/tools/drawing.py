"""Plans as text of at most 80 columns: who holds what, which step computes what, what travels, work and balance.

Long lists are cut short and say what they leave out. Without ranks asked for, a drawing of many ranks shows an excerpt.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from dtensor_ring.planning.costs import LLAMA_8B, AttentionShape, Costs, RankCost, cost_of, costs
from dtensor_ring.planning.head_sharing import copies_of_key_heads
from dtensor_ring.planning.kernel_calls import KernelCall, Step, TokenRange
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.runs import Run
from dtensor_ring.planning.schedule import KeySend, Plan, plan
from dtensor_ring.tools.facts import asks_too_much

WIDTH = 80  # columns of a line, at most
RANKS_SHOWN = 8  # a drawing of more ranks shows an excerpt
RANKS_OF_EXCERPT = 3  # the first ranks; the most loaded one is added
STEPS_SHOWN = 8  # steps of a rank that was not asked for
ITEMS_SHOWN = 3  # ranges, ranks or calls in a list of one step

_SIGNS_ACROSS = 32
_SIGNS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LARGEST_PICTURE = 4096  # queries, or keys; the picture visits every query
_TIED = "\u00a0"  # a space at which no line is broken


def draw(problem: AttentionProblem, ranks: Sequence[int] | None = None, shape: AttentionShape = LLAMA_8B) -> str:
    """Draws an attention as text: who holds what, what each rank computes and exchanges in each step, work, bytes and balance.

    Args:
        problem: what is planned.
        ranks: ranks whose steps are drawn, all of them; None draws up to 8 ranks, or an excerpt of more, and few of their steps.
        shape: sizes of the tensors; bytes are counted for them, and "ulysses" shares out their heads.

    Raises:
        ValueError: the layout cannot be laid out, as `Layout.runs` says, or the heads cannot be shared out for "ulysses".
    """
    spent = costs(problem, shape)
    shown = _excerpt(spent) if ranks is None else list(ranks)
    if problem.strategy == "ulysses":
        drawn = [_by_heads(cost_of(problem, rank, shape), problem, shape) for rank in shown]
        parts = [_title(problem), _holdings(problem, shown), *drawn, _pass(shape) + "\n" + _totals(spent)]
        return "\n\n".join(parts)
    # Who asks for a rank gets all of its steps, and waits for them; a first look comes at once, whatever the problem.
    most = STEPS_SHOWN if ranks is None else None
    left_out = ranks is None and asks_too_much(problem, len(shown))
    plans: list[Plan] = [] if left_out else [plan(problem, rank) for rank in shown]
    parts = [_title(problem), _holdings(problem, shown)]
    if left_out:
        parts.append("Steps are left out, since they take long to plan here: --rank R shows a rank's.")
    else:
        parts += [_picture(problem), *(_steps(problem, each, most) for each in plans)]
    parts.append(_forward_pass(spent, shape, shown, plans) + "\n" + _totals(spent))
    return "\n\n".join(part for part in parts if part)


def summary(problem: AttentionProblem, shape: AttentionShape = LLAMA_8B) -> str:
    """Writes the totals of all ranks as text; no plan is made for them.

    Raises:
        ValueError: as for `draw`.
    """
    return f"{_title(problem)}\n\n{_pass(shape)}\n{_totals(costs(problem, shape))}"


def _excerpt(spent: Costs) -> list[int]:
    world = len(spent.tokens)
    if world <= RANKS_SHOWN:
        return list(range(world))
    return sorted({*range(RANKS_OF_EXCERPT), spent.most_loaded})


def _title(problem: AttentionProblem) -> str:
    exchange = "halo: the keys around each chunk" if problem.is_halo else problem.exchange
    ranks = "1 rank" if problem.world == 1 else f"{problem.world} ranks"
    facts = [str(problem.layout), str(problem.band), f"{problem.q_length} tokens over {ranks}", exchange]
    if problem.documents is not None:
        facts.append(problem.documents.described)
    return _folded("", [", ".join(fact.replace(" ", _TIED) for fact in facts)], 2)


def _holdings(problem: AttentionProblem, shown: Sequence[int]) -> str:
    lines = ["who holds what"]
    for rank in shown:
        runs = problem.q_runs(rank)
        what = " | ".join(_tokens(run) for run in runs[:ITEMS_SHOWN]) or "nothing"
        if len(runs) > ITEMS_SHOWN:
            what += f" | and {len(runs) - ITEMS_SHOWN} more"
        lines.append(_folded(f"  rank {rank}: ", [f"{what:<40}", f"{sum(run.count for run in runs)} tokens"]))
    return "\n".join([*lines, *_more_ranks(problem.world, shown)])


def _more_ranks(world: int, shown: Sequence[int]) -> list[str]:
    more = world - len(shown)
    return [f"  ... and {more} more {'rank' if more == 1 else 'ranks'}: --rank R shows one"] if more else []


def _tokens(run: Run) -> str:
    if run.count == 1:
        return f"{run.start}"
    span = f"{run.start}..{run.token(run.count - 1)}"
    if run.stride == 1 or run.count <= run.block:
        return span
    return f"{span}{_TIED}" + (f"{run.block}{_TIED}in{_TIED}{run.stride}" if run.block > 1 else f"every{_TIED}{run.stride}th")


def _picture(problem: AttentionProblem) -> str:
    """The step in which each score is computed, queries down and keys across, both in position order."""
    # Made from the plans' calls and not from the mask: it shows what would be computed, and a fault of a plan shows in it.
    longest = max(problem.q_length, problem.k_length)
    if not 0 < min(problem.q_length, problem.k_length) <= longest <= _LARGEST_PICTURE:
        return ""
    if problem.world > len(_SIGNS) or asks_too_much(problem, problem.world):  # a sign for each step
        return ""
    scale = -(-longest // _SIGNS_ACROSS)
    height, width = -(-problem.q_length // scale), -(-problem.k_length // scale)
    cells = [["."] * width for _ in range(height)]
    held = [problem.k_tokens(rank) for rank in range(problem.world)]
    for rank in range(problem.world):
        queries = problem.q_tokens(rank)
        for index, step in enumerate(plan(problem, rank).steps):
            keys = [held[part.owner][i] for part in step.keys for i in range(part.start, part.stop)]
            for call in step.calls:
                for i, j in _samples(call, queries, keys, scale):
                    cells[queries[i] // scale][keys[j] // scale] = _SIGNS[index]
    head = ["step in which a score is computed (queries down, keys across)"]
    if scale > 1:
        head.append(f"a sign is {scale} x {scale} tokens")
    return "\n".join([*head, *("  " + " ".join(line) for line in cells)])


def _samples(call: KernelCall, queries: Sequence[int], keys: Sequence[int], scale: int) -> Iterable[tuple[int, int]]:
    """Scores of a call, one or more for each sign of the picture that it touches."""
    left, right = call.window
    for segment in call.segments:
        if segment.row:
            continue  # the picture is of one batch row
        offset = (segment.k1 - segment.k0) - (segment.q1 - segment.q0)
        for i in _thinned(segment.q0, segment.q1, queries, scale):
            at = i - segment.q0 + offset
            low = segment.k0 if left < 0 else max(segment.k0, segment.k0 + at - left)
            high = segment.k1 if right < 0 else min(segment.k1, segment.k0 + at + right + 1)
            for j in _thinned(low, high, keys, scale):
                yield i, j


# Among neighbours one token stands for all under its sign: every score of a long sequence would take minutes to visit.
def _thinned(start: int, stop: int, tokens: Sequence[int], scale: int) -> Iterable[int]:
    seen = -1
    for i in range(start, stop):
        if tokens[i] // scale != seen:
            seen = tokens[i] // scale
            yield i


def _steps(problem: AttentionProblem, each: Plan, most: int | None) -> str:
    """Writes a rank's steps in three columns where every step's fit, and otherwise in a paragraph for each."""
    shown = [
        (_fetched(step, each.rank), _calls(step), _sends(problem, each, index)) for index, step in enumerate(each.steps[:most])
    ]
    heads = [f"  step {index}: " for index in range(len(shown))]
    widths = [max(len(cells[column]) for cells in shown) for column in range(3)]
    if len(heads[-1]) + sum(widths) + 4 <= WIDTH:
        lines = [("  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)),) for cells in shown]
    else:
        lines = [(f"{cells[0]};", f"{cells[1]};", cells[2]) for cells in shown]
    folded = [_folded(head, line) for head, line in zip(heads, lines, strict=True)]
    if len(each.steps) > len(shown):
        folded.append(f"  ... and {len(each.steps) - len(shown)} more steps: --rank {each.rank} shows them")
    return "\n".join([f"rank {each.rank}", *folded])


def _fetched(step: Step, rank: int) -> str:
    by_origin: dict[tuple[int, int], list[TokenRange]] = {}
    for keys in step.keys:
        by_origin.setdefault((keys.owner, keys.peer), []).append(keys)
    if not by_origin:
        return "no keys needed"
    return _listed(f"{_origin(owner, peer, rank)} {_ranges(ranges)}" for (owner, peer), ranges in by_origin.items())


def _origin(owner: int, peer: int, rank: int) -> str:
    if owner == rank:
        return "own keys"
    return f"rank{_TIED}{owner}" if peer == owner else f"rank{_TIED}{owner}'s{_TIED}from{_TIED}{peer}"


def _ranges(ranges: Sequence[TokenRange]) -> str:
    first = " + ".join(f"[{each.start},{_TIED}{each.stop})" for each in ranges[:ITEMS_SHOWN])
    return first + (f" and {len(ranges) - ITEMS_SHOWN} more" if len(ranges) > ITEMS_SHOWN else "")


def _calls(step: Step) -> str:
    if not step.calls:
        return "no work"
    return f"{_listed(_call(call) for call in step.calls)}: {step.cells} scores"


def _call(call: KernelCall) -> str:
    left, right = call.window
    name = {(-1, -1): "full", (-1, 0): "causal"}.get(call.window, f"window ({left},{_TIED}{right})")
    return name if len(call.segments) == 1 else f"{name} x {len(call.segments)} segments"


def _sends(problem: AttentionProblem, each: Plan, index: int) -> str:
    if problem.collective:
        return "sends its keys to every rank"
    sends = (f"{_passed_on(send)}{_ranges(send.ranges)} to{_TIED}rank{_TIED}{send.rank}" for send in each.sends[index])
    return f"sends {_listed(sends) or 'nothing'}"


def _passed_on(send: KeySend) -> str:
    return "" if send.step is None else f"rank{_TIED}{send.ranges[0].owner}'s{_TIED}"


def _listed(items: Iterable[str]) -> str:
    every = list(items)
    more = len(every) - ITEMS_SHOWN
    return ", ".join([*every[:ITEMS_SHOWN], *([f"and {more} more"] if more > 0 else [])])


def _by_heads(cost: RankCost, problem: AttentionProblem, shape: AttentionShape) -> str:
    """What a rank gives and gets when heads change places, and what it attends with in between."""
    world, rank, kv_heads = problem.world, cost.rank, shape.kv_heads
    copies = copies_of_key_heads(world, kv_heads)
    heads, keys = _share(shape.heads, world, rank), _share(kv_heads * copies, world, rank)
    own_keys = problem.k_local(rank)
    given = f"{cost.tokens} tokens" if own_keys == cost.tokens else f"{cost.tokens} queries and {own_keys} keys"
    lines = [
        _folded("  to heads: ", [f"of its {given}, each other rank gets q, k and v of its heads"]),
        _folded(
            "  attends:  ",
            [
                f"query {_heads(heads)} with key {_heads(range(keys.start // copies, (keys.stop - 1) // copies + 1))}",
                f"on all {problem.q_length} tokens, {problem.band}:" if problem.q_length == problem.k_length else "on all tokens:",
                f"{cost.work // (len(heads) * _batch_rows(problem, shape))} scores a head in {_calls_of(cost.calls)}",
            ],
        ),
        _folded("  back:     ", [f"out and lse of {problem.q_length - cost.tokens} tokens of those heads"]),
        _folded("  sends:    ", [f"{cost.forward.bytes} bytes in {cost.forward.messages} messages"]),
    ]
    return "\n".join([f"rank {rank}", *lines])


def _share(count: int, world: int, rank: int) -> range:
    return range(rank * count // world, (rank + 1) * count // world)


def _heads(heads: range) -> str:
    return f"head {heads.start}" if len(heads) == 1 else f"heads {heads.start}..{heads.stop - 1}"


def _calls_of(count: int) -> str:
    return "1 call" if count == 1 else f"{count} calls"


def _batch_rows(problem: AttentionProblem, shape: AttentionShape) -> int:
    return shape.batch if problem.segmentation.rows == 1 else 1


def _pass(shape: AttentionShape) -> str:
    batch = "" if shape.batch == 1 else f"{shape.batch} batch rows of "
    dims = f"{shape.head_dim}" if shape.head_dim == shape.v_head_dim else f"{shape.head_dim} (values {shape.v_head_dim})"
    about = f"{batch}{shape.heads} query and {shape.kv_heads} key heads of {dims}, {shape.itemsize} bytes a number"
    return _folded("", [f"per forward pass, bytes for {about}"], 2)


def _forward_pass(spent: Costs, shape: AttentionShape, shown: Sequence[int], plans: Sequence[Plan]) -> str:
    lines = [_pass(shape)]
    made = {each.rank: each for each in plans}
    assert spent.totals is not None, "plans are counted in key tokens"
    for rank in shown:
        work, sent = f"{spent.totals.scores[rank]} scores", f"sends {spent.totals.sent[rank]} key tokens"
        if rank in made:
            work += f" in {made[rank].calls} calls"
            sent += f" in {made[rank].messages} messages"
        lines.append(_folded(f"  rank {rank}: ", [f"{work};", sent]))
    return "\n".join([*lines, *_more_ranks(len(spent.tokens), shown)])


def _totals(spent: Costs) -> str:
    low, high, counted = min(spent.tokens), max(spent.tokens), spent.totals
    lines = [f"  tokens a rank:             {low if low == high else f'{low} to {high}'}"]
    if counted is None:
        lines.append(_folded("  scores a rank, all heads:  ", [_mean_and_most(spent.work)]))
    else:
        lines += [
            f"  scores a rank:             {_mean_and_most(counted.scores)}",
            f"  key tokens fetched a rank: {_mean_and_most(counted.fetched)}",
            f"  key tokens sent a rank:    {_mean_and_most(counted.sent)}",
        ]
    lines += [
        _folded("  bytes sent a rank:         ", [_mean_and_most(spent.bytes)]),
        f"  balance (mean work / most loaded rank): {spent.balance:.4f}",
    ]
    return "\n".join(lines)


def _mean_and_most(numbers: Sequence[int]) -> str:
    most = max(numbers)
    return f"mean {sum(numbers) / len(numbers):.1f}, most {most} (rank {numbers.index(most)})"


def _folded(head: str, words: Iterable[str], indent: int | None = None) -> str:
    """Words after a head on lines of at most 80 columns, further lines indented as far as the head reaches."""
    margin = " " * (len(head) if indent is None else indent)
    text = " ".join(words).rstrip()
    if len(head) + len(text) <= WIDTH:
        return (head + text).replace(_TIED, " ")
    text = " ".join(filter(None, text.split(" ")))  # columns no longer stand below each other
    lines = textwrap.wrap(text, WIDTH, initial_indent=head, subsequent_indent=margin, break_on_hyphens=False)
    return "\n".join(lines).replace(_TIED, " ")
