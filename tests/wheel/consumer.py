# pyright: strict, reportUnnecessaryTypeIgnoreComment=true, reportUnknownVariableType=false
"""A user's file, for type checkers: what it says of types must be so, and each line with `type: ignore` must be an error.

transformers is not installed where it is checked, so that the type of the model that `ring_plan` takes is unknown there.
"""

from __future__ import annotations

from typing import Any, assert_type

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dtensor_ring import (
    Documents,
    RingPlan,
    ShardedBatch,
    Zigzag,
    distribute_tensor,
    from_local,
    ring_attention,
    ring_plan,
    shard_batch,
)
from dtensor_ring.ops.arguments import Strategy
from dtensor_ring.ops.kernels import KernelName


def placed(q: DTensor, with_lse: bool) -> Tensor:
    assert_type(ring_attention(q, q, q), DTensor)
    assert_type(ring_attention(q, q, q, return_lse=False), DTensor)
    assert_type(ring_attention(q, q, q, return_lse=True), tuple[DTensor, DTensor])
    assert_type(ring_attention(q, q, q, return_lse=with_lse), DTensor | tuple[DTensor, DTensor])
    out, lse = ring_attention(q, q, q, documents=Documents.from_lengths([3, 5]), strategy="gather", return_lse=True)
    return out.to_local() + lse.to_local()


def plain(q: Tensor, weight: torch.nn.Parameter, strategy: Strategy | None, kernel: KernelName) -> Tensor:
    assert_type(ring_attention(q, q, q), Tensor)
    assert_type(ring_attention(weight, weight, weight), Tensor)
    assert_type(ring_attention(q, q, q, return_lse=True), tuple[Tensor, Tensor])
    return ring_attention(q, q, q, strategy=strategy, kernel=kernel)


def batches(ids: Tensor, mesh: DeviceMesh) -> DTensor:
    batch: ShardedBatch = shard_batch({"input_ids": ids}, mesh, Zigzag(1))
    assert_type(batch.documents, Documents | None)
    assert_type(from_local(ids, mesh, [Zigzag(1)], length=batch.length), DTensor)
    return distribute_tensor(ids, mesh, [Zigzag(1)])


def logits(plan: RingPlan, local: Tensor) -> str:
    assert_type(plan.gather(local), Tensor)
    return plan.describe()


def planned(model: Any) -> RingPlan:
    return ring_plan(model, strategy="ulysses", kernel="torch_flash")


def wrong(q: DTensor, plan: RingPlan, model: Any) -> None:
    ring_attention(q, q, q, strategy="rings")  # type: ignore[call-overload]
    ring_attention(q, q, q, kernel="flash_attn")  # type: ignore[call-overload]
    ring_attention(q, q, q, documents=3)  # type: ignore[call-overload]
    ring_attention(q, q, q, causal=True)  # type: ignore[call-overload]
    ring_attention(q, q, q, return_lse=True).to_local()  # type: ignore[attr-defined]
    plan.gathered()  # type: ignore[attr-defined]
    ring_plan(model, strategy="rings")  # type: ignore[arg-type]
    ring_plan(model, kernel="flash_attn")  # type: ignore[arg-type]
