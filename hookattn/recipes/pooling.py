"""One query, or a few, that gather from all tokens: class attention and attention pooling.

Touvron et al. 2021, "Going deeper with Image Transformers", arXiv 2103.17239.
"""

from __future__ import annotations

from typing import Any

from einops import rearrange
from torch import Tensor

from ..functional import QK
from .plain import additive_or_bool
from .projections import project, project_heads, scale_of
from .registry import recipe


@recipe("timm.models.cait.ClassAttn")
def class_attention(self: Any, x: Tensor) -> QK:
    q = rearrange(self.q(x[:, 0]), "b (h d) -> b h 1 d", h=self.num_heads)
    k = project_heads(self.k, x, self.num_heads)
    return QK(q, k, scale=scale_of(self))


@recipe("timm.models.crossvit.CrossAttention")
def crossvit_attention(self: Any, x: Tensor) -> QK:
    q, k = project_heads(self.wq, x[:, 0:1], self.num_heads), project_heads(self.wk, x, self.num_heads)
    return QK(q, k, scale=scale_of(self))


@recipe("timm.models.volo.ClassAttention")
def volo_class_attention(self: Any, x: Tensor) -> QK:
    (k,) = project(self.kv, x, "b n (parts h d) -> parts b h n d", parts=1, of=2, h=self.num_heads)
    q = project_heads(self.q, x[:, :1], self.num_heads)
    return QK(q, k, scale=scale_of(self))


@recipe("timm.layers.attention_pool.AttentionPoolLatent")
def attention_pool_latent(self: Any, x: Tensor, attn_mask: Tensor | None = None) -> QK:
    if self.pos_embed is not None:
        x = x + self.pos_embed.unsqueeze(0).to(x.dtype)
    q = rearrange(self.q(self.latent.expand(len(x), -1, -1)), "b n (h d) -> b h n d", h=self.num_heads)
    (k,) = project(self.kv, x, "b n (parts h d) -> parts b h n d", parts=1, of=2, h=self.num_heads)
    return QK(self.q_norm(q), self.k_norm(k), scale=scale_of(self), **additive_or_bool(attn_mask))


@recipe("timm.layers.attention_pool.AttentionPoolPrr")
def attention_pool_prr(self: Any, x: Tensor) -> QK:
    """Tokens are their own queries and keys."""
    q = k = rearrange(self.pre_norm(x), "b n (h d) -> b h n d", h=self.num_heads)
    return QK(q, k, scale=scale_of(self))
