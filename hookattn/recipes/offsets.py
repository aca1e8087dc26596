"""A learned bias for the distance between query and key, without its sign (Graham et al. 2021, "LeViT", arXiv 2104.01136)."""

from __future__ import annotations

from typing import Any

from einops import rearrange
from torch import Tensor

from ..functional import QK
from .projections import scale_of
from .registry import recipe


@recipe("timm.models.levit.Attention")
def levit_attention(self: Any, x: Tensor) -> QK:
    qkv = rearrange(self.qkv(x), per_head(self), h=self.num_heads)
    q, k, _ = qkv.split([self.key_dim, self.key_dim, self.val_dim], dim=-1)
    return QK(q, k, scale=scale_of(self), bias=self.get_attention_biases(x.device))


@recipe("timm.models.levit.AttentionDownsample")
def levit_attention_downsample(self: Any, x: Tensor) -> QK:
    kv = rearrange(self.kv(x), per_head(self), h=self.num_heads)
    k, _ = kv.split([self.key_dim, self.val_dim], dim=-1)
    q = rearrange(self.q(x), per_head(self), h=self.num_heads)
    return QK(q, k, scale=scale_of(self), bias=self.get_attention_biases(x.device))


@recipe("timm.models.tiny_vit.Attention")
def tiny_vit_attention(self: Any, x: Tensor) -> QK:
    qkv = rearrange(self.qkv(self.norm(x)), "b n (h d) -> b h n d", h=self.num_heads)
    q, k, _ = qkv.split([self.key_dim, self.key_dim, self.val_dim], dim=-1)
    return QK(q, k, scale=scale_of(self), bias=self.get_attention_biases(x.device))


@recipe("timm.models.efficientformer.Attention")
def efficientformer_attention(self: Any, x: Tensor) -> QK:
    qkv = rearrange(self.qkv(x), "b n (h d) -> b h n d", h=self.num_heads)
    q, k, _ = qkv.split([self.key_dim, self.key_dim, self.val_dim], dim=-1)
    return QK(q, k, scale=scale_of(self), bias=self.get_attention_biases(x.device))


@recipe("timm.models.efficientformer_v2.Attention2dDownsample")
def efficientformer_v2_downsample(self: Any, x: Tensor) -> QK:
    q = rearrange(self.q(x), "b (h d) y x -> b h (y x) d", h=self.num_heads)
    k = rearrange(self.k(x), "b (h d) y x -> b h (y x) d", h=self.num_heads)
    return QK(q, k, scale=scale_of(self), bias=self.get_attention_biases(x.device))


def per_head(self: Any) -> str:
    """What makes (batch, heads, tokens, features) of a LeViT projection, on a grid or flat."""
    return "b (h d) y x -> b h (y x) d" if self.use_conv else "b n (h d) -> b h n d"
