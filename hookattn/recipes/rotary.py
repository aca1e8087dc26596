"""Queries and keys turned by rotary position embeddings."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..functional import QK
from .plain import additive_or_bool
from .projections import multiply, project, project_heads, scale_of
from .registry import recipe


@recipe("timm.layers.attention.AttentionRope")
def attention_rope(
    self: Any, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
) -> QK:
    if self.qkv is not None:
        q, k = project(self.qkv, x, "b n (parts h d) -> parts b h n d", parts=2, of=3, h=self.num_heads)
    else:
        q, k = self.q_proj(x), self.k_proj(x)
        q = rearrange(q, "b n (h d) -> b h n d", h=self.num_heads)
        k = rearrange(k, "b n (h d) -> b h n d", d=q.shape[-1])
    dtype = k.dtype
    q, k = self.q_norm(q), self.k_norm(k)
    if rope is not None:
        q, k = (rotate_patches(self, t, rope).to(dtype) for t in (q, k))
    k = torch.repeat_interleave(k, q.shape[1] // k.shape[1], dim=1)
    return QK(q, k, scale=scale_of(self), is_causal=is_causal, **additive_or_bool(attn_mask))


@recipe("timm.models.eva.EvaAttention")
def eva_attention(
    self: Any, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
) -> QK:
    if self.qkv is not None:
        q, k = project_with_biases(self, x)
    else:
        q, k = project_heads(self.q_proj, x, self.num_heads), project_heads(self.k_proj, x, self.num_heads)
    dtype = k.dtype
    q, k = self.q_norm(q), self.k_norm(k)
    if rope is not None:
        q, k = (rotate_patches(self, t, rope).to(dtype) for t in (q, k))
    return QK(q, k, scale=scale_of(self), is_causal=is_causal, **additive_or_bool(attn_mask))


@recipe("timm.models.gemma4_vit.Gemma4Attention")
def gemma4_attention(self: Any, x: Tensor, rope_cos: Tensor, rope_sin: Tensor, attn_mask: Tensor | None = None) -> QK:
    q = rearrange(self.q_proj(x), "b n (h d) -> b h n d", d=self.head_dim)
    k = rearrange(self.k_proj(x), "b n (h d) -> b h n d", d=self.head_dim)
    q, k = self.q_norm(q), self.k_norm(k)
    q, k = (rotated_by_axis(t, rope_cos, rope_sin) for t in (q, k))
    k = torch.repeat_interleave(k, q.shape[1] // k.shape[1], dim=1)
    return QK(q, k, scale=1.0, **additive_or_bool(attn_mask))


@recipe("timm.layers.attention_pool2d.RotAttentionPool2d")
def rot_attention_pool_2d(self: Any, x: Tensor, pre_logits: bool = False) -> QK:
    size = x.shape[-2:]
    x = rearrange(x, "b c y x -> b (y x) c")
    token = x.mean(1, keepdim=True) if self.cls_token is None else self.cls_token.expand(len(x), -1, -1)
    x = torch.cat((token, x), dim=1)
    if self.qkv is None:
        q, k = (rearrange(part(x), "b n (h d) -> b h n d", h=self.num_heads) for part in (self.q, self.k))
    else:
        q, k = project(self.qkv, x, "b n (parts h d) -> parts b h n d", parts=2, of=3, h=self.num_heads)
    rope = self.pos_embed.get_embed(tuple(size))
    rope = torch.cat(rope, dim=-1) if isinstance(rope, tuple) else rope
    half, dtype = getattr(self, "rotate_half", False), k.dtype
    q, k = (torch.cat((t[:, :, :1], rotated(t[:, :, 1:], rope, half=half)), dim=2).to(dtype) for t in (q, k))
    return QK(q, k, scale=scale_of(self))


def project_with_biases(self: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Queries and keys of a packed projection whose biases are parameters of their own (`q_bias`, `k_bias`, `v_bias`)."""
    pattern = "b n (parts h d) -> parts b h n d"
    if self.q_bias is None:
        return project(self.qkv, x, pattern, parts=2, of=3, h=self.num_heads)
    if self.qkv_bias_separate:
        bias = torch.cat((self.q_bias, self.k_bias))
        qk = torch.cat(project(self.qkv, x, "b n (parts c) -> parts b n c", parts=2, of=3), dim=-1) + bias
        return torch.unbind(rearrange(qk, pattern, parts=2, h=self.num_heads))
    q_weight, k_weight, _ = self.qkv.weight.chunk(3)
    return multiply(x, q_weight, self.q_bias, self.num_heads), multiply(x, k_weight, self.k_bias, self.num_heads)


def rotate_patches(self: Any, q: Tensor, rope: Tensor) -> Tensor:
    """Rotate (batch, heads, tokens, head_dim) behind the prefix tokens, which have no position.

    Args:
        rope: (tokens, 2 * d) or (heads, tokens, 2 * d) or with a leading batch axis: sines, then cosines.

    Source: Su et al. 2021, "RoFormer", equation 34; `rotate_half` pairs feature i with i + d/2 instead of 2i with 2i + 1.
    """
    prefix, patches = q[:, :, : self.num_prefix_tokens], q[:, :, self.num_prefix_tokens :]
    return torch.cat((prefix, rotated(patches, rope, half=getattr(self, "rotate_half", False))), dim=2)


def rotated(q: Tensor, rope: Tensor, *, half: bool = False) -> Tensor:
    """The same for (..., tokens, head_dim) that all have a position."""
    sin, cos = rope.chunk(2, dim=-1)
    if half:
        first, second = q.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    else:
        turned = torch.stack((-q[..., 1::2], q[..., ::2]), dim=-1).flatten(-2)
    return q * cos + turned * sin


def rotated_by_axis(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(batch, heads, tokens, head_dim), one half of the features by the column and the other by the row.

    Args:
        cos, sin: (batch, tokens, head_dim).
    """
    first, second = rearrange(q, "b h n (half two d) -> two b h n half d", half=2, two=2)
    turned: Tensor = rearrange([-second, first], "two b h n half d -> b h n (half two d)")
    return q * cos.unsqueeze(1) + turned * sin.unsqueeze(1)
