"""ring_attention on DTensors over real processes: results, placements, refusals, compilation."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from helpers import (
    LAYOUTS,
    PLACEMENTS,
    assert_like_kernel,
    backend_here,
    grid,
    line,
    make_case,
    once,
    one_or_all,
    over_ranks,
    refused,
    share,
    single_device,
    slow,
    some_or_every,
)
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from dtensor_ring import (
    Contiguous,
    Documents,
    Stripe,
    Zigzag,
    distribute_tensor,
    from_local,
    full_tensor,
    redistribute,
    ring_attention,
)
from dtensor_ring.ops.call import AttentionCall
from dtensor_ring.planning.layout import Layout
from dtensor_ring.planning.mask import Band

PLACEMENTS = {**{layout: PLACEMENTS[layout] for layout in LAYOUTS}, "shard": Shard(1)}


def attend(mesh, placements, case, **options):
    """out, lse, dq, dk, dv as whole tensors."""
    leaves = [x.clone().requires_grad_() for x in case.inputs]
    placed = [distribute_tensor(x, mesh, placements, src_data_rank=None) for x in leaves]
    masks = {"is_causal": case.is_causal, "window": case.window, "documents": case.documents}
    out, lse = ring_attention(*placed, return_lse=True, **masks, **options)
    assert out.placements == tuple(placements)
    assert lse.shape == (case.q.shape[0], case.q.shape[2], case.q.shape[1])
    return full_tensor(out).detach(), full_tensor(lse.detach()), *torch.autograd.grad(full_tensor(out), leaves, case.dout)


def one_axis(layout: str, strategy: str, every: bool):
    """Every length, number of heads and mask; or each of them once, since ranks as threads run all (`test_execute.py`)."""
    mesh = line()
    lengths, numbers, masks = (16, 32) if layout == "shard" else (1, 2, 7, 16, 33), ((4, 2), (3, 1)), ("causal", "full", "window")
    some = zip(lengths, itertools.cycle(numbers), itertools.cycle(masks), strict=False)
    for length, heads, mask in itertools.product(lengths, numbers, masks) if every else some:
        case = make_case(length, heads=heads, mask=mask)
        exact = once(case.exact)
        for found, wanted in zip(attend(mesh, [PLACEMENTS[layout]], case, strategy=strategy), exact, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


# Each layout and strategy at two ranks or at four by default, at both as slow tests; one rank is cheap.
CELLS = list(itertools.product(PLACEMENTS, ("ring", "gather"), (1, 2, 4)))
BY_DEFAULT = [cell for i, cell in enumerate(CELLS) if cell[2] == 1 or i // 3 % 4 in ((0, 3) if cell[2] == 4 else (1, 2))]


@some_or_every
@pytest.mark.parametrize(("layout", "strategy", "world"), [cell if cell in BY_DEFAULT else slow(*cell) for cell in CELLS])
def test_a_sequence_axis_of_any_layout_is_exact(pools, world, layout, strategy, every):
    pools.run(world, one_axis, layout, strategy, every)


@pytest.mark.slow
@pytest.mark.parametrize("layout", PLACEMENTS)
def test_eight_processes_are_exact(pools, layout):
    pools.run(8, one_axis, layout, "ring", True, timeout=280)


def sixteen_bits(layout: str, dtype: torch.dtype):
    case = make_case(300, dim=32, dtype=dtype)
    assert_like_kernel(over_ranks(case, layout), *once(lambda: (single_device(case, "torch_cpu"), case.exact())))


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        *(("contiguous", torch.float16), ("zigzag", torch.bfloat16), ("stripe", torch.bfloat16)),
        *(slow(*cell) for cell in (("contiguous", torch.bfloat16), ("zigzag", torch.float16), ("stripe", torch.float16))),
    ],
)
def test_sixteen_bits_err_like_one_device(pools, layout, dtype):
    pools.run(4, sixteen_bits, layout, dtype)


def two_axes(every: bool):
    """Each pair of placements in both orders; or in one, each placement in both."""
    mesh = grid("other")
    pairs = itertools.product((Shard(0), Shard(2), Replicate()), (Zigzag(1), Stripe(1), Contiguous(1)))
    for i, (other, placement) in enumerate(pairs):
        orders = [other, placement], [placement, other]
        for placements in orders if every else (orders[i % 2],):
            case = make_case(13, heads=(4, 2))
            for found, wanted in zip(attend(mesh, placements, case), case.exact(), strict=True):
                torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    case = make_case(12, documents=Documents(((0, 5, 12), (0, 9, 12))))
    for found, wanted in zip(attend(mesh, [Shard(0), Zigzag(1)], case), case.exact(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    case = make_case(12, heads=(4, 2))
    for found, wanted in zip(attend(mesh, [Shard(0), Shard(2)], case), case.exact(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


@some_or_every
def test_batch_and_head_sharding_pass_through_on_two_axes(pools, every):
    pools.run(4, two_axes, every)


def one_tensor_three_times():
    mesh = line()
    x = torch.randn(2, 13, 4, 8, dtype=torch.float64, requires_grad=True)
    whole_out = ring_attention(x, x, x, strategy="local")
    (wanted,) = torch.autograd.grad(whole_out.square().sum(), x, retain_graph=True)
    placed = distribute_tensor(x, mesh, [Zigzag(1)], src_data_rank=None)
    out = ring_attention(placed, placed, placed)
    again = ring_attention(out, placed, placed)  # keys used by two attentions
    alone = ring_attention(whole_out, x, x, strategy="local")
    (found,) = torch.autograd.grad(full_tensor(out).square().sum(), x, retain_graph=True)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    (found,) = torch.autograd.grad(full_tensor(again).square().sum(), x)
    (wanted,) = torch.autograd.grad(alone.square().sum(), x)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


def test_one_dtensor_may_be_queries_keys_and_values(pools):
    pools.run(2, one_tensor_three_times)


def gradients_in_another_placement():
    mesh = line()
    case = make_case(12)
    leaves = [x.clone().requires_grad_() for x in case.inputs]
    out = ring_attention(*[distribute_tensor(x, mesh, [Zigzag(1)], src_data_rank=None) for x in leaves])
    moved = redistribute(out, [Shard(2)])
    grads = torch.autograd.grad(moved, leaves, distribute_tensor(case.dout, mesh, [Shard(2)], src_data_rank=None))
    for found, wanted in zip(grads, case.exact()[2:], strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


def test_gradients_come_back_through_a_redistribution(pools):
    pools.run(2, gradients_in_another_placement)


def test_plain_tensors_run_the_kernel_of_one_device():
    for mask in ("causal", "full", "window", "two-sided"):
        case = make_case(13, mask=mask)
        leaves = [x.clone().requires_grad_() for x in case.inputs]
        out, lse = ring_attention(*leaves, is_causal=case.is_causal, window=case.window, return_lse=True)
        exact = case.exact()
        grads = torch.autograd.grad(out, leaves, case.dout)
        for found, wanted in zip((out, lse, *grads), exact, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


@some_or_every
def test_the_operators_pass_torch_s_own_checks(every):
    case = make_case(6, batch=1)
    documents = Documents.from_lengths([2, 4]).encoded
    leaves = [x.clone().requires_grad_() for x in case.inputs]
    call = AttentionCall(Band.parse("causal"), 8**-0.5, Layout("contiguous"), kernel="math")
    rest = (6, 6), (0, 0), str(call), ""
    sinks, slopes = torch.randn(4, dtype=torch.float64, requires_grad=True), torch.rand(4)
    for extras in ((None, None), (sinks, None), (sinks, slopes)) if every else ((sinks, slopes),):
        torch.library.opcheck(torch.ops.dtensor_ring.attention, (*leaves, *extras, documents, *rest))
        saved = torch.ops.dtensor_ring.attention(*leaves, *extras, documents, *rest)
        tensors = [x if x is None else x.detach() for x in (*leaves, *extras)]
        backward = case.dout, *tensors, *(x.detach() for x in saved), documents, *rest
        torch.library.opcheck(torch.ops.dtensor_ring.attention_backward, backward)


def test_gradients_agree_with_finite_differences():
    case = make_case(5, batch=1, heads=(2, 1), dim=3, softcap=1.0)
    leaves = [x.clone().requires_grad_() for x in case.inputs]
    assert torch.autograd.gradcheck(lambda q, k, v: ring_attention(q, k, v, softcap=1.0, documents=[0, 2, 5]), leaves)


def test_a_gradient_of_lse_is_refused():
    case = make_case(5)
    out, lse = ring_attention(*[x.clone().requires_grad_() for x in case.inputs], return_lse=True)
    with pytest.raises(NotImplementedError, match="the lse of ring_attention has no gradient"):
        (out.sum() + lse.square().sum()).backward()


def test_no_tokens_at_all_are_attended():
    x = torch.zeros(2, 0, 4, 8, requires_grad=True)
    out, lse = ring_attention(x, x, x, return_lse=True)
    assert out.shape == (2, 0, 4, 8)
    assert lse.shape == (2, 4, 0)
    out.sum().backward()


def refusals():
    rank, mesh = dist.get_rank(), line()
    plane = grid()
    x = torch.randn(4, 8, 4, 8)

    def placed(placement, on=mesh, tensor=x):
        return distribute_tensor(tensor, on, placement if isinstance(placement, list) else [placement], src_data_rank=None)

    zigzag, contiguous = placed(Zigzag(1)), placed(Contiguous(1))
    cases = [
        (
            lambda: ring_attention(zigzag, contiguous, contiguous),
            ValueError,
            "mesh axis 'cp'",
            "q is Zigzag(1), k is Contiguous(1)",
            "redistribute",
        ),
        (lambda: ring_attention(zigzag, zigzag, placed(Replicate())), ValueError, "v is Replicate()"),
        (lambda: ring_attention(placed(Replicate()), zigzag, zigzag), ValueError, "q is Replicate()", "k is Zigzag(1)"),
        (
            lambda: ring_attention(*[placed(Zigzag(2))] * 3),
            ValueError,
            "Zigzag(dim=2) cannot split the heads dimension",
            "use Zigzag(1)",
        ),
        (lambda: ring_attention(*[placed(Stripe(3))] * 3), ValueError, "Stripe(dim=3) cannot split the head dimension"),
        (lambda: ring_attention(*[placed(Zigzag(0))] * 3), ValueError, "Zigzag(dim=0) cannot split the batch dimension"),
        (lambda: ring_attention(*[placed(Shard(3))] * 3), ValueError, "Shard(dim=3) cannot split the head dimension"),
        (
            lambda: ring_attention(*[DTensor.from_local(x, mesh, [Partial()], run_check=False)] * 3),
            ValueError,
            "q is Partial(sum)",
            "reduce",
        ),
        (
            lambda: ring_attention(*[placed(Shard(2), tensor=x[:, :, :2])] * 3),
            ValueError,
            "splits heads over 4 ranks, but q has 2 and k has 2",
        ),
        (
            lambda: ring_attention(*[placed(Shard(1), tensor=x[:, :7])] * 3),
            ValueError,
            "Shard(dim=1) of lengths 7 and 7 over 4 ranks is not even",
        ),
        (
            lambda: ring_attention(*[DTensor.from_local(x[:, :2], plane, [Zigzag(1), Stripe(1)], run_check=False)] * 3),
            NotImplementedError,
            "mesh axes 'dp' and 'cp' both hold the sequence (Zigzag(1) and Stripe(1, block=1))",
        ),
        (lambda: ring_attention(zigzag, *[placed([Replicate(), Zigzag(1)], plane)] * 2), ValueError, "must lie on one mesh"),
        (lambda: ring_attention(zigzag, x, zigzag), TypeError, "plain: k"),
        (lambda: ring_attention(zigzag, zigzag, zigzag.double()), TypeError, "one dtype", "torch.float64"),
        (lambda: ring_attention(zigzag, zigzag, zigzag, sinks=torch.zeros(3)), ValueError, "sinks must have shape (H,) = (4,)"),
        (lambda: ring_attention(zigzag, zigzag, zigzag, dropout_p=1.0), ValueError, "a probability below 1, found 1.0"),
        (
            lambda: ring_attention(zigzag, zigzag, zigzag, alibi_slopes=torch.zeros(4, 3)),
            ValueError,
            "(4,) or (4, 4), found (4, 3)",
        ),
        (lambda: ring_attention(zigzag, zigzag, zigzag, alibi_slopes=torch.zeros(4).half()), TypeError, "plain float32 tensor"),
        (
            lambda: ring_attention(zigzag, zigzag, zigzag, alibi_slopes=torch.zeros(4, requires_grad=True)),
            NotImplementedError,
            "get no gradient: pass alibi_slopes.detach()",
        ),
        (
            lambda: ring_attention(zigzag, zigzag, zigzag, kernel="torch_cpu", dropout_p=0.1),
            NotImplementedError,
            "torch_cpu: has no dropout",
        ),
        (lambda: ring_attention(zigzag, zigzag, zigzag, window=(3, 1)), ValueError, "looks 1 tokens ahead"),
        (lambda: ring_attention(zigzag, zigzag, zigzag, strategy="rings"), ValueError, "unknown strategy 'rings'"),
        (lambda: ring_attention(zigzag, zigzag, zigzag, strategy="tree"), ValueError, "unknown strategy 'tree'"),
        (
            lambda: ring_attention(zigzag, zigzag, zigzag, kernel="torch_flash"),
            NotImplementedError,
            "runs on CUDA tensors, found cpu",
        ),
        (
            lambda: ring_attention(zigzag, zigzag, zigzag, documents=[0, 5]),
            ValueError,
            "documents end at token 5, but the sequence has 8",
        ),
        (
            lambda: ring_attention(zigzag, zigzag, zigzag, documents=Documents(((0, 8), (0, 3, 8)))),
            ValueError,
            "2 rows, but the batch has 4",
        ),
        # what only some ranks do wrong is told on all of them
        (
            lambda: ring_attention(*[DTensor.from_local(x[:, : 2 + (rank == 1)], mesh, [Zigzag(1)], run_check=False)] * 3),
            ValueError,
            "has q, k, v of global shapes",
            "(4, 12, 4, 8)",
        ),
        (
            lambda: ring_attention(
                *[from_local(x[:, :2].to([torch.float32, torch.float64][rank % 2]), mesh, [Zigzag(1)], length=8, run_check=False)]
                * 3
            ),
            ValueError,
            "calls with another layout, dtype, mask, strategy, kernel, number or documents",
        ),
        (lambda: ring_attention(zigzag, zigzag, zigzag, is_causal=rank == 0), ValueError, "every rank must make the same call"),
        (
            lambda: ring_attention(zigzag, zigzag, zigzag, documents=[0, 3 + rank, 8]),
            ValueError,
            "every rank must make the same call",
        ),
        (
            lambda: ring_attention(*[from_local(x[:, : 1 + rank], mesh, [Zigzag(1)], length=10, run_check=False)] * 3),
            ValueError,
            "rank 0 holds 1 tokens of q, but zigzag of length 10 gives it 3",
        ),
    ]
    for act, error, *texts in cases:
        refused(act, error, *texts)
    with torch.no_grad():  # nothing was left half done
        found, wanted = ring_attention(zigzag, zigzag, zigzag), ring_attention(contiguous, contiguous, contiguous)
        torch.testing.assert_close(full_tensor(found), full_tensor(wanted))


def test_what_does_not_fit_is_refused_by_name_on_every_rank(pools):
    pools.run(4, refusals)


@pytest.mark.parametrize(
    ("shapes", "text"),
    [
        (((2, 8, 4), (2, 8, 4, 8), (2, 8, 4, 8)), r"must have shape \(B, S, H, D\)"),
        (((2, 8, 4, 8), (3, 8, 4, 8), (3, 8, 4, 8)), "needed q"),
        (((2, 8, 4, 8), (2, 8, 4, 6), (2, 8, 4, 6)), "needed q"),
        (((2, 8, 4, 8), (2, 8, 4, 8), (2, 7, 4, 8)), "needed q"),
        (((2, 8, 4, 8), (2, 8, 3, 8), (2, 8, 3, 8)), "multiple of key heads, found 4 and 3"),
    ],
)
def test_shapes_that_do_not_fit_are_named(shapes, text):
    with pytest.raises(ValueError, match=text):
        ring_attention(*[torch.zeros(shape) for shape in shapes])


def wrong_layout_argument():
    mesh = line()
    placed = distribute_tensor(torch.randn(1, 8, 2, 4), mesh, [Zigzag(1)])
    none = DTensor.from_local(torch.empty(0, dtype=torch.int64), mesh, [Replicate()], run_check=False)
    call = AttentionCall(Band.parse("causal"), 0.5, Layout("stripe"), kernel="math")
    rest = (8, 8), (0, 0), str(call), mesh.get_group().group_name
    refused(
        lambda: torch.ops.dtensor_ring.attention(placed, placed, placed, None, None, none, *rest),
        RuntimeError,
        "was given the layout stripe:1",
        "Zigzag(1)",
    )


def test_the_sharding_rule_catches_a_layout_that_is_not_the_tensors(pools):
    pools.run(2, wrong_layout_argument)


def compiled(backend: str, packed: bool, everywhere: bool) -> int:
    """Forward and backward in one graph, over changing lengths; how many graphs were made."""
    torch._dynamo.reset()
    mesh, world, rank = line(), dist.get_world_size(), dist.get_rank()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend_here(backend, everywhere))

    @torch.compile(backend=counter, fullgraph=True)
    def layer(q, k, v, length, documents):
        placed = [from_local(x, mesh, [Zigzag(1)], length=length) for x in (q * 1.5, k, v)]
        return ring_attention(*placed, documents=documents).to_local() * 2

    # Inductor's C++ takes seconds a graph: fast tests have it made for lengths of one kind.
    odd = backend == "inductor" and not everywhere
    for length in (17, 19, 33, 21) if odd else (16, 32, 24, 17, 40, 19, 48, 64):
        documents = Documents.from_lengths([3, length - 7, 4]) if packed else None
        case = make_case(length, documents=documents, dtype=torch.float32)
        case.q, plain_q = case.q * 1.5, case.q
        exact = case.exact()
        shares = [share(x, "zigzag", world, rank).requires_grad_() for x in (plain_q, case.k, case.v)]
        out = layer(*shares, length, documents)
        grads = torch.autograd.grad(out, shares, share(case.dout, "zigzag", world, rank))
        wanted = exact[0], exact[2] * 1.5, exact[3], exact[4]
        for found, want in zip((out, *grads), wanted, strict=True):
            torch.testing.assert_close(found, 2 * share(want, "zigzag", world, rank), rtol=0, atol=5e-5)
    return counter.frame_count


def test_head_dims_may_change_in_compiled_code():
    attend = torch.compile(ring_attention, backend="aot_eager", fullgraph=True)
    for dim in (16, 8, 24):  # from the second on, compilers take what changes for a symbol
        case = make_case(12, dim=dim, dtype=torch.float32)
        leaves = [x.clone().requires_grad_() for x in case.inputs]
        found = attend(*leaves, is_causal=True)
        exact = case.exact()
        for mine, wanted in zip((found, *torch.autograd.grad(found, leaves, case.dout)), (exact[0], *exact[2:]), strict=True):
            torch.testing.assert_close(mine, wanted, rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("backend", "packed"), [slow("aot_eager", False), ("aot_eager", True), slow("inductor", False), slow("inductor", True)]
)
@one_or_all
@pytest.mark.timeout(600)
def test_one_graph_serves_changing_lengths(pools, backend, packed, everywhere):
    # one graph for the first length, one for even shares and one for uneven ones
    assert max(pools.run(2, compiled, backend, packed, everywhere, timeout=500)) <= 3
