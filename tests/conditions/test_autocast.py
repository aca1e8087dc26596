"""Autocast, grad mode, inference mode: a map is that of the modes of its forward, in whatever mode it is read."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from support.models import some, tiny
from support.reading import read, same
from torch import Tensor

from hookattn import AttentionRecorder

MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no autocast": lambda: torch.autocast("cpu", enabled=False),
}


@pytest.mark.parametrize("forward", MODES)
@pytest.mark.parametrize("name", ["vit", "eva_split", "beit", "levit"])
def test_a_map_is_the_same_in_whatever_mode_it_is_read(name: str, forward: str) -> None:
    model, x = some(name)
    with AttentionRecorder(model) as rec, MODES[forward]():
        model(x)
        inside = read(rec)
    for reading in MODES:
        with MODES[reading]():
            assert same(read(rec), inside), reading
            assert all(m.dtype == torch.float32 for m in rec.maps.values())
            rec.verify()
    assert same(read(rec), inside)


@pytest.mark.parametrize("name", ["vit", "levit"])
def test_autocast_makes_a_difference_to_a_map(name: str) -> None:
    """Or the test above would prove nothing of it."""
    model, x = some(name)
    with AttentionRecorder(model, passes="all") as rec, torch.no_grad():
        model(x)
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
    full, half = rec.passes
    assert 1e-5 < (full[0][...] - half[0][...]).abs().max() < 0.1


@pytest.mark.parametrize("reading", MODES)
def test_a_map_recorded_with_grad_stays_in_the_graph_in_whatever_mode_it_is_read(reading: str) -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model, detach=False, passes="all") as rec:
        model(x)
        with torch.no_grad():
            model(x)
    with_grad, without = rec.passes
    with MODES[reading]():
        assert without[0][...].requires_grad is False
        if reading != "inference":
            assert with_grad[0][...].requires_grad is True


@pytest.mark.parametrize("name", ["vit", "eva_split", "beit", "relpos"])
def test_outputs_and_gradients_under_autocast_are_bit_identical(name: str) -> None:
    """The recorder computes maps in between; what autocast remembers of that must not reach the model."""
    model, x = tiny(name)
    results = []
    for recorded in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            if recorded:
                with AttentionRecorder(model, keep="maps"):
                    output = model(x)
            else:
                output = model(x)
        results.append([output, *torch.autograd.grad(output.float().square().sum(), list(model.parameters()))])
    assert all(type(t) is Tensor for t in results[1])
    assert all(map(torch.equal, *results))
