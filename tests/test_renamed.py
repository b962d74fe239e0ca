"""Old names of arguments: they still work as keywords, warn, and give the same result; the new ones are those of PyTorch."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.distributed as dist
import torch.distributed.tensor as stock
from helpers import line
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

import dtensor_ring
from dtensor_ring import Zigzag, average_gradients, check_replicas, distribute_tensor, from_local, ring_plan, shard_batch
from dtensor_ring._renamed import renamed
from dtensor_ring.debug import traffic


@renamed(old="new")
def function(first: int, new: int = 0, *, other: int = 0) -> tuple[int, int, int]:
    """Says what it was given."""
    return first, new, other


def test_an_old_name_warns_where_it_is_used_and_is_passed_on():
    with pytest.warns(DeprecationWarning, match="old= of function is called new= now") as warned:
        assert function(1, old=2, other=3) == (1, 2, 3)
    assert warned[0].filename == __file__
    assert function(1, 2) == function(1, new=2) == (1, 2, 0)


def test_both_names_of_an_argument_are_refused():
    with pytest.raises(TypeError, match=r"function\(\) got old= and new=, two names of one argument: pass new= alone"):
        function(1, old=2, new=2)
    with pytest.warns(DeprecationWarning, match="is called new= now"), pytest.raises(TypeError, match="multiple values"):
        function(1, 2, old=2)


def test_a_renamed_function_shows_its_new_names():
    assert list(inspect.signature(function).parameters) == ["first", "new", "other"]
    assert function.__doc__ == "Says what it was given."


def test_names_are_those_of_torch():
    def names(of) -> list[str]:
        return list(inspect.signature(of).parameters)[:3]

    assert names(distribute_tensor) == names(stock.distribute_tensor)
    assert names(from_local) == names(DTensor.from_local)
    assert "run_check" in inspect.signature(DTensor.from_local).parameters
    for name in dtensor_ring.__all__:
        public = getattr(dtensor_ring, name)
        # The `mesh` of one does nothing, and goes; that of the other is sizes by name, and no DeviceMesh.
        if inspect.isfunction(public) and name not in ("redistribute", "estimate"):
            assert not {"mesh", "local", "check"} & set(inspect.signature(public).parameters)


def same(new, old, *names: str) -> None:
    """`old()` warns of exactly these names, and gives what `new()` gives."""
    wanted = new()
    with pytest.warns(DeprecationWarning, match=r"= of \w+ is called \w+= now") as warned:
        found = old()
    assert [str(each.message).split("=")[0] for each in warned] == list(names)
    if isinstance(wanted, DTensor):
        assert wanted.placements == found.placements
        wanted, found = wanted.to_local(), found.to_local()
    if isinstance(wanted, torch.Tensor):
        assert torch.equal(wanted, found)
    elif isinstance(wanted, dict):
        assert wanted.keys() == found.keys()
        assert all(torch.equal(wanted[key], found[key]) for key in wanted)
    else:
        assert wanted == found


def every_old_name():
    mesh, whole = line(), torch.arange(16.0).view(1, 8, 2)
    local, ids = whole[:, :4], torch.arange(8)[None]
    same(
        lambda: from_local(local, mesh, [Zigzag(1)], length=8, run_check=False),
        lambda: from_local(local=local, mesh=mesh, placements=[Zigzag(1)], length=8, check=False),
        "local",
        "mesh",
        "check",
    )
    same(
        lambda: distribute_tensor(whole, mesh, [Zigzag(1)]),
        lambda: distribute_tensor(whole, mesh=mesh, placements=[Zigzag(1)]),
        "mesh",
    )
    same(
        lambda: shard_batch({"input_ids": ids}, mesh, run_check=False),
        lambda: shard_batch({"input_ids": ids}, mesh=mesh, check=False),
        "mesh",
        "check",
    )
    same(lambda: traffic(mesh), lambda: traffic(mesh=mesh), "mesh")
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.full((3,), float(dist.get_rank()))
    same(lambda: average_gradients([weight], mesh), lambda: average_gradients([weight], mesh=mesh), "mesh")
    assert weight.grad.tolist() == [0.5] * 3
    same(lambda: check_replicas([weight], mesh), lambda: check_replicas([weight], mesh=mesh), "mesh")


def test_every_old_name_warns_and_does_the_same(pools):
    pools.run(2, every_old_name)


def old_names_of_a_plan():
    from test_transformers import make_model

    model = make_model("llama")
    plan = ring_plan(model)
    parallelize_module(model, line(), plan)
    local = torch.arange(6.0).view(1, 6) + 10 * dist.get_rank()
    same(lambda: plan.gather(local), lambda: plan.gather(local=local), "local")
    same(lambda: plan.sum_over_tokens(local), lambda: plan.sum_over_tokens(local=local), "local")
    plan.undo()


def test_old_names_of_a_plan_s_methods_warn_and_do_the_same(pools):
    pools.run(2, old_names_of_a_plan)
