from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import grid, line
from torch.distributed.tensor import Replicate, Shard

from dtensor_ring import Contiguous, Stripe, Zigzag, distribute_tensor, from_local, full_tensor, placements, redistribute
from dtensor_ring.placements import SequencePlacement

ALL = [Contiguous(0), Contiguous(1), Zigzag(1), Zigzag(2), Stripe(1), Stripe(1, block=2), Stripe(2, block=2)]


@pytest.mark.parametrize("placement", ALL, ids=repr)
def test_a_placement_is_a_value(placement):
    again = eval(repr(placement))
    for other in (again, pickle.loads(pickle.dumps(placement)), copy.copy(placement), copy.deepcopy(placement)):
        assert other == placement
        assert hash(other) == hash(placement)
        assert type(other) is type(placement)
    assert [other == placement for other in ALL].count(True) == 1
    assert placement != Shard(placement.dim)
    assert Shard(placement.dim) != placement
    assert placement.moved_to(3).dim == 3
    assert placement.moved_to(3).layout == placement.layout


def test_checkpoints_may_hold_every_placement():
    public = {value for value in vars(placements).values() if isinstance(value, type) and issubclass(value, SequencePlacement)}
    assert public - {SequencePlacement} == {type(placement) for placement in ALL}
    for placement in ALL:
        file = io.BytesIO()
        torch.save(placement, file)
        file.seek(0)
        assert torch.load(file, weights_only=True) == placement


def test_short_names():
    assert [str(placement) for placement in (Contiguous(1), Zigzag(1), Stripe(1), Stripe(1, block=2))] == [
        "C(1)",
        "Z(1)",
        "Stripe(1, 1)",
        "Stripe(1, 2)",
    ]


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Zigzag(-1), ValueError, r"Zigzag\(dim=-1\): count the dim from the front"),
        (lambda: Contiguous("1"), TypeError, "dim must be an int, found '1'"),
        (lambda: Contiguous(True), TypeError, "dim must be an int, found True"),
        (lambda: Stripe(1, block=0), ValueError, "a block has at least one token"),
        (lambda: Stripe(1, block=2.0), TypeError, "block must be an int, found 2.0"),
    ],
)
def test_a_placement_that_is_none_is_refused(make, error, text):
    with pytest.raises(error, match=text):
        make()


def copies_and_casts(length: int):
    mesh = line()
    x = torch.randn(2, length, 3)
    placed = distribute_tensor(x, mesh, [Zigzag(1)]).detach()
    for made, wanted in (
        (placed.clone(), x),
        (copy.deepcopy(placed), x),
        (placed.to(torch.float64), x.double()),
        (placed.bfloat16(), x.bfloat16()),
        (placed + placed, x + x),
        (torch.zeros_like(placed), torch.zeros_like(x)),
    ):
        assert made.placements == (Zigzag(1),)
        assert torch.equal(full_tensor(made), wanted)
        assert made.to_local().data_ptr() != placed.to_local().data_ptr() or not made.to_local().numel()
    file = io.BytesIO()
    torch.save(placed, file)
    file.seek(0)
    loaded = torch.load(file)
    assert loaded.placements == (Zigzag(1),)
    assert torch.equal(loaded.to_local(), placed.to_local())


@pytest.mark.parametrize("length", [16, 7, 1])
def test_copies_casts_sums_and_files_keep_values_and_placement(pools, length):
    pools.run(2, copies_and_casts, length)


def gradients(length: int):
    mesh = line()
    leaf = distribute_tensor(torch.randn(2, length, 3), mesh, [Stripe(1)]).detach().requires_grad_()
    for _ in range(2):  # gradients accumulate
        (full_tensor(leaf * 2 + leaf) * torch.arange(3.0)).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.placements == (Stripe(1),)
    assert torch.equal(full_tensor(leaf.grad), (6 * torch.arange(3.0)).expand(2, length, 3))
    local = torch.randn(leaf.to_local().shape, requires_grad=True)
    placed = from_local(local, mesh, [Stripe(1)], length=length)
    weights = torch.randn_like(local)
    (placed.to_local() * weights).sum().backward()
    assert torch.equal(local.grad, weights)


@pytest.mark.parametrize("length", [16, 7, 1])
def test_gradients_accumulate_and_pass_from_local_and_to_local(pools, length):
    pools.run(4, gradients, length)


def save_by_offset(folder: str):
    placed = distribute_tensor(torch.randn(2, 8, 3), line(), [Zigzag(1)]).detach()
    try:
        dcp.save({"x": placed}, checkpoint_id=folder, no_dist=False)
    except BaseException as failure:  # CheckpointException is no Exception
        text = "".join(str(each) for each in (failure, *getattr(failure, "failures", {}).values()))
        assert "redistribute(x, placements) with Shard or Replicate placements" in text, text
    else:
        raise AssertionError("a zigzag shard was saved by offset")
    dcp.save({"x": redistribute(placed, [Shard(1)])}, checkpoint_id=folder)
    loaded = {"x": torch.distributed.tensor.zeros(2, 8, 3, device_mesh=line(), placements=[Shard(1)])}
    dcp.load(loaded, checkpoint_id=folder)
    assert torch.equal(loaded["x"].full_tensor(), full_tensor(placed))


@pytest.mark.filterwarnings("ignore")
def test_a_distributed_checkpoint_says_what_to_do(pools, tmp_path):
    pools.run(2, save_by_offset, str(tmp_path))


def stock_redistribute():
    mesh = line()
    x = torch.randn(2, 8, 3)
    placed = distribute_tensor(x, mesh, [Zigzag(1)])
    try:
        assert torch.equal(placed.full_tensor(), x)
        assert torch.equal(placed.redistribute(placements=[Replicate()]).to_local(), x)
    except (NotImplementedError, RuntimeError, ValueError) as refusal:  # torch 2.11 refuses
        return str(refusal)
    return "right"


def test_the_stock_redistribute_is_right_on_one_axis_or_refuses(pools):
    answers = pools.run(2, stock_redistribute)
    assert len(set(answers)) == 1, "all ranks alike"
    assert answers[0] == "right" or "Zigzag(1)" in answers[0]


def stock_on_two_axes():
    mesh = grid()
    placed = distribute_tensor(torch.randn(4, 8, 3), mesh, [Shard(0), Zigzag(1)])
    for act in (placed.full_tensor, lambda: placed.redistribute(placements=[Shard(0), Replicate()])):
        try:
            act()
        except (NotImplementedError, RuntimeError, ValueError):
            continue
        raise AssertionError("the stock redistribute moved a zigzag on two axes")


def test_the_stock_redistribute_refuses_on_two_axes(pools):
    pools.run(4, stock_on_two_axes)
