"""Record a forward and read its maps, as most tests begin."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hookattn import AttentionRecorder

NAMES = ["blocks.0.attn", "blocks.1.attn"]  # of a tiny ViT


def record(model: nn.Module, x: Any, **options: Any) -> AttentionRecorder:
    """A recorder that has seen one forward without a graph."""
    with AttentionRecorder(model, **options) as rec, torch.no_grad():
        model(x)
    return rec


def read(recorded: AttentionRecorder) -> dict[str, Tensor]:
    """All maps of the last forward."""
    return {name: m[...] for name, m in recorded.maps.items()}


def maps_of(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The maps of one plain forward."""
    return read(record(model, images))


def same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Whether the same modules have the same maps, bit by bit, in the same order."""
    return list(got) == list(expected) and all(torch.equal(got[name], expected[name]) for name in got)
