"""Look at plans, and count what was sent.

print(draw(Problem(Layout("zigzag"), Band(0), 64, 64, world=4)))       # as `python -m dtensor_ring plan`
before = traffic(mesh["cp"])
...
print(traffic(mesh["cp"]).since(before).bytes)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch.distributed.device_mesh import DeviceMesh

from dtensor_ring.comm import Traffic, transport_of
from dtensor_ring.ops.kernels import KERNELS, Need
from dtensor_ring.ops.schedule import Plan, Problem, plan
from dtensor_ring.ops.steps import Call, Rows, Segment, Step

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


def kernel_table() -> str:
    """Which kernel supports what, as Markdown, asked of the kernels themselves; where one does not, its reason follows."""
    base = Need("cuda", torch.bfloat16, 64, 64, training=True)
    probes = {
        "float64": replace(base, dtype=torch.float64),
        "float32": replace(base, dtype=torch.float32),
        "bfloat16": base,
        "float16": replace(base, dtype=torch.float16),
        "head dim 128": replace(base, head_dim=128, v_head_dim=128),
        "head dim 256": replace(base, head_dim=256, v_head_dim=256),
        "head dim 80": replace(base, head_dim=80, v_head_dim=80),
        "value dim of its own": replace(base, head_dim=128, v_head_dim=64),
        "softcap": replace(base, softcap=30.0),
        "dropout": replace(base, dropout=True),
        "softcap and dropout": replace(base, softcap=30.0, dropout=True),
        "ALiBi, blocks that end together": replace(base, alibi="aligned"),
        "ALiBi, any blocks": replace(base, alibi="shifted"),
        "deterministic backward": replace(base, deterministic=True),
    }
    names = list(KERNELS)
    lines = ["| | " + " | ".join(f"`{name}`" for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    reasons: dict[str, list[str]] = {name: [] for name in names}
    for feature, need in probes.items():
        cells = []
        for name in names:
            reason = KERNELS[name].lacks(need)
            cells.append("yes" if reason is None else "no")
            if reason is not None and reason not in reasons[name]:
                reasons[name].append(reason)
        lines.append(f"| {feature} | " + " | ".join(cells) + " |")
    notes = [f"- `{name}`: {'; '.join(found)}." for name, found in reasons.items() if found]
    return "\n".join([*lines, "", *notes])


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
        runs = problem.q_runs(rank)
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
    held = [problem.k_tokens(rank) for rank in range(problem.world)]
    for each in plans:
        queries = problem.q_tokens(each.rank)
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
