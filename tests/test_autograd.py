"""What autograd may count on: a change in place is seen, and what has no gradient raises instead of being dropped."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch._dynamo
from helpers import line, make_case
from torch.autograd import forward_ad

from dtensor_ring import Zigzag, distribute_tensor, from_local, full_tensor, ring_attention
from dtensor_ring.ops.arguments import Arguments
from dtensor_ring.ops.operator import attention
from dtensor_ring.ops.place import place_alone
from dtensor_ring.ops.prepare import Inputs, prepare


def placed(case, requires_grad: bool = True):
    """q, k and v of a case over all ranks, as leaves."""
    mesh = line()
    return [distribute_tensor(x, mesh, [Zigzag(1)], src_data_rank=None).detach().requires_grad_(requires_grad) for x in case.inputs]


def changes_in_place():
    case = make_case(12, heads=(2, 2))
    q, k, v = placed(case)
    out = ring_attention(q, k, v)
    residual = out.detach() * 0 + 1
    out += residual
    with pytest.raises(RuntimeError, match=r"ring_attention returned.*modified by an inplace operation"):
        out.to_local().sum().backward()
    out, lse = ring_attention(q, k, v, return_lse=True)
    lse.detach().mul_(2)  # a view: its changes are those of what it views
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.to_local().sum().backward()
    for changed in range(3):
        inputs = [x * 1 for x in (q, k, v)]
        out = ring_attention(*inputs)
        inputs[changed].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.to_local().sum().backward()
    sinks = distribute_tensor(torch.zeros(2, dtype=torch.float64), line(), [torch.distributed.tensor.Replicate()]) * 1
    out = ring_attention(q, k, v, sinks=sinks)
    sinks.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.to_local().sum().backward()


def test_changes_in_place_between_forward_and_backward_raise(pools):
    pools.run(2, changes_in_place)


def changes_that_do_no_harm():
    case = make_case(12, heads=(2, 2))
    leaves = placed(case)
    wanted = case.exact()[2:]
    dout = distribute_tensor(case.dout, line(), [Zigzag(1)], src_data_rank=None)
    out = ring_attention(*leaves)
    changed = out + 1
    changed.mul_(1)
    for found, want in zip(torch.autograd.grad(changed, leaves, dout), wanted, strict=True):
        torch.testing.assert_close(full_tensor(found), want, rtol=0, atol=1e-10)
    with torch.no_grad():
        ring_attention(*leaves).mul_(2)
    out = ring_attention(*leaves)
    doubled, gone = out * 2, weakref.ref(out)
    del out
    assert gone() is None, "what backward compares keeps no result alive"
    for found, want in zip(torch.autograd.grad(doubled, leaves, dout * 0.5), wanted, strict=True):
        torch.testing.assert_close(full_tensor(found), want, rtol=0, atol=1e-10)


def test_changes_of_other_tensors_change_no_gradient_and_results_end_with_their_last_user(pools):
    pools.run(2, changes_that_do_no_harm)


def check_second_gradients(leaves, through):
    """Whatever is differentiated first, and whatever second: raised at once or by backward, never left out."""
    weights = torch.ones_like(leaves[0], requires_grad=True)  # of out: dout depends on it
    for first in leaves:
        (grad,) = torch.autograd.grad(through(leaves), first, torch.ones_like(weights.detach()), create_graph=True)
        assert grad.requires_grad
        with pytest.raises(NotImplementedError, match="the gradients of ring_attention have no gradient themselves"):
            torch.autograd.grad(grad, leaves, torch.ones_like(grad.detach()))
    (grad,) = torch.autograd.grad(through(leaves), leaves[1], weights, create_graph=True)
    with pytest.raises(NotImplementedError, match="have no gradient themselves"):
        torch.autograd.grad(grad, weights, torch.ones_like(grad.detach()))


def second_gradients_of_dtensors():
    check_second_gradients(placed(make_case(12, heads=(2, 2))), lambda leaves: ring_attention(*leaves))


def test_gradients_of_gradients_raise_on_dtensors(pools):
    pools.run(2, second_gradients_of_dtensors)


def test_gradients_of_gradients_raise_on_plain_tensors_and_where_the_operator_is_called_itself():
    case = make_case(6, heads=(2, 2))
    leaves = [x.clone().requires_grad_() for x in (*case.inputs, torch.zeros(2, dtype=torch.float64))]
    check_second_gradients(leaves, lambda leaves: ring_attention(*leaves[:3], sinks=leaves[3]))
    prepared = prepare(Inputs(*leaves), Arguments(), place_alone(*leaves[:3]), "a test")
    check_second_gradients(leaves, lambda leaves: attention(*leaves, *prepared[1:])[0])
    loss = ring_attention(*leaves[:3]).sum()
    (grad,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
    loss.backward()  # what is differentiated once is, with create_graph too
    torch.testing.assert_close(leaves[0].grad, grad, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # PyTorch loads such code when a level is entered
def test_forward_mode_derivatives_raise_with_gradients_and_without():
    x = torch.randn(1, 4, 2, 8)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="jvp"):
            ring_attention(x, dual, x)
        for inputs in ((dual, x, x), (x, x, dual)):
            with torch.no_grad(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                ring_attention(*inputs)
        with torch.no_grad():
            ring_attention(x, x, x)


def attended(x, mesh):
    """Out and lse of this rank's tokens, which are all there are or a share."""
    placed = x if mesh is None else from_local(x, mesh, [Zigzag(1)], length=12)
    out, lse = ring_attention(placed, placed, placed, return_lse=True)
    return (out, lse) if mesh is None else (out.to_local(), lse.to_local())


def compiled_lse(spread: bool):
    torch._dynamo.reset()
    mesh = line() if spread else None
    x = torch.randn(2, 6, 2, 8, requires_grad=True)
    layer = torch.compile(attended, backend="aot_eager", fullgraph=True)
    out, lse = layer(x, mesh)
    (found,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
    (wanted,) = torch.autograd.grad(attended(x, mesh)[0].sum(), x)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    with pytest.raises(NotImplementedError, match="the lse of ring_attention has no gradient"):
        torch.autograd.grad(out.sum() + lse.sum(), x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, mesh), attended(x, mesh), rtol=0, atol=1e-6)
    inside = torch.compile(
        lambda x: torch.stack([part.sum() for part in attended(x, mesh)]).sum(), backend="aot_eager", fullgraph=True
    )
    with pytest.raises(NotImplementedError, match="the lse of ring_attention has no gradient"):
        inside(x).backward()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # PyTorch's compiler does that itself
def test_a_gradient_of_lse_is_refused_in_compiled_code_and_one_that_nobody_asks_for_is_not():
    compiled_lse(spread=False)


def test_a_gradient_of_the_lse_of_dtensors_is_refused_in_compiled_code(pools):
    pools.run(2, compiled_lse, True)
