"""Laws of CUDA graphs over two NCCL ranks: whole calls of attention, whose two steps run on streams of their own. `pytest -m gpu`.

Each rank captures the same calls after one warm call, and replays them in the same order. A rank that waits in vain ends the test:
the pool ends ranks that do not answer in time.
"""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from captured import Act, Captured, attention, bitwise, check_captured_layers, make_inputs, small_llama
from helpers import PER_DOCUMENT, PLACEMENTS, line
from torch import Tensor
from torch.distributed.tensor.parallel import parallelize_module

from dtensor_ring import Documents, Zigzag, debug, ring_plan
from dtensor_ring.ops.executors import step_streams

pytestmark = pytest.mark.gpu(devices=2)
TOKENS = 2048  # of a rank: from so many on a plan of two steps has two streams
LENGTH = 2 * TOKENS
DOCUMENTS, OTHERS = Documents.from_lengths([1900, 7, 1, 1100, 300, 788]), Documents.from_lengths([3000, 1096])
# The layout, the arguments of the call, and whether it has steps for two streams. "ring" is in one stage, as ever on two ranks.
CALLS = {
    "zigzag": ("zigzag", {"strategy": "ring", "stages": 1}, True),
    "packed": ("zigzag", {"strategy": "ring", "stages": 1, "documents": DOCUMENTS}, True),
    "cut one by one": (PER_DOCUMENT, {"strategy": "ring", "stages": 1, "documents": DOCUMENTS}, True),
    "contiguous": ("contiguous", {"strategy": "ring", "stages": 1}, True),
    "window": ("zigzag", {"strategy": "ring", "window": (300, 0)}, False),
    "contiguous window": ("contiguous", {"strategy": "ring", "window": (300, 0), "documents": DOCUMENTS}, False),
    "gather": ("zigzag", {"strategy": "gather"}, False),
    "packed gather": ("zigzag", {"strategy": "gather", "documents": DOCUMENTS}, False),
}


def act_of(name: str) -> Act:
    layout, options, _ = CALLS[name]
    return attention(line("cuda"), PLACEMENTS[layout], LENGTH, kernel="torch_flash", **options)


def fresh() -> list[Tensor]:
    """Inputs that each rank draws for itself."""
    return make_inputs(tokens=TOKENS)


def check_same(name: str, found: list[Tensor], wanted: list[Tensor]) -> None:
    for part, a, b in zip(("out", "lse", "dq", "dk", "dv"), found, wanted, strict=True):
        assert not b.isnan().any(), f"{name}: {part} has NaN"
        assert torch.equal(a, b), f"{name}: {part} is {(a.float() - b.float()).abs().max().item():.1e} apart"


@contextmanager
def second_streams() -> Iterator[list[bool]]:
    """For each pass that takes a second stream, whether it was captured."""
    taken, take = [], step_streams._second_stream

    def noted(first: torch.cuda.Stream) -> torch.cuda.Stream:
        taken.append(torch.cuda.is_current_stream_capturing())
        return take(first)

    with patch.object(step_streams, "_second_stream", noted):
        yield taken


def replayed(name: str) -> None:
    """A call captured after one warm call, and five replays on new inputs."""
    torch.manual_seed(dist.get_rank())
    act = act_of(name)
    with bitwise(), second_streams() as taken:
        graph = Captured(act, fresh(), aside=False)
        # Forward and backward, in the warm call and in the captured one.
        assert taken == ([False, False, True, True] if CALLS[name][2] else [])
        for number in range(5):
            inputs = fresh()
            check_same(f"replay {number}", graph(inputs), act(*inputs))


@pytest.mark.parametrize("name", CALLS)
def test_a_whole_call_over_two_ranks_is_captured_after_one_call_and_replays_are_bitwise_those_without(pools, name):
    pools.run(2, replayed, name, device="cuda", timeout=100)


def interleaved(seed: int) -> None:
    """Replays of several graphs and calls without one, in any order, with nothing that would make ranks or streams wait."""
    rank, names = dist.get_rank(), ("zigzag", "cut one by one", "gather", "window")
    torch.manual_seed(rank)
    acts = {name: act_of(name) for name in names}
    turns = [(name, True) for name in names[:3]] * 5 + [(name, False) for name in names] * 3
    random.Random(seed).shuffle(turns)  # the same on both ranks
    with bitwise():
        graphs = {name: Captured(acts[name], fresh(), aside=False) for name in names[:3]}
        done = []
        for turn, (name, is_replay) in enumerate(turns):
            inputs = fresh()
            # Ranks drift apart: the GPU of one falls behind its host, or the host behind the other rank.
            if turn % 4 == rank:
                torch.cuda._sleep(20_000_000)
            if turn % 6 == 3 * rank:
                time.sleep(0.02)
            results = graphs[name](inputs) if is_replay else [x.clone() for x in acts[name](*inputs)]
            done.append((name, is_replay, inputs, results))
        torch.cuda.synchronize()
        for turn, (name, is_replay, inputs, results) in enumerate(done):
            check_same(f"turn {turn}, {'a replay' if is_replay else 'a call'} of {name}", results, acts[name](*inputs))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_replays_in_order_between_calls_without_graphs_stay_right(pools, seed):
    pools.run(2, interleaved, seed, device="cuda", timeout=100)


def captured_again() -> None:
    """Graphs come and go: each is captured, replayed and let go of before the next one."""
    torch.manual_seed(dist.get_rank())
    with bitwise():
        for name in ("zigzag", "cut one by one", "zigzag", "gather", "cut one by one"):
            act, inputs = act_of(name), fresh()
            graph = Captured(act, fresh(), aside=False)
            check_same(name, graph(inputs), act(*inputs))
            torch.cuda.synchronize()
            del graph
            debug.forget_captured()


def test_graphs_of_one_call_after_another_can_be_captured_and_let_go_of(pools):
    pools.run(2, captured_again, device="cuda", timeout=100)


def layers() -> None:
    model = small_llama(LENGTH)
    parallelize_module(model, line("cuda"), ring_plan(model, Zigzag(1), strategy="ring", kernel="torch_flash"))
    with bitwise(), second_streams() as taken, warnings.catch_warnings():
        # PyTorch keeps the autograd graph of its last warm-up, which ran on another stream, while it captures the backward pass.
        warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream does not match")
        check_captured_layers(model, LENGTH, DOCUMENTS, OTHERS)
        assert sum(taken) == 4, "two layers, forward and backward"


def test_layers_of_a_model_on_two_ranks_train_as_without_graphs(pools):
    pools.run(2, layers, device="cuda", timeout=100)
