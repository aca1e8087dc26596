"""What several conditions are tested under."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch._inductor.compile_fx as inductor
from support.compiling import aot_writing_over
from torch._dynamo.utils import counters


@pytest.fixture
def nothing_compiled_yet() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.set_stance("default")
    torch.compiler.reset()


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor makes no kernels: graphs are traced, cut and kept as ever, and run as they are, over what they have used."""
    monkeypatch.setattr(inductor, "compile_fx", lambda graph, inputs, **_: aot_writing_over(graph, inputs))
