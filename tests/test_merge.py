from __future__ import annotations

import itertools
import math
from importlib.util import find_spec
from pathlib import Path

import programs
import pytest
import torch
from helpers import made_once, make_case

from dtensor_ring.ops.executors.gradients import GradSum
from dtensor_ring.ops.executors.merge import OutputSum, merge_
from dtensor_ring.ops.executors.parts import OutputPart
from dtensor_ring.ops.reference import reference_attention


def blocks(dtype=torch.float64):
    """Out and lse of two halves of the keys, and of all of them."""
    case = make_case(10, mask="full", dtype=dtype)
    halves = [reference_attention(case.q, case.k[:, s], case.v[:, s], is_causal=False) for s in (slice(0, 4), slice(4, 10))]
    return halves, reference_attention(*case.inputs, is_causal=False)


def merged(first, second):
    """The first block's out and lse after the second was merged into them."""
    out, lse = first[0].contiguous(), first[1].clone()
    assert merge_(out, lse, [OutputPart(0, *second)]) is None
    return out, lse


def test_merging_two_halves_of_the_keys_gives_attention_over_all_of_them():
    (first, second), (out, lse) = blocks()
    mine = merged(first, second)
    torch.testing.assert_close(mine[0], out, rtol=0, atol=1e-14)
    torch.testing.assert_close(mine[1], lse, rtol=0, atol=1e-14)


def test_merging_does_not_depend_on_the_order():
    (first, second), _ = blocks()
    swapped = merged([x.clone() for x in second], [x.clone() for x in first])
    for a, b in zip(merged(first, second), swapped, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


def test_two_blocks_are_merged_at_once_as_one_after_the_other():
    case = make_case(10, mask="full", dtype=torch.float64)
    thirds = [
        reference_attention(case.q, case.k[:, s], case.v[:, s], is_causal=False) for s in (slice(0, 4), slice(4, 5), slice(5, 10))
    ]
    out, lse = thirds[0][0].contiguous(), thirds[0][1].clone()
    cut = slice(3, 8)
    parts = [OutputPart(0, *thirds[1]), OutputPart(3, thirds[2][0][:, cut].contiguous(), thirds[2][1][:, :, cut].contiguous())]
    merge_(out, lse, parts)
    wanted, wanted_lse = reference_attention(*case.inputs, is_causal=False)
    torch.testing.assert_close(out[:, cut], wanted[:, cut], rtol=0, atol=1e-14)
    torch.testing.assert_close(lse[:, :, cut], wanted_lse[:, :, cut], rtol=0, atol=1e-14)
    wanted, wanted_lse = reference_attention(case.q, case.k[:, :5], case.v[:, :5], is_causal=False)
    for rows in (slice(0, 3), slice(8, 10)):
        torch.testing.assert_close(out[:, rows], wanted[:, rows], rtol=0, atol=1e-14)
        torch.testing.assert_close(lse[:, :, rows], wanted_lse[:, :, rows], rtol=0, atol=1e-14)


@pytest.mark.parametrize("empty", ["first", "second", "both"])
def test_rows_without_keys_merge_without_nan(empty):
    ((out, lse), (block, block_lse)), _ = blocks()
    out, block = out.contiguous(), block.contiguous()
    if empty != "second":
        out[:, :3], lse[:, :, :3] = 0, -math.inf
    if empty != "first":
        block[:, :3], block_lse[:, :, :3] = 0, -math.inf
    before = {"first": block, "second": out, "both": torch.zeros_like(out)}[empty][:, :3].clone()
    before_lse = {"first": block_lse, "second": lse, "both": torch.full_like(lse, -math.inf)}[empty][:, :, :3].clone()
    merge_(out, lse, [OutputPart(0, block, block_lse)])
    assert torch.equal(out[:, :3], before)
    assert torch.equal(lse[:, :, :3], before_lse)
    assert not out.isnan().any()


def test_far_apart_lse_does_not_overflow():
    out, block = torch.ones(1, 1, 1, 2), torch.full((1, 1, 1, 2), 5.0)
    lse, block_lse = torch.full((1, 1, 1), -1e4), torch.full((1, 1, 1), 1e4)
    merge_(out, lse, [OutputPart(0, block, block_lse)])
    assert out.flatten().tolist() == [5.0, 5.0]
    assert lse.item() == 1e4


def test_two_contributions_are_rounded_once():
    (first, second), _ = blocks(torch.float32)
    parts = [(out.bfloat16(), lse) for out, lse in (first, second)]
    total = OutputSum(torch.empty(2, 10, 4, 8, dtype=torch.bfloat16), 8, parts=2, blocks=2)
    for out, lse in parts:
        total.add(OutputPart(0, out.clone(), lse.clone()))
    wide_out, _ = merged((parts[0][0].float(), parts[0][1]), (parts[1][0].float(), parts[1][1]))
    assert torch.equal(total.result()[0], wide_out.bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("more", [False, True], ids=["one at a time", "two at a time"])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("count", [2, 3, 8, 40])
def test_however_many_blocks_out_is_rounded_once(count, has_sinks, more, dtype):
    """As far from the sum in float64 as that is when it is rounded itself."""
    generator = torch.Generator().manual_seed(count)
    parts = []
    for i in range(count):
        start = 6 * (i % 3 == 1)  # every third block begins later, as half of a zigzag shard does
        out = torch.randn(2, 20 - start, 4, 64, generator=generator).to(dtype)
        parts.append(OutputPart(start, out, torch.randn(2, 4, 20 - start, generator=generator)))
    sinks = torch.randn(4, generator=generator) if has_sinks else None
    wide, lse = parts[0].out.double(), parts[0].lse.double()
    for part in parts[1:]:
        merge_(wide, lse, [OutputPart(part.start, part.out.double(), part.lse.double())])
    merge_(wide, lse, [], sinks_H=sinks)
    total = OutputSum(torch.empty(2, 20, 4, 64, dtype=dtype), 64, count, count, sinks)
    for i, part in enumerate(parts):
        total.add(OutputPart(part.start, part.out.clone(), part.lse.clone()), more=more and i % 2 == 1)
    out, out_lse = total.result()
    assert out.dtype == dtype
    error, of_one_rounding = (x.double() - wide for x in (out, wide.to(dtype)))
    assert error.square().mean() <= 1.005 * of_one_rounding.square().mean()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), wide, rtol=0.51 * eps, atol=eps**2 / 4)
    torch.testing.assert_close(out_lse.double(), lse, rtol=0, atol=1e-5)


def test_sinks_are_one_more_contribution_that_must_not_round_again():
    """Each query is in two blocks, but those of the first half are merged before the sinks come."""
    generator = torch.Generator().manual_seed(3)
    parts = [
        OutputPart(start, torch.randn(1, stop - start, 8, 64, generator=generator).bfloat16(), torch.randn(1, 8, stop - start))
        for start, stop in ((0, 40), (0, 20), (20, 40))
    ]
    sinks = torch.randn(8, generator=generator)
    wide, lse = parts[0].out.double(), parts[0].lse.double()
    for part in parts[1:]:
        merge_(wide, lse, [OutputPart(part.start, part.out.double(), part.lse.double())])
    merge_(wide, lse, [], sinks_H=sinks)
    total = OutputSum(torch.empty(1, 40, 8, 64, dtype=torch.bfloat16), 64, 2, 3, sinks)
    for part in parts:
        total.add(part)
    error, of_one_rounding = (x.double() - wide for x in (total.result()[0], wide.bfloat16()))
    assert error.square().mean() <= 1.005 * of_one_rounding.square().mean()


def test_a_first_block_of_some_queries_leaves_the_others_to_the_next():
    (first, second), (out, lse) = blocks()
    total = OutputSum(torch.empty_like(out), out.shape[3], parts=2, blocks=2)
    total.add(OutputPart(4, first[0][:, 4:].contiguous(), first[1][:, :, 4:].contiguous()))
    total.add(OutputPart(0, *second))
    mine, mine_lse = total.result()
    torch.testing.assert_close(mine[:, 4:], out[:, 4:], rtol=0, atol=1e-14)
    torch.testing.assert_close(mine[:, :4], second[0][:, :4], rtol=0, atol=0)
    torch.testing.assert_close(mine_lse[:, :, 4:], lse[:, :, 4:], rtol=0, atol=1e-14)


def test_rows_with_no_block_stay_empty():
    out, lse = OutputSum(torch.empty(2, 10, 4, 8, dtype=torch.bfloat16), 6, parts=0, blocks=0).result()
    assert out.shape == (2, 10, 4, 6)
    assert out.dtype == torch.bfloat16
    assert (out == 0).all()
    assert lse.dtype == torch.float32
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("flushes", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_add_up_in_float32_whatever_the_order(parts, dtype, flushes):
    like = torch.empty(2, 10, 3, 4, dtype=dtype), torch.empty(2, 10, 3, 2, dtype=dtype)
    pieces = [(i % 4, torch.randn(2, 10 - i % 4 if i else 10, 3, 6).to(dtype).split((4, 2), 3)) for i in range(parts)]
    exact = [torch.zeros(x.shape, dtype=torch.float64) for x in like]
    for start, piece in pieces:
        for total, x in zip(exact, piece, strict=True):
            total[:, start : start + x.shape[1]] += x.double()
    for order in (pieces, pieces[::-1]):
        total = GradSum(like)
        for start, piece in order:
            total.add(start, tuple(x.clone() for x in piece))
            if flushes:
                total.flush()
        for result, wanted in zip(total.result(dtype), exact, strict=True):
            assert result.dtype == dtype
            assert result.is_contiguous()
            # Half an ulp of one rounding, and what sums in float32 round.
            bound = torch.finfo(dtype).eps * (0.5 if dtype == torch.bfloat16 else 1)
            torch.testing.assert_close(result.double(), wanted, rtol=bound, atol=2e-6 if dtype == torch.bfloat16 else 1e-14)


def test_no_gradient_is_zero():
    assert torch.equal(GradSum([torch.ones(1, 2, 1, 1)]).result(torch.float32)[0], torch.zeros(1, 2, 1, 1))


def test_parts_side_by_side_are_put_together_and_nothing_is_added():
    like, pieces = torch.empty(1, 6, 2, 4), [torch.randn(1, n, 2, 4) for n in (2, 1, 3)]
    pieces[0][:, :1] = -0.0  # 0 + -0.0 is 0.0
    total = GradSum([like])
    for start, piece in ((3, pieces[2]), (0, pieces[0]), (2, pieces[1])):
        total.add(start, (piece,))
    (result,) = total.result(torch.float32)
    assert torch.equal(result.view(torch.int32), torch.cat(pieces, 1).view(torch.int32))


def test_a_whole_part_becomes_the_result_only_where_it_is_given_away():
    like, whole, other = torch.empty(1, 6, 2, 4), torch.randn(1, 6, 2, 4), torch.randn(1, 6, 2, 4)
    kept, lent = other.clone(), other
    total = GradSum([like])
    total.add(0, (lent,), owned=False)
    total.add(0, (whole,))
    (result,) = total.result(torch.float32)
    assert result.data_ptr() == whole.data_ptr()
    assert torch.equal(lent, kept)
    alone = GradSum([like])
    alone.add(0, (lent,), owned=False)
    assert alone.result(torch.float32)[0].data_ptr() != lent.data_ptr()


def test_own_part_comes_first_and_then_what_came_in_its_order():
    """Sums of float32 depend on their order: 1e8 swallows a 1."""
    like = torch.empty(1, 1, 1, 1)
    for pieces, wanted in (((1.0, -1e8, 1e8), 0.0), ((-1e8, 1.0, 1e8), 1.0)):
        total = GradSum([like])
        for piece in pieces[:2]:
            total.add(0, (torch.full((1, 1, 1, 1), piece),), owned=False)
        total.add(0, (torch.full((1, 1, 1, 1), pieces[2]),))
        assert total.result(torch.float32)[0].item() == wanted


def interpreted(name, part, tmp_path_factory):
    """What both, the Triton kernel under the interpreter and the portable code, make of the same inputs."""
    if find_spec("triton") is None:
        pytest.skip("needs Triton, whose interpreter runs the kernel on CPUs: pip install triton")
    script = str(Path(__file__).parent / f"interpreted_{name}.py")
    code = 'import runpy, sys; runpy.run_path(sys.argv[0], run_name="__main__")'

    def run(file):
        programs.check(code, [script, str(file), part], path=[str(Path(script).parent), str(programs.ROOT)])

    return torch.load(made_once(tmp_path_factory, f"interpreted_{name}_{part}.pt", run))


def wanted_cases(part, cells, dtypes, shapes):
    """What the interpreter runs: all shapes in each dtype, or every second one."""
    every = part == "every"
    return {(way, dtype, shape) for way, dtype in cells for shape in shapes[0 if every else dtypes.index(dtype) % 2 :: 2 - every]}


SOME_OR_EVERY = ["some", pytest.param("every", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=SOME_OR_EVERY)
def interpreted_merge(request, tmp_path_factory):
    found = interpreted("merge", request.param, tmp_path_factory)
    assert set(found) == wanted_cases(request.param, MERGES, DTYPES, SHAPES)
    return found


@pytest.fixture(scope="module", params=SOME_OR_EVERY)
def interpreted_sum(request, tmp_path_factory):
    found = interpreted("sum", request.param, tmp_path_factory)
    assert set(found) == wanted_cases(request.param, itertools.product(SUMS, DTYPES[:3]), DTYPES[:3], SUM_SHAPES)
    return found


DTYPES = ("float32", "bfloat16", "float16", "bfloat16 into float32")
SHAPES = [(1, 17, 2, 80), (1, 16, 1, 64), (1, 1, 1, 1), (3, 7, 2, 24), (1, 5, 3, 128), (2, 0, 2, 8)]
WAYS = ("one", "two", "two of some", "new rest", "kept rest", "last rest", "sinks", "sinks alone", "NaN", "NaN sinks")
MERGES = [(way, dtype) for way in WAYS for dtype in DTYPES if "rest" not in way or dtype in ("bfloat16", "float16")]


@pytest.mark.parametrize(("way", "dtype"), MERGES)
def test_the_triton_kernel_merges_as_the_portable_code_does(interpreted_merge, way, dtype):
    """Rows without keys in some or all blocks, head dims that are no power of two, and nothing written outside."""
    for shape in [shape for shape in SHAPES if (way, dtype, shape) in interpreted_merge]:
        case = interpreted_merge[way, dtype, shape]
        assert case["outside"].all(), "what lies around the tensors was written to, or NaN was left inside"
        assert case["out"].shape == case["plain out"].shape == shape
        eps = torch.finfo(case["out"].dtype).eps
        torch.testing.assert_close(case["lse"], case["plain lse"], rtol=1e-6, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(case["out"].float(), case["plain out"].float(), rtol=eps, atol=1e-6, equal_nan=True)
        if "NaN" in way and shape[1] > 5:
            assert case["out"].isnan().any()
            assert (case["out"].isnan().all(-1).transpose(1, 2) == case["lse"].isnan()).all(), "rows that went wrong look right"
        if "sinks" not in way and "some" not in way and way != "new rest":
            assert (case["lse"][:, :, 2:3] == -math.inf).all()
        assert (case["rest"] is None) == (case["plain rest"] is None) == (way not in ("new rest", "kept rest"))
        if case["rest"] is not None:
            mine, wanted = (case[f"{name}out"].double() + case[f"{name}rest"].double() for name in ("", "plain "))
            torch.testing.assert_close(mine, wanted, rtol=2 * eps**2, atol=1e-6)


def test_the_cases_of_the_triton_kernel_are_those_that_the_interpreter_ran(interpreted_merge):
    assert {(way, dtype) for way, dtype, _ in interpreted_merge} == set(MERGES)
    assert {(way, shape) for way, _, shape in interpreted_merge} == set(itertools.product(WAYS, SHAPES))


SUM_SHAPES = [(1, 13, 2, (80, 48)), (1, 9, 1, (64, 64)), (2, 7, 1, (24,)), (1, 6, 20, (128, 8)), (1, 1, 1, (1,)), (2, 0, 2, (8,))]
SUMS = ("new", "into the first", "into the first from a total", "total", "by index", "by index of two dtypes", "one by index")


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("way", SUMS)
def test_the_triton_kernel_adds_up_as_the_portable_code_does(interpreted_sum, way, dtype):
    """One tensor or two, tokens that nothing is added to, contributions that are missing, and nothing written outside."""
    for shape in [shape for shape in SUM_SHAPES if (way, dtype, shape) in interpreted_sum]:
        case = interpreted_sum[way, dtype, shape]
        assert all(case["outside"]), "what lies around the tensors was written to"
        for mine, wanted in zip(case["fused"], case["plain"], strict=True):
            torch.testing.assert_close(mine.float(), wanted.float(), rtol=torch.finfo(wanted.dtype).eps, atol=1e-6)


def test_the_sums_of_the_triton_kernel_are_those_that_the_interpreter_ran(interpreted_sum):
    assert {(way, dtype) for way, dtype, _ in interpreted_sum} == set(itertools.product(SUMS, DTYPES[:3]))
    assert {(way, shape) for way, _, shape in interpreted_sum} == set(itertools.product(SUMS, SUM_SHAPES))
