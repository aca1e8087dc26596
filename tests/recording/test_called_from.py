"""Who called an attention module, and what x is."""

from __future__ import annotations

import linecache
from typing import Any

import pytest
import torch
from support.models import tiny
from timm.layers import Attention
from torch import nn

from hookattn import AttentionRecorder, RecorderError


def test_called_from_tells_the_line_and_what_x_is() -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model, called_from=True) as rec, torch.no_grad():
        model(x)
    site = rec.maps["blocks.1.attn"].called_from
    assert site.file.endswith("vision_transformer.py")
    assert site.function.endswith("forward")
    assert "self.attn(" in site.code
    assert linecache.getline(site.file, site.line).strip() == site.code
    assert site.x == "what blocks.1.norm1 made of the output of blocks.0"
    assert f"{site.file}:{site.line}" in str(site)
    assert site.code in str(site)


def test_called_from_tells_a_call_by_hand_from_one_of_the_models() -> None:
    model: Any = tiny("vit")[0]
    y = torch.randn(1, 17, 48)
    with AttentionRecorder(model, called_from=True) as rec, torch.no_grad():
        model.blocks[0].attn(y)
        model.blocks[1].attn(model.blocks[1].norm1(y))
    first, second = (m.called_from for m in rec.maps.values())
    assert first.file == second.file == __file__
    assert first.code == "model.blocks[0].attn(y)"
    assert "between modules" in first.x
    assert second.line == first.line + 1
    assert second.x == "what blocks.1.norm1 put out"


def test_called_from_names_the_innermost_module_that_made_x() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(48, 48), nn.Identity()), Attention(48, num_heads=3))
    with AttentionRecorder(model, called_from=True) as rec, torch.no_grad():
        model(torch.randn(1, 5, 48))
    site = rec.maps[0].called_from
    assert site.x == "what 0.0 put out"
    assert site.code == "model(torch.randn(1, 5, 48))"


@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_called_from_is_refused_where_it_was_not_asked_for(keep: Any) -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model, keep=keep) as rec, torch.no_grad():
        model(x)
    with pytest.raises(RecorderError, match="called_from=True"):
        rec.maps[0].called_from  # noqa: B018
