"""Look at plans, and count what was sent.

print(draw(Problem(Layout("zigzag"), Band(0), 64, 64, world=4)))       # as `python -m dtensor_ring plan`
before = traffic(mesh["cp"])
...
print(traffic(mesh["cp"]).since(before).bytes)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch.distributed.device_mesh import DeviceMesh

from dtensor_ring.comm import Traffic, transport_of
from dtensor_ring.ops.schedule import Call, Plan, Problem, Rows, Segment, Step, plan

_WIDEST = 32
_LARGEST = 4096
_SIGNS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def traffic(mesh: DeviceMesh) -> Traffic:
    """What this rank has sent over a mesh of one axis since its group was made, by attention and redistribution alike."""
    if mesh.ndim != 1:
        raise ValueError(f"traffic is counted for one mesh axis, such as mesh['cp'], found {mesh.ndim} axes")
    return transport_of(mesh.get_group(0)).traffic.copy()


def draw(problem: Problem) -> str:
    """A plan as text: who holds what, what each rank computes and exchanges in each step, work and balance."""
    plans = [plan(problem, rank) for rank in range(problem.world)]
    parts = [_title(problem), _holdings(problem), _matrix(problem, plans)]
    parts += [_steps(problem, each) for each in plans]
    parts.append(_summary(plans))
    return "\n\n".join(part for part in parts if part)


def balance(plans: Sequence[Plan]) -> float:
    """Mean work over the most loaded rank's: 1 is perfect."""
    most = max(each.cells for each in plans)
    return sum(each.cells for each in plans) / len(plans) / most if most else 1.0


def _title(problem: Problem) -> str:
    band = problem.band
    left, right = ("unbounded" if side is None else side for side in (band.hi, None if band.lo is None else -band.lo))
    name = f"window {left} back, {right} ahead"
    if band.hi is None and band.lo in (None, 0):
        name = "full" if band.lo is None else "causal"
    way = "halo: the keys around each chunk" if problem.is_halo else problem.strategy
    documents = "" if problem.documents is None else f", {problem.documents}"
    return f"{problem.layout}, {name}, {problem.q_length} tokens over {problem.world} ranks, {way}{documents}"


def _holdings(problem: Problem) -> str:
    lines = ["who holds what"]
    for rank in range(problem.world):
        runs = problem.layout.runs(problem.q_length, problem.world, rank)
        what = " | ".join(_tokens(run.start, run.count, run.stride, run.block) for run in runs) or "nothing"
        lines.append(f"  rank {rank}: {what:<40} {sum(run.count for run in runs)} tokens")
    return "\n".join(lines)


def _tokens(start: int, count: int, stride: int, block: int) -> str:
    last = start + (count - 1) // block * stride + (count - 1) % block
    if count == 1:
        return f"{start}"
    if stride == 1 or count <= block:
        return f"{start}..{last}"
    each = f"{block} in {stride}" if block > 1 else f"every {stride}th"
    return f"{start}..{last} {each}"


def _matrix(problem: Problem, plans: Sequence[Plan]) -> str:
    """The step in which each score is computed, queries down and keys across, both in position order."""
    if not 0 < problem.q_length * problem.k_length <= _LARGEST**2:
        return ""
    scale = -(-max(problem.q_length, problem.k_length) // _WIDEST)
    rows, columns = -(-problem.q_length // scale), -(-problem.k_length // scale)
    cells = [["."] * columns for _ in range(rows)]
    held = [problem.layout.tokens(problem.k_length, problem.world, rank) for rank in range(problem.world)]
    for each in plans:
        queries = problem.layout.tokens(problem.q_length, problem.world, each.rank)
        for index, step in enumerate(each.steps):
            keys = [held[part.source][i] for part in step.keys for i in range(part.start, part.stop)]
            for call in step.calls:
                for i, j in _samples(call, queries, keys, scale):
                    cells[queries[i] // scale][keys[j] // scale] = _SIGNS[index % len(_SIGNS)]
    size = f", a sign is {scale} x {scale} tokens" if scale > 1 else ""
    head = f"step in which a score is computed (queries down, keys across{size})"
    return "\n".join([head, *("  " + " ".join(row) for row in cells)])


def _samples(call: Call, queries: Sequence[int], keys: Sequence[int], scale: int) -> Iterable[tuple[int, int]]:
    """Scores of a call, one or more for each sign of the picture that it touches."""
    left, right = call.window
    for segment in call.segments:
        if segment.row:
            continue
        offset = (segment.k1 - segment.k0) - (segment.q1 - segment.q0)
        for i in _thinned(segment.q0, segment.q1, queries, scale):
            at = i - segment.q0 + offset
            low = segment.k0 if left < 0 else max(segment.k0, segment.k0 + at - left)
            high = segment.k1 if right < 0 else min(segment.k1, segment.k0 + at + right + 1)
            for j in _thinned(low, high, keys, scale):
                yield i, j


def _thinned(start: int, stop: int, tokens: Sequence[int], scale: int) -> Iterable[int]:
    seen = -1
    for i in range(start, stop):
        if tokens[i] // scale != seen:
            seen = tokens[i] // scale
            yield i


def _steps(problem: Problem, each: Plan) -> str:
    lines = [f"rank {each.rank}"]
    for index, step in enumerate(each.steps):
        sends = ", ".join(f"{_rows(send.rows)} to rank {send.rank}" for send in each.sends[index])
        if problem.collective:
            sends = "its keys to every rank"
        lines.append(f"  step {index}: {_fetched(step, each.rank):<34} {_calls(step):<34} sends {sends or 'nothing'}")
    return "\n".join(lines)


def _fetched(step: Step, rank: int) -> str:
    by_source: dict[int, list[Rows]] = {}
    for rows in step.keys:
        by_source.setdefault(rows.source, []).append(rows)
    if not by_source:
        return "no keys needed"
    return ", ".join(f"{'own keys' if s == rank else f'rank {s}'} {_rows(rows)}" for s, rows in by_source.items())


def _rows(rows: Sequence[Rows]) -> str:
    shown = "+".join(f"[{part.start}, {part.stop})" for part in rows[:3])
    return shown + (f" and {len(rows) - 3} more" if len(rows) > 3 else "")


def _calls(step: Step) -> str:
    if not step.calls:
        return "no work"
    kinds = ", ".join(_call(call.window, call.segments) for call in step.calls)
    return f"{kinds}: {step.cells} scores"


def _call(window: tuple[int, int], segments: Sequence[Segment]) -> str:
    name = {(-1, -1): "full", (-1, 0): "causal"}.get(window, f"window {window}")
    return name if len(segments) == 1 else f"{name} x {len(segments)} segments"


def _summary(plans: Sequence[Plan]) -> str:
    lines = ["per forward pass"]
    for each in plans:
        sent = f"sends {each.rows_sent} key rows in {each.messages} messages"
        lines.append(f"  rank {each.rank}: {each.cells} scores in {each.calls} calls; {sent}")
    lines.append(f"  balance (mean work / most loaded rank): {balance(plans):.4f}")
    return "\n".join(lines)
