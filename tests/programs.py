"""Programs in processes of their own, in which PyTorch is imported and nothing of ours: forked from one that has done it for all.

    ended = programs.run("import dtensor_ring; print(dtensor_ring.__all__)")     # as subprocess.run([sys.executable, "-c", ...])

To import PyTorch takes seconds, and a dozen tests look at what importing the package does. A program that is about a process
without PyTorch begins with `WITHOUT_TORCH`, and ends that with `WITH_TORCH`.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from subprocess import CompletedProcess

ROOT = Path(__file__).parents[1]
# Modules that are imported again while these are away would not be the same, and PyTorch says so.
WITHOUT_TORCH = """
import sys
away = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in ("torch", "numpy")}
"""
WITH_TORCH = "sys.modules.update(away)\n"

_SERVER = """
import atexit, json, os, sys, traceback, types, warnings
import torch.distributed.tensor

def run(code, arguments, orig_argv, path, folder, environment, output, errors, strict):
    for name, number in ((output, 1), (errors, 2)):
        file = os.open(name, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    os.environ.update(environment)
    sys.path[:1], sys.argv, sys.orig_argv = path, arguments, orig_argv
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if strict:
        warnings.simplefilter("error")
    try:
        exec(compile(code, "<string>", "exec"), main.__dict__)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else bool(ended.code)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

for line in sys.stdin:
    child = os.fork()
    if not child:
        os.close(0)
        status = run(**json.loads(line))
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
_servers: list[subprocess.Popen[str]] = []


def run(
    code: str,
    arguments: Sequence[str] = ("-c",),
    *,
    orig_argv: Sequence[str] = ("python", "-c", ""),
    path: Sequence[str] = (str(ROOT),),
    folder: Path = ROOT,
    environment: dict[str, str] | None = None,
    strict: bool = False,
) -> CompletedProcess[str]:
    """What a program ends with and has printed; it finds modules in `path` first. With `strict` warnings are errors."""
    if not _servers:
        _servers.append(_started())
    server = _servers[0]
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as printed:
        output, errors = (Path(printed, name) for name in ("output", "errors"))
        request = {
            "code": code,
            "arguments": list(arguments),
            "orig_argv": list(orig_argv),
            "path": list(path),
            "folder": str(folder),
            "environment": environment or {},
            "output": str(output),
            "errors": str(errors),
            "strict": strict,
        }
        print(json.dumps(request), file=server.stdin, flush=True)
        status = server.stdout.readline()
        assert status, "the process that programs are forked from is gone"
        return CompletedProcess(code, int(status), output.read_text(), errors.read_text())


def check(code: str, *arguments, **options) -> str:
    """What a program has printed that ends well."""
    ended = run(code, *arguments, **options)
    assert ended.returncode == 0, f"exit status {ended.returncode}: {ended.stderr[-3000:]}"
    return ended.stdout


def _started() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    atexit.register(_end, server)
    return server


def _end(server: subprocess.Popen[str]) -> None:
    server.kill()
    server.communicate()
