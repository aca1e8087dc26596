"""Scaled dot products of one packed projection, with or without query and key norms and a mask."""

from __future__ import annotations

from typing import Any

from einops import rearrange
from torch import Tensor

from ..functional import QK
from .projections import project
from .registry import recipe


@recipe("timm.layers.attention.Attention", "timm.models.vision_transformer.Attention")
def attention(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> QK:
    q, k = project(self.qkv, x, "b n (parts h d) -> parts b h n d", parts=2, of=3, h=self.num_heads)
    q, k = self.q_norm(q), self.k_norm(k)
    return QK(q, k, scale=self.scale, is_causal=is_causal, **additive_or_bool(attn_mask))


@recipe("timm.models.vision_transformer.ParallelScalingBlock")
def parallel_scaling_block(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> QK:
    q, k = in_projection(self, x)
    q = self.q_norm(rearrange(q, "b n (h d) -> b n h d", h=self.num_heads))
    k = self.k_norm(rearrange(k, "b n (h d) -> b n h d", h=self.num_heads))
    q, k = rearrange(q, "b n h d -> b h n d"), rearrange(k, "b n h d -> b h n d")
    return QK(q, k, scale=self.scale, is_causal=is_causal, **additive_or_bool(attn_mask))


@recipe("timm.models.vision_transformer.DiffParallelScalingBlock")
def diff_parallel_scaling_block(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> QK:
    q, k = in_projection(self, x)
    return differential(self, q, k, attn_mask, is_causal)


@recipe("timm.layers.diff_attention.DiffAttention")
def diff_attention(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> QK:
    q, k = project(self.qkv, x, "b n (parts c) -> parts b n c", parts=2, of=3)
    return differential(self, q, k, attn_mask, is_causal)


def differential(self: Any, q: Tensor, k: Tensor, attn_mask: Tensor | None, is_causal: bool) -> QK:
    """Two softmaxes a head, (2h, 2h + 1) of 2 * num_heads, whose difference acts on the values (arXiv 2410.05258)."""
    q = rearrange(q, "b n (h d) -> b h n d", h=2 * self.num_heads)
    k = rearrange(k, "b n (h d) -> b h n d", h=2 * self.num_heads)
    q, k = self.q_norm(q), self.k_norm(k)
    return QK(q, k, scale=self.scale, is_causal=is_causal, **additive_or_bool(attn_mask))


def in_projection(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys, (batch, tokens, dim) each, of the projection a parallel block shares with its MLP."""
    y = self.in_proj(self.in_norm(x))
    _, q, k, _ = y.split(self.in_split, dim=-1)
    return q, k


def additive_or_bool(attn_mask: Tensor | None) -> dict[str, Tensor | None]:
    """What SDPA calls `attn_mask`: a bool tensor masks, a float tensor is added."""
    if attn_mask is not None and attn_mask.dtype.is_floating_point:
        return {"bias": attn_mask}
    return {"mask": attn_mask}
