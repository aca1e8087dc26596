"""Attention of all tokens to all tokens in float32 and bfloat16, against the module's own unfused softmax."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.inside import call_of, find_recipe, formed_by, replay_of
from support.models import ANY_DTYPE, TINY, tiny
from support.oracle import unfused
from support.reading import record
from torch import Tensor, nn

from hookattn import AttentionRecorder


@pytest.mark.parametrize("name", TINY)
def test_recipe_is_replay_is_the_unfused_softmax_in_float32(name: str) -> None:
    model, x = tiny(name)
    maps = record(model, x).maps[:]
    assert len(maps) == sum(find_recipe(module) is not None for module in model.modules()) > 0
    for m in maps:
        torch.testing.assert_close(m[...], formed_by(m), rtol=0, atol=2e-6)
        torch.testing.assert_close(m[...], replay_of(m), rtol=0, atol=1e-6)
        torch.testing.assert_close(m[...].sum(-1), torch.ones(m.shape[:3]), rtol=0, atol=1e-6)
        assert m.shape == m[...].shape
        assert m.dtype == m[...].dtype == torch.float32


@pytest.mark.parametrize("name", ANY_DTYPE)
def test_in_bfloat16_maps_are_nearer_to_float64_than_the_unfused_path(name: str) -> None:
    model, x = tiny(name)
    half = copy.deepcopy(model).bfloat16()
    with AttentionRecorder(half) as rec, torch.no_grad():
        half(x.bfloat16())
    for m in rec.maps.values():
        module, *given = call_of(m)
        exact = call_softmaxes(copy.deepcopy(module).double(), *as_double(tuple(given)))
        eager = call_softmaxes(module, *given)
        assert m.dtype == torch.float32
        assert rms(m[...] - exact) <= rms(eager - exact)  # the largest error is that of q and k themselves, in both


@torch.no_grad()
def call_softmaxes(module: nn.Module, args: Any, kwargs: Any) -> Tensor:
    with unfused(module) as maps:
        module(*args, **kwargs)
    return maps[0].double()


def as_double(value: Any) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, value)


def rms(difference: Tensor) -> float:
    return float(difference.pow(2).mean().sqrt())
