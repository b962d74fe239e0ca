"""`explain`: the public look at what an attention costs, before any tensor exists."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers import blocks_touched

from dtensor_ring import Contiguous, Documents, Stripe, Zigzag, explain
from dtensor_ring.planning.costs import AttentionShape, cost_of
from dtensor_ring.planning.layout import Layout
from dtensor_ring.planning.mask import Band
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.stages import BUFFERED_TOKENS
from dtensor_ring.tools import explain as module

DOCUMENTS = Documents.from_lengths([10, 20, 34])


@pytest.mark.parametrize("strategy", ["ring", "gather", "ulysses"])
@pytest.mark.parametrize("placement", [Contiguous(1), Zigzag(1), Stripe(1, block=2), Zigzag(1, per_document=True)])
def test_it_has_the_numbers_of_every_rank(placement, strategy):
    explained = explain(placement, 64, 4, DOCUMENTS, strategy=strategy, heads=8, kv_heads=4, head_dim=16, v_head_dim=8, batch=3)
    problem = AttentionProblem(placement.layout, Band(0, None), 64, 64, 4, strategy, DOCUMENTS).staged(0, BUFFERED_TOKENS)
    wanted = [cost_of(problem, rank, AttentionShape(8, 4, 16, 8, 3)) for rank in range(4)]
    assert [explained.rank(rank) for rank in range(4)] == wanted
    assert explained.work == tuple(cost.work for cost in wanted)
    assert explained.bytes == tuple(cost.forward.bytes for cost in wanted)
    assert explained.tokens == tuple(cost.tokens for cost in wanted)
    assert explained.balance == sum(explained.work) / 4 / max(explained.work)


def test_its_block_balance_counts_the_blocks_that_kernels_compute():
    texts = Documents.from_lengths([3000, *[10] * 100])
    explained = explain(Zigzag(1, per_document=True), 4000, 4, texts)
    bounds = texts.bounds[0]
    held = [explained.problem.q_runs(rank) for rank in range(4)]
    blocks = [blocks_touched(bounds, [(run.start, run.count) for run in runs]) for runs in held]
    assert explained.block_balance == pytest.approx(sum(blocks) / 4 / max(blocks))
    assert explained.balance < 0.75 < 0.95 < explained.block_balance, "a text of 10 tokens takes a block, and hardly any scores"
    # Rank r's eight rows have 8 r + 1 to 8 r + 8 blocks, each one half a block less, and there is half a block for the segment.
    halves = [2 * sum(range(8 * rank + 1, 8 * rank + 9)) - 8 + 1 for rank in range(4)]
    assert explain(Contiguous(1), 4096, 4).block_balance == pytest.approx(sum(halves) / 4 / max(halves))
    assert explain(Contiguous(1), 4096, 4, window=(127, 0)).block_balance > 0.9
    assert explain(Zigzag(1), 4096, 4, is_causal=False).block_balance is None
    assert explain(Contiguous(1), 4096, 4, strategy="ulysses").block_balance == 1.0


@pytest.mark.parametrize("strategy", ["ring", "gather", "ulysses"])
def test_it_prints_a_summary_and_plots_the_ranks_asked_for(strategy):
    explained = explain(Zigzag(1), 64, 4, strategy=strategy)
    text, plot, one = str(explained), explained.plot(), explained.plot([2])
    exchange = "ring in 1 stage" if strategy == "ring" else strategy
    assert text.startswith(f"zigzag, causal, 64 tokens over 4 ranks, {exchange}\n")
    assert f"bytes sent a rank:         mean {sum(explained.bytes) / 4:.1f}, most {max(explained.bytes)}" in text
    assert [f"\nrank {rank}\n" in plot for rank in range(4)] == [True] * 4
    assert [f"\nrank {rank}\n" in one for rank in range(4)] == [False, False, True, False]
    assert max(map(len, [*text.splitlines(), *plot.splitlines()])) <= 80


def test_a_layout_or_its_text_is_a_placement_and_cu_seqlens_are_documents():
    by_placement = explain(Zigzag(1, per_document=True), 64, 4, DOCUMENTS)
    assert by_placement == explain(Layout.parse("zigzag/documents"), 64, 4, DOCUMENTS)
    assert by_placement == explain("zigzag/documents", 64, 4, [0, 10, 30, 64])


def test_masks_have_the_defaults_of_ring_attention():
    assert explain("zigzag", 64, 4).problem.band == Band(0, None)
    assert explain("zigzag", 64, 4, is_causal=False).problem.band == Band()
    assert explain("zigzag", 64, 4, window=(16, 0)).problem.band == Band(0, 16)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        ((1, 64, 4), {}, TypeError, "placement must be Contiguous, Zigzag or Stripe"),
        (("snake", 64, 4), {}, ValueError, "unknown layout 'snake'"),
        (("zigzag", 64, 0), {}, ValueError, "at least one rank, found length=64 and world=0"),
        (("zigzag", -1, 4), {}, ValueError, "found length=-1"),
        (("zigzag", 65, 4, DOCUMENTS), {}, ValueError, "documents end at token 64, but the sequence has 65 tokens"),
        (("zigzag/documents", 64, 4), {}, ValueError, "pass documents=, one row for the whole batch, found None"),
        (("zigzag", 64, 4), {"strategy": "local"}, ValueError, "unknown strategy 'local'"),
        (("zigzag", 64, 4), {"window": (1, 1)}, ValueError, "looks 1 tokens ahead but is_causal=True"),
        (("zigzag", 64, 4), {"heads": 12}, ValueError, "the 8 key heads must divide the 12 query heads"),
        (("zigzag", 64, 4), {"batch": 0}, ValueError, "found batch=0"),
        (("zigzag", 64, 6), {"strategy": "ulysses"}, ValueError, "cannot be shared by 6 ranks"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, options, error, text):
    with pytest.raises(error, match=text):
        explain(*arguments, **options)


def test_the_drawing_in_its_docstring_is_what_it_prints():
    example = module.__doc__.split('>>> print(explain("zigzag", 16, 4))\n')[1].split("\n\nNo torch")[0]
    assert "\n".join(line.removeprefix("    ") for line in example.splitlines()) == str(explain("zigzag", 16, 4))


def test_it_loads_no_torch_where_the_command_line_runs():
    code = """
import sys
sys.argv, sys.orig_argv = ["-m", "plan"], ["python", "-m", "dtensor_ring", "plan"]
from dtensor_ring.tools.explain import explain
print(explain("zigzag", 64, 4).balance, sorted({"torch", "numpy"} & set(sys.modules)))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "1.0 []\n"
