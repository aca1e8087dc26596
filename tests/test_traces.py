"""Reading leaves nothing behind in a module, and what a module holds when it runs is what its map comes from."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from support.models import randomise
from support.oracle import unfused
from support.untouched import state_of
from torch import Tensor, nn

from hookattn import AttentionRecorder

SMALL: dict[str, tuple[dict[str, Any], int]] = {
    "levit_128s": ({"img_size": 128}, 128),
    "tiny_vit_5m_224": ({}, 64),
    "efficientvit_m0": ({"img_size": 128}, 128),
    "efficientformerv2_s0": ({"img_size": 64}, 64),
    "convit_tiny": ({"img_size": 64, "depth": 3, "local_up_to_layer": 2}, 64),
    "cpubone_nano": ({}, 128),
    "maxvit_rmlp_pico_rw_256": ({"img_size": 64}, 64),
    "swinv2_cr_tiny_224": (
        {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4]},
        64,
    ),
}

SMALL = {name: made for name, made in SMALL.items() if timm.is_model(name)}  # older timm has fewer


def small(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    arguments, size = SMALL[name]
    return randomise(timm.create_model(name, **arguments), 0.2), torch.randn(4, 3, size, size)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", SMALL)
def test_reading_leaves_no_trace(name: str, training: bool) -> None:
    model, x = small(name)
    model.train(training)
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    before = state_of(model)
    for m in rec.maps.values():
        assert m[...].shape == m.shape
    rec.maps[0].verify()
    assert state_of(model) == before


@pytest.mark.parametrize("name", ["levit_128s", "tiny_vit_5m_224", "efficientvit_m0", "efficientformerv2_s0"])
def test_where_a_model_uses_a_stale_cache_so_does_its_map(name: str) -> None:
    """After `load_state_dict` on a model that has run, timm still uses the biases it had looked up before."""
    model, x = small(name)
    model.eval()
    with torch.no_grad():
        model(x)
        for key, parameter in model.named_parameters():
            if key.endswith("attention_biases"):
                parameter.copy_(torch.randn_like(parameter))
        with AttentionRecorder(model) as rec, unfused(model) as maps:
            model(x)
    model.train()  # clears the cache
    model.eval()
    for m, expected in zip(rec.maps.values(), folded(maps, rec)):
        torch.testing.assert_close(m[...], expected, rtol=0, atol=1e-5)


def folded(maps: list[Tensor], rec: AttentionRecorder) -> list[Tensor]:
    """What each module's softmax put out; one with several heads in turn has put out as many."""
    found, left = [], list(maps)
    for m in rec.maps.values():
        calls = m.shape[1] if left[0].dim() == 3 else 1
        parts, left = left[:calls], left[calls:]
        found.append(torch.stack(parts, dim=1) if calls > 1 else parts[0].reshape(m.shape))
    return found


@pytest.mark.parametrize("name", ["maxvit_rmlp_pico_rw_256", "swinv2_cr_tiny_224"])
def test_dropout_inside_a_bias_is_the_dropout_of_the_call(name: str) -> None:
    model, x = small(name)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    with AttentionRecorder(model) as rec, unfused(model) as maps, torch.no_grad():
        model(x)
    torch.rand(7)
    for m, expected in zip(rec.maps.values(), maps):
        torch.testing.assert_close(m[...], expected, rtol=0, atol=1e-5)


def test_a_buffer_that_a_forward_replaces_is_the_one_of_the_call() -> None:
    """ConViT replaces its relative indices when the number of tokens changes, in the first forward too."""
    model, x = small("convit_tiny")
    model.eval()
    with torch.no_grad(), AttentionRecorder(model) as rec, unfused(model) as maps:
        model(x)
    m = rec.maps[0]
    expected = torch.stack(maps[:2], dim=2).flatten(1, 2)
    torch.testing.assert_close(m[...], expected, rtol=0, atol=1e-5)
    assert m.verify() < 1e-5
