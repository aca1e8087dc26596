"""Attention whose tokens stay on their grid: (batch, channels, height, width), or channels last, projected by convolutions.

Graham et al. 2021, "LeViT", arXiv 2104.01136, for a learned bias for the distance between query and key, without its sign;
Srinivas et al. 2021, "Bottleneck Transformers", arXiv 2101.11605, for positions read off the query; Shazeer 2019, arXiv
1911.02150, for one key that all heads share. For grids that are pooled see the note in `pooled_attention`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from ..attention.projection import project, scale_of
from ..attention.sources import QK
from ..errors import TokenError
from ..image.geometry import Geometry
from ..image.sizes import pair, size_after
from ..image.tokens import Tokens
from ..image.windows import cut_windows, whole_grid
from .mechanisms import (
    additive_or_bool,
    channels_first_tokens,
    channels_last_tokens,
    flatten_grid,
    number_offsets,
    patch_tokens,
    read_off_query,
)
from .registry import Shape, layout, recipe

# Scaled dot products of a grid


@recipe("timm.models.volo.Attention")
def volo_attention(self: Any, x: Tensor) -> QK:
    q, k = project(self.qkv, x, "b y x (parts h d) -> parts b h (y x) d", parts=2, of=3, h=self.num_heads)
    return QK(q, k, scale=scale_of(self))


layout("timm.models.volo.Attention")(channels_last_tokens)


@recipe("timm.models.fastvit.Attention")
def fastvit_attention(self: Any, x: Tensor) -> QK:
    x = rearrange(x, "b c y x -> b (y x) c")
    q, k = project(self.qkv, x, "b n (parts h d) -> parts b h n d", parts=2, of=3, h=self.num_heads)
    return QK(q, k, scale=scale_of(self))


layout("timm.models.fastvit.Attention")(channels_first_tokens)


@recipe("timm.models.visformer.Attention")
def visformer_attention(self: Any, x: Tensor) -> QK:
    q, k = project(self.qkv, x, "b (parts h d) y x -> parts b h (y x) d", parts=2, of=3, h=self.num_heads)
    return QK(q, k, scale=scale_of(self))


layout("timm.models.visformer.Attention")(channels_first_tokens)


@recipe("timm.layers.attention2d.Attention2d")
def attention_2d(self: Any, x: Tensor, attn_mask: Tensor | None = None) -> QK:
    packed = "(h parts d)" if self.head_first else "(parts h d)"
    q, k = project(self.qkv, x, f"b {packed} y x -> parts b h (y x) d", parts=2, of=3, h=self.num_heads)
    return QK(q, k, **additive_or_bool(attn_mask))


layout("timm.layers.attention2d.Attention2d")(channels_first_tokens)


# One head


@recipe("timm.models.iformer.SHMA", axes="b q k")
def single_head_modulation_attention(self: Any, x: Tensor) -> QK:
    """One head, in windows where `window_size` says so; keys that only pad the image to whole windows are attended to."""
    if self.window_size and self.window_size > 0:
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % self.window_size, 0, -height % self.window_size))
        x = rearrange(x, "b c (row y) (col x) -> (b row col) c y x", y=self.window_size, x=self.window_size)
    if self.training:
        self.v_gate(x)  # comes first in the forward, and draws its random numbers first
    # (batch * windows, 1, tokens, d)
    q, k = rearrange(self.q(x), "b d y x -> b 1 (y x) d"), rearrange(self.k(x), "b d y x -> b 1 (y x) d")
    return QK(q, k, scale=scale_of(self))


@layout("timm.models.iformer.SHMA")
def single_head_modulation_attention_tokens(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    _, _, rows, columns = geometry.argument("x")
    window = geometry.module.window_size
    tokens = cut_windows((rows, columns), window) if window and window > 0 else whole_grid((rows, columns))
    return tokens, tokens


@recipe("timm.models.shvit.SHSA", axes="b q k")
def single_head_self_attention(self: Any, x: Tensor) -> QK:
    """One head that sees the first `pdim` channels only."""
    qkv = rearrange(self.qkv(self.pre_norm(x[:, : self.pdim])), "b d y x -> b 1 (y x) d")
    q, k, _ = qkv.split([self.qk_dim, self.qk_dim, self.pdim], dim=-1)
    return QK(q, k, scale=scale_of(self))


layout("timm.models.shvit.SHSA")(channels_first_tokens)


# A bias for the distance between query and key


@recipe("timm.models.levit.Attention")
def levit_attention(self: Any, x: Tensor) -> QK:
    qkv = rearrange(self.qkv(x), pattern_per_head(self), h=self.num_heads)
    q, k, _ = qkv.split([self.key_dim, self.key_dim, self.val_dim], dim=-1)
    return QK(q, k, scale=scale_of(self), bias=self.get_attention_biases(x.device))  # (heads, queries, keys)


@layout("timm.models.levit.Attention")
def levit_attention_tokens(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    tokens = find_tokens_at_resolution(geometry)
    return tokens, tokens


@recipe("timm.models.levit.AttentionDownsample")
def levit_attention_downsample(self: Any, x: Tensor) -> QK:
    kv = rearrange(self.kv(x), pattern_per_head(self), h=self.num_heads)  # (batch, heads, tokens, key_dim + val_dim)
    k, _ = kv.split([self.key_dim, self.val_dim], dim=-1)
    q = rearrange(self.q(x), pattern_per_head(self), h=self.num_heads)
    return QK(q, k, scale=scale_of(self), bias=self.get_attention_biases(x.device))


@layout("timm.models.levit.AttentionDownsample")
def levit_attention_downsample_tokens(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    """A query is every `stride`-th token, or the mean around it."""
    keys, stride = find_tokens_at_resolution(geometry), geometry.module.stride
    rows, columns = keys.grid_size
    return whole_grid((-(-rows // stride), -(-columns // stride))), keys


def pattern_per_head(self: Any) -> str:
    """What makes (batch, heads, tokens, features) of a LeViT projection, on a grid or flat."""
    return "b (h d) y x -> b h (y x) d" if self.use_conv else "b n (h d) -> b h n d"


def find_tokens_at_resolution(geometry: Geometry) -> Tokens:
    """All tokens on the grid that a module is made for, if the image gives that grid too."""
    x, (rows, columns) = geometry.argument("x"), pair(geometry.module.resolution)  # tokens in a row do not tell their grid
    if len(x) == 4:
        return whole_grid(x[2:])
    if geometry.images is not None and geometry.tokens(x[1], prefix=False).grid_size != (rows, columns):
        raise TokenError(
            f"{geometry.name!r} is made for a grid of {rows} x {columns}, which is not the one an image of this size makes; "
            "slice the map itself, m[...]."
        )
    return whole_grid((rows, columns))


@recipe("timm.models.efficientformer.Attention")
def efficientformer_attention(self: Any, x: Tensor) -> QK:
    qkv = rearrange(self.qkv(x), "b n (h d) -> b h n d", h=self.num_heads)
    q, k, _ = qkv.split([self.key_dim, self.key_dim, self.val_dim], dim=-1)
    return QK(q, k, scale=scale_of(self), bias=self.get_attention_biases(x.device))


layout("timm.models.efficientformer.Attention")(patch_tokens)


@recipe("timm.models.efficientformer_v2.Attention2dDownsample")
def efficientformer_v2_downsample(self: Any, x: Tensor) -> QK:
    q = rearrange(self.q(x), "b (h d) y x -> b h (y x) d", h=self.num_heads)
    k = rearrange(self.k(x), "b (h d) y x -> b h (y x) d", h=self.num_heads)
    return QK(q, k, scale=scale_of(self), bias=self.get_attention_biases(x.device))


@layout("timm.models.efficientformer_v2.Attention2dDownsample")
def efficientformer_v2_downsample_tokens(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    size = geometry.argument("x")[2:]
    return whole_grid(size_after(size, geometry.module.q.pool)), whole_grid(size)


# Positions read off the query


@recipe("timm.layers.bottleneck_attn.BottleneckAttn", axes="(b h) q k")
def bottleneck_attention(self: Any, x: Tensor) -> QK:
    qkv = self.qkv(x)
    q, k, _ = qkv.split([self.dim_out_qk, self.dim_out_qk, self.dim_out_v], dim=1)
    q, k = (rearrange(t, "b (h d) y x -> b h (y x) d", h=self.num_heads) for t in (q, k))
    height, width = x.shape[-2:]
    # the table counts key - query, the transpose of what `number_offsets` counts
    rel_h = self.pos_embed.height_rel[number_offsets(height, height, x.device).T]  # (rows, rows, d)
    rel_w = self.pos_embed.width_rel[number_offsets(width, width, x.device).T]
    position_scale = self.scale if self.scale_pos_embed else 1.0
    return read_off_query(q, k, rel_h, rel_w, scale=self.scale, position_scale=position_scale)


layout("timm.layers.bottleneck_attn.BottleneckAttn")(channels_first_tokens)


# One key for all heads


@recipe("timm.layers.attention2d.MultiQueryAttention2d")
def multi_query_attention_2d(self: Any, x: Tensor, attn_mask: Tensor | None = None) -> QK:
    q = rearrange(self.query(x), "b (h d) y x -> b h (y x) d", h=self.num_heads)
    k = repeat(flatten_grid(self.key(x)), "b n d -> b h n d", h=self.num_heads)  # may be strided: fewer keys
    return QK(q, k, scale=scale_of(self), **additive_or_bool(attn_mask))


@layout("timm.layers.attention2d.MultiQueryAttention2d")
def multi_query_attention_2d_tokens(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    size = geometry.argument("x")[2:]
    return whole_grid(size_after(size, geometry.module.query)), whole_grid(size_after(size, geometry.module.key))


@recipe("timm.layers.attention2d.MultiQueryAttentionV2", axes="b q h k")
def multi_query_attention_v2(self: Any, x: Tensor, m: Tensor | None = None) -> QK:
    q = torch.einsum("bnc,hdc->bhnd", flatten_grid(x), self.query_proj)  # parameters of no layer
    k = torch.einsum("bnc,cd->bnd", flatten_grid(x if m is None else m), self.key_proj)
    return QK(q, repeat(k, "b n d -> b h n d", h=self.num_heads), scale=scale_of(self))


@layout("timm.layers.attention2d.MultiQueryAttentionV2")
def multi_query_attention_v2_tokens(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    size, other = geometry.argument("x")[2:], geometry.argument("m")
    return whole_grid(size), whole_grid(size if other is None else other[2:])


# Strided convolutions before the projection


@recipe("timm.models.cpubone.ConvAttention", "timm.models.lowformer.ConvAttention")
def conv_attention(self: Any, x: Tensor) -> QK:
    """A strided convolution makes fewer tokens of all three, queries too."""
    if getattr(self, "small_kernels", False) and self.att_stride > 1:  # a kernel as small as its stride needs whole cells
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % self.att_stride, 0, -height % self.att_stride))
    pattern = "b (h parts d) y x -> parts b h (y x) d"  # q, k and v of each head together
    q, k = project(self.pwise, self.conv_proj(x), pattern, parts=2, of=3, h=self.num_heads)
    return QK(q, k, scale=scale_of(self))


@layout("timm.models.cpubone.ConvAttention", "timm.models.lowformer.ConvAttention")
def conv_attention_tokens(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    """A strided convolution makes fewer tokens of all three, queries too."""
    self = geometry.module
    rows, columns = geometry.argument("x")[2:]
    if getattr(self, "small_kernels", False) and self.att_stride > 1:
        rows, columns = rows + -rows % self.att_stride, columns + -columns % self.att_stride
    tokens = whole_grid(size_after((rows, columns), self.conv_proj))
    return tokens, tokens
