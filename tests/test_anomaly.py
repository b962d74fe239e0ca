"""`torch.autograd.set_detect_anomaly(True)`: every rank looks at its own part of a gradient and waits for nobody."""

from __future__ import annotations

import warnings
from contextlib import contextmanager, nullcontext

import pytest
import torch
from helpers import line
from models import make_batch, make_model
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import parallelize_module

from dtensor_ring import Zigzag, distribute_tensor, full_tensor, ring_attention, ring_plan


@contextmanager
def detecting():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is slow, and where the forward of a NaN was
        with torch.autograd.set_detect_anomaly(True):
            yield


def _place(x):
    return distribute_tensor(x, line(), [Zigzag(1)], src_data_rank=None).detach()


def sound_gradients(length: int):
    placed = [_place(torch.randn(1, length, 2, 8)).requires_grad_() for _ in range(3)]
    weights = _place(torch.randn(1, length, 2, 8))

    def gradients():
        q, k, v = placed
        return torch.autograd.grad(ring_attention(torch.nn.functional.elu(q), k, v * 2, is_causal=True), placed, weights)

    unwatched = gradients()
    with detecting():
        watched = gradients()
    for one, other in zip(unwatched, watched, strict=True):
        assert torch.equal(full_tensor(one), full_tensor(other))


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("length", [12, 7, 2])
def test_anomaly_mode_lets_sound_gradients_pass_unchanged(pools, length, world):
    pools.run(world, sound_gradients, length)


def one_nan(token: int) -> str:
    values = torch.ones(1, 8, 4)
    values[0, token, 1] = 0
    x = _place(values).requires_grad_()
    with detecting():
        try:
            (x.sqrt() * 0).backward(_place(torch.ones(1, 8, 4)))  # 0 / sqrt(0) at one element
        except RuntimeError as failure:
            return str(failure)
    return "passed"


@pytest.mark.parametrize(("token", "rank"), [(0, 0), (2, 1), (5, 1), (7, 0)])
def test_anomaly_mode_raises_on_the_rank_that_has_the_nan_and_there_alone(pools, token, rank):
    texts = pools.run(2, one_nan, token, timeout=30)
    assert texts[1 - rank] == "passed"
    assert "'SqrtBackward0' returned nan values in its 0th output" in texts[rank]


def model_step():
    losses, gradients = [], []
    for watched in (False, True):
        model = make_model("llama")
        parallelize_module(model, line(), ring_plan(model, Zigzag(1)))
        with detecting() if watched else nullcontext():
            out = model(**make_batch(13))
            out.loss.backward()
        losses.append(out.loss.detach())
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert torch.equal(*losses)
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_anomaly_mode_watches_a_model_under_ring_plan(pools):
    pools.run(2, model_step)


def answers() -> list[bool]:
    x = _place(torch.arange(12.0).view(1, 6, 2))
    mixed = torch.distributed.tensor.ones(2, 2, device_mesh=line(), placements=[Shard(0)])
    with pytest.raises(NotImplementedError):
        torch._is_any_true(mixed > 0)  # what PyTorch lacks for its own placements it lacks still
    return [bool(torch._is_any_true(x > bound).full_tensor()) for bound in (-1.0, 4.0, 11.0)]


def test_whether_any_element_is_true_is_asked_of_all_ranks_once_it_is_reduced(pools):
    assert pools.run(2, answers) == [[True, True, False]] * 2
