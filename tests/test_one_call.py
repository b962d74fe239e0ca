"""A plan of one step and one call adds nothing to the kernel: its tensors are the result."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dtensor_ring.comm import AloneTransport, LoopbackTransport
from dtensor_ring.ops.dtypes import accumulate_dtype
from dtensor_ring.ops.executors.plan_executor import Executor
from dtensor_ring.ops.kernels import Kernel, Result, Saved, SoftmaxParams
from dtensor_ring.planning.documents import Documents
from dtensor_ring.planning.layout import Layout
from dtensor_ring.planning.mask import Band
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.schedule import plan

LENGTH, HEADS, DIM = 12, 4, 8
VIEWS = {"aten::view", "aten::transpose.int", "aten::slice.Tensor", "aten::select.int", "aten::unsqueeze"}


class PreparedKernel(Kernel):
    """Gives tensors that were made before, and keeps what it was called with."""

    name = "prepared"

    def __init__(self, q, k, v, packed: bool, dtype: torch.dtype | None = None) -> None:
        dtype = dtype or q.dtype
        flat = (lambda x: x.flatten(0, 1)) if packed else (lambda x: x)
        self.out = flat(torch.randn(*q.shape[:3], v.shape[3]).to(dtype))
        self.lse = torch.randn((HEADS, q.shape[0] * q.shape[1]) if packed else (q.shape[0], HEADS, q.shape[1]))
        self.lse = self.lse.to(accumulate_dtype(q.dtype))
        self.grads = tuple(flat(torch.randn(x.shape).to(dtype)) for x in (q, k, v))
        self.inputs = []

    def unavailable(self, need):
        return None

    def lacks(self, need):
        return None

    def forward(self, q, k, v, block):
        self.inputs.append((q, k, v))
        return Result(self.out, self.lse)

    def backward(self, saved, dout, block):
        self.inputs.append((*saved[:3], dout, *saved[3:]))
        return self.grads


class Names(TorchDispatchMode):
    """The operators that ran inside, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def problem_of(documents: Documents | None, mask: str = "causal", world: int = 1, strategy: str = "ring") -> AttentionProblem:
    band = Band(0, None) if mask == "causal" else Band(None, None)
    return AttentionProblem(Layout.parse("contiguous"), band, LENGTH, LENGTH, world, strategy, documents)


def tensors(rows: int, dtype: torch.dtype, batch: int = 1):
    q, out = (torch.randn(batch, rows, HEADS, DIM).to(dtype) for _ in range(2))
    k, v = (torch.randn(batch, rows, 2, DIM).to(dtype) for _ in range(2))
    return q, k, v, out


def pointers(*found):
    return [x.data_ptr() for x in found]


PACKINGS = [None, Documents.from_lengths([5, 1, 6])]


@pytest.mark.parametrize("strategy", ["ring", "gather"])
@pytest.mark.parametrize("documents", PACKINGS, ids=["dense", "packed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_on_one_rank_the_kernels_tensors_are_the_result_and_no_other_operator_runs(strategy, documents, dtype):
    q, k, v, dout = tensors(LENGTH, dtype)
    kernel = PreparedKernel(q, k, v, documents is not None)
    executor = Executor(plan(problem_of(documents, strategy=strategy), 0), AloneTransport(), kernel, SoftmaxParams(0.3))
    executor.forward(q, k, v)  # what is kept between calls is made the first time
    with Names() as seen:
        out, lse = executor.forward(q, k, v)
        dq, dk, dv, dsinks = executor.backward(Saved(q, k, v, out, lse), dout)
    assert pointers(out, lse, dq, dk, dv) == pointers(kernel.out, kernel.lse, *kernel.grads)
    assert dsinks is None
    assert [x.shape for x in (out, lse, dq, dk, dv)] == [q.shape, (1, HEADS, LENGTH), q.shape, k.shape, v.shape]
    assert pointers(*kernel.inputs[-1]) == pointers(q, k, v, dout, out, lse)
    assert set(seen.names) <= (set() if documents is None else VIEWS)


@pytest.mark.parametrize("documents", PACKINGS, ids=["dense", "packed"])
def test_two_batch_rows_copy_no_more_than_the_lse_of_a_packed_call(documents):
    q, k, v, dout = tensors(LENGTH, torch.bfloat16, batch=2)
    kernel = PreparedKernel(q, k, v, documents is not None)
    executor = Executor(plan(problem_of(documents), 0), AloneTransport(), kernel, SoftmaxParams(0.3))
    out, lse = executor.forward(q, k, v)
    dq, dk, dv, _ = executor.backward(Saved(q, k, v, out, lse), dout)
    assert pointers(out, dq, dk, dv) == pointers(kernel.out, *kernel.grads)
    given = kernel.lse if documents is None else kernel.lse.view(HEADS, 2, LENGTH).transpose(0, 1)
    assert torch.equal(lse, given)
    assert lse.is_contiguous()


def test_on_gathered_keys_the_kernels_out_lse_and_dq_are_the_result():
    problem = problem_of(None, "full", 2, "gather")

    def rank_body(transport):
        q, k, v, dout = tensors(LENGTH // 2, torch.bfloat16)
        gathered = torch.empty(1, LENGTH, 2, DIM, dtype=q.dtype)
        kernel = PreparedKernel(q, gathered, gathered, packed=False)
        executor = Executor(plan(problem, transport.rank), transport, kernel, SoftmaxParams(0.3))
        out, lse = executor.forward(q, k, v)
        dq, dk, dv, _ = executor.backward(Saved(q, k, v, out, lse), dout)
        assert pointers(out, lse, dq) == pointers(kernel.out, kernel.lse, kernel.grads[0])
        return kernel.grads[1:], (dk, dv)

    results = LoopbackTransport.run(2, rank_body)
    for i in range(2):
        summed = sum(given[i].float() for given, _ in results).bfloat16()
        assert torch.equal(summed, torch.cat([returned[i] for _, returned in results], 1))


def test_what_a_kernel_returns_in_a_wider_dtype_is_rounded_to_that_of_the_inputs():
    q, k, v, dout = tensors(LENGTH, torch.bfloat16)
    kernel = PreparedKernel(q, k, v, packed=False, dtype=torch.float32)
    executor = Executor(plan(problem_of(None), 0), AloneTransport(), kernel, SoftmaxParams(0.3))
    out, lse = executor.forward(q, k, v)
    grads = executor.backward(Saved(q, k, v, out, lse), dout)[:3]
    for mine, given in zip((out, *grads), (kernel.out, *kernel.grads), strict=True):
        assert torch.equal(mine, given.bfloat16())


@pytest.mark.parametrize("documents", PACKINGS, ids=["dense", "packed"])
def test_sinks_enter_once(documents):
    q, k, v, dout = tensors(LENGTH, torch.float64)
    kernel, sinks = PreparedKernel(q, k, v, documents is not None), torch.randn(HEADS, dtype=torch.float64)
    executor = Executor(plan(problem_of(documents), 0), AloneTransport(), kernel, SoftmaxParams(0.3), sinks)
    given_out, given_lse = kernel.out.clone().view(1, LENGTH, HEADS, DIM), kernel.lse.clone().view(1, HEADS, LENGTH)
    out, lse = executor.forward(q, k, v)
    weights = torch.stack([given_lse, sinks[:, None].expand(-1, LENGTH)[None]])
    torch.testing.assert_close(lse, weights.logsumexp(0), rtol=0, atol=1e-13)
    torch.testing.assert_close(out, given_out * weights.softmax(0)[0].transpose(1, 2)[..., None], rtol=0, atol=1e-13)
    *grads, dsinks = executor.backward(Saved(q, k, v, out, lse), dout)
    assert pointers(*grads) == pointers(*kernel.grads)
    wanted = -(weights.softmax(0)[1].transpose(1, 2) * (dout * out).sum(-1)).sum((0, 1))
    torch.testing.assert_close(dsinks, wanted, rtol=0, atol=1e-12)
