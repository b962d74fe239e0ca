"""The drop-in functions of ring-flash-attn: every name, every argument, exact over ranks."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from dropin import BATCH, FAMILIES, GATHERED, VARLEN, family_case, on_ranks, reference_case
from helpers import Case, assert_like_kernel, make_case, once, refused, single_device, slow, some_or_every
from hypothesis import given
from hypothesis import strategies as st
from sweeps import swept

from dtensor_ring import functional
from dtensor_ring._torch import TensorCache
from dtensor_ring.comm import transport_of
from dtensor_ring.functional import llama3, llama3_flash_attn_prepare_cu_seqlens, zigzag_llama3_flash_attn_prepare_cu_seqlens
from dtensor_ring.planning.documents import Documents
from dtensor_ring.planning.layout import Layout

PUBLIC = [
    f"{family}_{variant}"
    for family in (*BATCH, *VARLEN, "llama3_flash_attn_varlen")
    for variant in ("func", "kvpacked_func", "qkvpacked_func")
]
PUBLIC += ["llama3_flash_attn_prepare_cu_seqlens", "substitute_hf_flash_attn", "update_ring_flash_attn_params"]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_of_the_reference_is_here(name):
    assert callable(getattr(functional, name))
    assert name in functional.__all__
    assert getattr(functional, name).__doc__


TAIL = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
    "group": None,
}
HEAD = {"func": ["q", "k", "v"], "kvpacked_func": ["q", "kv"], "qkvpacked_func": ["qkv"]}
LLAMA3 = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "heads_k_stride", "local_k_slice"]


@pytest.mark.parametrize("name", [name for name in PUBLIC if name.endswith("func")])
def test_signatures_and_defaults_are_those_of_the_reference(name):
    family, variant = next(
        (f, name.removeprefix(f"{f}_")) for f in sorted(FAMILIES, key=len, reverse=True) if name.startswith(f"{f}_")
    )
    middle = ["cu_seqlens", "max_seqlen"] if family in VARLEN else LLAMA3 if family in GATHERED else []
    parameters = inspect.signature(getattr(functional, name)).parameters
    assert list(parameters) == [*HEAD[variant], *middle, *TAIL]
    assert {key: parameters[key].default for key in TAIL} == TAIL
    assert getattr(functional, name).__name__ == name


def exact_results(family: str, variant: str, every: bool):
    """All numbers of heads with all masks; or each of them at least once, packed variants with the two masks of the reference."""
    world, cells = dist.get_world_size(), [((4, 4), "causal"), ((4, 4), "full")]
    if not variant:
        cells = [((4, 4), "causal"), ((4, 1), "full"), ((4, 2), "window"), ((4, 4), "two-sided")]
    if every:
        cells = itertools.product(((4, 4), (4, 1), (4, 2)), ("causal", "full", "window", "two-sided"))
    for heads, mask in cells:
        if variant == "qkvpacked" and heads[0] != heads[1]:
            continue
        case = family_case(family, world, heads=heads, mask=mask)
        for found, wanted in zip(on_ranks(family, variant, case), once(case.exact), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


@some_or_every
@pytest.mark.parametrize(("family", "world", "variant"), swept(FAMILIES, [1, 2, 4], ["", "kvpacked", "qkvpacked"]))
def test_out_lse_and_gradients_are_exact_for_mha_gqa_and_mqa(pools, world, family, variant, every):
    pools.run(world, exact_results, family, variant, every)


def sixteen_bits(family: str, dtype: torch.dtype, every: bool):
    """All numbers of heads with all masks; or one of each, the others in the next family."""
    world, cells = dist.get_world_size(), [[((4, 4), "causal")], [((4, 1), "full")]][list(FAMILIES).index(family) % 2]
    for heads, mask in itertools.product(((4, 4), (4, 1)), ("causal", "full")) if every else cells:
        case = family_case(family, world, 512, heads=heads, mask=mask, dtype=dtype, dim=32)
        assert_like_kernel(on_ranks(family, "", case), *once(lambda case=case: (single_device(case, "torch_cpu"), case.exact())))


@some_or_every
@pytest.mark.parametrize(
    ("dtype", "family"),
    [
        *((torch.bfloat16, family) for family in FAMILIES),
        (torch.float16, "zigzag_ring_flash_attn"),
        *(slow(torch.float16, family) for family in FAMILIES if family != "zigzag_ring_flash_attn"),
    ],
)
def test_sixteen_bits_stay_what_they_are_and_err_like_one_device(pools, family, dtype, every):
    pools.run(4, sixteen_bits, family, dtype, every)


def own_test_shapes(family: str, heads: int):
    case = reference_case(family, heads=heads)
    assert_like_kernel(on_ranks(family, "qkvpacked", case), *once(lambda: (single_device(case, "torch_cpu"), case.exact())))


OWN_SHAPES = ["zigzag_ring_flash_attn", "zigzag_ring_flash_attn_varlen", "llama3_flash_attn_varlen"]


@pytest.mark.parametrize(("family", "heads"), [(OWN_SHAPES[1], 1), *(slow(family, 5) for family in OWN_SHAPES)])
def test_the_reference_s_own_shapes(pools, family, heads):
    pools.run(2, own_test_shapes, family, heads, timeout=200)


def extras(family: str, mask: str, extra: str):
    """Dropout is replayed, ALiBi measures positions, a scale is used: with every gradient."""
    case = family_case(family, dist.get_world_size(), heads=(4, 2), mask=mask)
    if extra == "alibi":
        case.alibi = torch.rand(4)
        options = {"alibi_slopes": case.alibi}
    else:
        torch.manual_seed(7)
        case.dropout_p, case.seed = 0.25, int(torch.randint(1 << 62, ()))
        torch.manual_seed(7)
        options = {"dropout_p": 0.25, **({"stride": 2} if family in GATHERED else {})}
    for found, wanted in zip(on_ranks(family, "", case, **options), once(case.exact), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("family", "world", "mask", "extra"), swept(FAMILIES, [1, 4], ["causal", "full"], ["alibi", "dropout"]))
def test_dropout_is_replayed_and_alibi_measures_positions_across_ranks(pools, world, family, mask, extra):
    pools.run(world, extras, family, mask, extra)


def deterministic(family: str):
    case = family_case(family, dist.get_world_size(), 64, heads=(4, 2), dtype=torch.bfloat16)
    first, second = (on_ranks(family, "", case, deterministic=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("family", FAMILIES)
def test_deterministic_runs_are_bitwise_the_same(pools, family):
    pools.run(4, deterministic, family)


def strides():
    world = dist.get_world_size()
    for family in GATHERED:
        case = family_case(family, world, heads=(8, 4))
        results, messages = zip(*(counted(family, case, stride=stride) for stride in (1, 2, 4)), strict=True)
        assert messages == (4 * messages[2], 2 * messages[2], messages[2])
        short, few = counted(family, case, stride=1, at_once=llama3.AT_ONCE)
        assert few == messages[2]  # heads of a few bytes are gathered at once
        for other in (*results[1:], short):
            for a, b in zip(results[0], other, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def counted(family: str, case: Case, **options) -> tuple[Sequence[torch.Tensor], int]:
    """What a function returns, and how many messages this rank has sent for it."""
    before = transport_of(dist.group.WORLD).traffic.copy()
    found = on_ranks(family, "", case, **options)
    return found, transport_of(dist.group.WORLD).traffic.since(before).messages


def test_heads_k_stride_changes_memory_not_results(pools):
    pools.run(2, strides)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 4 * llama3.AT_ONCE))
def test_as_many_heads_are_gathered_at_a_time_as_take_little_memory(stride, groups, head_bytes):
    heads = stride * groups
    found = llama3._at_a_time(stride, heads, head_bytes)
    assert heads % found == found % stride == 0
    fitting = [n for n in range(1, heads + 1) if heads % n == n % stride == 0 and n * head_bytes <= llama3.AT_ONCE]
    assert found == max([stride, *fitting])


def empty_documents_and_ranks_without_some():
    world, rank = dist.get_world_size(), dist.get_rank()
    for family, mask in itertools.product(GATHERED, ("causal", "full", "window")):
        case = make_case(32, batch=1, mask=mask, documents=Documents(((0, 0, 1, 1, 3, 30, 30, 32, 32),)))
        found = on_ranks(family, "", case)
        assert not any(x.isnan().any() for x in found)
        for a, b in zip(found, case.exact(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    case = make_case(32, batch=1, documents=Documents(((0, 0, 16, 16, 32, 32),)))
    for family in VARLEN:
        for a, b in zip(on_ranks(family, "", case), case.exact(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    return world, rank


def test_documents_without_tokens_and_ranks_without_a_document_are_no_trouble(pools):
    pools.run(4, empty_documents_and_ranks_without_some)


def other_groups():
    """group= names the ranks; None is the default group."""
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group = pairs[rank // 2]
    case = family_case("zigzag_ring_flash_attn", 2)
    tokens = torch.tensor(Layout("zigzag").tokens(32, 2, rank % 2))
    out = functional.zigzag_ring_flash_attn_func(*(x[:, tokens] for x in case.inputs), causal=True, group=group)
    torch.testing.assert_close(out, case.exact()[0][:, tokens], rtol=0, atol=1e-10)


def test_a_group_of_some_ranks(pools):
    pools.run(4, other_groups)


def refusals():
    x, t = torch.zeros(1, 8, 4, 8), torch.zeros(8, 4, 8)
    odd = torch.zeros(1, 7, 4, 8)
    cu = torch.tensor([0, 3, 8], dtype=torch.int32)
    world, rank = dist.get_world_size(), dist.get_rank()
    llama3 = llama3_flash_attn_prepare_cu_seqlens(torch.tensor([0, 5, 16]), True, rank, world)
    prepared = zigzag_llama3_flash_attn_prepare_cu_seqlens(torch.tensor([0, 5, 16]), True, rank, world)
    f = functional
    cases = [
        (lambda: f.zigzag_ring_flash_attn_func(odd, odd, odd), ValueError, "q has 7 tokens: S must be divisible by 2 * 2"),
        (lambda: f.zigzag_ring_flash_attn_varlen_func(t, t, t, cu, 5), ValueError, "but 3 tokens of document 0"),
        (lambda: f.ring_flash_attn_varlen_func(t, t, t, cu, 4), ValueError, "a document of 5 tokens, longer than"),
        (
            lambda: f.ring_flash_attn_varlen_func(t[:7], t[:7], t[:7], cu, 5),
            ValueError,
            "cu_seqlens ends at 8, but there are 7 tokens",
        ),
        (lambda: f.ring_flash_attn_varlen_func(t, t, t, cu.float(), 5), TypeError, "must be a 1-D integer tensor"),
        (lambda: f.ring_flash_attn_varlen_func(t, t, t, torch.tensor([1, 8]), 8), ValueError, "must start at 0 and never decrease"),
        (lambda: f.ring_flash_attn_func(t, t, t), ValueError, "must be (B, S/W, H, D), found 3, 3 and 3 dims"),
        (lambda: f.ring_flash_attn_varlen_func(x, x, x, cu, 5), ValueError, "must be (T/W, H, D), found 4, 4 and 4 dims"),
        (lambda: f.ring_flash_attn_func(x, x, x.double()), TypeError, "one dtype"),
        (lambda: f.ring_flash_attn_func(x, x[:, :, :3], x[:, :, :3]), ValueError, "multiple of key heads, found 4 and 3"),
        (lambda: f.ring_flash_attn_func(x, x, x, dropout_p=1.5), ValueError, "a probability below 1"),
        (
            lambda: f.ring_flash_attn_func(x, x, x, alibi_slopes=torch.zeros(3)),
            ValueError,
            "alibi_slopes must have shape (4,) or (1, 4)",
        ),
        (lambda: f.ring_flash_attn_func(x, x, x, window_size=(-3, 0)), ValueError, "a side is a number of tokens"),
        (lambda: f.ring_flash_attn_kvpacked_func(x, x), ValueError, "kv must have shape (..., 2, heads, D), found (1, 8, 4, 8)"),
        (lambda: f.ring_flash_attn_qkvpacked_func(x), ValueError, "qkv must have shape (..., 3, heads, D)"),
        (
            lambda: f.llama3_flash_attn_varlen_func(t, t, t, *llama3[:4], 3, llama3[4]),
            ValueError,
            "heads_k_stride must divide the 4 key heads",
        ),
        (
            lambda: f.llama3_flash_attn_varlen_func(t[:4], t[:4], t[:4], *llama3[:4], 1, llama3[4]),
            ValueError,
            "cu_seqlens_q ends at 8",
        ),
        (lambda: f.zigzag_llama3_flash_attn_varlen_func(t, t, t, prepared), ValueError, "prepare once a batch"),
        (
            lambda: f.zigzag_llama3_flash_attn_varlen_func(t[:4], t[:4], t[:4], prepared, causal=True),
            ValueError,
            "prepare once a batch",
        ),
        (lambda: llama3_flash_attn_prepare_cu_seqlens(torch.tensor([0, 5, 17]), True, 0, 2), ValueError, "17 tokens over 2 ranks"),
        (lambda: zigzag_llama3_flash_attn_prepare_cu_seqlens(torch.tensor([0, 18]), True, 0, 2), ValueError, "divisible by 2 * 2"),
    ]
    for act, error, text in cases:
        refused(act, error, text)
    # flash-attn takes R as 0 where attention is causal
    assert torch.equal(
        f.ring_flash_attn_func(x, x, x, causal=True, window_size=(3, 5)),
        f.ring_flash_attn_func(x, x, x, causal=True, window_size=(3, 0)),
    )


def test_what_does_not_fit_is_refused_by_name(pools):
    pools.run(2, refusals)


def test_without_a_process_group_the_error_says_what_to_do():
    x = torch.zeros(1, 8, 4, 8)
    with pytest.raises(RuntimeError, match=r"call torch.distributed.init_process_group first, or pass group="):
        functional.ring_flash_attn_func(x, x, x)


@pytest.mark.parametrize(
    ("bounds", "causal", "rank", "world", "wanted"),
    [
        ((0, 120, 1248, 4232), True, 0, 8, ([0, 120, 529], [0, 120, 529], 409, 409, slice(0, 529))),
        ((0, 120, 1248, 4232), True, 2, 8, ([0, 190, 529], [0, 1128, 1467], 339, 1128, slice(120, 1587))),
        ((0, 120, 1248, 4232), True, 7, 8, ([0, 529], [0, 2984], 529, 2984, slice(1248, 4232))),
        ((0, 120, 1248, 4232), False, 2, 8, ([0, 190, 529], [0, 1128, 4112], 339, 2984, slice(120, 4232))),
        ((0, 8, 16), True, 1, 2, ([0, 8], [0, 8], 8, 8, slice(8, 16))),
    ],
)
def test_prepared_llama3_lengths_are_those_of_the_reference(bounds, causal, rank, world, wanted):
    cu_q, cu_k, max_q, max_k, k_slice = llama3_flash_attn_prepare_cu_seqlens(
        torch.tensor(bounds, dtype=torch.int32), causal, rank, world
    )
    assert (cu_q.tolist(), cu_k.tolist(), max_q, max_k, k_slice) == wanted
    assert cu_q.dtype == cu_k.dtype == torch.int32


def test_prepared_lengths_cover_what_each_query_sees():
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        world = int(torch.randint(1, 5, (), generator=generator))
        share = int(torch.randint(1, 9, (), generator=generator))
        total = world * share
        inner = sorted(torch.randint(0, total + 1, (4,), generator=generator).tolist())
        bounds = (0, *inner, total)
        for rank, causal in itertools.product(range(world), (True, False)):
            cu_q, cu_k, max_q, max_k, k_slice = llama3_flash_attn_prepare_cu_seqlens(torch.tensor(bounds), causal, rank, world)
            assert cu_q[-1] == share
            assert cu_k[-1] == k_slice.stop - k_slice.start
            assert max_q == cu_q.diff().max()
            assert max_k == cu_k.diff().max()
            for i in range(len(cu_q) - 1):
                for token in range(rank * share + int(cu_q[i]), rank * share + int(cu_q[i + 1])):
                    document = Documents.find(bounds, token)
                    low, high = k_slice.start + int(cu_k[i]), k_slice.start + int(cu_k[i + 1])
                    assert low == bounds[document]
                    assert high >= token + 1 if causal else high == bounds[document + 1]


def test_zigzag_preparation_is_a_value():
    prepared = [zigzag_llama3_flash_attn_prepare_cu_seqlens(torch.tensor([0, 5, 16]), True, 0, 2) for _ in range(2)]
    assert prepared[0] == prepared[1]
    assert hash(prepared[0]) == hash(prepared[1])
    assert prepared[0].tokens == ((0, 4), (12, 16))


def test_what_was_worked_out_from_a_tensor_is_kept_until_it_changes_or_goes():
    cache, cu = TensorCache(), torch.tensor([0, 4, 8])
    cache.put(cu, "read")
    assert cache.get(cu) == "read"
    assert cache.get(cu.clone()) is None
    cu[1] = 6
    assert cache.get(cu) is None
    del cu
    assert not cache._entries
