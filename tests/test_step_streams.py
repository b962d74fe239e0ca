"""Two streams for the two steps of a plan: which plans have them, and that they change no bit of the result."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers import make_case, run_loopback

from dtensor_ring import Documents
from dtensor_ring.ops.executors import step_streams
from dtensor_ring.ops.executors.step_streams import StepStreams
from dtensor_ring.ops.kernels import KERNELS
from dtensor_ring.planning.schedule import plan


@pytest.mark.parametrize(
    ("layout", "world", "strategy", "stages", "options", "expected"),
    [
        ("zigzag", 4, "ring", 1, {}, True),
        ("zigzag", 4, "ring", 3, {}, False),  # results of three transfers would wait for the end
        ("zigzag", 1, "ring", 0, {}, False),
        ("zigzag", 4, "gather", 0, {}, False),  # one step has all keys
        ("zigzag/documents", 2, "ring", 1, {"documents": Documents.from_lengths([800, 200, 24])}, True),
    ],
)
def test_plans_of_own_keys_and_one_transfer_have_two_parts(layout, world, strategy, stages, options, expected):
    problem = make_case(1024, **options).problem(layout, world, strategy, stages)
    assert {plan(problem, rank).is_on_two_streams("torch_flash") for rank in range(world)} == {expected}


def test_a_plan_whose_first_call_is_not_of_all_queries_stays_on_one_stream():
    """A piece of one token has another window, and comes first: what others are merged into would have to be filled."""
    documents = Documents.from_lengths([8, 9, 4, 2, 5, 5, 1, 14, 11, 5])
    problem = make_case(64, documents=documents).problem("zigzag", 4, "ring", 1)
    firsts = {rank: plan(problem, rank).steps[0].calls[0].queries for rank in range(4)}
    assert {rank: queries == (0, 16) for rank, queries in firsts.items()} == {0: True, 1: True, 2: False, 3: True}
    assert [plan(problem, rank).is_on_two_streams("torch_flash") for rank in range(4)] == [True, True, False, True]


def test_kernels_that_keep_every_multiprocessor_stay_on_one_stream():
    todo = plan(make_case(64).problem("zigzag", 2, "ring", 1), 0)
    assert {name for name in KERNELS if todo.is_on_two_streams(name)} == {"torch_flash", "flash_attn_2"}


def test_a_pass_on_a_cpu_stays_where_it_is():
    todo = plan(make_case(64).problem("zigzag", 2, "ring", 1), 0)
    with StepStreams(todo, torch.empty(1, 1 << 20, 1, 1, device="meta"), "torch_flash", begun=False) as streams:
        assert not streams.are_two


class FakeStream:
    """Takes note of what it is asked to wait for, in one log of all streams."""

    def __init__(self, log: list, name: str) -> None:
        self.log, self.name, self.device = log, name, "a device"

    def wait_stream(self, other) -> None:
        self.log.append((self.name, "waits for all of", other.name))

    def wait_event(self, event) -> None:
        self.log.append((self.name, "waits for", event))

    def record_event(self) -> str:
        return f"what {self.name} has so far"


@pytest.fixture
def faked(monkeypatch):
    """A log of what streams are asked for, and what makes the streams of a rank that has keys of two others."""
    log: list[tuple] = []
    first, second = FakeStream(log, "first"), FakeStream(log, "second")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: first)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: log.append(("current is", stream.name)))
    monkeypatch.setattr(step_streams, "_second_stream", lambda stream: second)
    todo = plan(make_case(64).problem("zigzag", 4, "ring", 1), 1)
    like = SimpleNamespace(is_cuda=True, shape=(1, 4096), get_device=lambda: 0)
    return log, lambda: StepStreams(todo, like, "torch_flash", begun=False)


@pytest.mark.parametrize("calls", [1, 2])
def test_streams_wait_for_each_other_where_one_reads_what_the_other_made(calls, faked):
    """The memory rules: also at the end, where the first stream has read keys that the second allocated."""
    log, make = faked
    with make() as streams:
        with streams.of_step(0), streams.of_call(0, 0):
            streams.divide(0, 3)  # calls on own keys stay where they are
        with streams.of_step(1):
            streams.divide(1, calls)
            for number in range(calls):
                with streams.of_call(1, number):
                    log.append(("call", number))
    shared = [("first", "waits for", "what second has so far")] * (calls > 1)
    moved = [("current is", "first"), ("call", 1), ("current is", "second")] * (calls > 1)
    ends = [("second", "waits for all of", "first")] * (calls > 1)
    assert log == [
        ("second", "waits for all of", "first"),
        ("current is", "second"),
        *shared,
        ("call", 0),
        *moved,
        ("current is", "first"),
        ("first", "waits for all of", "second"),
        *ends,
    ]


@pytest.mark.parametrize("again", [False, True])
def test_after_a_join_a_pass_ends_without_another_unless_the_second_stream_was_used_again(again, faked):
    log, make = faked
    with make() as streams:
        for _ in range(1 + again):
            with streams.of_step(1):
                pass
            if not log.count(("first", "waits for all of", "second")):
                streams.join()
    assert log.count(("first", "waits for all of", "second")) == 1 + again


def test_streams_are_joined_in_an_error_too(faked):
    log, make = faked

    def fails():
        with make() as streams, streams.of_step(1):
            streams.divide(1, 2)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert log[-3:] == [("current is", "first"), ("first", "waits for all of", "second"), ("second", "waits for all of", "first")]


CASES: dict[str, dict] = {
    "zigzag": {},
    "contiguous": {},
    "zigzag/documents": {"documents": Documents.from_lengths([5000, 70, 3000, 1001, 145])},
}


@pytest.mark.gpu
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("layout", CASES)
def test_two_streams_give_the_bits_of_one(layout, world, monkeypatch):
    case = make_case(9216, dim=64, batch=1, dtype=torch.bfloat16, device="cuda", **CASES[layout])
    torch.use_deterministic_algorithms(True)  # the kernel's sums of dq, otherwise in any order
    try:
        made = []
        streams = torch.cuda.Stream
        monkeypatch.setattr(torch.cuda, "Stream", lambda *options, **named: made.append(named) or streams(*options, **named))
        divided, divide = [], StepStreams.divide
        monkeypatch.setattr(StepStreams, "divide", lambda self, *step: divide(self, *step) or divided.append(self._is_divided))
        two = [run_loopback(case, layout, world, "ring", "torch_flash", 1)[0] for _ in range(3)]
        assert {"priority": -1} in made, "no second stream was made"
        assert any(divided) == (world == 4 and layout != "contiguous"), "ranks between others have two calls on their keys"
        monkeypatch.setattr(step_streams, "_FEWEST", 1 << 40)
        one = run_loopback(case, layout, world, "ring", "torch_flash", 1)[0]
    finally:
        torch.use_deterministic_algorithms(False)
    for found in two:
        for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), found, one, strict=True):
            assert torch.equal(a, b), f"{name} differs by {(a - b).abs().max()}"


@pytest.mark.gpu
@pytest.mark.parametrize(("layout", "world"), [("zigzag", 2), ("zigzag/documents", 4)])
def test_memory_that_is_used_again_at_once_changes_no_result(layout, world):
    case = make_case(4096 * world, dim=64, batch=1, dtype=torch.bfloat16, device="cuda")
    case.documents = Documents.from_lengths([9000, 7384]) if world == 4 else None
    torch.use_deterministic_algorithms(True)
    try:
        first = run_loopback(case, layout, world, "ring", "torch_flash", 1)[0]
        for turn in range(40):
            # What the passes gave back is taken and overwritten while the GPU is far behind the host.
            torch.cuda._sleep(2_000_000 * (turn % 3))
            taken = [
                torch.full((1, 4096 >> turn % 4, 4, 64), float("nan"), dtype=torch.bfloat16, device="cuda") for _ in range(turn % 7)
            ]
            found = run_loopback(case, layout, world, "ring", "torch_flash", 1)[0]
            del taken
            for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), found, first, strict=True):
                assert torch.equal(a, b), f"{name} of turn {turn}"
    finally:
        torch.use_deterministic_algorithms(False)
