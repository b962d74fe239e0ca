"""Laws of the flash kernels and of the drop-in functions on real GPUs; kernels that are not installed are skipped by name.

Run with `pytest -m gpu` on a machine with two GPUs and as many of flash-attn, flash-attn-4 as are wanted.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from dropin import FAMILIES, GATHERED, family_case, on_ranks, reference_case
from helpers import (
    PER_DOCUMENT,
    Case,
    assert_like_kernel,
    default_kernel,
    error_ratios,
    make_case,
    over_ranks,
    run_loopback,
    single_device,
)
from test_gpu import LAYOUTS, note

from dtensor_ring import Documents, functional, ring_attention
from dtensor_ring.ops.kernels import KERNELS, KernelRequirements, choose_kernel
from dtensor_ring.ops.reference import reference_attention
from dtensor_ring.planning.layout import Layout

pytestmark = pytest.mark.gpu
FLASH = ("torch_flash", "flash_attn_2", "flash_attn_3", "flash_attn_4")
NEED = KernelRequirements("cuda", torch.bfloat16, 128, 128, training=True)
LENGTHS = (400, 7, 1, 700, 940)


def skip_unless(kernel: str, **needs) -> None:
    reason = KERNELS[kernel].refuses(replace(NEED, **needs))
    if reason is not None:
        pytest.skip(f"{kernel} {reason}")


def gpu_case(mask: str, packed: bool, heads=(4, 2), dtype=torch.bfloat16, softcap: float = 0.0) -> Case:
    documents = Documents.from_lengths(LENGTHS) if packed else None
    return make_case(
        2048, heads=heads, dim=128, dtype=dtype, mask=mask, documents=documents, device="cuda", batch=1, softcap=softcap
    )


def kernel_law(kernel: str, mask: str, packed: bool, softcap: float):
    case = gpu_case(mask, packed, softcap=softcap)
    single, exact = single_device(case, kernel), case.exact()
    return {
        layout: assert_like_kernel(over_ranks(case, layout, strategy="ring", kernel=kernel), single, exact)
        for layout in ("zigzag", "contiguous", "stripe")
    }


@pytest.mark.parametrize("kernel", FLASH)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("mask", ["causal", "full", "window", "two-sided"])
@pytest.mark.parametrize("packed", [False, True])
def test_every_flash_kernel_over_two_gpus_errs_like_itself_on_one(pools, kernel, mask, packed, softcap):
    skip_unless(kernel, softcap=softcap)
    ratios = pools.run(2, kernel_law, kernel, mask, packed, softcap, device="cuda", timeout=300)[0]
    note(f"{kernel} {mask} packed={packed} softcap={softcap}", ratios)


def packed_law(kernel: str, layout: str, strategy: str, mask: str):
    case = gpu_case(mask, True)
    return assert_like_kernel(over_ranks(case, layout, strategy=strategy, kernel=kernel), single_device(case, kernel), case.exact())


@pytest.mark.parametrize("mask", ["causal", "window"])
@pytest.mark.parametrize(
    ("layout", "strategy"),
    [(PER_DOCUMENT, "ring"), (PER_DOCUMENT, "gather"), (PER_DOCUMENT, "ulysses"), ("zigzag", "ulysses"), ("stripe", "ulysses")],
)
def test_documents_cut_one_by_one_and_heads_instead_of_tokens(pools, layout, strategy, mask):
    note(f"{layout} {strategy} {mask}", pools.run(2, packed_law, "torch_flash", layout, strategy, mask, device="cuda")[0])


def single_law(kernel: str, mask: str, packed: bool, softcap: float):
    """Absolute: what a kernel returns is attention, to its dtype's precision."""
    case = gpu_case(mask, packed, softcap=softcap)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), single_device(case, kernel), case.exact(), strict=True):
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert error < 1e-2, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("kernel", FLASH)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("mask", ["causal", "full", "window", "two-sided"])
@pytest.mark.parametrize("packed", [False, True])
def test_every_flash_kernel_computes_attention(kernel, mask, packed, softcap):
    skip_unless(kernel, softcap=softcap)
    single_law(kernel, mask, packed, softcap)


def sinks_law(kernel: str):
    case = gpu_case("window", True)
    sinks = torch.linspace(-1, 3, 4, device="cuda").requires_grad_()
    wide = [x.float().requires_grad_() for x in case.inputs]
    options = {"window": case.window, "documents": case.documents, "sinks": sinks}
    out = ring_attention(*wide, strategy="local", kernel="math", **options)
    exact = [out.detach(), *torch.autograd.grad(out, [*wide, sinks], case.dout.float())]
    for layout in LAYOUTS:
        out, _, *grads = over_ranks(case, layout, strategy="ring", kernel=kernel, sinks=sinks)
        for a, b in zip((out, *grads), exact, strict=True):
            assert (a.float() - b).norm() / b.norm() < 1e-2


@pytest.mark.parametrize("kernel", FLASH)
def test_sinks_and_their_gradient(pools, kernel):
    skip_unless(kernel)
    pools.run(2, sinks_law, kernel, device="cuda", timeout=300)


class Dropped(Case):
    """A case whose dropout mask is known."""

    mask: torch.Tensor

    def kept(self) -> torch.Tensor:
        return self.mask.double() / (1 - self.dropout_p)


def dropout_law(kernel: str, layout: str, strategy: str, packed: bool):
    """With one-hot values the output is the dropped weights, which tells the mask; with it everything must be exact."""
    lengths = (50, 3, 75)
    plain = make_case(128, heads=(4, 2), dim=128, batch=1, dtype=torch.bfloat16, device="cuda", seed=3)
    plain = replace(plain, documents=Documents.from_lengths(lengths) if packed else None, dropout_p=0.3)
    one_hot = torch.eye(128, device="cuda", dtype=torch.bfloat16)[None, :, None].repeat(1, 1, 2, 1)
    case = Dropped(**{**vars(plain), "q": plain.q / 4, "v": one_hot})
    torch.manual_seed(11 + dist.get_rank())
    found = over_ranks(case, layout, strategy=strategy, kernel=kernel)
    case.mask = found[0].transpose(1, 2) != 0
    seen = torch.ones(128, 128, dtype=torch.bool, device="cuda").tril()
    share_kept = (case.mask & seen).sum() / (4 * (seen.sum() if not packed else sum(n * (n + 1) // 2 for n in lengths)))
    assert abs(share_kept.item() - 0.7) < 0.03
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), found, case.exact(), strict=True):
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert error < 1.2e-2, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("kernel", FLASH)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("layout", "strategy"), [*itertools.product(LAYOUTS, ["ring"]), ("zigzag", "gather")])
def test_dropout_is_replayed_exactly_in_backward(pools, kernel, layout, strategy, packed):
    skip_unless(kernel, dropout=True)
    pools.run(2, dropout_law, kernel, layout, strategy, packed, device="cuda")


def alibi_law(layout: str, mask: str, packed: bool):
    case = gpu_case(mask, packed)
    case.alibi = torch.tensor([0.5, 0.25, 0.125, 0.0625], device="cuda")
    for name, a, b in zip(
        ("out", "lse", "dq", "dk", "dv"),
        over_ranks(case, layout, strategy="gather", kernel="flash_attn_2"),
        case.exact(),
        strict=True,
    ):
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert error < 1e-2, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("mask", ["causal", "window"])
@pytest.mark.parametrize("packed", [False, True])
def test_alibi_measures_positions_on_flash_attn_2(pools, layout, mask, packed):
    skip_unless("flash_attn_2", alibi="aligned")
    pools.run(2, alibi_law, layout, mask, packed, device="cuda")


def deterministic_law(kernel: str):
    case = gpu_case("causal", True)
    for layout, strategy in itertools.product(LAYOUTS, ("ring", "gather")):
        first, *others = (over_ranks(case, layout, strategy=strategy, kernel=kernel, deterministic=True) for _ in range(3))
        for other in others:
            assert all(map(torch.equal, first, other)), (layout, strategy)


@pytest.mark.parametrize("kernel", FLASH)
def test_deterministic_runs_are_bitwise_the_same(pools, kernel):
    skip_unless(kernel, deterministic=True)
    pools.run(2, deterministic_law, kernel, device="cuda", timeout=300)


def family_law(family: str, variant: str, dtype: torch.dtype):
    world, found = dist.get_world_size(), {}
    for heads, mask in itertools.product(((4, 4), (8, 2), (4, 1)), ("causal", "full")):
        if variant == "qkvpacked" and heads[0] != heads[1]:
            continue
        case = family_case(family, world, 2048, heads=heads, mask=mask, dtype=dtype, dim=128, device="cuda")
        kernel, results = default_kernel(case, FAMILIES[family], world), on_ranks(family, variant, case)
        assert all(x.dtype == dtype for x in (results[0], *results[2:]))
        found[f"{heads} {mask} {kernel}"] = assert_like_kernel(results, single_device(case, kernel), case.exact())
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", ["", "kvpacked", "qkvpacked"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_function_errs_like_its_kernel_on_one_gpu(pools, family, variant, dtype):
    note(f"{family} {variant} {dtype}", pools.run(2, family_law, family, variant, dtype, device="cuda")[0])


def own_shapes(family: str):
    case = reference_case(family, "cuda")
    kernel = default_kernel(case, FAMILIES[family], dist.get_world_size())
    return assert_like_kernel(on_ranks(family, "qkvpacked", case), single_device(case, kernel), case.exact())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_s_own_shapes(pools, family):
    note(f"own shapes {family}", pools.run(2, own_shapes, family, device="cuda")[0])


def bit_equal(family: str, lengths: tuple[int, ...]):
    """Nothing is merged, so a row is computed as on one GPU."""
    import flash_attn

    world, rank = dist.get_world_size(), dist.get_rank()
    documents = Documents.from_lengths(lengths)
    case = make_case(sum(lengths), heads=(16, 4), dim=128, batch=1, dtype=torch.bfloat16, documents=documents, device="cuda")
    q, k, v = (x[0] for x in case.inputs)
    cu, most = torch.tensor(documents.bounds[0], dtype=torch.int32, device="cuda"), max(lengths)
    wanted, wanted_lse, _ = flash_attn.flash_attn_varlen_func(q, k, v, cu, cu, most, most, causal=True, return_attn_probs=True)
    mine = torch.tensor(Layout.parse(FAMILIES[family]).tokens(sum(lengths), world, rank), device="cuda")
    if family == "llama3_flash_attn_varlen":
        prepared = functional.llama3_flash_attn_prepare_cu_seqlens(cu, True, rank, world)
        arguments = (*prepared[:4], 2, prepared[4])
    else:
        arguments = (functional.zigzag_llama3_flash_attn_prepare_cu_seqlens(cu, True, rank, world), 2)
    func = getattr(functional, f"{family}_func")
    out, lse, _ = func(q[mine], k[mine], v[mine], *arguments, causal=True, return_attn_probs=True)
    assert torch.equal(out, wanted[mine])
    assert torch.equal(lse, wanted_lse[:, mine])


@pytest.mark.parametrize("family", GATHERED)
@pytest.mark.parametrize("lengths", [(8192,), (2048, 4096, 2048), (120, 1128, 2984, 3960), (1, 4095, 7, 89, 4000)])
def test_llama3_is_bit_equal_to_flash_attn_on_one_gpu(pools, family, lengths):
    skip_unless("flash_attn_2")
    if choose_kernel(None, NEED).name != "flash_attn_2":
        pytest.skip("another kernel comes first here")
    pools.run(2, bit_equal, family, lengths, device="cuda")


@pytest.mark.parametrize("kernel", FLASH)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_precision_does_not_depend_on_the_number_of_ranks(kernel, layout):
    skip_unless(kernel)
    case = make_case(4096, heads=(4, 2), dim=128, batch=1, dtype=torch.bfloat16, device="cuda")
    single, exact = single_device(case, kernel), case.exact()
    ratios = {}
    for world in (2, 4, 8):
        found = run_loopback(case, layout, world, "ring", kernel)[0]
        assert_like_kernel(found, single, exact)
        ratios[world] = error_ratios(found, single, exact)
    note(f"precision {kernel} {layout} W=2,4,8", ratios)
    for name, (mean, _) in ratios[8].items():
        assert mean <= 1.1 * ratios[2][name][0], f"{name}: {mean:.2f} at W=8, {ratios[2][name][0]:.2f} at W=2"


@pytest.mark.parametrize("scale", [-0.5, 0.0])
@pytest.mark.parametrize("mask", ["causal", "full", "window"])
def test_a_scale_of_zero_or_less_is_exact_on_gpus(scale, mask):
    case = gpu_case(mask, packed=False)
    options = {"is_causal": case.is_causal, "window": case.window, "scale": scale}
    out = ring_attention(*case.inputs, strategy="local", **options)
    exact, _ = reference_attention(*case.inputs, **options)
    assert (out.float() - exact).norm() / exact.norm() < 1e-2
