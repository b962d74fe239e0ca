from __future__ import annotations

import quiet_imports  # first: it is about what the others import

# isort: split
import os
from contextlib import suppress

import laws
import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of programs that tests start
settings.register_profile("quick", deadline=None, max_examples=50)
settings.register_profile("thorough", deadline=None, max_examples=150)


def pytest_configure(config):
    """Properties are tried on three times the examples where slow tests run too.

    Threads, also those of processes that this one starts, do not interrupt each other when they are woken up: see `pool`.
    """
    if not hasattr(config.option, "dist") or config.option.dist == "no" or hasattr(config, "workerinput"):
        import torch  # not in the process that deals tests out to others

        torch.set_num_threads(1)
    with suppress(AttributeError, OSError):  # Linux has it
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    settings.load_profile("quick" if "not slow" in config.option.markexpr else "thorough")


@pytest.fixture(scope="session")
def pools():
    from pool import Pools

    live = Pools()
    yield live
    live.close()


def pytest_collection_finish():
    quiet_imports.done()


def pytest_unconfigure():
    quiet_imports.ended()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """What was collected, before markers and words take tests away, for the record of laws."""
    config.stash[laws.COLLECTED] = laws.count(items)


def pytest_runtest_setup(item):
    """Tests on GPUs need one device, or two where ranks are processes."""
    marker = item.get_closest_marker("gpu")
    if marker:
        import torch

        needed = marker.kwargs.get("devices", 2 if "pools" in item.fixturenames else 1)
        if torch.cuda.device_count() < needed:
            pytest.skip(f"needs {needed} CUDA device{'s' * (needed > 1)}, found {torch.cuda.device_count()}")
