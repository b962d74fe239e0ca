"""What a ring's transfers reach over each transport: bytes, host time, and what carries them.

    torchrun --nproc-per-node 2 -m benchmarks.transfers
    torchrun --nproc-per-node 4 -m benchmarks.transfers --megabytes 4 64 --rounds 9

Every rank sends a message to the next rank and gets one from the rank before, on its own GPU. What arrives is compared bit by bit
first. Then blocks of exchanges run over one transport after the other, in turns; of the blocks the median counts, and of the ranks
the slowest. `GiB/s` is what a rank gets, idle and beside matrix products that fill the GPU; `slowed` is how much longer these
took; `host us` is what an exchange costs the host. Last, the profiler's names of copies and kernels in an exchange: "Memcpy PtoP"
is a copy engine's work between two GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import ProfilerActivity, profile

from dtensor_ring.comm import Message, Transport, transport_along, use_transport

NAMES = ("process_group", "symmetric_memory")
CALLS = 20  # exchanges in a block
PRODUCTS = 4  # matrix products beside each exchange


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[1, 4, 16, 64, 256], help="sizes of a message, in MiB")
    parser.add_argument("--rounds", type=int, default=5, help="blocks of each, whose median counts")
    parser.add_argument("--backend", default="nccl", help="of the process group; gloo lets ranks share a GPU, and is not measured")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", os.environ["RANK"])) % torch.cuda.device_count())
    dist.init_process_group(options.backend)
    mesh = init_device_mesh("cuda", (dist.get_world_size(),), mesh_dim_names=("cp",))
    ends = {}
    for name in NAMES if options.backend == "nccl" else NAMES[1:]:
        use_transport(mesh, name)
        ends[name] = transport_along(mesh)
    rows = [measure(ends, megabytes << 20, options.rounds) for megabytes in options.megabytes]
    names = {name: names_of(end) for name, end in ends.items()}
    if dist.get_rank() == 0:
        print(torch.cuda.get_device_name(), f"{dist.get_world_size()} ranks, torch {torch.__version__}")
        print(f"{'MiB':>4} {'transport':<18}{'GiB/s':>8}{'beside':>8}{'slowed':>8}{'host us':>9}")
        for row in rows:
            for name, (idle, beside, slowed, host) in row["transports"].items():
                print(f"{row['bytes'] >> 20:>4} {name:<18}{idle:>8.1f}{beside:>8.1f}{slowed:>8.2f}{host:>9.1f}")
        for name, found in names.items():
            print(f"{name}: {', '.join(found)}")
        if options.json:
            options.json.write_text(json.dumps({"rows": rows, "names": names}))
    dist.destroy_process_group()


def exchange_of(end: Transport, count: int) -> Callable[[], object]:
    """Give the call that starts an exchange of `count` bytes around the ring; checked before."""
    rank, world = end.rank, end.world
    source, target = (rank - 1) % world, (rank + 1) % world
    mine, got = (torch.randint(0, 256, (count,), device="cuda", dtype=torch.uint8, generator=_seeded(r)) for r in (rank, source))
    wanted = got.clone()
    got.zero_()

    def start() -> object:
        return end.exchange([Message(target, mine)], [Message(source, got)])

    for _ in range(3):
        got.zero_()
        start().wait()
        if not torch.equal(got, wanted):
            raise SystemExit(f"{end.name}: rank {rank} got other bytes than rank {source} sent, and is not measured")
    return start


def _seeded(rank: int) -> torch.Generator:
    return torch.Generator("cuda").manual_seed(rank)


def measure(ends: dict[str, Transport], count: int, rounds: int) -> dict:
    """Idle and beside products in GiB/s, how much these are slowed, and host microseconds, by transport: of the slowest rank."""
    exchanges = {name: exchange_of(end, count) for name, end in ends.items()}
    matrix = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)

    def products() -> None:
        for _ in range(PRODUCTS):
            matrix @ matrix

    def beside(start: Callable[[], object]) -> None:
        pending = start()
        products()
        pending.wait()

    times: dict[str, list[list[float]]] = {name: [] for name in exchanges}
    for _ in range(rounds):
        for name, start in exchanges.items():
            idle, host = _block(lambda start=start: start().wait())
            both, _ = _block(lambda start=start: beside(start))
            alone, _ = _block(products)
            times[name].append([idle, both, alone, host])
    found = {}
    for name, blocks in times.items():
        medians = torch.tensor([statistics.median(each) for each in zip(*blocks, strict=True)], device="cuda")
        dist.all_reduce(medians, op=dist.ReduceOp.MAX)
        idle, both, alone, host = medians.tolist()
        gib = count / 2**30
        found[name] = (gib / idle * 1e3, gib / max(both, 1e-9) * 1e3, both / alone, host * 1e3)
    return {"bytes": count, "transports": found}


def _block(call: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds a call on the GPU, and of the host, over a block that all ranks begin together."""
    call()
    torch.cuda.synchronize()
    dist.barrier()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    begin = time.perf_counter()
    for _ in range(CALLS):
        call()
    host = (time.perf_counter() - begin) * 1e3 / CALLS
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / CALLS, host


def names_of(end: Transport) -> list[str]:
    """Collect the profiler's names of what one exchange of 4 MiB does on the GPU, with how often."""
    start = exchange_of(end, 4 << 20)
    torch.cuda.synchronize()
    dist.barrier()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        start().wait()
        torch.cuda.synchronize()
    on_gpu = [event for event in profiler.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [f"{event.key} x {event.count}" for event in on_gpu]


if __name__ == "__main__":
    main()
