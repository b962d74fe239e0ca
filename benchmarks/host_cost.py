"""What a ring_attention call on DTensors costs the host, beside the same operator on plain tensors.

    python benchmarks/host_cost.py

One process, one rank, a handful of tokens on the CPU, so that next to nothing is computed and nothing is sent: the difference is
checking, dispatch and wrapping. Medians over blocks of calls taken in turns.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from dtensor_ring import Zigzag, from_local, ring_attention
from dtensor_ring.ops.kernels import KERNELS, Options

CALLS, BLOCKS = 200, 9


def main() -> None:
    """Print a table of microseconds a call."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("cp",))
    q, k, v = (torch.randn(1, 8, 2, 16, requires_grad=True) for _ in range(3))
    dout, kernel, options = torch.randn(1, 8, 2, 16), KERNELS["torch_cpu"], Options(0.25)

    def placed() -> list[torch.Tensor]:
        return [from_local(x, mesh, [Zigzag(1)], length=8, check=False) for x in (q, k, v)]

    ready = [x.detach() for x in placed()]

    def kernel_both() -> object:
        out, lse = kernel.forward(q.detach(), k.detach(), v.detach(), (-1, 0), options)
        return kernel.backward(dout, q.detach(), k.detach(), v.detach(), out, lse, (-1, 0), options)

    forward: dict[str, Callable[[], object]] = {
        "kernel alone": lambda: kernel.forward(q, k, v, (-1, 0), options),
        "ring_attention, plain tensors": lambda: ring_attention(q, k, v),
        "ring_attention, DTensors": lambda: ring_attention(*ready),
        "from_local, ring_attention, to_local": lambda: ring_attention(*placed()).to_local(),
    }
    both: dict[str, Callable[[], object]] = {
        "kernel alone": kernel_both,
        "ring_attention, plain tensors": lambda: torch.autograd.grad(ring_attention(q, k, v), (q, k, v), dout),
        "from_local, ring_attention, to_local": lambda: torch.autograd.grad(ring_attention(*placed()).to_local(), (q, k, v), dout),
    }
    with torch.no_grad():
        report("forward", forward)
    report("forward and backward", both)
    dist.destroy_process_group()


def report(title: str, calls: dict[str, Callable[[], object]]) -> None:
    """Microseconds of each, measured in turns."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(BLOCKS):
        for name, call in calls.items():
            call()
            begin = time.perf_counter()
            for _ in range(CALLS):
                call()
            spent[name].append((time.perf_counter() - begin) / CALLS * 1e6)
    print(title)
    for name, values in spent.items():
        print(f"  {name:<40}{statistics.median(values):>8.0f} us")


if __name__ == "__main__":
    main()
