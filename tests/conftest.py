from __future__ import annotations

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


def pytest_runtest_setup(item):
    """Tests on GPUs need one device, or two where ranks are processes."""
    if item.get_closest_marker("gpu"):
        needed = 2 if "pools" in item.fixturenames else 1
        if torch.cuda.device_count() < needed:
            pytest.skip(f"needs {needed} CUDA device{'s' * (needed > 1)}, found {torch.cuda.device_count()}")
