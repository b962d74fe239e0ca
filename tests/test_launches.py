"""What a stage launches besides its kernels: copies of keys, one merge, one sum; no fills, no casts, nothing for each document."""

from __future__ import annotations

import random
import threading
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dtensor_ring.comm import LoopbackTransport, Pending
from dtensor_ring.ops.executors import gradients, merge
from dtensor_ring.ops.executors.parts import MOST_OUTPUTS
from dtensor_ring.ops.executors.plan_executor import Executor
from dtensor_ring.ops.kernels import Kernel, Result, Saved, SoftmaxParams
from dtensor_ring.planning.documents import Documents
from dtensor_ring.planning.layout import Layout
from dtensor_ring.planning.mask import Band
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.schedule import Plan, plan

LOCAL, HEADS, DIM = 64, 4, 8
LAUNCHES_NOTHING = {"aten::view", "aten::slice.Tensor", "aten::transpose.int", "aten::split_with_sizes", "aten::split.Tensor"}
LAUNCHES_NOTHING |= {"aten::select.int", "aten::unsqueeze", "aten::detach", "aten::alias", "aten::empty.memory_format"}


class Launches(TorchDispatchMode):
    """Operators that run inside by name, without those of what stands for something else: a kernel, a transfer, a fused sum."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter()
        self.rests = []
        self.inside = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.inside and func.name() not in LAUNCHES_NOTHING:
            self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))

    @contextmanager
    def one(self, name):
        """All that runs inside counts as one launch of that name; for None it counts as none."""
        self.counts[name] += name is not None and not self.inside
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1


here = threading.local()  # `here.counting` is that of the rank that runs in this thread


class QuietTransport(LoopbackTransport):
    """Its own operators are not counted: it stands for a transport that receives into memory as it is."""

    def empty(self, shape, like, dtype=None):
        with here.counting.one(None):
            return super().empty(shape, like, dtype)

    def _exchange(self, sends, receives):
        with here.counting.one(None):
            pending = super()._exchange(sends, receives)

        def finish():
            with here.counting.one(None):
                return pending.wait()

        return Pending(finish)


class CountedKernel(Kernel):
    """Gives tensors of the right shapes."""

    name = "counted"

    def unavailable(self, need):
        return None

    def lacks(self, need):
        return None

    def forward(self, q, k, v, block):
        with here.counting.one("kernel"):
            shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
            return Result(torch.zeros_like(q), torch.zeros(shape))

    def backward(self, saved, dout, block):
        with here.counting.one("kernel"):
            return tuple(torch.zeros_like(x) for x in saved[:3])


@pytest.fixture
def launches(monkeypatch):
    """What gives for each rank of a problem its plan, and what forward and backward launch."""
    for module, name in ((merge, "merge_"), (gradients, "add_up")):
        whole = getattr(module, name)

        def counted(*arguments, whole=whole, name=name):
            if name == "merge_":
                here.counting.rests.append(arguments[3])
            with here.counting.one(name):
                return whole(*arguments)

        monkeypatch.setattr(module, name, counted)

    def of_problem(problem: AttentionProblem, batch: int = 1) -> list[tuple[Plan, Counter, Counter]]:
        def rank_body(transport):
            each = plan(problem, transport.rank)
            q, dout, out = (torch.zeros(batch, LOCAL, HEADS, DIM, dtype=torch.bfloat16) for _ in range(3))
            k, v = (torch.zeros(batch, LOCAL, 2, DIM, dtype=torch.bfloat16) for _ in range(2))
            lse = torch.zeros(batch, HEADS, LOCAL)
            executor = Executor(each, transport, CountedKernel(), SoftmaxParams(0.3))
            found = []
            for act in (lambda: executor.forward(q, k, v), lambda: executor.backward(Saved(q, k, v, out, lse), dout)):
                for _ in range(2):  # index tensors are made the first time
                    here.counting = Launches()
                    with here.counting:
                        act()
                found.append(here.counting.counts)
                if here.counting.rests:
                    # What rounding drops is written only for a later merge, and never where no query is merged twice.
                    *others, last = here.counting.rests
                    assert not last.needed
                    assert all(rests.needed == (each.q_parts > 2) for rests in others)
            return each, *found

        return QuietTransport.run(problem.world, rank_body)

    return of_problem


def problem_of(layout: str, stages: int, documents: Documents | None = None, world: int = 4) -> AttentionProblem:
    length = world * LOCAL
    return AttentionProblem(Layout.parse(layout), Band(0, None), length, length, world, "ring", documents, stages=stages)


def random_documents(count: int, length: int) -> Documents:
    return Documents(((0, *sorted(random.Random(count).sample(range(1, length), count - 1)), length),))


CASES = [(layout, None) for layout in ("contiguous", "zigzag", "stripe")]
CASES += [(layout, count) for layout in ("contiguous", "zigzag", "zigzag/documents") for count in (2, 60)]


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize(("layout", "documents"), CASES)
def test_a_stage_is_its_kernels_the_copies_of_its_keys_and_one_merge(launches, layout, documents, stages):
    """Two blocks of one stage are merged in one go; the first of all is merged into, and costs nothing."""
    for each, forward, _ in launches(problem_of(layout, stages, documents and random_documents(documents, 4 * LOCAL))):
        calls = [len(step.calls) for step in each.steps]
        merges = [-(-count // MOST_OUTPUTS) for count in (calls[0] - 1, *calls[1:])]
        assert forward["merge_"] == sum(merges)
        assert forward["kernel"] == sum(calls)
        assert forward["aten::index_select"] <= 4 * len(each.steps)  # keys and values: taken out for others, and put in order
        assert set(forward) <= {None, "kernel", "merge_", "aten::index_select"}


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize(("layout", "documents"), CASES)
def test_a_stage_backward_adds_copies_of_gradients_one_sum_of_dq_and_one_of_dk_and_dv(launches, layout, documents, stages):
    for each, _, backward in launches(problem_of(layout, stages, documents and random_documents(documents, 4 * LOCAL))):
        calls = [len(step.calls) for step in each.steps]
        several = sum(count > 1 for count in calls)
        assert backward["kernel"] == sum(calls)
        # Between stages dq and what came back are summed; at the end of all each once more.
        assert backward["add_up"] <= 2 * stages + 1 + several
        assert backward["aten::cat"] <= 2 * several  # dk and dv of several calls, side by side
        # As forward, and gradients of keys are taken apart as those were put together.
        assert backward["aten::index_select"] <= 6 * len(each.steps)
        # What is summed over several stages begins in float32 as a copy: dq, and dk and dv where all keys come back at once.
        assert backward["aten::_to_copy"] <= (3 if stages > 1 else 0)
        empty = sum(not step.calls for step in each.steps)  # gradients of no keys
        assert backward["aten::zeros"] == 2 * empty
        assert set(backward) <= {None, "kernel", "add_up", "aten::cat", "aten::index_select", "aten::_to_copy", "aten::zeros"}


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_one_stage_merges_once_and_sums_dq_once_and_dk_with_dv_once(launches, layout):
    for each, forward, backward in launches(problem_of(layout, 1)):
        if not each.steps[1].calls:
            continue
        assert forward["merge_"] == 1
        one_range = [send for send in each.sends[1] if len(send.ranges) == 1]
        several_sends = len(one_range) == len(each.sends[1]) > 2  # more than fit one sum beside the own part
        assert backward["add_up"] == (1 if not each.sends[1] else 2 + several_sends)
