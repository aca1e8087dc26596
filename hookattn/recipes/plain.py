"""Scaled dot products of one packed projection, with or without query and key norms and a mask."""

from __future__ import annotations

from typing import Any, TypedDict

from einops import rearrange
from torch import Tensor

from ..functional import QK
from .projections import project, scale_of
from .registry import recipe


@recipe("timm.layers.attention.Attention", "timm.models.vision_transformer.Attention")
def attention(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> QK:
    q, k = project(self.qkv, x, "b n (parts h d) -> parts b h n d", parts=2, of=3, h=self.num_heads)
    q, k = self.q_norm(q), self.k_norm(k)
    return QK(q, k, scale=scale_of(self), is_causal=is_causal, **additive_or_bool(attn_mask))


@recipe("timm.models.vision_transformer.ParallelScalingBlock")
def parallel_scaling_block(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> QK:
    q, k = in_projection(self, x)
    q = self.q_norm(rearrange(q, "b n (h d) -> b n h d", h=self.num_heads))
    k = self.k_norm(rearrange(k, "b n (h d) -> b n h d", h=self.num_heads))
    q, k = rearrange(q, "b n h d -> b h n d"), rearrange(k, "b n h d -> b h n d")
    return QK(q, k, scale=scale_of(self), is_causal=is_causal, **additive_or_bool(attn_mask))


@recipe("timm.models.metaformer.Attention", "timm.models.convit.MHSA")
def packed_attention(self: Any, x: Tensor) -> QK:
    q, k = project(self.qkv, x, "b n (parts h d) -> parts b h n d", parts=2, of=3, h=self.num_heads)
    return QK(q, k, scale=scale_of(self))


@recipe("timm.models.tnt.Attention")
def tnt_attention(self: Any, x: Tensor) -> QK:
    q, k = project(self.qk, x, "b n (parts h d) -> parts b h n d", parts=2, of=2, h=self.num_heads)
    return QK(q, k, scale=scale_of(self))


def in_projection(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys, (batch, tokens, dim) each, of the projection a parallel block shares with its MLP."""
    y = self.in_proj(self.in_norm(x))
    _, q, k, _ = y.split(self.in_split, dim=-1)
    return q, k


class Masked(TypedDict, total=False):
    """What a mask is to a `QK`."""

    bias: Tensor
    mask: Tensor | None


def additive_or_bool(attn_mask: Tensor | None) -> Masked:
    """What SDPA calls `attn_mask`: a bool tensor masks, a float tensor is added."""
    if attn_mask is not None and attn_mask.dtype.is_floating_point:
        return {"bias": attn_mask}
    return {"mask": attn_mask}
