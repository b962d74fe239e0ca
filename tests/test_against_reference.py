"""The benchmark of the drop-in functions beside ring-flash-attn: who is compared with what, and when it fails."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from benchmarks import against_ring_flash_attn as against
from benchmarks.against_ring_flash_attn import FAMILIES, OURS, THEIRS, Compared, Timed
from benchmarks.report import TABLES
from dtensor_ring import functional

SIZES = "--device cpu --dtypes float32 --head-dim 8 --shrink 24 --tokens 16 --rounds 1 --block 0"


def rows_of(theirs, ours, arguments: str = ""):
    """Rows and printed text of this rank."""
    options = against.parser().parse_args([*SIZES.split(), *arguments.split()])
    with redirect_stdout(StringIO()) as printed:
        rows = against.run(options, {THEIRS: theirs, OURS: ours}, torch.device("cpu"))
    compared = [row for row in rows if isinstance(row, Compared)]
    return compared, [row for row in rows if isinstance(row, Timed)], printed.getvalue()


def every_function():
    compared, timed, printed = rows_of(functional, functional)
    assert [(row.function, row.heads) for row in compared] == [(name, heads) for name in FAMILIES for heads in ("5:5", "8:2")]
    for row in compared:
        assert not row.wrong
        assert not row.worse
        assert list(row.rms) == list(row.most) == ["kernel", THEIRS, OURS]
        # Tokens of another layout would be off by the size of the tensors.
        assert all(ours <= 3 * max(kernel, 1e-7) for ours, kernel in zip(row.rms[OURS], row.rms["kernel"], strict=True)), row
        assert all(0 < rms <= most for rms, most in zip(row.rms[OURS], row.most[OURS], strict=True))
    llama3 = [(name, heads) for name in list(FAMILIES)[-2:] for heads in (1, 1, 8)]
    assert [(row.function, row.key_heads) for row in timed] == [*((name, None) for name in list(FAMILIES)[:-2]), *llama3]
    for row in timed:
        assert not row.wrong
        assert list(row.ms) == [THEIRS, OURS]
        assert min(*row.ms[THEIRS], *row.ms[OURS], *row.ratio) > 0
    assert printed.count("\n") == (1 + 4 * len(compared) + len(timed) if dist.get_rank() == 0 else 0)


def key_heads_that_are_asked_for():
    asked = set()

    def llama3(*arguments, **options):
        asked.add(arguments[7])
        return functional.llama3_flash_attn_varlen_func(*arguments, **options)

    prepare = functional.llama3_flash_attn_prepare_cu_seqlens
    both = SimpleNamespace(llama3_flash_attn_varlen_func=llama3, llama3_flash_attn_prepare_cu_seqlens=prepare)
    only = "--functions llama3_flash_attn_varlen zigzag_llama3_flash_attn_varlen"
    for theirs, ours in ((both, SimpleNamespace()), (SimpleNamespace(), both)):
        asked.clear()
        compared, timed, _ = rows_of(theirs, ours, only)
        assert [(row.key_heads, row.no_more) for row in timed] == 2 * [(1, False), (1, True), (8, False)]
        assert asked == {1, 8}
        assert [list(row.ms) for row in timed] == [
            *3 * [[THEIRS if theirs is both else OURS]],
            [],
            [],
            [],
        ]  # the last is in neither
        assert all(row.ratio is None for row in timed)
        assert [row.worse for row in compared] == [ours is not both] * 2 + [True] * 2


def wrong_and_raising():
    def scaled(factor):
        def func(*arguments, **options):
            out, lse, rest = functional.ring_flash_attn_func(*arguments, **options)
            return factor * out, lse, rest

        return SimpleNamespace(ring_flash_attn_func=func)

    def refuse(*_arguments, **_options):
        raise ValueError("not these\nshapes")

    only = "--functions ring_flash_attn"
    right, off, raising = scaled(1.0), scaled(1.1), SimpleNamespace(ring_flash_attn_func=refuse)
    assert [row.worse for row in rows_of(right, off, only)[0]] == [True, True]
    assert [row.worse for row in rows_of(off, right, only)[0]] == [False, False]
    compared, timed, printed = rows_of(raising, right, only)
    assert all(row.wrong == {THEIRS: "ValueError: not these"} and not row.worse for row in compared)
    assert timed[0].wrong == {THEIRS: "ValueError: not these"}
    assert list(timed[0].ms) == [OURS]
    assert printed.count("WRONG") == (3 if dist.get_rank() == 0 else 0)
    assert all(row.worse for row in rows_of(right, raising, only)[0])
    assert rows_of(right, right, f"{only} --tokens 0")[1] == []


def lengths_of_all_worlds():
    for family in FAMILIES:
        bench = against.Comparison({}, SimpleNamespace(device=torch.device("cpu")))
        for bench.world in (2, 4, 8):
            bounds, length = bench.bounds_of(family)
            assert all(bound % (2 * bench.world) == 0 for bound in (*(bounds or ()), length))
            if bench.world < 8:  # as the reference's tests have them
                assert length == (3816 if bounds is None else 4240 if "zigzag" in family else 4232)


@pytest.mark.parametrize(
    "law",
    [every_function, key_heads_that_are_asked_for, wrong_and_raising, lengths_of_all_worlds],
    ids=lambda law: law.__name__,
)
def test_functions_are_compared_with_the_reference_s_and_timed_beside_them(pools, law):
    pools.run(2, law)


RUN = {"benchmark": "against_ring_flash_attn", "date": "2026-01-31", "device": "Some GPU", "devices": 2, "torch": "2.11.0"}


def test_tables_have_times_of_both_and_errors_of_all():
    timed = {"key_heads": None, "tokens": 8192, "heads": "32:8", "ratio": [1.0456, 0.98], "wrong": {}}
    rows = [
        {"function": "ring_flash_attn", **timed, "ms": {THEIRS: [6.1, 18.84], OURS: [5.834, 18.0]}},
        {
            "function": "llama3",
            **timed,
            "key_heads": 1,
            "ms": {OURS: [2.0, 4.0]},
            "ratio": None,
            "wrong": {THEIRS: "ValueError: no"},
        },
        {"function": "llama3", **timed, "key_heads": 1, "no_more": True, "ms": {OURS: [3.0, 5.0]}, "ratio": None},
        {"function": "zigzag_llama3", **timed, "key_heads": 8, "ms": {OURS: [2.0, 4.0]}, "ratio": None},
        {"function": "a", "dtype": "bfloat16", "heads": "8:2", "tokens": 4, "rms": {OURS: [1e-4] * 5}, "most": {OURS: [2e-3] * 5}},
    ]
    rows[-1]["wrong"] = {THEIRS: "ValueError: no"}
    run = {**RUN, "rows": rows}
    assert TABLES["drop_in"]([run]).splitlines()[-4:] == [
        "| `ring_flash_attn` |  | 8192 | 32:8 | 6.10; 18.84 | 5.83; 18.00 | 1.046; 0.980 |",
        "| `llama3` | 1 | 8192 | 32:8 | wrong: ValueError: no | 2.00; 4.00 |  |",
        "| `llama3` | 1, no more | 8192 | 32:8 |  | 3.00; 5.00 |  |",
        "| `zigzag_llama3` | 8 | 8192 | 32:8 |  | 2.00; 4.00 |  |",
    ]
    assert TABLES["drop_in_errors"]([run]).splitlines()[-2:] == [
        "| `a` | bfloat16 | 8:2 | dtensor_ring |" + 5 * " 1.00e-04 (2.0e-03) |",
        "| `a` | bfloat16 | 8:2 | ring-flash-attn | wrong: ValueError: no |  |  |  |  |",
    ]
    other = {**RUN, "benchmark": "emulate", "rows": []}
    assert TABLES["drop_in"]([other]) == TABLES["drop_in_errors"]([other]) == "No file in `benchmarks/results` has this yet."
