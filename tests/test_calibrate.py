"""`calibrate`: what is timed, how figures are fitted to it, and the command; the timing itself runs on GPUs only."""

from __future__ import annotations

import random
import statistics

import pytest
import torch

from dtensor_ring.__main__ import main
from dtensor_ring.ops.kernels import KERNELS
from dtensor_ring.ops.kernels.math import MathKernel
from dtensor_ring.planning.cost_model import CostModel, Speed
from dtensor_ring.planning.devices import KNOWN
from dtensor_ring.tools import calibrate as module
from dtensor_ring.tools.calibrate import HEADS, Effort, Shape, calibrate, calls_of, fitted, measured, shapes


@pytest.mark.parametrize("kernel", ["torch_flash", "cudnn"])
def test_figures_are_found_again_from_the_times_that_they_give(kernel):
    noise = random.Random(0)
    for speed in (KNOWN["h100"].kernel(kernel).forward, KNOWN["h100"].kernel(kernel).backward):
        timed = [(shape.work, speed.nanoseconds(shape.work, HEADS, 128, 1) * noise.uniform(0.98, 1.02)) for shape in shapes()]
        found = fitted(timed)
        for work, nanoseconds in timed:
            assert found.nanoseconds(work, HEADS, 128, 1) == pytest.approx(nanoseconds, rel=0.05)
        assert found.block == pytest.approx(speed.block, rel=0.03)


def test_no_figure_is_below_0_whatever_was_timed():
    noise = random.Random(1)
    found = fitted([(shape.work, noise.uniform(1e3, 1e6)) for shape in shapes()])
    assert min(found.call, found.row, found.edge, found.column, found.block) >= 0


def test_timed_calls_differ_in_all_that_figures_are_fitted_to():
    works = [shape.work for shape in shapes()]
    for name in ("rows", "edges", "columns", "blocks"):
        assert len({getattr(work, name) / max(work.rows, 1) for work in works}) >= 2 or name == "rows"
    assert any(work.columns > 8 * work.rows for work in works)
    assert any(work.rows == work.blocks for work in works)  # short segments
    assert all(sum(q for q, _ in shape.segments) <= 8192 + 7 * 21 for shape in shapes())


@pytest.mark.parametrize(
    "shape", [Shape(((64, 64),), (-1, 0), 16), Shape(((32, 96),), (-1, -1), 16), Shape(((20, 20), (44, 44)), (-1, 0), 16)]
)
def test_a_kernel_is_timed_forward_and_backward_on_the_shape(shape, monkeypatch):
    monkeypatch.setattr(module, "DTYPE", torch.float32)
    forward, backward = calls_of(KERNELS["math"], shape, torch.device("cpu"))
    queries, keys = (sum(lengths) for lengths in zip(*shape.segments, strict=True))
    result, gradients = forward(), backward()
    assert result.out.shape[-3:] == (queries, HEADS, 16)
    assert [gradient.shape[-3] for gradient in gradients] == [queries, keys, keys]
    ((once, again),) = measured(KERNELS["math"], [shape], torch.device("cpu"), Effort(1, 1.0))
    assert min(once, again) > 1000  # nanoseconds


def test_without_a_gpu_it_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="calibrate measures a CUDA GPU, and found cpu"):
        calibrate(torch.device("cpu"))
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit) as ended:
            main(["calibrate", "--out", str(tmp_path / "model.json")])
        assert ended.value.code == 2
        assert "run it on the machine that the model is for" in capsys.readouterr().err


def test_a_kernel_is_timed_by_the_shapes_that_it_takes_alone(monkeypatch):
    class Picky(MathKernel):
        """Takes what cuDNN's kernel takes."""

        name, refuses_block = "picky", KERNELS["cudnn"].refuses_block

        def forward(self, q, k, v, block):
            assert block.varlen is None
            assert block.window == (-1, -1) or (block.window == (-1, 0) and q.shape[1] == k.shape[1])
            return super().forward(q, k, v, block)

    monkeypatch.setattr(module, "DTYPE", torch.float32)
    monkeypatch.setattr(module, "HEADS", 8)
    taken = [shape for shape in shapes(64) if KERNELS["cudnn"].refuses_block(shape.kind) is None]
    assert {shape.kind.mask for shape in taken} == {"full", "square causal"}
    assert len(taken) == 11  # all that are dense and without a window
    speed = module.speed_of(Picky(), torch.device("cpu"), Effort(1, 0.1), 64)
    assert speed.forward.nanoseconds(taken[0].work, 8, 128, 1) > 1000


@pytest.mark.gpu(devices=1)
def test_a_gpu_is_measured_and_what_it_takes_is_predicted(tmp_path, monkeypatch):
    timed = {}

    def noted(kernel, shapes, *rest):
        times = measured(kernel, shapes, *rest)
        timed.setdefault(kernel.name, list(zip(shapes, times, strict=True)))
        return times

    monkeypatch.setattr(module, "measured", noted)
    monkeypatch.setattr(module, "Effort", lambda: Effort(2, 5.0))
    path = tmp_path / "model.json"
    assert main(["calibrate", "--out", str(path)]) == 0
    model = CostModel.load(path)
    assert "torch_flash" in timed
    assert set(timed) == set(dict(model.kernels))
    for name, speed in model.kernels:
        for direction, figures in enumerate((speed.forward, speed.backward)):
            # Against what these figures were fitted to: a second measurement of a GPU that others use too may differ by any factor.
            predicted = [figures.nanoseconds(shape.work, HEADS, 128, model.multiprocessors) for shape, _ in timed[name]]
            shares = [mine / times[direction] for mine, (_, times) in zip(predicted, timed[name], strict=True)]
            assert 0.5 < statistics.median(shares) < 2, f"{name}: {shares}"


def test_the_plan_command_predicts_by_a_device_and_by_a_file(tmp_path, capsys):
    path = tmp_path / "model.json"
    KNOWN["a100"].save(path)

    def printed(*arguments: str) -> str:
        assert main(["plan", "--world", "8", "--length", "64Ki", "--summary", *arguments]) == 0
        return capsys.readouterr().out

    assert "predicted" not in printed()
    assert "torch_flash on h100" in printed("--device", "h100")
    assert "on a100" in printed("--cost-model", str(path))
    assert '"forward_backward_ms"' in printed("--device", "h100", "--json")
    assert "45 GB/s between hosts" in printed("--device", "h100", "--ranks-per-host", "2")
    assert "cudnn on h100" in printed("--device", "h100", "--kernel", "cudnn")
    for wrong, text in (
        (["--kernel", "cudnn"], "name a --device"),
        (["--cost-model", str(tmp_path / "none.json")], "No such file"),
        (["--device", "h100", "--kernel", "flash"], "is not among those of the cost model"),
    ):
        with pytest.raises(SystemExit):
            printed(*wrong)
        assert text in capsys.readouterr().err


def test_a_speed_scales_with_head_dims_as_measured():
    speed = Speed(0.0, 0.0, 0.0, 0.0, 10.0, narrow=0.5, wide=3.0)
    work = Shape(((8192, 8192),), (-1, -1)).work
    base = speed.nanoseconds(work, 1, 128, 1)
    assert [speed.nanoseconds(work, 1, dim, 1) / base for dim in (32, 64, 96, 128, 192, 256)] == [0.5, 0.5, 0.75, 1.0, 2.0, 3.0]
