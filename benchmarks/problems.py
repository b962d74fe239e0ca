"""From a case to the problem that is planned, the calls that are timed, and the ranks worth measuring."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.timing import Call
from dtensor_ring.comm import Transport
from dtensor_ring.ops.executors.plan_executor import Executor
from dtensor_ring.ops.executors.step_streams import StepStreams
from dtensor_ring.ops.kernels import Kernel, Saved, SoftmaxParams
from dtensor_ring.planning.costs import AttentionShape
from dtensor_ring.planning.devices import KNOWN
from dtensor_ring.planning.documents import Documents
from dtensor_ring.planning.kernel_calls import KernelCall
from dtensor_ring.planning.layout import Layout
from dtensor_ring.planning.mask import Band
from dtensor_ring.planning.predict import Predictor
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.schedule import Plan, plan
from dtensor_ring.planning.stage_choice import choose_stages
from dtensor_ring.planning.totals import totals

BLOCK = 128  # queries and keys of the blocks that flash kernels compute


def problem_of(case: Case, kernel: str = "torch_flash") -> AttentionProblem:
    """The attention of a case; where it leaves the stages open, those that are fastest with `kernel`."""
    layout, band = Layout.parse(case.layout), Band.parse(case.mask)
    documents = Documents.from_lengths(list(case.lengths)) if case.lengths else None
    problem = AttentionProblem(layout, band, case.length, case.length, case.world, case.strategy or "ring", documents)
    if case.stages:
        return problem.staged(case.stages)
    # As the library chooses on the GPUs that we measure: over this link, by figures of H100, which hold for H200 too.
    shape = AttentionShape(case.heads, case.kv_heads, case.head_dim, case.head_dim)
    return choose_stages(problem, Predictor(KNOWN["h100"], kernel, shape, case.link.known()))


def calls_of(case: Case, transport: Transport, kernel: Kernel, device: torch.device, dtype: torch.dtype) -> tuple[Call, Call]:
    """The forward pass of the transport's rank by its executor, and forward with backward, on random tensors."""
    problem, rank = problem_of(case, kernel.name), transport.rank
    executor = Executor(plan(problem, rank), transport, kernel, SoftmaxParams(case.head_dim**-0.5))
    heads = case.heads, case.kv_heads, case.kv_heads, case.heads
    shapes = [(1, problem.q_local(rank), each, case.head_dim) for each in heads]
    q, k, v, dout = (torch.randn(shape, device=device, dtype=dtype) for shape in shapes)

    def both() -> None:
        out, lse = executor.forward(q, k, v)
        executor.backward(Saved(q, k, v, out, lse), dout)

    return lambda: executor.forward(q, k, v), both


def kernels_of(case: Case, transport: Transport, kernel: Kernel, device: torch.device, dtype: torch.dtype) -> tuple[Call, Call]:
    """The kernel calls that `calls_of` makes, alone: nothing is exchanged, merged or added up, and all keys are there at once."""
    todo = plan(problem_of(case, kernel.name), transport.rank)
    executor = Executor(todo, transport, kernel, SoftmaxParams(case.head_dim**-0.5))

    def pair(tokens: int, heads: int) -> tuple[Tensor, Tensor]:
        x, y = torch.randn((2, 1, tokens, heads, case.head_dim), device=device, dtype=dtype)
        return x, y

    own = todo.problem.q_local(transport.rank)
    q, dout = pair(own, case.heads)
    out, lse = executor.forward(q, *pair(own, case.kv_heads))
    keys, block_of = [pair(step.key_count, case.kv_heads) for step in todo.steps], executor._blocks(q, 0)

    def forward() -> None:
        with StepStreams(todo, q, kernel.name, begun=False) as streams:
            for index in executor.forward_order:
                calls = todo.steps[index].calls
                with streams.of_step(index):
                    streams.divide(index, len(calls))
                    for number, call in enumerate(calls):
                        with streams.of_call(index, number):
                            executor._forward_call(q, *keys[index], call, block_of(index, number))

    def both() -> None:
        forward()
        with StepStreams(todo, q, kernel.name, begun=False) as streams:
            for index in executor.backward_order:
                with streams.of_step(index):
                    for number, call in enumerate(todo.steps[index].calls):
                        executor._backward_call(Saved(q, *keys[index], out, lse), dout, call, block_of(index, number))

    return forward, both


def flops_of(case: Case) -> tuple[float, float]:
    """Floating point operations a rank, of forward, and of forward with backward, which computes 2.5 times as much again."""
    forward = 4 * case.head_dim * case.heads * sum(totals(problem_of(case)).scores) / case.world
    return forward, 3.5 * forward


def strategy_of(case: Case, kernel: str) -> str:
    """What tables call the strategy of a case, with its number of stages."""
    problem = problem_of(case, kernel)
    return f"ring/{problem.transfers}" if problem.strategy == "ring" and not problem.is_halo else problem.strategy


def predicted_blocks(todo: Plan) -> int:
    """Blocks of 128 x 128 scores that a kernel computes for all calls of a plan; one with a single needed score counts whole."""
    return sum(_blocks(call) for step in todo.steps for call in step.calls)


def _blocks(call: KernelCall) -> int:
    left, right = call.window
    total = 0
    for segment in call.segments:
        queries, keys = segment.q1 - segment.q0, segment.k1 - segment.k0
        for first in range(0, queries, BLOCK):
            last = min(first + BLOCK, queries) - 1
            low = 0 if left < 0 else max(0, first + keys - queries - left)
            high = keys - 1 if right < 0 else min(keys - 1, last + keys - queries + right)
            total += high // BLOCK - low // BLOCK + 1
    return total


def ranks_to_measure(case: Case, most: int = 8) -> list[int]:
    """All ranks of a small world; of a large one those with the most blocks, and those that fetch the most keys."""
    if case.world <= most:
        return list(range(case.world))
    if not case.lengths:
        return sorted({0, case.world // 2, case.world - 1})  # without documents ranks differ in where their keys come from only
    return predicted_slowest(case)


def predicted_slowest(case: Case, by_work: int = 3, by_keys: int = 1) -> list[int]:
    """The ranks with the most blocks, and those that fetch the most keys."""
    problem = problem_of(case)
    plans = [plan(problem, rank) for rank in range(case.world)]
    work = sorted(range(case.world), key=lambda rank: -predicted_blocks(plans[rank]))
    keys = sorted(range(case.world), key=lambda rank: -sum(step.key_count for step in plans[rank].steps))
    return sorted({*work[:by_work], *keys[:by_keys]})
