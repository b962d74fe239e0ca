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
