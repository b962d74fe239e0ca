"""Laws of cuDNN's attention on a Hopper GPU: `pytest -m gpu`."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import Case, assert_like_kernel, make_case, run_loopback, single_device
from test_gpu import note

from dtensor_ring import ring_attention
from dtensor_ring.ops.kernels import KERNELS, Block, KernelRequirements, Saved, SoftmaxParams
from dtensor_ring.ops.kernels.cudnn import CudnnKernel
from dtensor_ring.ops.reference import reference_attention

pytestmark = pytest.mark.gpu
CUDNN = KERNELS["cudnn"]
NEED = KernelRequirements("cuda", torch.bfloat16, 128, 128, training=True)
FULL, CAUSAL = (Block(window, SoftmaxParams(64**-0.5)) for window in ((-1, -1), (-1, 0)))


@pytest.fixture(autouse=True)
def skipped_elsewhere():
    reason = CUDNN.refuses(NEED) if torch.cuda.is_available() else "needs a GPU"
    if reason is not None:
        pytest.skip(f"cudnn {reason}")


@pytest.fixture
def computed(monkeypatch):
    """The (B, Sq, H, D), (B, Sk, Hk, D) and window of each forward call of the kernel."""
    calls, stock = [], CudnnKernel.forward

    def forward(self, q, k, v, block):
        calls.append((q.shape, k.shape, block.window))
        return stock(self, q, k, v, block)

    monkeypatch.setattr(CudnnKernel, "forward", forward)
    return calls


def gpu_case(length: int, **options) -> Case:
    return make_case(length, **{"heads": (8, 2), "dim": 64, "dtype": torch.bfloat16, "device": "cuda", **options})


def errors(found, exact) -> list[float]:
    return [((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(found, exact, strict=True)]


def both_passes(case: Case, block: Block) -> tuple[torch.Tensor, ...]:
    out, lse = CUDNN.forward(*case.inputs, block)
    return out, lse, *CUDNN.backward(Saved(*case.inputs, out, lse), case.dout, block)


@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize(
    ("layout", "mask", "options"),
    [
        ("zigzag", "causal", {"dim": 128}),
        ("zigzag", "causal", {"dtype": torch.float16, "heads": (4, 4), "batch": 1}),
        ("zigzag", "causal", {"dim": 256, "heads": (4, 2)}),
        ("zigzag", "full", {}),
        ("contiguous", "causal", {"heads": (4, 1)}),
        ("contiguous", "full", {"dim": 128, "dtype": torch.float16}),
        ("stripe", "full", {"batch": 1}),
    ],
    ids=str,
)
def test_over_ranks_it_errs_like_itself_on_one_gpu(layout, mask, options, world):
    case = gpu_case(2048, mask=mask, **options)
    single, exact = single_device(case, "cudnn"), case.exact()
    ratios = {
        stages: assert_like_kernel(run_loopback(case, layout, world, "ring", "cudnn", stages)[0], single, exact)
        for stages in (0, 1)
    }
    note(f"cudnn {layout} {mask} W={world} {options}", ratios)


@pytest.mark.parametrize("mask", ["causal", "full"])
@pytest.mark.parametrize(
    "options",
    [
        {"dim": 128},
        {"dtype": torch.float16},
        {"dim": 96, "heads": (6, 3)},
        {"dim": 8, "heads": (2, 2)},
        {"dim": 256},
    ],
    ids=str,
)
def test_it_errs_like_flash_attention(mask, options):
    case = gpu_case(1024, mask=mask, **options)
    single, exact = single_device(case, "torch_flash"), case.exact()
    note(f"cudnn over torch_flash {mask} {options}", assert_like_kernel(single_device(case, "cudnn"), single, exact))


@pytest.mark.parametrize("lengths", [(128, 128), (128, 384), (384, 128), (256, 640), (1152, 128)])
@pytest.mark.parametrize("level", [-120.0, 100.0])
def test_gradients_are_right_where_all_scores_are_far_from_zero(lengths, level):
    case = gpu_case(lengths[0], k_length=lengths[1], mask="full", batch=1)
    case.q[..., 1:] *= 0.1
    case.k[..., 1:] *= 0.1
    case.q[..., 0], case.k[..., 0] = 1.0, level * math.sqrt(64)
    for block in (FULL, CAUSAL) if lengths[0] == lengths[1] else (FULL,):
        exact = replace(case, is_causal=block is CAUSAL).exact()
        assert exact[1].mean().sign() == math.copysign(1, level)
        found = both_passes(case, block)
        for index in (0, 3, 4):  # the gradient of q is a difference of large numbers, and all of it rounding
            assert errors(found[index : index + 1], exact[index : index + 1])[0] < 1e-2
        assert found[2].isfinite().all()


@pytest.mark.parametrize("tokens", [1 << 18, 1 << 19])
def test_gradients_are_right_up_to_as_many_numbers_as_are_refused(tokens):
    need = replace(NEED, rows=1, heads=32, grain=128)
    assert CUDNN.lacks(replace(need, tokens=tokens)) is None
    assert "2**31 numbers" in CUDNN.lacks(replace(need, tokens=(1 << 19) + 128))
    q, dout = (torch.randn(1, tokens, 32, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.randn(1, 128, 8, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out, lse = CUDNN.forward(q, k, v, FULL)
    dq, *found = CUDNN.backward(Saved(q, k, v, out, lse), dout, FULL)
    _, *wanted = KERNELS["torch_flash"].backward(Saved(q, k, v, out, lse), dout, FULL)
    assert max(errors(found, wanted)) < 1e-2
    for rows in (slice(0, 128), slice(tokens - 128, tokens)):
        part = Case(q[:, rows], k, v, dout[:, rows], is_causal=False)
        exact = reference_attention(*(x.float() for x in part.inputs), is_causal=False, scale=FULL.softmax.scale)
        assert max(errors((out[:, rows], lse[..., rows]), exact)) < 1e-2
        flash = KERNELS["torch_flash"].backward(Saved(*part.inputs, out[:, rows], lse[..., rows].contiguous()), part.dout, FULL)
        assert errors([dq[:, rows]], flash[:1])[0] < 1e-2


def test_gradients_do_not_depend_on_the_strides_of_the_call_that_a_plan_was_made_for():
    case = gpu_case(640)
    exact = case.exact()
    out, lse = CUDNN.forward(*case.inputs, CAUSAL)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (out, case.dout)]
    wide = [torch.cat([x, x], 1)[:, :640] for x in (out, case.dout)]
    for (other, dout), stats in (
        (turned, lse.mT.contiguous().mT),
        ((out, case.dout), lse),
        (wide, torch.cat([lse, lse], 2)[..., :640]),
    ):
        grads = CUDNN.backward(Saved(*case.inputs, other, stats), dout, CAUSAL)
        assert max(errors(grads, exact[2:])) < 1e-2


def test_tensors_as_they_come_are_taken():
    packed = torch.randn(2, 256, 3, 4, 64, device="cuda", dtype=torch.bfloat16)
    one_head = torch.randn(2, 256, 1, 64, device="cuda", dtype=torch.bfloat16).expand(2, 256, 4, 64)
    askew = torch.randn(2 * 256 * 4 * 64 + 1, device="cuda", dtype=torch.bfloat16)[1:].view(2, 256, 4, 64)
    part = torch.randn(2, 256, 4, 65, device="cuda", dtype=torch.bfloat16)[..., :64]
    for q, k, v in (packed.unbind(2), (packed[:, :, 0], one_head, one_head), (askew, part, askew), (part, askew, part)):
        case = Case(q, k, v, torch.randn_like(q))
        assert max(errors(both_passes(case, CAUSAL), case.exact())) < 1e-2


@pytest.mark.parametrize("compiled", [False, True])
def test_it_is_the_default_for_whole_tiles_and_the_next_kernel_elsewhere(computed, compiled):
    attend = torch.compile(ring_attention, backend="aot_eager", fullgraph=True) if compiled else ring_attention
    before = KERNELS["flash_attn_4"].refuses(NEED) and KERNELS["flash_attn_3"].refuses(NEED)
    for length, kernel in ((512, "cudnn"), (511, "torch_flash"), (17 * 128, "torch_flash")):
        case = gpu_case(length, dim=128)
        leaves = [x.clone().requires_grad_() for x in case.inputs]
        found = attend(*leaves, is_causal=True)
        grads = torch.autograd.grad(found, leaves, case.dout)
        exact = case.exact()
        assert max(errors((found, *grads), (exact[0], *exact[2:]))) < 1e-2
        if before:
            assert len(computed) == (kernel == "cudnn")
        computed.clear()
    attend(*(x[:, :512] for x in case.inputs), is_causal=True, kernel="torch_flash")
    assert not computed


def test_sinks_and_their_gradient():
    case = gpu_case(512)
    sinks = torch.linspace(-1, 3, 8, device="cuda")
    found, exact = [], []
    for results, kernel, dtype in ((found, "cudnn", torch.bfloat16), (exact, "math", torch.float32)):
        leaves = [*(x.to(dtype).requires_grad_() for x in case.inputs), sinks.clone().requires_grad_()]
        out = ring_attention(*leaves[:3], sinks=leaves[3], kernel=kernel)
        results += [out.detach(), *torch.autograd.grad(out, leaves, case.dout.to(dtype))]
    assert max(errors(found, exact)) < 1e-2


def test_a_call_is_captured_in_a_cuda_graph():
    case = gpu_case(512)
    wanted = both_passes(case, CAUSAL)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = both_passes(case, CAUSAL)
    graph.replay()
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])
    assert max(errors(found[2:], wanted[2:])) < 1e-3


def resident() -> float:
    """MiB of host memory of this process."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


def test_two_hundred_lengths_cost_a_bounded_number_of_plans(computed):
    """Of 200 lengths the default takes few, and nothing grows when they come again."""
    lengths = range(64, 64 + 200 * 64, 64)
    passes = []
    for _ in range(2):
        memory, begin, before = resident(), time.perf_counter(), len(computed)
        for length in lengths:
            q, k = (torch.randn(1, length, heads, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2))
            ring_attention(q, k, k, is_causal=True).sum().backward()
        torch.cuda.synchronize()
        passes.append((len(set(computed)), len(computed) - before, resident() - memory, time.perf_counter() - begin))
    note("200 lengths, twice: shapes, calls, MiB, seconds", passes)
    print(passes)
    (shapes, calls, grown, seconds), (again, calls_again, grown_again, seconds_again) = passes
    assert shapes == again == calls == calls_again == 36  # of 100 multiples of 128
    assert grown < 36 * 8
    assert grown_again < 16
    assert seconds < 36 * 0.5 + seconds_again
    assert seconds_again < 200 * 0.02
