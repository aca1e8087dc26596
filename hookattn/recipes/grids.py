"""Scaled dot products of tokens that stay on their grid: (batch, channels, height, width), or channels last."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..functional import QK
from .plain import additive_or_bool
from .projections import project, scale_of
from .registry import recipe


@recipe("timm.models.volo.Attention")
def volo_attention(self: Any, x: Tensor) -> QK:
    q, k = project(self.qkv, x, "b y x (parts h d) -> parts b h (y x) d", parts=2, of=3, h=self.num_heads)
    return QK(q, k, scale=scale_of(self))


@recipe("timm.models.fastvit.Attention")
def fastvit_attention(self: Any, x: Tensor) -> QK:
    x = rearrange(x, "b c y x -> b (y x) c")
    q, k = project(self.qkv, x, "b n (parts h d) -> parts b h n d", parts=2, of=3, h=self.num_heads)
    return QK(q, k, scale=scale_of(self))


@recipe("timm.models.visformer.Attention")
def visformer_attention(self: Any, x: Tensor) -> QK:
    q, k = project(self.qkv, x, "b (parts h d) y x -> parts b h (y x) d", parts=2, of=3, h=self.num_heads)
    return QK(q, k, scale=scale_of(self))


@recipe("timm.layers.attention2d.Attention2d")
def attention_2d(self: Any, x: Tensor, attn_mask: Tensor | None = None) -> QK:
    packed = "(h parts d)" if self.head_first else "(parts h d)"
    q, k = project(self.qkv, x, f"b {packed} y x -> parts b h (y x) d", parts=2, of=3, h=self.num_heads)
    return QK(q, k, **additive_or_bool(attn_mask))


@recipe("timm.models.iformer.SHMA", form="b q k")
def single_head_modulation_attention(self: Any, x: Tensor) -> QK:
    """One head, in windows where `window_size` says so; keys that only pad the image to whole windows are attended to."""
    if self.window_size and self.window_size > 0:
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % self.window_size, 0, -height % self.window_size))
        x = rearrange(x, "b c (row y) (col x) -> (b row col) c y x", y=self.window_size, x=self.window_size)
    if self.training:
        self.v_gate(x)  # comes first in the forward, and draws its random numbers first
    q, k = rearrange(self.q(x), "b d y x -> b 1 (y x) d"), rearrange(self.k(x), "b d y x -> b 1 (y x) d")
    return QK(q, k, scale=scale_of(self))


@recipe("timm.models.shvit.SHSA", form="b q k")
def single_head_self_attention(self: Any, x: Tensor) -> QK:
    """One head that sees the first `pdim` channels only."""
    qkv = rearrange(self.qkv(self.pre_norm(x[:, : self.pdim])), "b d y x -> b 1 (y x) d")
    q, k, _ = qkv.split([self.qk_dim, self.qk_dim, self.pdim], dim=-1)
    return QK(q, k, scale=scale_of(self))
