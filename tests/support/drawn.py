"""Photos that are drawn here, encoded, as a source of images that keeps an account of what is read of it."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn

from hookattn.image import Photo
from support.inside import Images
from support.models import randomise


@cache
def draw(seed: int, height: int = 48, width: int = 64) -> bytes:
    """A PNG of coarse random patches."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8))
    file = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


class Drawn(Images):
    """So many photos, each with a name and a label.

    Args:
        count: how many.
        sizes: (height, width) of each in turn.
        broken: numbers of those that are no images.
        account: is told the number of each image that is read.
    """

    def __init__(
        self,
        count: int,
        sizes: Sequence[tuple[int, int]] = ((48, 64),),
        broken: Sequence[int] = (),
        account: Callable[[int], object] = lambda _: None,
    ) -> None:
        self.names = [f"photo {i:03d}.png" for i in range(count)]
        self.labels = ["even" if i % 2 == 0 else "odd" for i in range(count)]
        self._sizes, self._broken, self._account = sizes, broken, account

    def read(self, index: int) -> bytes:
        self._account(index)
        return b"no image" if index in self._broken else draw(index, *self._sizes[index % len(self._sizes)])


def shown(images: Drawn, index: int, model: nn.Module, **how: Any) -> torch.Tensor:
    """One of them, as a model is shown it: (1, channels, height, width)."""
    return Photo.open(Image.open(io.BytesIO(images.read(index))), model, **{"crop": "center", **how}).tensor[None]


def small_vit(**options: Any) -> nn.Module:
    """A randomised ViT with class token and registers, for photos of 64 x 64."""
    made = {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 0, **options}
    return randomise(timm.create_model("vit_tiny_patch16_224", **made)).eval()
