"""What `plan_ahead` has planned is what attention finds."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import grid, line

from dtensor_ring import Contiguous, Documents, Zigzag, from_local, ring_attention
from dtensor_ring.data import plan_ahead
from dtensor_ring.planning import schedule

LENGTH = 64
ASKED = [
    (Zigzag(1), {}),
    (Contiguous(1), {"is_causal": False}),
    (Zigzag(1), {"window": (5, 0)}),
    (Zigzag(1), {"strategy": "gather"}),
    (Zigzag(1), {"strategy": "ulysses"}),
    (Zigzag(1), {"stages": 2}),
    (Zigzag(1, per_document=True), {}),
]


def attend_as_planned():
    mesh = line()
    x = torch.randn(1, LENGTH // mesh.size(), 4, 8, dtype=torch.float64)

    def attend(placement, documents, asked):
        q = from_local(x.clone().requires_grad_(), mesh, [placement], length=LENGTH)
        ring_attention(q, q, q, documents=documents, **asked).to_local().sum().backward()

    def unplanned(*_):
        raise AssertionError("a plan was made")

    planned = [Documents.from_lengths([LENGTH - 3 * i - 7, 3 * i + 7]) for i in range(len(ASKED))]
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as planner:
        for documents, (placement, asked) in zip(planned, ASKED, strict=True):
            planner.submit(plan_ahead, documents, mesh, placement, **asked).result()
        patch.setattr(schedule, "_plan", unplanned)
        for documents, (placement, asked) in zip(planned, ASKED, strict=True):
            attend(placement, documents, asked)
        with pytest.raises(AssertionError, match="a plan was made"):  # of other documents
            attend(Zigzag(1), Documents.from_lengths([1, LENGTH - 1]), {})


def test_attention_makes_no_plan_of_a_batch_that_was_planned_ahead(pools):
    pools.run(4, attend_as_planned)


def refused():
    documents = Documents.from_lengths([3, 5])
    with pytest.raises(ValueError, match="found a mesh of 2 axes"):
        plan_ahead(documents, grid())
    with pytest.raises(ValueError, match="cut in dim 1"):
        plan_ahead(documents, line(), Zigzag(0))
    with pytest.raises(ValueError, match="looks 2 tokens ahead but is_causal=True"):
        plan_ahead(documents, line(), window=(1, 2))


def test_what_cannot_be_planned_ahead_is_refused(pools):
    pools.run(2, refused)
