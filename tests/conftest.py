from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)  # there are as many workers as cores


@pytest.fixture(autouse=True)
def _a_seed() -> None:
    torch.manual_seed(0)
