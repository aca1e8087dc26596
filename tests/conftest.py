from __future__ import annotations

import gc

import pytest
import torch
from support.hub import client as client  # which tests of any room ask, with a `hub` and a `folder` of their own

torch.set_num_threads(1)  # there are as many workers as cores


def pytest_collection_finish() -> None:
    """What has been imported stays: the garbage collector need not go through it each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _a_seed() -> None:
    torch.manual_seed(0)
