"""cuDNN's attention: what it refuses, when it is the default, and how PyTorch's ops are called, on stand-ins for them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from cudnn_ops import BACKWARD, FORWARD, installed
from helpers import assert_exact, line, make_case, run_loopback, share, solved
from torch.nn.attention import SDPBackend, sdpa_kernel

from dtensor_ring import Documents, Zigzag, from_local, full_tensor, ring_attention
from dtensor_ring.ops.block_kinds import block_grain
from dtensor_ring.ops.call import AttentionCall
from dtensor_ring.ops.kernels import EVERY_KIND, KERNELS, Block, BlockKind, KernelRequirements, Saved, SoftmaxParams
from dtensor_ring.planning.layout import Layout
from dtensor_ring.planning.mask import Band

CUDNN = KERNELS["cudnn"]
NEED = KernelRequirements("cuda", torch.bfloat16, 128, 128, training=True, rows=1, heads=32, tokens=8192, grain=4096)


@pytest.fixture
def ops():
    with installed() as ops:
        yield ops


@pytest.mark.parametrize(
    ("need", "reason"),
    [
        ({}, None),
        ({"dtype": torch.float16, "head_dim": 64, "v_head_dim": 64}, None),
        ({"grain": None}, None),
        ({"grain": 0}, None),
        ({"dtype": torch.float32}, "needs bfloat16 or float16, found torch.float32"),
        ({"head_dim": 256, "v_head_dim": 256}, None),
        ({"head_dim": 8, "v_head_dim": 8}, None),
        *(({"head_dim": d, "v_head_dim": d}, f"needs a head dim up to 128, or of 256, found {d}") for d in (136, 192, 248)),
        ({"head_dim": 264, "v_head_dim": 264}, "needs a head dim that is a multiple of 8 up to 256, found 264"),
        ({"head_dim": 68, "v_head_dim": 68}, "needs a head dim that is a multiple of 8 up to 256, found 68"),
        ({"v_head_dim": 64}, "needs one head dim for q, k and v, found 128 and 64"),
        ({"softcap": 30.0}, "has no softcap"),
        ({"dropout": True}, "has no dropout"),
        ({"alibi": "aligned"}, "has no ALiBi"),
        ({"scale": 0.0}, "has no scale of 0 or less"),
        ({"deterministic": True}, "its backward is not deterministic"),
        ({"deterministic": True, "training": False}, None),
        ({"grain": 4160}, "here the largest number known to divide all blocks is 4160"),
        ({"grain": 1}, "needs blocks of whole tiles of 128 tokens"),
        ({"rows": 4, "tokens": 1 << 17}, None),
        ({"rows": 4, "tokens": (1 << 17) + 128}, "gets dq and dk wrong where q has more than 2**31 numbers, found 2149580800"),
        ({"rows": 4, "tokens": (1 << 17) + 128, "training": False}, None),
        *(({"rows": 5, "tokens": 1 << 17, unknown: None}, None) for unknown in ("rows", "heads", "tokens")),
    ],
)
def test_what_a_call_may_not_ask_for_is_refused_with_its_reason(need, reason):
    lacks = CUDNN.lacks(replace(NEED, **need))
    assert (lacks is None) if reason is None else (reason in lacks)


def test_gradients_are_refused_where_pytorch_is_told_to_be_deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        assert CUDNN.lacks(NEED) == "its backward is not deterministic"
        assert CUDNN.lacks(replace(NEED, training=False)) is None
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("gpu", "version", "reason"),
    [
        ((9, 0), 91900, None),
        ((9, 0), 92600, None),
        ((9, 0), 91899, "needs cuDNN 9.19 or newer, found 91899"),
        ((9, 0), None, "this build of PyTorch has no cuDNN"),
        ((8, 9), 91900, "needs compute capability 9.0, this GPU has 8.9"),
        ((10, 0), 91900, "is for Hopper GPUs (compute capability 9)"),
        (None, 91900, "runs on CUDA tensors, found cpu"),
    ],
)
def test_where_it_cannot_run_it_says_why(monkeypatch, gpu, version, reason):
    monkeypatch.setattr("dtensor_ring.ops.kernels.flash.capability", lambda: gpu)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: version is not None)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    assert CUDNN.unavailable(NEED if gpu else replace(NEED, device="cpu")) == reason


def test_a_build_for_amd_gpus_is_none_with_cudnn(monkeypatch):
    monkeypatch.setattr("dtensor_ring.ops.kernels.flash.capability", lambda: (9, 4))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 3005001)
    monkeypatch.setattr(torch.version, "hip", "7.1")
    assert CUDNN.unavailable(NEED) == "this build of PyTorch has no cuDNN"


def test_it_takes_dense_full_and_square_causal_blocks_alone():
    taken = {BlockKind("full", False), BlockKind("square causal", False)}
    assert {kind for kind in EVERY_KIND if CUDNN.refuses_block(kind) is None} == taken
    assert CUDNN.refuses_block(BlockKind("rectangular causal", False)) == "aligns causal masks top-left"
    assert CUDNN.refuses_block(BlockKind("window", False)) == "has no windows"
    assert CUDNN.refuses_block(BlockKind("full", True)) == "takes no varlen blocks"


@pytest.mark.parametrize(("window", "lengths"), [((-1, 0), (8, 16)), ((5, 0), (8, 8)), ((-1, 1), (8, 8)), ((0, -1), (8, 8))])
def test_a_block_that_it_would_get_wrong_does_not_reach_the_op(ops, window, lengths):
    case = make_case(lengths[0], k_length=lengths[1], dtype=torch.bfloat16)
    block = Block(window, SoftmaxParams(0.3))
    with pytest.raises(AssertionError, match="refused otherwise"):
        CUDNN.forward(*case.inputs, block)
    with pytest.raises(AssertionError, match="refused otherwise"):
        CUDNN.backward(Saved(*case.inputs, case.q, case.q[..., 0].transpose(1, 2).float()), case.dout, block)
    assert not ops.calls[FORWARD]
    assert not ops.calls[BACKWARD]


def test_lengths_of_which_it_is_the_default_are_few():
    grains = [grain for grain in range(0, (1 << 20) + 1, 128) if CUDNN.unasked(replace(NEED, grain=grain)) is None]
    # None, 1 to 15 tiles, and eight numbers of tiles for each power of two from 16 to 2**12, and 2**13.
    assert len(grains) == 1 + 15 + 8 * 9 + 1
    assert {128, 512, 640, 4096, 4096 + 512, 1 << 20} <= set(grains)
    rows = [rows for rows in range(257) if CUDNN.unasked(replace(NEED, rows=rows)) is None]
    assert len(rows) == 1 + 15 + 8 * 4 + 1
    text = CUDNN.unasked(replace(NEED, grain=17 * 128, rows=3))
    assert "found 3 batch rows, and chunks that are multiples of 2176 tokens" in text


def test_it_is_no_default_where_pytorch_is_told_not_to_take_it(ops):
    case = make_case(128, dim=16, dtype=torch.bfloat16)
    leaves = [x.requires_grad_() for x in case.inputs]
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        assert "sdpa_kernel" in CUDNN.unasked(NEED)
        out = ring_attention(*leaves)
    torch.autograd.grad(out, leaves, case.dout)
    assert not ops.calls[FORWARD] + ops.calls[BACKWARD]
    out = ring_attention(*leaves)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        torch.autograd.grad(out, leaves, case.dout)
        assert len(ops.calls[FORWARD]) == len(ops.calls[BACKWARD]) == 1
        ring_attention(*leaves, kernel="cudnn")
    assert len(ops.calls[FORWARD]) == 2


@pytest.mark.parametrize("unknown", ["rows", "grain"])
def test_it_is_no_default_before_lengths_are_known(unknown):
    assert CUDNN.unasked(replace(NEED, **{unknown: None})) == "is no default before lengths are known"


def chosen(
    length: int, world: int = 1, *, kernel: str = "auto", rows: int = 1, mask: str = "causal", layout="zigzag", **call
) -> str:
    asked = AttentionCall(Band.parse(mask), 0.1, Layout.parse(layout), kernel=kernel, **{"training": True, **call})
    need = asked.need("cpu", torch.bfloat16, 128, 128, rows, 32)
    return asked.choose(need, problem=asked.problem((length, length), world, None)).kernel.name


@pytest.mark.parametrize(
    ("length", "world", "options", "kernel"),
    [
        (8192, 1, {}, "cudnn"),
        (8192 * 8, 8, {}, "cudnn"),
        (8192 * 256, 256, {}, "cudnn"),
        (8192 * 8, 8, {"mask": "full", "layout": "contiguous"}, "cudnn"),
        (8192 * 8, 8, {"mask": "full", "layout": "stripe"}, "cudnn"),
        (8192 * 8, 8, {"strategy": "ulysses", "layout": "stripe"}, "cudnn"),
        (8192 * 8, 8, {"rows": 16}, "cudnn"),
        (8192 * 8, 8, {"rows": 17}, "torch_cpu"),
        (8192 * 8, 8, {"layout": "stripe"}, "torch_cpu"),
        (8192 * 8 + 1, 8, {}, "torch_cpu"),
        (8192 * 8 + 16, 8, {}, "torch_cpu"),
        (64 * 16, 8, {}, "torch_cpu"),
        (17 * 128 * 16, 8, {}, "torch_cpu"),
        (8192 * 8, 8, {"strategy": "gather"}, "torch_cpu"),
        (8192 * 8, 8, {"strategy": "gather", "mask": "full"}, "cudnn"),
        (8192 * 8, 8, {"mask": "window:1023,0"}, "torch_cpu"),
        (8192, 1, {"deterministic": True}, "torch_cpu"),
        (8192, 1, {"softcap": 20.0}, "math"),
        (1 << 20, 2, {}, "cudnn"),
        ((1 << 20) + (1 << 17), 2, {}, "torch_cpu"),
        ((1 << 20) + (1 << 17), 2, {"training": False}, "cudnn"),
    ],
)
def test_it_is_the_default_where_it_is_right_and_lengths_are_few_and_else_the_next_kernel(ops, length, world, options, kernel):
    assert chosen(length, world, **options) == kernel
    if kernel == "cudnn":
        assert chosen(length, world, **options, kernel="torch_cpu") == "torch_cpu"


def test_by_name_it_takes_lengths_of_which_it_is_no_default_and_refuses_those_that_it_gets_wrong(ops):
    assert chosen(17 * 128 * 16, 8, kernel="cudnn") == "cudnn"
    for length, options, reason in (
        (8192 * 8 + 16, {}, "here the largest number known to divide all blocks is 4097"),
        (8192 * 8, {"mask": "window:1023,0"}, "needs blocks of whole tiles of 128 tokens"),
        (8192 * 8, {"strategy": "gather"}, "aligns causal masks top-left, and this attention may have rectangular causal blocks"),
    ):
        with pytest.raises(NotImplementedError, match=f"kernel 'cudnn' refuses this attention. cudnn: .*{reason}"):
            chosen(length, 8, kernel="cudnn", **options)


def test_packed_documents_go_to_the_next_kernel(ops):
    asked = AttentionCall(Band.parse("causal"), 0.1, Layout("zigzag"), training=True)
    need = asked.need("cpu", torch.bfloat16, 128, 128, 1, 32)
    for documents in (Documents.from_lengths([4096, 4096]), Documents.from_lengths([8192])):
        assert block_grain(asked.problem((8192, 8192), 2, documents)) == 1
        assert asked.choose(need, problem=asked.problem((8192, 8192), 2, documents)).kernel.name == "torch_cpu"


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("mask", ["causal", "full"])
def test_over_ranks_its_blocks_are_merged_and_shared_out_as_those_of_other_kernels(ops, world, mask):
    case, exact = solved(64, mask=mask)
    for layout, stages in itertools.product(("contiguous", "zigzag", *(("stripe",) if mask == "full" else ())), (0, 1)):
        assert_exact(run_loopback(case, layout, world, "ring", CUDNN, stages)[0], exact)
    assert len(ops.calls[FORWARD]) == len(ops.calls[BACKWARD]) > 0


def test_backward_gets_the_same_strides_of_a_shape_in_every_call(ops):
    """A plan is found by q, k and v alone, and reads the rest by the strides of the call that it was made for."""
    case, block = make_case(16, dtype=torch.bfloat16), Block((-1, -1), SoftmaxParams(0.3))
    out, lse = CUDNN.forward(*case.inputs, block)
    wanted = CUDNN.backward(Saved(*case.inputs, out, lse), case.dout, block)
    wide = [torch.cat([x, torch.zeros_like(x)], 1)[:, :16] for x in (out, case.dout)]
    wide_lse = torch.cat([lse, lse], 2)[:, :, :16]
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (out, case.dout)]
    for (other, dout), other_lse in ((wide, wide_lse), (turned, lse.mT.contiguous().mT)):
        assert not other.is_contiguous()
        found = CUDNN.backward(Saved(*case.inputs, other, other_lse), dout, block)
        assert all(map(torch.equal, found, wanted))


def test_tensors_as_they_come_are_taken(ops):
    packed = torch.randn(2, 16, 3, 4, 8, dtype=torch.float64)
    one_head = torch.randn(2, 16, 1, 8, dtype=torch.float64).expand(2, 16, 4, 8)
    askew = torch.randn(2 * 16 * 4 * 8 + 1, dtype=torch.float64)[1:].view(2, 16, 4, 8)
    part = torch.randn(2, 16, 4, 9, dtype=torch.float64)[..., :8]
    for q, k, v in (packed.unbind(2), (packed[:, :, 0], one_head, one_head), (askew, part, askew), (part, askew, part)):
        case = replace(make_case(16), q=q, k=k, v=v, dout=q, is_causal=False)
        block = Block((-1, -1), SoftmaxParams(8**-0.5))
        out, lse = CUDNN.forward(q, k, v, block)
        found = out, lse, *CUDNN.backward(Saved(q, k, v, out, lse), q, block)
        assert all(x.is_contiguous() for x in found)
        assert_exact(found, case.exact())


def test_without_batch_rows_there_is_nothing_to_compute(ops):
    case = make_case(128, dim=16, dtype=torch.bfloat16)
    q, k, v, dout = (x[:0] for x in (*case.inputs, case.dout))
    out, lse = CUDNN.forward(q, k, v, Block((-1, 0), SoftmaxParams(0.25)))
    assert out.shape == q.shape
    assert (lse.shape, lse.dtype) == ((0, 4, 128), torch.float32)
    grads = CUDNN.backward(Saved(q, k, v, out, lse), dout, Block((-1, 0), SoftmaxParams(0.25)))
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]
    assert not ops.calls[FORWARD] + ops.calls[BACKWARD]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_call_that_leaves_the_kernel_open_is_computed_by_it(ops, compiled):
    case = make_case(256, dim=16, dtype=torch.bfloat16)
    leaves = [x.clone().requires_grad_() for x in case.inputs]
    attend = torch.compile(ring_attention, backend="aot_eager", fullgraph=True) if compiled else ring_attention
    out = attend(*leaves, is_causal=True)
    grads = torch.autograd.grad(out, leaves, case.dout)
    shapes = (2, 4, 256, 16), (2, 2, 256, 16), True
    assert ops.calls == {FORWARD: [shapes], BACKWARD: [shapes]}
    exact = case.exact()
    for found, wanted in zip((out, *grads), (exact[0], *exact[2:]), strict=True):
        assert (found.float() - wanted).norm() < 1e-2 * wanted.norm()
    attend(*leaves, is_causal=True, kernel="torch_cpu")
    assert len(ops.calls[FORWARD]) == 1


def test_sinks_are_exact(ops):
    case = make_case(128, dim=16, dtype=torch.bfloat16)
    sinks = torch.linspace(-1, 3, 4)
    results = []
    for kernel, dtype in (("cudnn", torch.bfloat16), ("math", torch.float32)):
        leaves = [x.to(dtype).requires_grad_() for x in case.inputs] + [sinks.clone().requires_grad_()]
        out = ring_attention(*leaves[:3], sinks=leaves[3], kernel=kernel)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, case.dout.to(dtype))))
    for found, exact in zip(*results, strict=True):
        assert (found.float() - exact).norm() < 1e-2 * exact.norm()


def over_two_ranks(length: int):
    mesh, rank = line(), torch.distributed.get_rank()
    case = make_case(length, dim=16, dtype=torch.bfloat16)
    with installed() as ops:
        placed = [from_local(share(x, "zigzag", 2, rank), mesh, [Zigzag(1)], length=length) for x in case.inputs]
        out, lse = ring_attention(*placed, return_lse=True)
    for found, exact in zip((full_tensor(out), full_tensor(lse)), case.exact(), strict=False):
        assert (found.float() - exact).norm() < 1e-2 * exact.norm()
    return ops.calls[FORWARD]


def test_ranks_choose_alike_also_where_only_one_of_them_has_an_odd_length(pools):
    first, second = pools.run(2, over_two_ranks, 512)
    own = (2, 4, 256, 16), (2, 2, 256, 16), True
    assert first == [own, ((2, 4, 128, 16), (2, 2, 256, 16), False)]
    assert second == [own, ((2, 4, 256, 16), (2, 2, 128, 16), False)]
    for length in (513, 514, 516):
        assert pools.run(2, over_two_ranks, length) == [[], []]
