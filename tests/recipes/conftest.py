"""What the tests of recipes share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from hookattn.testing import check_recipe, places


@pytest.fixture
def prove(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Check a module, and count of how many axes the places were looked at."""
    looked: list[None] = []
    check = places._check_tokens
    monkeypatch.setattr(places, "_check_tokens", lambda *about: looked.append(check(*about)))

    def run(module: nn.Module, *args: Any) -> int:
        looked.clear()
        check_recipe(module, *args)
        return len(looked)

    return run
