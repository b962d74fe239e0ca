"""An error inside a kernel is its own and leaves nothing behind: no transfer that the next call would be mixed up with."""

from __future__ import annotations

import datetime
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from helpers import make_case, share
from torch.distributed.device_mesh import DeviceMesh

from dtensor_ring import Zigzag, from_local, ring_attention
from dtensor_ring.comm import Pending, SilentRankError, Transfers
from dtensor_ring.functional import llama3, llama3_flash_attn_prepare_cu_seqlens, llama3_flash_attn_varlen_func
from dtensor_ring.ops.kernels.torch_cpu import TorchCpuKernel

SECONDS = 5


class BrokenKernelError(RuntimeError):
    """What the kernel raises."""


def breaking(patch: pytest.MonkeyPatch, direction: str, call: int) -> None:
    """The kernel raises at one of its next calls in a direction."""
    name, counted = f"{direction}_dense", [0]
    stock = getattr(TorchCpuKernel, name)

    def act(self, *arguments):
        counted[0] += 1
        if counted[0] == call:
            raise BrokenKernelError("the kernel is broken")
        return stock(self, *arguments)

    patch.setattr(TorchCpuKernel, name, act)


def plan_steps(group, shares):
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("cp",))
    # A stage for each other rank, in which all ranks make one call: so that the call of a number is at one place of every plan.
    stages = dist.get_world_size() - 1
    return ring_attention(*(from_local(x, mesh, [Zigzag(1)], length=24) for x in shares), stages=stages).to_local()


def head_groups(group, shares):
    bounds = torch.tensor([0, 24], dtype=torch.int32)
    *cu_seqlens, longest_q, longest_k, keys = llama3_flash_attn_prepare_cu_seqlens(
        bounds, True, dist.get_rank(), dist.get_world_size()
    )
    flat, rest = [x[0] for x in shares], (longest_q, longest_k, 1, keys)
    with patch.object(llama3, "AT_ONCE", 0):  # one head after the other
        return llama3_flash_attn_varlen_func(*flat, *cu_seqlens, *rest, causal=True, group=group)


def an_error_on_all_ranks(attend, direction: str, call: int):
    world, rank, group = dist.get_world_size(), dist.get_rank(), dist.new_group(timeout=datetime.timedelta(seconds=SECONDS))
    case = make_case(24, heads=(4, 2), batch=1)
    layout = "zigzag" if attend is plan_steps else "contiguous"
    shares = [share(x, layout, world, rank).requires_grad_() for x in case.inputs]
    dist.barrier()

    def step():
        out = attend(group, shares)
        return out, *torch.autograd.grad(out.sum(), shares)

    wanted = step()
    with pytest.MonkeyPatch.context() as patch:
        breaking(patch, direction, call)
        with pytest.raises(BrokenKernelError, match="the kernel is broken"):
            step()
    for found, want in zip(step(), wanted, strict=True):
        assert torch.equal(found, want)


@pytest.mark.parametrize("attend", [plan_steps, head_groups])
@pytest.mark.parametrize(("direction", "call"), [("forward", 1), ("backward", 1), ("backward", 2)])
@pytest.mark.parametrize("world", [2, 3])
def test_after_an_error_in_a_kernel_on_all_ranks_the_next_call_is_right(pools, world, attend, direction, call):
    pools.run(world, an_error_on_all_ranks, attend, direction, call, timeout=60)


def an_error_on_one_rank() -> str:
    world, rank, group = dist.get_world_size(), dist.get_rank(), dist.new_group(timeout=datetime.timedelta(seconds=SECONDS))
    shares = [share(x, "zigzag", world, rank) for x in make_case(24, heads=(4, 2), batch=1).inputs]
    plan_steps(group, shares)
    dist.barrier()

    def twice():
        plan_steps(group, shares)
        plan_steps(group, shares)  # ranks that needed nothing more of rank 1 wait here

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            breaking(patch, "forward", 1)
        with pytest.raises((BrokenKernelError, SilentRankError)) as failure:
            twice()
    return f"{type(failure.value).__name__}: {failure.value}"


def test_an_error_in_a_kernel_on_one_rank_is_raised_there_and_the_others_name_the_rank(pools):
    first, broken, last = pools.run(3, an_error_on_one_rank, timeout=60)
    assert broken == "BrokenKernelError: the kernel is broken"
    for text in (first, last):
        assert text.startswith("SilentRankError")
        assert "waited" in text
        assert "Rank 1 says nothing" in text


def test_transfers_are_settled_once_after_an_error_and_left_alone_without_one_or_where_a_rank_is_silent():
    waited = []

    def transfer(name, failure=None):
        def finish():
            waited.append(name)
            if failure is not None:
                raise failure

        return Pending(finish)

    for failure, settled in ((ValueError(), ["failing", "late"]), (SilentRankError(), []), (None, [])):
        waited.clear()
        try:
            with Transfers() as transfers:
                transfers.add(transfer("redeemed")).wait()
                transfers.add(transfer("failing", RuntimeError()))
                transfers.add(transfer("late"))
                if failure is not None:
                    raise failure
        except Exception as raised:
            assert raised is failure
        assert waited == ["redeemed", *settled]
