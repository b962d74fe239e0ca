"""The benchmarks tell the truth: what is timed, how it is compared, and that nothing wrong is given a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import cases as suite
from benchmarks import emulate, layouts, targets
from benchmarks.cases import Case
from benchmarks.checking import small, wrong_numbers
from benchmarks.emulate import Emulation
from benchmarks.links import EmulatedTransport
from benchmarks.problems import calls_of, kernels_of, predicted_slowest, problem_of
from benchmarks.record import load
from benchmarks.timing import Effort, Stopwatch, ratio
from dtensor_ring.ops.kernels import KERNELS, Result
from dtensor_ring.ops.kernels.math import MathKernel

CPU = torch.device("cpu")
QUICK = Stopwatch(CPU, Effort(rounds=2, block=0.0))
TINY = Case("tiny", tokens=16, heads=2, kv_heads=1, head_dim=8, world=4)


class Doubling(MathKernel):
    """Gives twice the values."""

    def forward(self, q, k, v, block):
        out, lse = super().forward(q, k, v, block)
        return Result(2 * out, lse)


class Forgetful(MathKernel):
    """Is right about whole shares only."""

    def forward(self, q, k, v, block):
        out, lse = super().forward(q, k, v, block)
        return Result(out, lse) if q.shape[1] == k.shape[1] else Result(out, lse + 1)


def test_every_rank_is_timed_shortly_and_the_slowest_in_turns_with_the_ideal(monkeypatch):
    """Calls give their own times here, in milliseconds: forward and both, of the ideal and of four ranks."""
    times = {(1, 0): (3.0, 9.0), (4, 0): (10.0, 44.0), (4, 1): (11.0, 30.0), (4, 2): (16.0, 40.0), (4, 3): (15.0, 48.0)}
    monkeypatch.setattr(Emulation, "calls", lambda _, case, rank, kernel, allocate=False: times_of(times[case.world, rank]))
    monkeypatch.setattr(Emulation, "kernels", lambda _, case, rank, kernel: times_of({2: (8.0, 30.0), 3: (12.0, 40.0)}[rank]))
    monkeypatch.setattr(Stopwatch, "block", lambda _, call, count: call())
    row = Emulation(QUICK, slowest=2).measure(TINY, KERNELS["math"])
    assert row.wrong == ""
    assert row.shortly == {rank: times[4, rank] for rank in range(4)}
    assert row.fully == 2
    assert row.ms == (16.0, 48.0)
    assert row.ratio == (4 * 3.0 / 16.0, 4 * 9.0 / 48.0)
    assert row.kernels == (row.ratio[0] * 16.0 / 8.0, row.ratio[1] * 48.0 / 40.0)  # of the slowest: rank 2, then rank 3
    strict = Emulation(QUICK).measure(replace(TINY, strict=True), KERNELS["math"])
    assert strict.kernels == (strict.ratio[0] * 16.0 / 8.0, strict.ratio[1] * 48.0 / 40.0)
    assert strict.ratio == (3.0 / 4 / 16.0, 9.0 / 4 / 48.0)
    scores = 64 * 65 / 2
    assert row.tflops == pytest.approx([4 * 8 * 2 * scores / 4 / 16.0 / 1e9, 3.5 * 4 * 8 * 2 * scores / 4 / 48.0 / 1e9])


def times_of(both: tuple[float, float]):
    return (lambda: both[0]), (lambda: both[1])


def test_an_emulated_case_runs_on_a_cpu():
    row = Emulation(QUICK).measure(replace(TINY, lengths=(40, 24), strict=True), KERNELS["math"])
    assert row.wrong == ""
    assert min(*row.ms, *row.ratio, *row.host, *row.tflops) > 0
    assert row.calls >= 2


class Noting(MathKernel):
    """Takes note of the lengths, the window and the segments of every call, and of the pass."""

    def __init__(self) -> None:
        super().__init__()
        self.noted = []

    def forward(self, q, k, v, block):
        self.noted.append(("forward", q.shape, k.shape, block.window, block.varlen and block.varlen.segments))
        return super().forward(q, k, v, block)

    def backward(self, saved, dout, block):
        self.noted.append(("backward", dout.shape, saved.k.shape, block.window, block.varlen and block.varlen.segments))
        return super().backward(saved, dout, block)


@pytest.mark.parametrize("lengths", [(), (40, 24), (7, 30, 27)])
def test_kernels_alone_are_the_calls_that_an_attention_makes(lengths):
    case = replace(TINY, layout="zigzag/documents" if lengths else "zigzag", lengths=lengths, strict=True)
    for rank in range(case.world):
        notes = []
        for calls in (calls_of, kernels_of):
            kernel = Noting()
            made = calls(case, EmulatedTransport(rank, case.world, case.link, CPU), kernel, CPU, torch.float32)
            for call in made:
                kernel.noted.clear()
                call()
                notes.append(list(kernel.noted))
        assert notes[:2] == notes[2:]
        assert {name for name, *_ in notes[1]} == {"forward", "backward"}


@pytest.mark.parametrize("kernel", [Doubling(), Forgetful()])
def test_what_is_wrong_gets_no_time(kernel):
    row = Emulation(QUICK).measure(TINY, kernel)
    assert row.ms == (0.0, 0.0)
    assert not row.shortly
    assert "WRONG: out" in row.line()


@pytest.mark.parametrize("case", [suite.window(8), *suite.lists(8), *suite.tails(8, [1])], ids=lambda case: case.name)
def test_the_check_keeps_the_proportions_of_a_case(case):
    fewer, factor = small(case, 256), 256 / case.tokens
    assert problem_of(fewer).is_halo == problem_of(case).is_halo
    assert all(abs(a - factor * b) <= max(1, factor * b) for a, b in zip(fewer.lengths, case.lengths, strict=False))
    if case.mask.startswith("window"):
        assert fewer.mask == f"window:{int(4095 * factor)},0"
        assert fewer.length > 2 * 4095 * factor


def test_the_check_is_of_the_window_itself():
    """A window that is as long as the whole would be no window."""
    case = suite.window(4, back=63, tokens=64, heads=2, kv_heads=1, head_dim=8)
    assert wrong_numbers(case, KERNELS["math"], CPU, torch.float32, tokens=64) == ""
    assert small(case, 16).mask == "window:15,0"


def test_a_ratio_is_the_median_over_rounds_of_the_ideal_over_the_slowest():
    assert ratio([2.0, 4.0, 6.0], [[4.0, 4.0, 4.0], [1.0, 8.0, 6.0]]) == 0.5


def test_calls_are_timed_in_turns():
    order = []
    Stopwatch(CPU, Effort(rounds=3, block=0.0)).in_turns([lambda: order.append("a"), lambda: order.append("b")])
    assert "".join(order).endswith("aabb" * 3)  # a call that is not counted, and one that is


def test_every_target_has_cases_for_every_kernel_of_its_family():
    present = {family: names[0] for family, names in targets.FAMILIES.items()}
    cases = list(targets.targets(present, [1, 2]))
    emulated = [target for target in targets.TARGETS if target.benchmark == "emulate"]
    for target in emulated:
        wanted = set(present.values()) if target.family == "best" else {present[target.family]}
        assert wanted <= {case.kernel for case in cases if case.target == target.name}
    assert {case.target for case in cases} == {target.name for target in emulated}
    assert all(case.stages is None and case.strategy is None for case in cases)
    on_a_cpu = list(targets.targets({}, [1]))
    assert on_a_cpu
    assert {case.kernel for case in on_a_cpu} == {None}


def test_packings_are_of_all_kinds_and_fill_the_ranks():
    cases = [layouts.packing(seed, 8, 512) for seed in range(40)]
    assert all(sum(case.lengths) == 8 * 512 for case in cases)
    assert all(min(case.lengths) > 0 for case in cases)
    assert {case.name.rsplit(" ", 1)[0] for case in cases} == {"long tail", "short", "long", "equal", "one long"}
    assert layouts.packing(3, 8, 512) == layouts.packing(3, 8, 512)
    assert all(sum(case.lengths) in (0, 8 * 512) for case in layouts.packings_for_stages(8, 512))


def test_layouts_are_compared_by_their_slowest_ranks(monkeypatch):
    """Calls give their own times here: plain zigzag's ranks 8 and 10, 28 and 30; the other's 4 and 5, 40 and 60."""
    found = {"zigzag": [(8.0, 28.0), (10.0, 30.0)], targets.PACKED: [(4.0, 40.0), (5.0, 60.0)]}
    monkeypatch.setattr(layouts, "predicted_slowest", lambda case, *_: [0, 1])
    monkeypatch.setattr(layouts.Comparison, "calls", lambda _, case, rank, kernel: times_of(found[case.layout][rank]))
    monkeypatch.setattr(Stopwatch, "block", lambda _, call, count: call())
    comparison, case = layouts.Comparison(QUICK), replace(TINY, layout=targets.PACKED, lengths=(40, 24))
    row = comparison.measure(case, KERNELS["math"])
    assert (row.plain_ms, row.ms, row.ratio) == ((10.0, 30.0), (5.0, 60.0), (2.0, 0.5))
    assert comparison.measure(case, Doubling()).wrong.startswith("out ")


def test_a_stage_costs_what_more_stages_take_longer(monkeypatch):
    """A call's host time here is its number of stages, and ten times that with backward."""
    monkeypatch.setattr(layouts.Comparison, "calls", lambda _, case, rank, kernel: times_of((case.stages, 10.0 * case.stages)))
    monkeypatch.setattr(Stopwatch, "host_time", lambda _, call: call())
    row = layouts.Comparison(QUICK).stages(replace(TINY, world=8), KERNELS["math"])
    assert (row.over_ms, row.target) == ((1.0, 10.0), targets.STAGE)


def test_the_ranks_predicted_to_be_slowest_have_the_most_blocks_and_keys():
    case = Case("one long", layout="contiguous", world=4, tokens=512, lengths=(1024, *[64] * 16))
    assert predicted_slowest(case, 1, 0) == [1]  # the second half of the long document
    assert predicted_slowest(case, 1, 1) == [1]
    assert predicted_slowest(case, 2, 0) == [0, 1]


def test_the_command_line_measures_prints_and_saves(tmp_path, monkeypatch, capsys):
    path = tmp_path / "run.json"
    sizes = f"--cases batch lists --world 2 --tokens 16 --rounds 1 --block 0 --stages 1 --json {path}"
    monkeypatch.setattr("sys.argv", ["emulate", *sizes.split()])
    assert emulate.main() == 0
    run, printed = load(path), capsys.readouterr().out
    assert [row["case"] for row in run["rows"]] == ["causal", "list 1", "list 2", "list 3", "list 4"]
    assert all(row["strategy"] == "ring/1" and not row["wrong"] for row in run["rows"])
    assert (run["benchmark"], run["emulated"], run["device"]) == ("emulate", True, "CPU")
    assert "20 us" in run["note"]
    assert printed.count("list ") == 4
    assert "checks" in printed.splitlines()[-1]


def test_long_tails_of_the_targets_are_drawn_anew_unless_given():
    def tails(*arguments: str) -> list[str]:
        options = emulate.parser().parse_args(["--preset", "targets", *arguments])
        return [case.name for case in emulate.cases_of(options, targets.need_of(CPU, torch.bfloat16)) if "tail" in case.name]

    assert len(tails("--seeds", "5")) == 5
    assert tails("--seeds", "5") != tails("--seeds", "5")
    assert tails("--draw", "7", "8") == ["long tail 7", "long tail 8"]
