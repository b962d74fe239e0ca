"""A call as a value, its preparation, and the two ways to the operators: eager, and traced."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from helpers import backend_here, grid, line, make_case, one_or_all, share, some_or_every
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import DTensor, Replicate, Shard

from dtensor_ring import (
    Contiguous,
    Documents,
    Stripe,
    Zigzag,
    distribute_tensor,
    from_local,
    full_tensor,
    ring_attention,
)
from dtensor_ring.ops import operator as operator_module
from dtensor_ring.ops import prepare as prepare_module
from dtensor_ring.ops.arguments import Arguments
from dtensor_ring.ops.call import AttentionCall
from dtensor_ring.ops.kernels import KERNELS
from dtensor_ring.ops.kernels.math import MathKernel
from dtensor_ring.ops.place import place_alone
from dtensor_ring.ops.prepare import Inputs, prepare
from dtensor_ring.planning.layout import Layout
from dtensor_ring.planning.mask import Band, mask_text

sides = st.integers(-1, 1 << 40)
masks = st.one_of(
    st.tuples(st.just(True), st.tuples(sides, st.sampled_from([-1, 0]))), st.tuples(st.just(False), st.tuples(sides, sides))
)
numbers = st.floats(0, 1e30, allow_nan=False, exclude_max=True)
layouts = st.one_of(
    st.sampled_from(["contiguous", "zigzag", "contiguous/even", "zigzag/even", "zigzag/documents"]),
    st.integers(1, 1 << 30).map(lambda block: f"stripe:{block}"),
).map(Layout.parse)
calls = st.builds(
    AttentionCall,
    masks.map(lambda mask: Band.parse(mask_text(*mask))),
    st.floats(allow_nan=False, allow_infinity=False),
    layouts,
    st.sampled_from(["auto", "ring", "gather", "ulysses"]),
    st.sampled_from(["auto", *KERNELS]),
    numbers,
    st.floats(0, 1, exclude_max=True),
    st.booleans(),
    st.booleans(),
    st.integers(0, 128),
)


@given(calls)
def test_a_call_is_what_its_text_says(call):
    assert AttentionCall.parse(str(call)) == call


@given(calls, calls)
def test_texts_are_equal_where_calls_are(a, b):
    assert (str(a) == str(b)) == (a == b)


def test_operators_and_the_public_function_stay_small():
    forward, backward = (len(op.default._schema.arguments) for op in (attention_op(), torch.ops.dtensor_ring.attention_backward))
    assert forward <= 12
    assert backward <= 15
    tree = ast.parse(textwrap.dedent(inspect.getsource(ring_attention)))
    (function,) = tree.body
    body = function.body[1:]  # after the docstring
    assert body[-1].end_lineno - body[0].lineno + 1 <= 25


def attention_op():
    return torch.ops.dtensor_ring.attention


def test_a_wrong_window_is_refused_also_after_an_equal_right_one():
    x = torch.randn(1, 4, 2, 8)
    ring_attention(x, x, x, window=(2, 0))
    with pytest.raises(TypeError, match="a side is a whole number of tokens, found float, int"):
        ring_attention(x, x, x, window=(2.0, 0))
    wanted = ring_attention(x, x, x, window=(2, 0))
    assert torch.equal(ring_attention(x, x, x, window=[2, 0]), wanted)


def test_what_is_remembered_of_calls_is_bounded():
    for length in range(1, 300):
        x = torch.empty(1, length, 1, 8)
        prepare(Inputs(x, x, x), Arguments(), place_alone(x, x, x), "a test")
    use = prepare_module._CALLS.use()
    assert use.entries <= use.most_entries == 128


def test_a_setting_of_pytorch_that_kernels_read_is_part_of_what_is_remembered():
    x = torch.randn(1, 4, 2, 8)
    asked, place = Arguments(deterministic=True), place_alone(x, x, x)
    prepare_module._CALLS.clear()
    prepare(Inputs(x, x, x), asked, place, "a test")
    torch.use_deterministic_algorithms(True)
    try:
        prepare(Inputs(x, x, x), asked, place, "a test")
    finally:
        torch.use_deterministic_algorithms(False)
    assert prepare_module._CALLS.use().entries == 2


def both_ways(every: bool):
    """Placements, shapes and values of out, lse and gradients, by the autograd function and by the sharding rules.

    Each pair of placements in both orders, with sinks and without; or in one order, with sinks or without.
    """
    plane = grid("a", "b")
    outer = [Shard(0), Shard(2), Replicate()]
    pairs = [(a, b) for a in outer for b in (Contiguous(1), Zigzag(1), Stripe(1, block=2), Shard(1), Shard(0), Replicate())]
    case = make_case(8, heads=(4, 2))
    for i, (a, b) in enumerate(pairs):
        if a == b == Shard(0):
            continue
        for j, with_sinks in itertools.product((0, 1), (False, True)):
            if every or (j, with_sinks) == ((i + i // 6) % 2, i // 2 % 2 == 0):
                compare_ways(plane, [b, a] if j else [a, b], case, with_sinks)


def compare_ways(plane, placements, case, with_sinks):
    leaves = [distribute_tensor(x, plane, placements, src_data_rank=None).requires_grad_() for x in case.inputs]
    dout = distribute_tensor(case.dout, plane, placements, src_data_rank=None)
    sinks = None
    if with_sinks:
        split = [Shard(0) if p == Shard(2) else Replicate() for p in placements]
        sinks = distribute_tensor(torch.arange(4.0, dtype=torch.float64), plane, split, src_data_rank=None).requires_grad_()
    wanted = [*leaves, *([sinks] if sinks is not None else [])]
    eager = ring_attention(*leaves, sinks=sinks, kernel="math", return_lse=True)
    eager_grads = torch.autograd.grad(eager[0], wanted, dout)

    none = DTensor.from_local(torch.empty(0, dtype=torch.int64), plane, [Replicate(), Replicate()], run_check=False)
    axis = next((i for i, p in enumerate(placements) if p not in (Shard(0), Shard(2), Replicate())), None)
    layout = Layout("contiguous") if axis is None or placements[axis] == Shard(1) else placements[axis].layout
    call = AttentionCall(Band.parse("causal"), 8**-0.5, layout, kernel="math", training=True)
    group = "" if axis is None else plane.get_group(axis).group_name
    out, lse, _ = attention_op()(*leaves, sinks, None, none, (8, 8), (0, 0), str(call), group)
    grads = torch.autograd.grad(out, wanted, dout)
    for mine, rule in zip((*eager, *eager_grads[:3]), (out, lse, *grads[:3]), strict=True):
        assert mine.placements == rule.placements, placements
        assert mine.shape == rule.shape
        assert mine.to_local().shape == rule.to_local().shape
        torch.testing.assert_close(mine.to_local(), rule.to_local(), rtol=0, atol=1e-12)
    if with_sinks:  # the rule leaves the sum over ranks to whoever asks for it
        assert eager_grads[3].placements == sinks.placements
        torch.testing.assert_close(full_tensor(eager_grads[3]), full_tensor(grads[3]), rtol=0, atol=1e-12)


@some_or_every
def test_the_autograd_function_and_the_sharding_rules_place_alike(pools, every):
    pools.run(4, both_ways, every)


def graphs_of_calls(change: str, everywhere: bool) -> int:
    """Graphs of a compiled layer over masks, numbers of documents, or numbers; values are checked."""
    torch._dynamo.reset()
    mesh, world, rank = line(), dist.get_world_size(), dist.get_rank()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend_here("aot_eager", everywhere))

    @torch.compile(backend=counter, fullgraph=True)
    def layer(q, k, v, length, documents, is_causal, window, scale, softcap):
        placed = [from_local(x, mesh, [Zigzag(1)], length=length) for x in (q, k, v)]
        return ring_attention(
            *placed, documents=documents, is_causal=is_causal, window=window, scale=scale, softcap=softcap
        ).to_local()

    for i in range(12):
        mask = ("causal", "full", "window")[i % 3] if change == "masks" else "causal"
        lengths = [1] * (i + 1) + [47 - i]
        documents = Documents.from_lengths(lengths) if change == "documents" else None
        number = 0.5 + i % 3 if change == "numbers" else 1.0
        case = make_case(48, mask=mask, documents=documents, dtype=torch.float32, softcap=number)
        case.q *= number  # the exact results have the default scale
        shares = [share(x, "zigzag", world, rank) for x in case.inputs]
        out = layer(shares[0] / number, *shares[1:], 48, documents, case.is_causal, case.window, number * 8**-0.5, number)
        torch.testing.assert_close(out, share(case.exact()[0], "zigzag", world, rank), rtol=0, atol=5e-5)
    return counter.frame_count


@pytest.mark.parametrize(("change", "most"), [("masks", 4), ("numbers", 4), ("documents", 2)])
@one_or_all
def test_compiled_calls_make_a_bounded_number_of_graphs(pools, change, most, everywhere):
    assert max(pools.run(2, graphs_of_calls, change, everywhere, timeout=250)) <= most


class Promising(MathKernel):
    """Keeps its promise of equal gradients only under a setting of PyTorch, as torch_flash does; its dropout masks are its own."""

    name = "promising"

    def lacks(self, need):
        lacks = need.deterministic and need.training and not torch.are_deterministic_algorithms_enabled()
        return "the setting is off" if lacks else None

    def forward_dense(self, q, k, v, block):
        return super().forward_dense(q, k, v, with_other_seed(block))

    def backward_dense(self, saved, dout, block):
        return super().backward_dense(saved, dout, with_other_seed(block))


def with_other_seed(block):
    return block._replace(positions=replace(block.positions, seed=block.positions.seed + 1))


@pytest.fixture
def promising():
    """The kernel is the first choice inside; what was chosen is forgotten before and after."""
    stock, kernel = dict(KERNELS), Promising()

    def forget():
        prepare_module._CALLS.clear()
        operator_module._resolved.cache_clear()

    KERNELS.clear()
    KERNELS.update({kernel.name: kernel, **stock})
    forget()
    yield kernel.name
    KERNELS.clear()
    KERNELS.update(stock)
    forget()
    torch.use_deterministic_algorithms(False)


def gradients_under(forward: bool, backward: bool, compiled: bool):
    """Gradients of a call with dropout whose passes see different settings."""
    x = torch.randn(1, 8, 2, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    attend = torch.compile(ring_attention, backend="aot_eager", fullgraph=True) if compiled else ring_attention
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(forward)
    out = attend(x, x, x, deterministic=True, dropout_p=0.4)
    torch.use_deterministic_algorithms(backward)
    return torch.autograd.grad(out.sum(), x)[0]


def test_backward_runs_the_kernel_of_forward_or_says_why_it_cannot(promising):
    torch._dynamo.reset()
    first, other = (gradients_under(setting, setting, compiled=False) for setting in (True, False))
    assert not torch.equal(first, other), "the two kernels draw other masks"
    assert torch.equal(gradients_under(False, True, compiled=False), other)
    with pytest.raises(NotImplementedError, match=f"kernel '{promising}' refuses this attention.*the setting is off"):
        gradients_under(True, False, compiled=False)
    for setting, wanted in ((True, first), (False, other)):  # PyTorch itself refuses settings that change in compiled code
        torch.testing.assert_close(gradients_under(setting, setting, compiled=True), wanted, rtol=0, atol=1e-6)
