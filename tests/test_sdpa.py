"""F.scaled_dot_product_attention on our placements is ring attention, and on all other DTensors what it was."""

from __future__ import annotations

import itertools

import programs
import pytest
import stock_sdpa
import torch
import torch._dynamo.testing
import torch.distributed as dist
from helpers import (
    assert_like_kernel,
    default_kernel,
    grid,
    line,
    make_case,
    once,
    refused,
    share,
    single_device,
    slow,
    some_or_every,
    together,
)
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dtensor_ring import Contiguous, Stripe, Zigzag, distribute_tensor, from_local, full_tensor, redistribute, ring_attention
from dtensor_ring.debug import traffic

PLACEMENTS = {"contiguous": Contiguous(2), "zigzag": Zigzag(2), "stripe": Stripe(2), "stripe:3": Stripe(2, block=3)}
sdpa = F.scaled_dot_product_attention  # context_parallel replaces the name in F
flash_cuda = torch.ops.aten._scaled_dot_product_flash_attention


def _leaves(length: int, heads=(4, 2), k_length: int | None = None, **options) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k, v that want gradients, and dout, all (B, H, S, D)."""
    case = make_case(length, heads=heads, k_length=k_length, **options)
    return [x.transpose(1, 2).requires_grad_() for x in case.inputs], case.dout.transpose(1, 2)


def _place(tensors, mesh, placements):
    return [distribute_tensor(x, mesh, placements, src_data_rank=None) for x in tensors]


def _assert_equal(found, wanted) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def _both(mesh, placements, leaves, dout, **options):
    """out, dq, dk, dv over the mesh, and of one device."""
    out = sdpa(*_place(leaves, mesh, placements), **options)
    assert isinstance(out, DTensor)
    assert out.placements == tuple(placements)
    assert out.shape == leaves[0].shape
    alone = sdpa(*leaves, **options)
    found = full_tensor(out), *torch.autograd.grad(full_tensor(out), leaves, dout)
    return found, (alone, *torch.autograd.grad(alone, leaves, dout))


def one_axis(layout: str, every: bool):
    """Every length, number of heads and mask; or each of them."""
    mesh, lengths, numbers, causal = line(), (1, 2, 7, 16, 33), ((4, 2), (3, 1), (2, 2)), (True, False)
    some = zip(lengths, itertools.cycle(numbers), itertools.cycle(causal), strict=False)
    for length, heads, is_causal in itertools.product(lengths, numbers, causal) if every else some:
        options = {"is_causal": is_causal, "enable_gqa": heads[0] != heads[1], "scale": 0.3 if length == 7 else None}
        _assert_equal(*_both(mesh, [PLACEMENTS[layout]], *_leaves(length, heads), **options))
    _assert_equal(*_both(mesh, [PLACEMENTS[layout]], *_leaves(13, (2, 2), k_length=9)))
    _assert_equal(*_both(mesh, [PLACEMENTS[layout]], *_leaves(16, (2, 2), dtype=torch.float64, dim=12)))


# Each layout at two ranks or at four by default, at both as slow tests.
CELLS = list(itertools.product(PLACEMENTS, (1, 2, 4)))
BY_DEFAULT = [(layout, world) for i, layout in enumerate(PLACEMENTS) for world in (1, (2, 4)[i % 2])]


@some_or_every
@pytest.mark.parametrize(("layout", "world"), [cell if cell in BY_DEFAULT else slow(*cell) for cell in CELLS])
def test_sdpa_over_a_sequence_axis_is_that_of_one_process(pools, world, layout, every):
    pools.run(world, one_axis, layout, every)


def two_axes(every: bool):
    """Each pair of placements in both orders; or in one, each placement in both."""
    mesh = grid("other")
    pairs = itertools.product((Shard(0), Shard(1), Replicate()), (Zigzag(2), Stripe(2), Contiguous(2)))
    for i, (other, placement) in enumerate(pairs):
        orders = [other, placement], [placement, other]
        for placements in orders if every else (orders[i % 2],):
            _assert_equal(*_both(mesh, placements, *_leaves(13), is_causal=True, enable_gqa=True))


@some_or_every
def test_batch_and_head_sharding_pass_through_on_two_axes(pools, every):
    pools.run(4, two_axes, every)


def same_code(layout: str):
    mesh = line()
    leaves, dout = _leaves(33, dtype=torch.float32)
    placed = _place(leaves, mesh, [PLACEMENTS[layout]])
    ring_leaves = [x.detach().transpose(1, 2).requires_grad_() for x in leaves]
    ring_placed = _place(ring_leaves, mesh, [PLACEMENTS[layout].moved_to(1)])

    def step(attend, inputs, gradient):
        before = traffic(mesh).bytes
        out = attend(*inputs)
        grads = torch.autograd.grad(out, inputs, _place([gradient], mesh, inputs[0].placements)[0])
        return [x.to_local() for x in (out, *grads)], traffic(mesh).bytes - before

    found, sent = step(lambda *x: sdpa(*x, is_causal=True, enable_gqa=True), placed, dout)
    wanted, ring_sent = step(ring_attention, ring_placed, dout.transpose(1, 2))
    assert all(torch.equal(a, b.transpose(1, 2)) for a, b in zip(found, wanted, strict=True))
    assert sent == ring_sent


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "stripe"])
def test_sdpa_is_bit_equal_to_ring_attention_and_sends_the_same(pools, layout):
    pools.run(4, same_code, layout)


def _attend_in_shares(case, layout: str, device: str, exact):
    """out, lse, dq, dk, dv put together as (B, S, H, D), made from local shares as a model has them; lse is the exact one."""
    mesh, world, rank = line(device), dist.get_world_size(), dist.get_rank()
    shares = [share(x, layout, world, rank).contiguous().requires_grad_() for x in case.inputs]
    placed = [from_local(x.transpose(1, 2), mesh, [PLACEMENTS[layout]], length=case.q.shape[1]) for x in shares]
    options = {"is_causal": case.is_causal, "enable_gqa": case.q.shape[2] != case.k.shape[2]}
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = sdpa(*placed, **options)
    local = out.to_local().transpose(1, 2)
    grads = torch.autograd.grad(local, shares, share(case.dout, layout, world, rank).contiguous())
    out, *grads = together((local, *grads), layout, dims=(1, 1, 1, 1))
    return out, exact[1], *grads  # SDPA returns no lse


def sixteen_bits(layout: str):
    for mask in ("causal", "full"):
        case = make_case(300, dim=32, dtype=torch.bfloat16, mask=mask)
        single, exact = once(lambda case=case: (single_device(case, "torch_cpu"), case.exact()))
        assert_like_kernel(_attend_in_shares(case, layout, "cpu", exact), single, exact)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "stripe"])
def test_bfloat16_errs_like_one_device(pools, layout):
    pools.run(4, sixteen_bits, layout)


def in_other_settings():
    mesh = line()
    leaves, dout = _leaves(13, (2, 2))
    x = leaves[0]
    (placed,) = _place([x], mesh, [Zigzag(2)])
    out, alone = sdpa(placed, placed, placed, is_causal=True), sdpa(x, x, x, is_causal=True)  # one tensor three times
    _assert_equal(torch.autograd.grad(full_tensor(out), x, dout), torch.autograd.grad(alone, x, dout))
    out = redistribute(sdpa(*_place(leaves, mesh, [Zigzag(2)])), [Shard(1)])  # the gradient comes in another placement
    grads = torch.autograd.grad(out, leaves, distribute_tensor(dout, mesh, [Shard(1)], src_data_rank=None))
    _assert_equal(grads, torch.autograd.grad(sdpa(*leaves), leaves, dout))
    with torch.inference_mode():
        out = sdpa(*_place([y.detach() for y in leaves], mesh, [Stripe(2)]), is_causal=True)
        _assert_equal([full_tensor(out)], [sdpa(*leaves, is_causal=True)])


def test_one_tensor_three_times_gradients_in_another_placement_and_inference_mode(pools):
    pools.run(2, in_other_settings)


def the_op_of_gpus():
    """The op that F.scaled_dot_product_attention calls on GPUs takes DTensors on CPUs too, where its kernel is another."""
    mesh = line()
    for is_causal, heads in ((True, (4, 2)), (False, (2, 2))):
        leaves, dout = _leaves(13, heads)
        out, lse, *_rest = flash_cuda(*_place(leaves, mesh, [Zigzag(2)]), 0.0, is_causal)
        assert lse.placements == (Zigzag(2),)
        assert lse.shape == out.shape[:3]
        alone = sdpa(*leaves, is_causal=is_causal, enable_gqa=True)
        found = full_tensor(out), *torch.autograd.grad(full_tensor(out), leaves, dout)
        _assert_equal(found, (alone, *torch.autograd.grad(alone, leaves, dout)))
    leaves, dout = _leaves(13)
    ring_leaves = [x.detach().transpose(1, 2).requires_grad_() for x in leaves]
    torch.manual_seed(3)
    out = full_tensor(flash_cuda(*_place(leaves, mesh, [Zigzag(2)]), 0.4, True)[0])
    torch.manual_seed(3)
    alone = ring_attention(*ring_leaves, dropout_p=0.4, kernel="math", strategy="local")
    _assert_equal([out.transpose(1, 2)], [alone])
    grads = torch.autograd.grad(alone, ring_leaves, dout.transpose(1, 2))
    _assert_equal(torch.autograd.grad(out, leaves, dout), [x.transpose(1, 2) for x in grads])


@pytest.mark.parametrize("world", [1, 2])
def test_the_op_of_gpus_runs_the_ring_and_replays_dropout(pools, world):
    pools.run(world, the_op_of_gpus)


def inside_and_after_context_parallel():
    from torch.distributed.tensor.experimental import context_parallel

    mesh = line()
    handlers = DTensor._op_dispatcher._custom_op_handlers

    def check():
        leaves, dout = _leaves(13)
        _assert_equal(*_both(mesh, [Zigzag(2)], leaves, dout, is_causal=True, enable_gqa=True))
        out, *_rest = flash_cuda(*_place(leaves, mesh, [Zigzag(2)]), 0.0, True)
        alone = sdpa(*leaves, is_causal=True, enable_gqa=True)
        found = full_tensor(out), *torch.autograd.grad(full_tensor(out), leaves, dout)
        _assert_equal(found, (alone, *torch.autograd.grad(alone, leaves, dout)))

    x = torch.randn(2, 2, 8, 4)
    with context_parallel(mesh, buffers=[x], buffer_seq_dims=[2]), torch.enable_grad():
        assert flash_cuda.default in DTensor._op_dispatcher._custom_op_handlers, "context_parallel handles the op here"
        check()
    assert DTensor._op_dispatcher._custom_op_handlers is handlers
    assert flash_cuda.default not in handlers
    assert F.scaled_dot_product_attention is sdpa
    check()


def test_it_works_inside_and_after_torch_s_context_parallel(pools):
    pools.run(2, inside_and_after_context_parallel)


@some_or_every
@pytest.mark.timeout(450)
def test_importing_changes_nothing_for_other_dtensors_and_context_parallel(pools, tmp_path, every):
    arguments = [stock_sdpa.__file__, str(tmp_path), *(["every"] if every else [])]
    programs.check('import runpy, sys; runpy.run_path(sys.argv[0], run_name="__main__")', arguments)  # the package is here already
    pools.run(2, stock_sdpa.write_down, str(tmp_path), "ours", every, timeout=200)
    worked = 0
    for rank in range(2):
        stock, ours = (torch.load(tmp_path / f"{kind}{rank}.pt") for kind in ("stock", "ours"))
        assert len(stock) == len(ours) == (80 if every else 46)
        for before, after in zip(stock, ours, strict=True):
            if isinstance(before, str):
                assert before == after
                continue
            worked += 1
            for a, b in zip(before, after, strict=True):
                assert a[0] == b[0]
                assert torch.equal(a[1], b[1])
    assert worked >= (20 if every else 4)


def refusals():
    rank, mesh = dist.get_rank(), line()
    plane = grid(rows=1)
    x, mask = torch.randn(4, 4, 8, 8), torch.ones(8, 8, dtype=torch.bool)

    def placed(placement, on=mesh, tensor=x):
        return distribute_tensor(tensor, on, placement if isinstance(placement, list) else [placement], src_data_rank=None)

    def on_math():
        with sdpa_kernel(SDPBackend.MATH):
            sdpa(zigzag, zigzag, zigzag)

    zigzag, contiguous, few = placed(Zigzag(2)), placed(Contiguous(2)), placed(Zigzag(2), tensor=x[:, :2])
    longer = placed(Zigzag(2), tensor=torch.randn(4, 4, 12, 8))
    remedy = "sdpa_kernel(SDPBackend.FLASH_ATTENTION)", "dtensor_ring.ring_attention"
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
    other = torch.ops.aten._scaled_dot_product_fused_attention_overrideable
    cases = [
        (lambda: sdpa(zigzag, contiguous, contiguous), ValueError, "mesh axis 'cp'", "q is Zigzag(2), k is Contiguous(2)"),
        (lambda: sdpa(zigzag, zigzag, placed(Replicate())), ValueError, "v is Replicate()", "dtensor_ring.redistribute"),
        (lambda: sdpa(placed(Shard(2)), zigzag, zigzag), ValueError, "q is Shard(dim=2), k is Zigzag(2)"),
        (
            lambda: sdpa(*[placed(Zigzag(1))] * 3),
            ValueError,
            "mesh axis 'cp'",
            "Zigzag(dim=1) cannot split the heads dimension of (B, H, S, D): the sequence is dim 2, use Zigzag(2)",
        ),
        (lambda: sdpa(*[placed(Stripe(3))] * 3), ValueError, "Stripe(dim=3) cannot split the head dimension"),
        (lambda: sdpa(*[placed([Shard(3), Zigzag(2)], plane)] * 3), ValueError, "mesh axis 'dp'", "Shard(1) for heads"),
        (
            lambda: sdpa(*[DTensor.from_local(x[:, :, :4], plane, [Shard(2), Zigzag(2)], run_check=False)] * 3),
            NotImplementedError,
            "mesh axes 'dp' and 'cp' both hold the sequence",
        ),
        (
            lambda: sdpa(*[DTensor.from_local(x[:, :, :4], plane, [Partial(), Zigzag(2)], run_check=False)] * 3),
            ValueError,
            "q is Partial(sum)",
        ),
        (lambda: sdpa(zigzag, *[placed([Replicate(), Zigzag(2)], plane)] * 2), ValueError, "must lie on one mesh"),
        (lambda: sdpa(zigzag, x, zigzag), TypeError, "plain: k", "dtensor_ring.from_local"),
        (lambda: sdpa(x, zigzag, zigzag), TypeError, "plain: q"),
        (lambda: sdpa(zigzag, zigzag, zigzag, attn_mask=mask), NotImplementedError, "attn_mask", "documents= or window="),
        (lambda: sdpa(zigzag, zigzag, zigzag, attn_mask=placed(Replicate(), tensor=mask)), NotImplementedError, "attn_mask"),
        (lambda: sdpa(longer, zigzag, zigzag, is_causal=True), NotImplementedError, "12 queries and 8 keys", "ring_attention"),
        # the math backend, which CPUs take for dropout and unequal heads, shows as its single ops
        (on_math, NotImplementedError, "math backend", *remedy),
        (lambda: sdpa(zigzag, zigzag, zigzag, dropout_p=0.5), NotImplementedError, "on CPUs no dropout_p", *remedy),
        (lambda: sdpa(zigzag, few, few), NotImplementedError, "equal numbers of heads or enable_gqa=True", *remedy),
        (lambda: efficient(zigzag, zigzag, zigzag, None, True), NotImplementedError, "chose its memory-efficient backend", *remedy),
        (lambda: cudnn(zigzag, zigzag, zigzag, None, True), NotImplementedError, "chose its cuDNN backend", "float32", *remedy),
        (lambda: other(zigzag, zigzag, zigzag), NotImplementedError, "chose its overrideable backend", *remedy),
        (lambda: flash_cuda(zigzag, zigzag, zigzag, 0.0, True, True), NotImplementedError, "return_debug_mask"),
        # what ranks do differently is told on all of them
        (lambda: sdpa(zigzag, zigzag, zigzag, is_causal=rank == 0), ValueError, "mesh axis 'cp'", "must make the same call"),
        (
            lambda: sdpa(*[from_local(x[:, :, : 1 + rank], mesh, [Zigzag(2)], length=10, run_check=False)] * 3),
            ValueError,
            "rank 0 holds 1 tokens of q, but zigzag of length 10 gives it 5",
        ),
    ]
    for act, error, *texts in cases:
        refused(act, error, *texts)
    with torch.no_grad():  # nothing was left half done
        found, wanted = sdpa(zigzag, zigzag, zigzag), sdpa(contiguous, contiguous, contiguous)
        torch.testing.assert_close(full_tensor(found), full_tensor(wanted))


def test_what_does_not_fit_is_refused_by_name_on_every_rank(pools):
    pools.run(2, refusals)


def compiled(backend: str) -> int:
    """Forward and backward in one graph, over changing lengths; how many graphs were made."""
    torch._dynamo.reset()
    mesh, world, rank = line(), dist.get_world_size(), dist.get_rank()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)

    @torch.compile(backend=counter, fullgraph=True)
    def layer(q, k, v, length):
        placed = [from_local(x.transpose(1, 2), mesh, [Zigzag(2)], length=length) for x in (q * 1.5, k, v)]
        return F.scaled_dot_product_attention(*placed, is_causal=True, enable_gqa=True).to_local().transpose(1, 2) * 2

    for length in (16, 32, 24, 17, 40, 19):
        case = make_case(length, dtype=torch.float32)
        case.q, plain_q = case.q * 1.5, case.q
        exact = case.exact()
        shares = [share(x, "zigzag", world, rank).requires_grad_() for x in (plain_q, case.k, case.v)]
        out = layer(*shares, length)
        grads = torch.autograd.grad(out, shares, share(case.dout, "zigzag", world, rank))
        wanted = exact[0], exact[2] * 1.5, exact[3], exact[4]
        for found, want in zip((out, *grads), wanted, strict=True):
            torch.testing.assert_close(found, 2 * share(want, "zigzag", world, rank), rtol=0, atol=5e-5)
    return counter.frame_count


def on_two_gpus(test):
    return pytest.mark.gpu(pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")(test))


def on_gpus(layout: str, mask: str, heads: tuple[int, int], length: int):
    case = make_case(length, heads=heads, dim=128, dtype=torch.bfloat16, mask=mask, device="cuda", batch=1)
    kernel = default_kernel(case, layout, dist.get_world_size())
    exact = case.exact()
    assert_like_kernel(_attend_in_shares(case, layout, "cuda", exact), single_device(case, kernel), exact)


@on_two_gpus
@pytest.mark.parametrize(
    ("layout", "mask", "heads", "length"),
    [
        *itertools.product(("contiguous", "zigzag", "stripe"), ("causal", "full"), ((4, 2),), (2048,)),
        *(("zigzag", "causal", heads, length) for heads, length in (((8, 8), 1000), ((4, 1), 1001), ((6, 2), 33), ((4, 2), 1))),
    ],
)
def test_two_gpus_are_as_exact_as_one(pools, layout, mask, heads, length):
    pools.run(2, on_gpus, layout, mask, heads, length, device="cuda")


def other_backends_on_gpus():
    mesh = line("cuda")
    leaves, _ = _leaves(64, (2, 2), dim=64, dtype=torch.float16, device="cuda")
    placed = _place(leaves, mesh, [Zigzag(2)])
    for backend, text in ((SDPBackend.EFFICIENT_ATTENTION, "memory-efficient backend"), (SDPBackend.MATH, "math backend")):
        with sdpa_kernel(backend):
            refused(lambda: sdpa(*placed, is_causal=True), NotImplementedError, text, "SDPBackend.FLASH_ATTENTION")
    wide = _place([x.detach().float() for x in leaves], mesh, [Zigzag(2)])
    refused(lambda: sdpa(*wide, is_causal=True), NotImplementedError, "torch.float32", "dtensor_ring.ring_attention")
    narrow = _place([x.detach()[..., :60].contiguous() for x in leaves], mesh, [Zigzag(2)])
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        refused(lambda: sdpa(*narrow, is_causal=True), NotImplementedError, "multiple of 8", "dtensor_ring.ring_attention")


@on_two_gpus
def test_other_backends_are_refused_on_gpus(pools):
    pools.run(2, other_backends_on_gpus, device="cuda")


def context_parallel_on_gpus():
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import context_parallel_unshard

    mesh = line("cuda")
    case = make_case(256, heads=(2, 2), dim=128, dtype=torch.bfloat16, device="cuda")
    q, k, v = (x.transpose(1, 2).contiguous() for x in case.inputs)
    exact = sdpa(q.float(), k.float(), v.float(), is_causal=True)
    placed = _place([q.clone(), k.clone(), v.clone()], mesh, [Zigzag(2)])
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        with context_parallel(mesh, buffers=[q, k, v], buffer_seq_dims=[2, 2, 2]):
            theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            ours = full_tensor(sdpa(*placed, is_causal=True))
            (theirs,) = context_parallel_unshard(mesh, [theirs], [2])
        after = full_tensor(sdpa(*placed, is_causal=True))
    assert torch.equal(ours, after)
    for found in (ours, theirs):
        torch.testing.assert_close(found.float(), exact, rtol=0, atol=2e-2)


@on_two_gpus
def test_context_parallel_and_our_placements_work_side_by_side_on_gpus(pools):
    pools.run(2, context_parallel_on_gpus, device="cuda")


@pytest.mark.parametrize("backend", ["aot_eager", slow("inductor")])
@pytest.mark.timeout(600)
def test_it_compiles_as_one_graph(pools, backend):
    assert max(pools.run(2, compiled, backend, timeout=500)) <= 3
