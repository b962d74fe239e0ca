"""Plans under the windows that FlashAttention-2's kernels would apply: exact, whatever the layout, mask, documents and lengths."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch
from flash_windows import FLASH_2_WINDOWS, as_flash_attn_2
from helpers import LAYOUTS, MASKS, assert_exact, assert_like_kernel, make_case, run_loopback, single_device, some_or_every
from sweeps import swept

from dtensor_ring.ops.kernels import KERNELS, Block, SoftmaxParams, VarlenMetadata, VarlenSegment
from dtensor_ring.planning.documents import Documents

STRATEGIES = ("ring", "gather")
WINDOWS = [(True, (3, 0)), (True, (25, 0)), (False, (4, 30)), (False, (-1, 20)), (False, (30, -1)), (False, (0, 9))]
DOCUMENTS = [None, ((0, 7, 40),), ((0, 5, 5, 6, 20, 37, 40), (0, 1, 12, 39, 40))]


@pytest.mark.parametrize(
    ("window", "longest_k", "read"),
    [
        ((-1, -1), 4, (-1, -1)),
        ((-1, 0), 4, (4, 0)),
        ((2, 0), 4, (2, 0)),
        ((4, 0), 4, (4, 0)),
        ((-1, 3), 4, (4, 3)),
        ((-1, 4), 4, (-1, -1)),  # every key, also those more than 4 ahead of a row far above the last
        ((2, -1), 4, (2, 4)),  # keys up to 4 ahead only
        ((2, 9), 4, (2, 4)),
        ((9, 9), 4, (-1, -1)),
    ],
)
def test_flash_attention_2_reads_sides_as_long_as_the_keys_its_own_way(window, longest_k, read):
    assert as_flash_attn_2(window, longest_k) == read


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("window", "rows", "columns"), [((-1, 4), 9, 3), ((0, -1), 9, 3)])
def test_the_stand_in_misreads_what_plans_must_avoid(packed, window, rows, columns):
    case, varlen = make_case(rows, k_length=columns, batch=1), None
    if packed:
        varlen = VarlenMetadata.of([VarlenSegment(0, rows, 0, columns)], rows, columns, torch.device("cpu"))
    inputs, block = [x[0] if packed else x for x in case.inputs], Block(window, SoftmaxParams(0.3), varlen)
    out, meant = (kernel.forward(*inputs, block).out for kernel in (FLASH_2_WINDOWS, KERNELS["math"]))
    assert not torch.allclose(out, meant)


@cache
def windowed(length: int, is_causal: bool, window: tuple[int, int], **options):
    """A small case under a window, and its exact results."""
    case = make_case(length, heads=(2, 1), dim=4, **options)
    case.is_causal, case.window = is_causal, window
    return case, case.exact()


@some_or_every
@pytest.mark.parametrize(("layout", "strategy", "bounds"), swept(LAYOUTS, STRATEGIES, DOCUMENTS))
def test_windows_and_documents_are_exact(layout, strategy, bounds, every):
    windows = (*MASKS.values(), *WINDOWS)
    half = windows[LAYOUTS.index(layout) % 2 :: 2]  # the other half in the next layout
    cells = itertools.product((1, 3, 4), windows) if every else zip(itertools.cycle((3, 4, 3, 4, 1)), half, strict=False)
    for world, (is_causal, window) in cells:
        case, exact = windowed(40, is_causal, window, documents=bounds and Documents(bounds))
        assert_exact(run_loopback(case, layout, world, strategy, FLASH_2_WINDOWS)[0], exact)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_documents_cut_one_by_one_are_exact(strategy):
    for world, (is_causal, window) in itertools.product((2, 4), (*MASKS.values(), *WINDOWS)):
        case, exact = windowed(72, is_causal, window, documents=Documents.from_lengths([41, 1, 9, 3, 18]))
        assert_exact(run_loopback(case, "zigzag/documents", world, strategy, FLASH_2_WINDOWS)[0], exact)


TWO_LENGTHS = [(7, 30), (30, 7), (40, 1), (1, 40)]


@some_or_every
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lengths", TWO_LENGTHS)
def test_two_lengths_are_exact(layout, lengths, every):
    """Both strategies with all windows; or a quarter of them, the others with other layouts and lengths."""
    cells = list(itertools.product(STRATEGIES, (*MASKS.values(), *WINDOWS)))
    turn = (LAYOUTS.index(layout) + TWO_LENGTHS.index(lengths)) % 4
    for strategy, (is_causal, window) in cells if every else cells[turn::4]:
        case, exact = windowed(lengths[0], is_causal, window, k_length=lengths[1])
        assert_exact(run_loopback(case, layout, 3, strategy, FLASH_2_WINDOWS)[0], exact)


@cache
def of_two_rows():
    case = make_case(300, dim=32, documents=Documents(((0, 90, 300), (0, 211, 300))), dtype=torch.bfloat16)
    return case, single_device(case, "torch_cpu"), case.exact()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rows_of_other_documents_add_nothing_to_a_gradient_in_sixteen_bits(layout, strategy):
    """Each call of a batch whose rows differ returns zeros for the other rows: they are added, and travel, unwidened."""
    case, single, exact = of_two_rows()
    assert_like_kernel(run_loopback(case, layout, 4, strategy, "torch_cpu")[0], single, exact)
