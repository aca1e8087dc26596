"""Modules by name are those that PyTorch names, in the same order."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from support.inside import walk
from support.models import tiny
from torch import nn

SHARED = nn.Linear(2, 2)


def circular() -> nn.Module:
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU()))
    model[1].outer = model
    return model  # type: ignore[no-any-return]


MODELS = {
    "timm": lambda: tiny("vit")[0],
    "windows": lambda: timm.create_model("swin_tiny_patch4_window7_224", embed_dim=12, num_heads=(1, 2, 3, 4)),
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 2),
    "shared": lambda: nn.Sequential(nn.Sequential(SHARED, nn.ReLU()), SHARED, nn.ModuleDict({"a": SHARED, "b": nn.ReLU()})),
    "a leaf": lambda: nn.ReLU(),
    "in a circle": circular,
}


@pytest.mark.parametrize("name", MODELS)
def test_modules_are_named_as_pytorch_names_them(name: str) -> None:
    model = MODELS[name]()
    model.register_module("nothing", None)
    model.a_tensor = torch.zeros(1)  # type: ignore[assignment]
    assert list(walk(model).items()) == list(model.named_modules())
