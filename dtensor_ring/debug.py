"""Look at plans, count what was sent and what is kept, see which transport was chosen, and let ranks compare every call.

print(draw(AttentionProblem(Layout("zigzag"), Band(0), 64, 64, world=4)))       # as `python -m dtensor_ring plan`
print(explain_transport(mesh["cp"]))                                   # and why the others were not
before = traffic(mesh["cp"])
...
print(traffic(mesh["cp"]).since(before).bytes)
print(sum(cache.bytes for cache in caches()))                          # what is kept between calls
forget_captured()                                                      # what CUDA graphs read, once none is replayed any more
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch.distributed.device_mesh import DeviceMesh

from dtensor_ring._renamed import renamed
from dtensor_ring.cache import CacheUse, caches
from dtensor_ring.captures import forget_captured
from dtensor_ring.comm import TRANSPORTS, Traffic, TransportRequirements, explain_transport, transport_of
from dtensor_ring.comm.rank_checks import check_every_call
from dtensor_ring.ops.kernels import KERNELS, KernelRequirements
from dtensor_ring.planning.document_sharding import balance_of
from dtensor_ring.planning.schedule import Plan
from dtensor_ring.tools.drawing import draw

T = TypeVar("T")

__all__ = [
    "CacheUse",
    "balance",
    "caches",
    "check_every_call",
    "draw",
    "explain_transport",
    "forget_captured",
    "kernel_table",
    "traffic",
    "transport_table",
]


@renamed(mesh="device_mesh")
def traffic(device_mesh: DeviceMesh) -> Traffic:
    """What this rank has sent over a mesh of one axis since its group was made, by attention and redistribution alike.

    A call in a CUDA graph is counted when it is captured; what replays send is not.
    """
    if device_mesh.ndim != 1:
        raise ValueError(f"traffic is counted for one mesh axis, such as mesh['cp'], found {device_mesh.ndim} axes")
    # A copy: the transport goes on counting in its own, and what was read before must stay what it was.
    return transport_of(device_mesh.get_group(0)).traffic.copy()


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
        "scale of 0 or less": replace(base, scale=0.0),
        "ALiBi, blocks that end together": replace(base, alibi="aligned"),
        "ALiBi, any blocks": replace(base, alibi="shifted"),
        "deterministic backward": replace(base, deterministic=True),
    }
    # `lacks` and not `refuses`: the table is the same on every machine, whatever is installed there.
    return _table(probes, {name: kernel.lacks for name, kernel in KERNELS.items()})


def transport_table() -> str:
    """Which transport carries what between which ranks, as Markdown, asked of the transports themselves; reasons follow."""
    probes = {
        "one rank": TransportRequirements(0, 1),
        "processes with a gloo group": TransportRequirements(0, 4, "gloo"),
        "processes with an NCCL group": TransportRequirements(0, 4, "nccl"),
        "threads of one process": TransportRequirements(0, 4),
    }
    return _table(probes, {name: transport.refuses for name, transport in TRANSPORTS.items()})


def _table(probes: Mapping[str, T], refusals: Mapping[str, Callable[[T], str | None]]) -> str:
    """A Markdown table with a line for each probe and a column for each candidate; the reasons of those that refuse follow."""
    lines = ["| | " + " | ".join(f"`{name}`" for name in refusals) + " |", "|---" * (len(refusals) + 1) + "|"]
    # A dict for a set in order of entry: a reason that several probes meet is listed once, where it came first.
    reasons: dict[str, dict[str, None]] = {name: {} for name in refusals}
    for feature, need in probes.items():
        cells = []
        for name, refuses in refusals.items():
            reason = refuses(need)
            cells.append("yes" if reason is None else "no")
            if reason is not None:
                reasons[name][reason] = None
        lines.append(f"| {feature} | " + " | ".join(cells) + " |")
    notes = [f"- `{name}`: {'; '.join(listed)}." for name, listed in reasons.items() if listed]
    return "\n".join([*lines, "", *notes])


def balance(plans: Sequence[Plan]) -> float:
    """The mean work of all ranks divided by that of the most loaded one: 1 is perfect."""
    return balance_of([each.cells for each in plans])
