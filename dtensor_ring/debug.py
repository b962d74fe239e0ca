"""Look at plans, count what was sent and what is kept, and let ranks compare every call.

print(draw(Problem(Layout("zigzag"), Band(0), 64, 64, world=4)))       # as `python -m dtensor_ring plan`
before = traffic(mesh["cp"])
...
print(traffic(mesh["cp"]).since(before).bytes)
print(sum(cache.bytes for cache in caches()))                          # what is kept between calls
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.distributed.device_mesh import DeviceMesh

from dtensor_ring.cache import CacheUse, caches
from dtensor_ring.comm import Traffic, transport_of
from dtensor_ring.comm.rank_checks import check_every_call
from dtensor_ring.ops.kernels import KERNELS, KernelRequirements
from dtensor_ring.planning.document_sharding import balance_of
from dtensor_ring.planning.schedule import Plan
from dtensor_ring.tools.drawing import draw

__all__ = ["CacheUse", "balance", "caches", "check_every_call", "draw", "kernel_table", "traffic"]


def traffic(mesh: DeviceMesh) -> Traffic:
    """What this rank has sent over a mesh of one axis since its group was made, by attention and redistribution alike."""
    if mesh.ndim != 1:
        raise ValueError(f"traffic is counted for one mesh axis, such as mesh['cp'], found {mesh.ndim} axes")
    return transport_of(mesh.get_group(0)).traffic.copy()


def kernel_table() -> str:
    """Which kernel supports what, as Markdown, asked of the kernels themselves; where one does not, its reason follows."""
    base = KernelRequirements("cuda", torch.bfloat16, 64, 64, training=True)
    probes = {
        "float64": replace(base, dtype=torch.float64),
        "float32": replace(base, dtype=torch.float32),
        "bfloat16": base,
        "float16": replace(base, dtype=torch.float16),
        "head dim 128": replace(base, head_dim=128, v_head_dim=128),
        "head dim 256": replace(base, head_dim=256, v_head_dim=256),
        "head dim 80": replace(base, head_dim=80, v_head_dim=80),
        "value dim of its own": replace(base, head_dim=128, v_head_dim=64),
        "softcap": replace(base, softcap=30.0),
        "dropout": replace(base, dropout=True),
        "softcap and dropout": replace(base, softcap=30.0, dropout=True),
        "ALiBi, blocks that end together": replace(base, alibi="aligned"),
        "ALiBi, any blocks": replace(base, alibi="shifted"),
        "deterministic backward": replace(base, deterministic=True),
    }
    names = list(KERNELS)
    lines = ["| | " + " | ".join(f"`{name}`" for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    reasons: dict[str, list[str]] = {name: [] for name in names}
    for feature, need in probes.items():
        cells = []
        for name in names:
            reason = KERNELS[name].lacks(need)
            cells.append("yes" if reason is None else "no")
            if reason is not None and reason not in reasons[name]:
                reasons[name].append(reason)
        lines.append(f"| {feature} | " + " | ".join(cells) + " |")
    notes = [f"- `{name}`: {'; '.join(found)}." for name, found in reasons.items() if found]
    return "\n".join([*lines, "", *notes])


def balance(plans: Sequence[Plan]) -> float:
    """Mean work over the most loaded rank's: 1 is perfect."""
    return balance_of([each.cells for each in plans])
