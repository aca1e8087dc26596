"""One query, or a few, that gather from all tokens: class attention and attention pooling.

Touvron et al. 2021, "Going deeper with Image Transformers", arXiv 2103.17239; Chen et al. 2021, "CrossViT", arXiv 2103.14899;
Zhai et al. 2022, "Scaling Vision Transformers", arXiv 2106.04560, for pooling by a learned query; Radford et al. 2021, "CLIP",
arXiv 2103.00020, for pooling by the mean of all tokens.

`timm.layers.attention_pool2d.AttentionPool2d` has a layout and no recipe: versions of timm resample its position embedding
differently where the features are not square. It is called once a model, on the last features, and is replayed.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..attention.projection import project, project_heads, scale_of
from ..attention.sources import QK
from ..image.geometry import Geometry
from ..image.tokens import Tokens
from ..image.windows import whole_grid
from .mechanisms import additive_or_bool, rotate
from .places import find_windows
from .registry import Shape, layout, recipe
from .values import packed_values, project_last, separate_values

# The class token asks


@recipe("timm.models.cait.ClassAttn", values=separate_values)
def class_attention(self: Any, x: Tensor) -> QK:
    q = rearrange(self.q(x[:, 0]), "b (h d) -> b h 1 d", h=self.num_heads)  # the class token alone
    k = project_heads(self.k, x, self.num_heads)
    return QK(q, k, scale=scale_of(self))


def values_of_kv(self: Any, x: Tensor) -> Tensor:
    return project_last(self.kv, x, "b n (parts h d) -> parts b h n d", of=2, h=self.num_heads)


@recipe("timm.models.volo.ClassAttention", values=values_of_kv)
def volo_class_attention(self: Any, x: Tensor) -> QK:
    (k,) = project(self.kv, x, "b n (parts h d) -> parts b h n d", parts=1, of=2, h=self.num_heads)
    q = project_heads(self.q, x[:, :1], self.num_heads)
    return QK(q, k, scale=scale_of(self))


@recipe("timm.models.crossvit.CrossAttention", values=lambda self, x: project_heads(self.wv, x, self.num_heads))
def crossvit_attention(self: Any, x: Tensor) -> QK:
    q, k = project_heads(self.wq, x[:, 0:1], self.num_heads), project_heads(self.wk, x, self.num_heads)
    return QK(q, k, scale=scale_of(self))


@layout("timm.models.cait.ClassAttn", "timm.models.volo.ClassAttention", "timm.models.crossvit.CrossAttention")
def class_attention_tokens(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    return Tokens(("cls",), (0, 0)), find_windows(geometry) or geometry.tokens(shape[3], prefix=True)


# A learned query asks


def attention_pool_latent_values(self: Any, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    return values_of_kv(self, x if self.pos_embed is None else x + self.pos_embed.unsqueeze(0).to(x.dtype))


@recipe("timm.layers.attention_pool.AttentionPoolLatent", values=attention_pool_latent_values)
def attention_pool_latent(self: Any, x: Tensor, attn_mask: Tensor | None = None) -> QK:
    if self.pos_embed is not None:
        x = x + self.pos_embed.unsqueeze(0).to(x.dtype)
    # (batch, heads, latents, head_dim)
    q = rearrange(self.q(self.latent.expand(len(x), -1, -1)), "b n (h d) -> b h n d", h=self.num_heads)
    (k,) = project(self.kv, x, "b n (parts h d) -> parts b h n d", parts=1, of=2, h=self.num_heads)
    return QK(self.q_norm(q), self.k_norm(k), scale=scale_of(self), **additive_or_bool(attn_mask))


@layout("timm.layers.attention_pool.AttentionPoolLatent")
def attention_pool_latent_tokens(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    return Tokens(tuple(f"latent{i}" for i in range(shape[2])), (0, 0)), find_pooled_tokens(geometry, shape)


def attention_pool_prr_values(self: Any, x: Tensor) -> Tensor:
    x = self.pre_norm(x)
    return rearrange(x, "b n (h d) -> b h n d", h=self.num_heads)


@recipe("timm.layers.attention_pool.AttentionPoolPrr", values=attention_pool_prr_values)
def attention_pool_prr(self: Any, x: Tensor) -> QK:
    """Tokens are their own queries, keys and values."""
    q = k = attention_pool_prr_values(self, x)
    return QK(q, k, scale=scale_of(self))


@layout("timm.layers.attention_pool.AttentionPoolPrr")
def attention_pool_prr_tokens(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    tokens = find_pooled_tokens(geometry, shape)
    return tokens, tokens


def find_pooled_tokens(geometry: Geometry, shape: Shape) -> Tokens:
    """What a model pools: all of its tokens unless it says that its prefix tokens are left out."""
    prefix = getattr(geometry.trunk, "pool_include_prefix", True)
    return find_windows(geometry) or geometry.tokens(shape[3], prefix=bool(prefix))


# The mean of all tokens asks


def prepend_token(self: Any, x: Tensor) -> Tensor:
    """The tokens of a grid behind a class token, or their mean."""
    x = rearrange(x, "b c y x -> b (y x) c")
    token = x.mean(1, keepdim=True) if self.cls_token is None else self.cls_token.expand(len(x), -1, -1)
    return torch.cat((token, x), dim=1)


def rot_attention_pool_2d_values(self: Any, x: Tensor, pre_logits: bool = False) -> Tensor:
    return (separate_values if self.qkv is None else packed_values)(self, prepend_token(self, x))


@recipe("timm.layers.attention_pool2d.RotAttentionPool2d", values=rot_attention_pool_2d_values)
def rot_attention_pool_2d(self: Any, x: Tensor, pre_logits: bool = False) -> QK:
    size, x = x.shape[-2:], prepend_token(self, x)
    if self.qkv is None:
        q, k = (rearrange(part(x), "b n (h d) -> b h n d", h=self.num_heads) for part in (self.q, self.k))
    else:
        q, k = project(self.qkv, x, "b n (parts h d) -> parts b h n d", parts=2, of=3, h=self.num_heads)
    rope = self.pos_embed.get_embed(tuple(size))
    rope = torch.cat(rope, dim=-1) if isinstance(rope, tuple) else rope
    half, dtype = getattr(self, "rotate_half", False), k.dtype
    q, k = (rotate(t, rope, prefix=1, half=half).to(dtype) for t in (q, k))  # the first token has no position
    return QK(q, k, scale=scale_of(self))


@layout("timm.layers.attention_pool2d.AttentionPool2d", "timm.layers.attention_pool2d.RotAttentionPool2d")
def attention_pool_2d_tokens(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    """One token more comes first: a class token, or the mean of all the others, which is called "pool"."""
    first = "pool" if geometry.module.cls_token is None else "cls"
    tokens = whole_grid(geometry.argument("x")[2:], (first,))
    return tokens, tokens
