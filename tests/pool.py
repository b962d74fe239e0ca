"""Real processes with a gloo group, started once a session and world size: a call on a live pool takes milliseconds.

    pools.run(4, check, "zigzag", 13)      # calls check("zigzag", 13) on four ranks; the first failure is raised here

`check` is a module-level function of a test module; ranks find each other through `torch.distributed` as in a real program.
A rank that does not answer in time is named, and the pool is started afresh for the next test.

Ranks are forked from a server that has imported what the session has: PyTorch, test modules and the models they use are loaded once
for all ranks of all pools, and a pool starts in a fraction of a second.
"""

from __future__ import annotations

import importlib
import multiprocessing as mp
import os
import socket
import sys
import time
import traceback
import warnings
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from unittest.mock import patch

import quiet_imports
import torch
import torch.distributed as dist

# Groups that tests have made in a pool's ranks before new ranks take their place. Each has a thread that wakes up a hundred times a
# second, and groups cannot be ended: DTensor keeps meshes, and takes an equal one for the one that it knows.
_MOST_LOOPS = 16
_context = mp.get_context("forkserver")
# Else each rank that compiles starts processes of its own, which import PyTorch again.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Else Inductor compiles six programs to find out which vectors the machine has.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")
# Imported by ranks when they first need it, each for itself, unless the server has it already.
FAMILIES = ("mistral", "qwen2", "qwen3_moe", "mixtral", "gemma2", "gemma3", "gpt_oss", "phi3")
LATER = {
    "models": [f"transformers.models.{name}.modeling_{name}" for name in ("llama", "qwen3")],
    "test_families": [f"transformers.models.{name}.modeling_{name}" for name in FAMILIES],
    "accelerate_ranks": ["datasets"],  # which Accelerate and trainers import where it is there
    "trainers": ["datasets"],
    "torch._dynamo": ["torch._dynamo.testing", "torch._functorch.aot_autograd"],
}


def _start_server() -> None:
    """Start the server that ranks are forked from, with the modules that this session has loaded.

    Where there are GPUs it has PyTorch alone: what is forked from a process that has asked for them cannot use them, and models and
    tests ask when they are imported.
    """
    modules = ["quiet_imports", "torch.distributed.tensor"]
    if not torch.cuda.is_available():
        files = {name: getattr(module, "__file__", None) or "/" for name, module in list(sys.modules.items()) if name != "__main__"}
        modules += ["dtensor_ring", *(name for name, file in files.items() if Path(file).parent == Path(__file__).parent)]
        modules += [name for module, names in LATER.items() if module in sys.modules for name in names]
    _context.set_forkserver_preload(modules)
    # The server does not take the path over by itself; and where threads of OpenMP ran, what is forked would wait for them.
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS="1"):
        forkserver.ensure_running()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _calm_gloo() -> int:
    """Let gloo's threads that send and receive run after those that they wait for, on Linux; says how many there are.

    Woken up by every message, such a thread interrupts the one that holds its lock, and asks for its sockets again and again until
    that goes on: a third of the CPU time of tests over ranks. `conftest` takes the interrupting away; this is for what is left.
    """
    count = 0
    for task in Path("/proc/self/task").glob("*"):
        with suppress(OSError):
            if (task / "comm").read_text() == "gloo_tcp_loop\n":
                os.setpriority(os.PRIO_PROCESS, int(task.name), 10)
                count += 1
    return count


def _work(rank: int, world: int, port: int, device: str, paths: list[str], line: Connection) -> None:
    """A rank: the environment that torchrun gives it, a process group unless `device` is "", then one call after the other."""
    sys.path[:0] = [path for path in paths if path not in sys.path]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    quiet_imports.done()
    warnings.simplefilter("error")
    warnings.filterwarnings(
        "ignore", category=DeprecationWarning, module="torch|flash_attn|cutlass|quack|nvidia_cutlass_dsl|tvm_ffi"
    )
    warnings.filterwarnings("ignore", message="Argument aux_data", category=UserWarning)  # of flash-attn-4's compiler
    warnings.filterwarnings("ignore", message="attention on this packed batch")  # small packings are not balanced
    if device:  # two ranks may make PyTorch's directory of compiled kernels at once, and one of them warns that it could not
        warnings.filterwarnings("ignore", message="Specified kernel cache directory could not be created")
    if device == "cuda":
        warnings.filterwarnings("ignore", message="Attempting to run cuBLAS")  # PyTorch's autograd threads, the first time
        torch.cuda.set_device(rank)
        dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    elif device == "shared cuda":  # all ranks on one GPU, which NCCL refuses
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
        warnings.filterwarnings("ignore", message="Attempting to run cuBLAS")
        torch.cuda.set_device(0)
        dist.init_process_group("gloo")
    elif device:
        dist.init_process_group("gloo")
    line.send(("ok", None, 0))
    while True:
        module, name, args = line.recv()
        torch.manual_seed(0)
        loops = _calm_gloo()
        try:
            line.send(("ok", getattr(importlib.import_module(module), name)(*args), loops))
        except BaseException as failure:
            line.send((f"{type(failure).__name__}: {failure}", traceback.format_exc(), loops))


class Pool:
    """Ranks of one world size; on `device` "" they have no process group, as a program that torchrun has just started."""

    def __init__(self, world: int, device: str = "cpu") -> None:
        self.world, self.is_worn = world, False
        port = free_port()
        self._lines, self._processes = [], []
        _start_server()
        for rank in range(world):
            here, there = _context.Pipe()
            process = _context.Process(target=_work, args=(rank, world, port, device, list(sys.path), there), daemon=True)
            process.start()
            self._lines.append(here)
            self._processes.append(process)
        self._collect(120)

    def run(self, check, *args, timeout: float = 120, lost: frozenset[int] = frozenset()):
        """The ranks' answers; ranks in `lost` are expected to die, and answer None."""
        for line in self._lines:
            line.send((check.__module__, check.__qualname__, args))
        return self._collect(timeout, lost)

    def _collect(self, timeout: float, lost: frozenset[int] = frozenset()):
        answers, until = {}, time.monotonic() + timeout
        while len(answers) < self.world:
            ready = wait([line for rank, line in enumerate(self._lines) if rank not in answers], max(0.0, until - time.monotonic()))
            if not ready:
                silent = [rank for rank in range(self.world) if rank not in answers]
                failed = {rank: f"{text}\n{trace}" for rank, (text, trace, _) in answers.items() if text != "ok"}
                self.close()
                if failed:
                    rank, text = next(iter(failed.items()))
                    raise AssertionError(f"rank {rank} of {self.world} failed, ranks {silent} wait for it: {text}")
                raise TimeoutError(f"ranks {silent} of {self.world} did not answer within {timeout:.0f} s")
            for line in ready:
                rank = self._lines.index(line)
                try:
                    answers[rank] = line.recv()
                except EOFError:
                    if rank in lost:
                        answers[rank] = ("ok", None, 0)
                        continue
                    self.close()
                    raise RuntimeError(f"rank {rank} of {self.world} died") from None
                if answers[rank][0] != "ok":
                    until = min(until, time.monotonic() + 5)
        self.is_worn = max(loops for *_, loops in answers.values()) > _MOST_LOOPS
        failures = {rank: answer for rank, answer in sorted(answers.items()) if answer[0] != "ok"}
        if failures:
            rank, (text, trace, _) = next(iter(failures.items()))
            raise AssertionError(f"ranks {list(failures)} of {self.world} failed, rank {rank} with {text}\n{trace}")
        return [answers[rank][1] for rank in range(self.world)]

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(5)


class Pools:
    def __init__(self) -> None:
        self._pools: dict[tuple[int, str], Pool] = {}

    def run(self, world: int, check, *args, device: str = "cpu", timeout: float = 120, lost: frozenset[int] = frozenset()):
        pool = self._pools.get((world, device))
        if pool is not None and pool.is_worn:
            pool.close()
        if pool is None or pool.is_worn or not pool.alive:
            pool = self._pools[world, device] = Pool(world, device)
        return pool.run(check, *args, timeout=timeout, lost=lost)

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
