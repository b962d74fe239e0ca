from __future__ import annotations

import laws
import pytest
import torch
from hypothesis import settings
from pool import Pools

torch.set_num_threads(1)
settings.register_profile("default", deadline=None, max_examples=150)
settings.load_profile("default")


@pytest.fixture(scope="session")
def pools():
    live = Pools()
    yield live
    live.close()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """What was collected, before markers and words take tests away, for the record of laws."""
    config.stash[laws.COLLECTED] = laws.count(items)


def pytest_runtest_setup(item):
    """Tests on GPUs need one device, or two where ranks are processes."""
    if item.get_closest_marker("gpu"):
        needed = 2 if "pools" in item.fixturenames else 1
        if torch.cuda.device_count() < needed:
            pytest.skip(f"needs {needed} CUDA device{'s' * (needed > 1)}, found {torch.cuda.device_count()}")
