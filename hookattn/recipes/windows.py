"""Attention inside windows of the image, with or without a learned bias for the offset between query and key.

Liu et al. 2021, "Swin Transformer", arXiv 2103.14030, equation 4; Tu et al. 2022, "MaxViT", arXiv 2204.01697. Windows count as
images to whoever reads the map: (images * windows, heads, queries, keys), the windows of an image one after the other.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from ..functional import QK
from .projections import project, scale_of
from .registry import recipe


@recipe("timm.models.swin_transformer.WindowAttention")
def swin_attention(self: Any, x: Tensor, mask: Tensor | None = None) -> QK:
    q, k = project(self.qkv, x, "b n (parts h d) -> parts b h n d", parts=2, of=3, h=self.num_heads)
    return QK(q, k, scale=scale_of(self), bias=(self._get_rel_pos_bias(), *per_window(mask, len(x))))


@recipe("timm.models.davit.WindowAttention")
def davit_window_attention(self: Any, x: Tensor) -> QK:
    q, k = project(self.qkv, x, "b n (parts h d) -> parts b h n d", parts=2, of=3, h=self.num_heads)
    return QK(q, k, scale=scale_of(self))


@recipe("timm.models.nest.Attention", form="b h w q k")
def nest_attention(self: Any, x: Tensor) -> QK:
    q, k = project(self.qkv, x, "b w n (parts h d) -> parts (b w) h n d", parts=2, of=3, h=self.num_heads)
    return QK(q, k, scale=scale_of(self))


@recipe("timm.models.twins.LocallyGroupedAttn", form="b w h q k")
def locally_grouped_attention(self: Any, x: Tensor, size: tuple[int, int]) -> QK:
    """Keys that only pad the image to whole windows are attended to, as in the module."""
    height, width = size
    x = rearrange(x, "b (y x) c -> b y x c", y=height, x=width)
    x = F.pad(x, (0, 0, 0, -width % self.ws, 0, -height % self.ws))
    x = rearrange(x, "b (row y) (col x) c -> b row col y x c", y=self.ws, x=self.ws)
    pattern = "b row col y x (parts h d) -> parts (b row col) h (y x) d"
    q, k = project(self.qkv, x, pattern, parts=2, of=3, h=self.num_heads)
    return QK(q, k, scale=scale_of(self))


@recipe("timm.models.maxxvit.AttentionCl")
def maxxvit_attention_cl(self: Any, x: Tensor, shared_rel_pos: Tensor | None = None) -> QK:
    packed = "(h parts d)" if self.head_first else "(parts h d)"
    q, k = project(self.qkv, x, f"b ... {packed} -> parts b h (...) d", parts=2, of=3, h=self.num_heads)
    bias = shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias()
    return QK(q, k, scale=scale_of(self), bias=bias)


@recipe("timm.models.maxxvit.Attention2d")
def maxxvit_attention_2d(self: Any, x: Tensor, shared_rel_pos: Tensor | None = None) -> QK:
    packed = "(h parts d)" if self.head_first else "(parts h d)"
    q, k = project(self.qkv, x, f"b {packed} y x -> parts b h (y x) d", parts=2, of=3, h=self.num_heads)
    bias = shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias()
    return QK(q, k, scale=scale_of(self), bias=bias)


def per_window(mask: Tensor | None, batch: int) -> tuple[Tensor, ...]:
    """The additive mask of shifted windows, (windows, queries, keys), for the windows of every image; nothing for None.

    Returns:
        (batch, 1, queries, keys), where batch is images * windows.
    """
    if mask is None:
        return ()
    return (repeat(mask, "w q k -> (b w) 1 q k", b=batch // len(mask)),)
