"""A model and images that need nothing but torch: a process that is started anew has them in half the time that timm takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset


class Plain(nn.Module):
    """A ViT of two layers for images of 64 x 64, the same one each time."""

    def __init__(self, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            self.patch_embed = nn.Conv2d(3, width, 16, 16)
            self.cls_token = nn.Parameter(torch.randn(1, 1, width))
            self.layers = nn.ModuleList([nn.MultiheadAttention(width, heads, batch_first=True) for _ in range(2)])
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        for layer in self.layers:
            x = x + layer(x, x, x, need_weights=False)[0]
        return x


class Noise(Dataset[Any]):
    """So many images of noise, with labels.

    Args:
        count: how many.
        broken: numbers of those that cannot be read.
        account: is told the number of each image that is read.
    """

    def __init__(self, count: int, broken: Sequence[int] = (), account: Callable[[int], object] = lambda _: None) -> None:
        self._count, self._broken, self._account = count, broken, account

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        self._account(index)
        if index in self._broken:
            raise OSError(f"image {index} is broken")
        return torch.randn(3, 64, 64, generator=torch.Generator("cpu").manual_seed(index)), ("even", "odd")[index % 2]
