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
    heads_of_grid,
    number_offsets,
    patch_tokens,
    read_off_query,
)
from .registry import Shape, layout, recipe
from .values import channels_first_values, channels_last_values, packed_values

# Scaled dot products of a grid


@recipe("timm.models.volo.Attention", values=channels_last_values)
def volo_attention(self: Any, x: Tensor) -> QK:
    q, k = project(self.qkv, x, "b y x (parts h d) -> parts b h (y x) d", parts=2, of=3, h=self.num_heads)
    return QK(q, k, scale=scale_of(self))


layout("timm.models.volo.Attention")(channels_last_tokens)


@recipe("timm.models.fastvit.Attention", values=lambda self, x: packed_values(self, flatten_grid(x)))
def fastvit_attention(self: Any, x: Tensor) -> QK:
    q, k = project(self.qkv, flatten_grid(x), "b n (parts h d) -> parts b h n d", parts=2, of=3, h=self.num_heads)
    return QK(q, k, scale=scale_of(self))


layout("timm.models.fastvit.Attention")(channels_first_tokens)


@recipe("timm.models.visformer.Attention", values=channels_first_values)
def visformer_attention(self: Any, x: Tensor) -> QK:
    q, k = project(self.qkv, x, "b (parts h d) y x -> parts b h (y x) d", parts=2, of=3, h=self.num_heads)
    return QK(q, k, scale=scale_of(self))


layout("timm.models.visformer.Attention")(channels_first_tokens)


@recipe("timm.layers.attention2d.Attention2d", values=channels_first_values)
def attention_2d(self: Any, x: Tensor, attn_mask: Tensor | None = None) -> QK:
    packed = "(h parts d)" if self.head_first else "(parts h d)"
    q, k = project(self.qkv, x, f"b {packed} y x -> parts b h (y x) d", parts=2, of=3, h=self.num_heads)
    return QK(q, k, **additive_or_bool(attn_mask))


layout("timm.layers.attention2d.Attention2d")(channels_first_tokens)


# One head


def cut_if_windowed(self: Any, x: Tensor) -> Tensor:
    """(batch * windows, channels, rows, columns), padded to whole windows; all of the grid where the module has none."""
    if not self.window_size or self.window_size < 0:
        return x
    height, width = x.shape[-2:]
    x = F.pad(x, (0, -width % self.window_size, 0, -height % self.window_size))
    return rearrange(x, "b c (row y) (col x) -> (b row col) c y x", y=self.window_size, x=self.window_size)


def single_head_modulation_values(self: Any, x: Tensor) -> Tensor:
    x = self.gate_act(self.v_gate(cut_if_windowed(self, x)))  # values, then gates
    return rearrange(x[:, : x.shape[1] // 2], "b d y x -> b 1 (y x) d")


@recipe("timm.models.iformer.SHMA", axes="b q k", values=single_head_modulation_values)
def single_head_modulation_attention(self: Any, x: Tensor) -> QK:
    """One head, in windows where `window_size` says so; keys that only pad the image to whole windows are attended to."""
    x = cut_if_windowed(self, x)
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


def split_one_head(self: Any, x: Tensor) -> tuple[Tensor, ...]:
    qkv = rearrange(self.qkv(self.pre_norm(x[:, : self.pdim])), "b d y x -> b 1 (y x) d")
    return torch.split(qkv, [self.qk_dim, self.qk_dim, self.pdim], dim=-1)


@recipe("timm.models.shvit.SHSA", axes="b q k", values=lambda self, x: split_one_head(self, x)[2])
def single_head_self_attention(self: Any, x: Tensor) -> QK:
    """One head that sees the first `pdim` channels only."""
    q, k, _ = split_one_head(self, x)
    return QK(q, k, scale=scale_of(self))


layout("timm.models.shvit.SHSA")(channels_first_tokens)


# A bias for the distance between query and key


@recipe("timm.models.levit.Attention", values=lambda self, x: split_per_head(self, self.qkv(x))[2])
def levit_attention(self: Any, x: Tensor) -> QK:
    q, k, _ = split_per_head(self, self.qkv(x))
    return QK(q, k, scale=scale_of(self), bias=self.get_attention_biases(x.device))  # (heads, queries, keys)


@layout("timm.models.levit.Attention")
def levit_attention_tokens(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    tokens = find_tokens_at_resolution(geometry)
    return tokens, tokens


def split_keys_and_values(self: Any, x: Tensor) -> tuple[Tensor, ...]:
    kv = rearrange(self.kv(x), pattern_per_head(self), h=self.num_heads)
    return torch.split(kv, [self.key_dim, self.val_dim], dim=-1)


@recipe("timm.models.levit.AttentionDownsample", values=lambda self, x: split_keys_and_values(self, x)[1])
def levit_attention_downsample(self: Any, x: Tensor) -> QK:
    k, _ = split_keys_and_values(self, x)
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
    return "b (h d) y x -> b h (y x) d" if getattr(self, "use_conv", False) else "b n (h d) -> b h n d"


def split_per_head(self: Any, qkv: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values of each head together, which may be of other widths."""
    qkv = rearrange(qkv, pattern_per_head(self), h=self.num_heads)
    return torch.split(qkv, [self.key_dim, self.key_dim, self.val_dim], dim=-1)


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


@recipe("timm.models.efficientformer.Attention", values=lambda self, x: split_per_head(self, self.qkv(x))[2])
def efficientformer_attention(self: Any, x: Tensor) -> QK:
    q, k, _ = split_per_head(self, self.qkv(x))
    return QK(q, k, scale=scale_of(self), bias=self.get_attention_biases(x.device))


layout("timm.models.efficientformer.Attention")(patch_tokens)


@recipe("timm.models.efficientformer_v2.Attention2dDownsample", values=lambda self, x: heads_of_grid(self.v(x), self.num_heads))
def efficientformer_v2_downsample(self: Any, x: Tensor) -> QK:
    q, k = (heads_of_grid(layer(x), self.num_heads) for layer in (self.q, self.k))
    return QK(q, k, scale=scale_of(self), bias=self.get_attention_biases(x.device))


@layout("timm.models.efficientformer_v2.Attention2dDownsample")
def efficientformer_v2_downsample_tokens(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    size = geometry.argument("x")[2:]
    return whole_grid(size_after(size, geometry.module.q.pool)), whole_grid(size)


# Positions read off the query


def split_bottleneck(self: Any, x: Tensor) -> tuple[Tensor, ...]:
    parts = self.qkv(x).split([self.dim_out_qk, self.dim_out_qk, self.dim_out_v], dim=1)
    return tuple([heads_of_grid(part, self.num_heads) for part in parts])


@recipe("timm.layers.bottleneck_attn.BottleneckAttn", axes="(b h) q k", values=lambda self, x: split_bottleneck(self, x)[2])
def bottleneck_attention(self: Any, x: Tensor) -> QK:
    q, k, _ = split_bottleneck(self, x)
    height, width = x.shape[-2:]
    # the table counts key - query, the transpose of what `number_offsets` counts
    rel_h = self.pos_embed.height_rel[number_offsets(height, height, x.device).T]  # (rows, rows, d)
    rel_w = self.pos_embed.width_rel[number_offsets(width, width, x.device).T]
    position_scale = self.scale if self.scale_pos_embed else 1.0
    return read_off_query(q, k, rel_h, rel_w, scale=self.scale, position_scale=position_scale)


layout("timm.layers.bottleneck_attn.BottleneckAttn")(channels_first_tokens)


# One key for all heads


def multi_query_values_2d(self: Any, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    return repeat(flatten_grid(self.value(x)), "b n d -> b h n d", h=self.num_heads)


@recipe("timm.layers.attention2d.MultiQueryAttention2d", values=multi_query_values_2d)
def multi_query_attention_2d(self: Any, x: Tensor, attn_mask: Tensor | None = None) -> QK:
    q = heads_of_grid(self.query(x), self.num_heads)
    k = repeat(flatten_grid(self.key(x)), "b n d -> b h n d", h=self.num_heads)  # may be strided: fewer keys
    return QK(q, k, scale=scale_of(self), **additive_or_bool(attn_mask))


@layout("timm.layers.attention2d.MultiQueryAttention2d")
def multi_query_attention_2d_tokens(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    size = geometry.argument("x")[2:]
    return whole_grid(size_after(size, geometry.module.query)), whole_grid(size_after(size, geometry.module.key))


def multi_query_values_v2(self: Any, x: Tensor, m: Tensor | None = None) -> Tensor:
    v = torch.einsum("bnc,cd->bnd", flatten_grid(x if m is None else m), self.value_proj)
    return repeat(v, "b n d -> b h n d", h=self.num_heads)


@recipe("timm.layers.attention2d.MultiQueryAttentionV2", axes="b q h k", values=multi_query_values_v2)
def multi_query_attention_v2(self: Any, x: Tensor, m: Tensor | None = None) -> QK:
    q = torch.einsum("bnc,hdc->bhnd", flatten_grid(x), self.query_proj)  # parameters of no layer
    k = torch.einsum("bnc,cd->bnd", flatten_grid(x if m is None else m), self.key_proj)
    return QK(q, repeat(k, "b n d -> b h n d", h=self.num_heads), scale=scale_of(self))


@layout("timm.layers.attention2d.MultiQueryAttentionV2")
def multi_query_attention_v2_tokens(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    size, other = geometry.argument("x")[2:], geometry.argument("m")
    return whole_grid(size), whole_grid(size if other is None else other[2:])


# Strided convolutions before the projection


def project_strided(self: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values behind a strided convolution."""
    if getattr(self, "small_kernels", False) and self.att_stride > 1:  # a kernel as small as its stride needs whole cells
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % self.att_stride, 0, -height % self.att_stride))
    pattern = "b (h parts d) y x -> parts b h (y x) d"  # q, k and v of each head together
    return project(self.pwise, self.conv_proj(x), pattern, parts=3, of=3, h=self.num_heads)


@recipe(
    "timm.models.cpubone.ConvAttention",
    "timm.models.lowformer.ConvAttention",
    values=lambda self, x: project_strided(self, x)[2],
)
def conv_attention(self: Any, x: Tensor) -> QK:
    """A strided convolution makes fewer tokens of all three, queries too."""
    q, k, _ = project_strided(self, x)
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
