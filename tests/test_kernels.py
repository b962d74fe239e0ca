from __future__ import annotations

from collections import Counter

import pytest
import torch
from helpers import make_case
from torch.utils._python_dispatch import TorchDispatchMode

from dtensor_ring import ring_attention
from dtensor_ring.ops.kernels import (
    KERNELS,
    Block,
    KernelRequirements,
    PositionContext,
    Saved,
    SoftmaxParams,
    VarlenMetadata,
    VarlenSegment,
    choose_kernel,
)
from dtensor_ring.ops.kernels.base import Strip, band_mask, strips
from dtensor_ring.ops.kernels.flash import load
from dtensor_ring.ops.kernels.math import MathKernel
from dtensor_ring.ops.reference import reference_attention
from dtensor_ring.planning.documents import Documents

NEED = KernelRequirements("cpu", torch.float32, 64, 64)
CPU_KERNELS = sorted(name for name, kernel in KERNELS.items() if kernel.unavailable(NEED) is None)
SOFTMAX = SoftmaxParams(8**-0.5)
WINDOWS = [(-1, -1), (-1, 0), (5, 0), (4, 3), (-1, 2), (3, -1)]


def both_passes(kernel, case, block):
    """out, lse, dq, dk, dv of one dense block that is the whole attention."""
    out, lse = KERNELS[kernel].forward(*case.inputs, block)
    return out, lse, *KERNELS[kernel].backward(Saved(*case.inputs, out, lse), case.dout, block)


def exact(case, window):
    inputs = [x.double().requires_grad_() for x in case.inputs]
    out, lse = reference_attention(*inputs, is_causal=False, window=window, softcap=case.softcap)
    return out.detach(), lse.detach(), torch.autograd.grad(out, inputs, case.dout.double())


def seen(window, lengths) -> torch.Tensor:
    """Which rows of a block see a key, by brute force."""
    rows, keys = lengths
    left, right = window
    cells = [
        [(left < 0 or j >= i + keys - rows - left) and (right < 0 or j <= i + keys - rows + right) for j in range(keys)]
        for i in range(rows)
    ]
    return torch.tensor(cells).any(1)


LENGTHS = [(9, 9), (6, 13), (13, 6), (1, 8), (8, 1), (1, 1)]
BLOCKS = [(window, lengths) for window in WINDOWS for lengths in LENGTHS]
# Every row of a tile of a plan sees a key; the last rows of a square or wide block always do.
WHOLE = [block for block in BLOCKS if bool(seen(*block).all())]
IDLE = [block for block in BLOCKS if not bool(seen(*block).all())]


@pytest.mark.parametrize("kernel", CPU_KERNELS)
@pytest.mark.parametrize(("window", "lengths"), WHOLE)
@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (2, 2)])
def test_a_block_is_exact_in_float64(kernel, window, lengths, heads):
    case = make_case(lengths[0], k_length=lengths[1], heads=heads)
    out, lse, *grads = both_passes(kernel, case, Block(window, SOFTMAX))
    want_out, want_lse, want_grads = exact(case, window)
    for found, wanted in zip((out, lse, *grads), (want_out, want_lse, *want_grads), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
        assert found.is_contiguous() or found is lse


@pytest.mark.parametrize(("window", "lengths"), IDLE)
def test_in_math_a_row_that_sees_no_key_is_zero_and_gives_no_gradient(window, lengths):
    case, idle = make_case(lengths[0], k_length=lengths[1]), ~seen(window, lengths)
    assert idle.any()
    out, lse, *grads = both_passes("math", case, Block(window, SOFTMAX))
    want_out, want_lse, want_grads = exact(case, window)
    for found, wanted in zip((out, lse, *grads), (want_out, want_lse, *want_grads), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert (out[:, idle] == 0).all()
    assert (lse[:, :, idle] == -torch.inf).all()
    assert (grads[0][:, idle] == 0).all()


@pytest.mark.parametrize("kernel", CPU_KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_block_is_as_exact_as_its_dtype(kernel, dtype):
    case = make_case(40, dtype=dtype)
    block = Block((-1, 0), SOFTMAX)
    out, lse = KERNELS[kernel].forward(*case.inputs, block)
    grads = KERNELS[kernel].backward(Saved(*case.inputs, out.to(dtype), lse), case.dout, block)
    want_out, want_lse, want_grads = exact(case, (-1, 0))
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=max(1e-5, 0.1 * torch.finfo(dtype).eps))
    for found, wanted in zip((out, *grads), (want_out, *want_grads), strict=True):
        assert (found.double() - wanted).abs().max() < 8 * torch.finfo(dtype).eps * wanted.abs().max()
    assert all(grad.dtype == KERNELS[kernel].grad_dtype(dtype) for grad in grads)


@pytest.mark.parametrize("kernel", CPU_KERNELS)
def test_backward_of_a_block_with_the_global_lse_is_its_share(kernel):
    case = make_case(12, mask="full")
    block, k_cut = Block((-1, -1), SOFTMAX), 5
    out, lse, *_ = case.exact()
    shares = []
    for part in (slice(0, k_cut), slice(k_cut, 12)):
        saved = Saved(case.q, case.k[:, part], case.v[:, part], out, lse)
        shares.append(KERNELS[kernel].backward(saved, case.dout, block))
    _, _, want = exact(case, (-1, -1))
    torch.testing.assert_close(shares[0][0] + shares[1][0], want[0], rtol=0, atol=1e-12)
    for i in (1, 2):
        torch.testing.assert_close(torch.cat([shares[0][i], shares[1][i]], 1), want[i], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", CPU_KERNELS)
def test_packed_segments_are_problems_of_their_own(kernel):
    case = make_case(20, k_length=26, batch=1)
    q, k, v, dout = (x[0] for x in (*case.inputs, case.dout))
    segments = [VarlenSegment(2, 7, 1, 9), VarlenSegment(7, 8, 9, 10), VarlenSegment(12, 20, 14, 25)]
    block = Block((-1, 0), SOFTMAX, VarlenMetadata.of(segments, 20, 26, q.device))
    out, lse = KERNELS[kernel].forward(q, k, v, block)
    grads = KERNELS[kernel].backward(Saved(q, k, v, out, lse), dout, block)
    idle_q, idle_k = torch.ones(20, dtype=torch.bool), torch.ones(26, dtype=torch.bool)
    for q0, q1, k0, k1 in segments:
        idle_q[q0:q1], idle_k[k0:k1] = False, False
        part = make_case(1)
        part.q, part.k, part.v, part.dout = q[None, q0:q1], k[None, k0:k1], v[None, k0:k1], dout[None, q0:q1]
        want_out, want_lse, want_grads = exact(part, (-1, 0))
        torch.testing.assert_close(out[q0:q1], want_out[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(lse[:, q0:q1], want_lse[0], rtol=0, atol=1e-12)
        for found, wanted, tokens in zip(grads, want_grads, (slice(q0, q1), slice(k0, k1), slice(k0, k1)), strict=True):
            torch.testing.assert_close(found[tokens], wanted[0], rtol=0, atol=1e-12)
    assert (out[idle_q] == 0).all()
    assert (lse[:, idle_q] == -torch.inf).all()
    assert (grads[0][idle_q] == 0).all()
    assert (grads[1][idle_k] == 0).all()
    assert (grads[2][idle_k] == 0).all()


def test_gaps_between_segments_are_sequences_without_keys_or_without_queries():
    varlen = VarlenMetadata.of([VarlenSegment(2, 5, 0, 4), VarlenSegment(5, 6, 6, 8)], 9, 10, torch.device("cpu"))
    assert varlen.cu_q.tolist() == [0, 2, 5, 5, 6, 9, 9]
    assert varlen.cu_k.tolist() == [0, 0, 4, 6, 8, 8, 10]
    assert (varlen.max_q, varlen.max_k) == (3, 4)
    assert varlen.cu_q.dtype == torch.int32


@pytest.mark.parametrize("kernel", CPU_KERNELS)
def test_a_packed_block_without_segments_is_nothing_of_the_right_shape(kernel):
    case = make_case(6, v_dim=8, batch=1, dtype=torch.float32)
    q, k, v, dout = (x[0] for x in (*case.inputs, case.dout))
    nothing = Block((-1, 0), SOFTMAX, VarlenMetadata.of([], 6, 6, q.device))
    out, lse = KERNELS[kernel].forward(q, k, v, nothing)
    assert torch.equal(out, torch.zeros(6, 4, 8))
    assert torch.equal(lse, torch.full((4, 6), -torch.inf))
    grads = KERNELS[kernel].backward(Saved(q, k, v, out, lse), dout, nothing)
    assert all(torch.equal(grad, torch.zeros_like(x)) for grad, x in zip(grads, (q, k, v), strict=True))


def test_softcap_and_its_gradient_are_exact_in_math():
    case = make_case(11, softcap=1.5)
    out, lse, *grads = both_passes("math", case, Block((-1, 0), SoftmaxParams(8**-0.5, softcap=1.5)))
    want_out, want_lse, want_grads = exact(case, (-1, 0))
    for found, wanted in zip((out, lse, *grads), (want_out, want_lse, *want_grads), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_a_value_dim_of_its_own_is_exact_in_math():
    case = make_case(11, v_dim=5)
    out, *_ = KERNELS["math"].forward(*case.inputs, Block((-1, 0), SOFTMAX))
    torch.testing.assert_close(out, exact(case, (-1, 0))[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", WINDOWS)
def test_strips_hold_every_key_that_their_queries_see(window):
    mask = band_mask(Strip(range(10), range(14)), 4, window, torch.device("cpu"))
    rebuilt = torch.zeros_like(mask)
    for strip in strips((10, 14), window, 3):
        part = band_mask(strip, 4, window, torch.device("cpu"))
        rebuilt[strip.queries.start : strip.queries.stop, strip.keys.start : strip.keys.stop] = part
    assert torch.equal(mask, rebuilt)


def test_long_blocks_are_computed_in_strips_alike():
    case = make_case(1200, dim=4, heads=(2, 1), batch=1)
    for window in [(-1, 0), (300, 0), (-1, 40), (300, -1)]:
        results = [both_passes(kernel, case, Block(window, SoftmaxParams(0.5))) for kernel in ("torch_cpu", "math")]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


class Recording(MathKernel):
    """Keeps the positions that each dense block got."""

    def __init__(self) -> None:
        self.kept = []

    def forward_dense(self, q, k, v, block):
        self.kept.append(block.positions)
        return super().forward_dense(q, k, v, block)

    def backward_dense(self, saved, dout, block):
        self.kept.append(block.positions)
        return super().backward_dense(saved, dout, block)


class OpCounter(TorchDispatchMode):
    """Counts the ops of each name inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("window", "lengths", "calls"), [((-1, 0), (600, 600), 1), ((-1, -1), (600, 300), 1), ((9, 0), (600, 600), 2)]
)
def test_torch_cpu_masks_only_where_its_op_cannot(window, lengths, calls):
    case = make_case(lengths[0], k_length=lengths[1], dtype=torch.float32)
    with OpCounter() as ops:
        both_passes("torch_cpu", case, Block(window, SOFTMAX))
    assert ops.counts["_scaled_dot_product_flash_attention_for_cpu"] == calls
    assert ops.counts["_scaled_dot_product_flash_attention_for_cpu_backward"] == calls
    assert (ops.counts["masked_fill_"] > 0) == (calls > 1)


def test_each_packed_segment_gets_the_positions_and_slopes_of_its_own_rows():
    queries, keys, slopes = 10, 13, torch.rand(2, 4)
    segments = [VarlenSegment(1, 4, 0, 5), VarlenSegment(6, 9, 5, 13), VarlenSegment(10, 12, 13, 15), VarlenSegment(14, 19, 20, 25)]
    varlen = VarlenMetadata.of(segments, 2 * queries, 2 * keys, torch.device("cpu"))
    q_positions, k_positions = torch.randperm(queries), torch.randperm(keys)
    positions = PositionContext(slopes, 7, q_positions, k_positions, origin=(3, 1))
    case = make_case(2 * queries, k_length=2 * keys, batch=1)
    q, k, v, dout = (x[0] for x in (*case.inputs, case.dout))
    kernel, block = Recording(), Block((-1, -1), SoftmaxParams(0.4), varlen, positions)
    out, lse = kernel.forward(q, k, v, block)
    kernel.backward(Saved(q, k, v, out, lse), dout, block)
    assert len(kernel.kept) == 2 * len(segments)
    for (q0, q1, k0, k1), part in zip((*segments, *segments), kernel.kept, strict=True):
        row = q0 // queries
        assert torch.equal(part.q_positions, q_positions[q0 - row * queries : q1 - row * queries])
        assert torch.equal(part.k_positions, k_positions[k0 - row * keys : k1 - row * keys])
        assert torch.equal(part.alibi, slopes[row : row + 1])
        assert (part.batch, part.origin, part.seed) == (row, (3, 1), 7)


def test_the_first_kernel_that_does_not_refuse_is_chosen():
    assert choose_kernel(None, NEED).name == "torch_cpu"
    assert choose_kernel(None, KernelRequirements("cpu", torch.float32, 64, 32)).name == "math"
    assert choose_kernel("math", NEED).name == "math"


def test_an_unknown_kernel_is_named():
    with pytest.raises(ValueError, match=r"unknown kernel 'flash': choose one of flash_attn_4, .*torch_flash, torch_cpu, math"):
        choose_kernel("flash", NEED)


def test_all_refusals_are_listed_with_their_reasons():
    with pytest.raises(NotImplementedError) as failure:
        choose_kernel(None, KernelRequirements("cpu", torch.int32, 64, 64))
    text = str(failure.value)
    assert "every kernel refuses" in text
    assert "torch_flash: runs on CUDA tensors, found cpu" in text
    assert "torch_cpu: needs float64, float32, bfloat16 or float16, found torch.int32" in text
    assert "math: needs floating-point tensors, found torch.int32" in text


@pytest.mark.parametrize(
    ("need", "text"),
    [
        (KernelRequirements("cuda", torch.float32, 64, 64), "runs on CPU tensors, found cuda"),
        (KernelRequirements("cpu", torch.float32, 64, 32), "needs one head dim for q, k and v, found 64 and 32"),
        (KernelRequirements("cpu", torch.float32, 64, 64, softcap=30.0), "has no softcap"),
    ],
)
def test_torch_cpu_says_why_it_refuses(need, text):
    with pytest.raises(NotImplementedError, match=f"kernel 'torch_cpu' refuses this attention. torch_cpu: {text}"):
        choose_kernel("torch_cpu", need)


def test_the_reference_masks_documents_windows_and_lengths():
    case = make_case(9, batch=1, heads=(1, 1))
    documents = Documents.from_lengths([4, 5])
    out, lse = reference_attention(*case.inputs, documents=documents)
    for part in (slice(0, 4), slice(4, 9)):
        alone, alone_lse = reference_attention(*(x[:, part] for x in case.inputs))
        torch.testing.assert_close(out[:, part], alone)
        torch.testing.assert_close(lse[:, :, part], alone_lse)
    sdpa = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in case.inputs), is_causal=True)
    torch.testing.assert_close(reference_attention(*case.inputs)[0], sdpa.transpose(1, 2))


@pytest.mark.parametrize(("module", "needs"), [("no_such_module", ()), ("json", ("dumps",)), ("json", ("attention",))])
def test_looking_for_a_package_compiles(module, needs):
    def scaled(x):
        found = load(module, "a package", needs)
        return x * (2 if isinstance(found, str) else 3)

    wanted = scaled(torch.ones(2))
    assert torch.equal(torch.compile(scaled, backend="eager", fullgraph=True)(torch.ones(2)), wanted)


@pytest.mark.parametrize("scale", [-0.5, 0.0])
@pytest.mark.parametrize("mask", ["causal", "window", "full"])
def test_a_scale_of_zero_or_less_is_exact_by_the_kernels_that_take_it(scale, mask):
    case = make_case(9, mask=mask)
    leaves = [x.clone().requires_grad_() for x in case.inputs]
    options = {"is_causal": case.is_causal, "window": case.window, "scale": scale}
    out, lse = ring_attention(*leaves, **options, return_lse=True)
    exact, exact_lse = reference_attention(*leaves, **options)
    torch.testing.assert_close((out, lse), (exact, exact_lse), rtol=0, atol=1e-10)
    for found, wanted in zip(
        torch.autograd.grad(out, leaves, case.dout), torch.autograd.grad(exact, leaves, case.dout), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    for kernel in KERNELS.values():
        need = KernelRequirements("cpu", torch.bfloat16, 64, 64, scale=scale)
        assert kernel.lacks(need) == (None if kernel.name == "math" else "has no scale of 0 or less")


def test_queries_of_head_dim_zero_weigh_all_keys_alike_in_math_and_are_refused_by_name():
    q, k, v = torch.zeros(1, 3, 2, 0), torch.zeros(1, 3, 2, 0), torch.randn(1, 3, 2, 4)
    out, lse = KERNELS["math"].forward(q, k, v, Block((-1, 0), SoftmaxParams(1.0)))
    torch.testing.assert_close(out, v.cumsum(1) / torch.arange(1.0, 4).view(3, 1, 1))
    torch.testing.assert_close(lse, torch.arange(1.0, 4).log().expand(1, 2, 3))
    for scale in (1.0, None):
        with pytest.raises(ValueError, match="q and k have head dim 0"):
            ring_attention(q, k, v, scale=scale)
