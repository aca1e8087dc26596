"""The small Vision Transformer of the demo: plain timm blocks behind a convolutional stem."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ...maps.attention_map import AttentionMap
from .scenes import SHAPES, SIZE

WEIGHTS = Path(__file__).with_name("weights.safetensors")


class ConvStem(nn.Module):
    """Patch embedding of the demo by strided 3 x 3 convolutions, which lets a small ViT learn from few images.

    Source: Xiao et al. 2021, "Early convolutions help transformers see better".
    """

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **_: Any) -> None:
        super().__init__()
        if patch_size != 8:
            raise ValueError(f"three strides of 2 make patches of 8 pixels, not {patch_size}")
        self.patch_size = (patch_size, patch_size)
        self.img_size = (img_size, img_size)
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        widths = [in_chans, embed_dim // 4, embed_dim // 2, embed_dim]
        layers: list[nn.Module] = []
        for width, wider in pairwise(widths):
            layers += [nn.Conv2d(width, wider, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(wider), nn.GELU()]
        self.convs = nn.Sequential(*layers, nn.Conv2d(embed_dim, embed_dim, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.convs(x)
        return y.flatten(2).transpose(1, 2)  # (batch, patches, embed_dim)


def build() -> VisionTransformer:
    """The demo's architecture, untrained: 96 pixels, 144 patches and a class token, 5 blocks of 4 heads, 0.64 M parameters."""
    return VisionTransformer(
        img_size=SIZE,
        patch_size=8,
        embed_dim=96,
        depth=5,
        num_heads=4,
        num_classes=len(SHAPES),
        embed_layer=ConvStem,
    )


def load() -> VisionTransformer:
    """The demo's model with the trained weights that lie in the package, in eval mode."""
    model = build()
    state = load_file(str(WEIGHTS))
    # the weights lie in the package as halves, for its size
    model.load_state_dict({name: value.to(model.state_dict()[name].dtype) for name, value in state.items()})
    return model.eval()


def to_input(images: npt.NDArray[np.uint8]) -> torch.Tensor:
    """Turn (batch, height, width, 3) uint8 pixels into what the model takes: (batch, 3, height, width) in -1 .. 1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def attention_on(m: AttentionMap, mask: npt.NDArray[np.bool_]) -> float:
    """Share of the class token's attention, mean of heads, that falls on the pixels of a mask (height, width)."""
    cover = torch.from_numpy(mask).float()[None, None]
    attention = m.image("cls")
    per_patch = F.adaptive_avg_pool2d(cover, m.tokens.grid_size)[0]  # share of each patch that the mask covers
    return float((attention * per_patch).sum())
