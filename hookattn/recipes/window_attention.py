"""Attention inside windows of the image, with or without a learned bias for the offset between query and key.

Liu et al. 2021, "Swin Transformer", arXiv 2103.14030, equation 4; Liu et al. 2022, "Swin V2", arXiv 2111.09883, equation 2 for
normalised queries and keys with a learned scale, equation 3 for the bias; Tu et al. 2022, "MaxViT", arXiv 2204.01697.

Windows count as images to whoever reads the map: (images * windows, heads, queries, keys), the windows of an image one after
the other. Where a class pads the image to whole windows, keys that are only padding are attended to and lie nowhere.

`timm.models.gcvit.WindowAttentionGlobal` has no recipe: which window takes the global query of which image is not the same in
all versions of timm, and nothing but the version tells. Its windows are small, and it is replayed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..attention.projection import project, scale_of
from ..attention.sources import QK, Scores
from ..image.geometry import Geometry
from ..image.sizes import size_after
from ..image.tokens import Tokens
from ..image.windows import cut_windows, slide_windows, whole_grid
from .mechanisms import (
    channels_first_tokens,
    channels_last_tokens,
    number_offsets,
    per_window,
    project_with_biases,
    read_off_query,
    resize_table,
    rotate,
)
from .registry import Shape, layout, partition, recipe
from .values import channels_first_values, channels_last_values, packed_values, project_last, values_with_bias

# Swin


@recipe("timm.models.swin_transformer.WindowAttention", values=packed_values)
def swin_attention(self: Any, x: Tensor, mask: Tensor | None = None) -> QK:
    q, k = project(self.qkv, x, "b n (parts h d) -> parts b h n d", parts=2, of=3, h=self.num_heads)
    bias = self._get_rel_pos_bias()  # (1, heads, queries, keys)
    return QK(q, k, scale=scale_of(self), bias=(bias, *per_window(mask, len(x))))


@recipe("timm.models.swin_transformer_v2.WindowAttention", values=values_with_bias)
def swin_v2_attention(self: Any, x: Tensor, mask: Tensor | None = None) -> QK:
    q, k = project_with_biases(self, x)
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    return QK(q, k, scale=clamp_scale(self.logit_scale), bias=(compute_continuous_bias(self), *per_window(mask, len(x))))


@recipe("timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention", values=packed_values)
def swin_v2_cr_attention(self: Any, x: Tensor, mask: Tensor | None = None) -> QK:
    q, k = project(self.qkv, x, "b n (parts h d) -> parts b h n d", parts=2, of=3, h=self.num_heads)
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    scale = clamp_scale(rearrange(self.logit_scale, "h -> h 1 1"))  # (heads, 1, 1), as v2 has it
    return QK(q, k, scale=scale, bias=(self._relative_positional_encodings(), *per_window(mask, len(x))))


def clamp_scale(logit_scale: Tensor) -> Tensor:
    """The inverse temperature of each head, at most 100."""
    return torch.clamp(logit_scale, max=math.log(1.0 / 0.01)).exp()


def compute_continuous_bias(self: Any) -> Tensor:
    """(heads, queries, keys): a small network of the log-spaced offset between query and key, equation 3 there."""
    table = rearrange(self.cpb_mlp(self.relative_coords_table), "1 y x h -> (y x) h")  # (offsets, heads)
    return 16 * torch.sigmoid(rearrange(table[self.relative_position_index], "q k h -> h q k"))


@partition(
    "timm.models.swin_transformer.SwinTransformerBlock",
    "timm.models.swin_transformer_v2.SwinTransformerV2Block",
    "timm.models.swin_transformer_v2_cr.SwinTransformerV2CrBlock",
)
def swin_block(self: Any, geometry: Geometry) -> Tokens:
    # all three roll first, and pad what has been rolled
    _, rows, columns, _ = geometry.block_argument(self, "x")
    return cut_windows((rows, columns), self.window_size, self.shift_size)


# MaxViT and CoAtNet


@recipe("timm.models.maxxvit.AttentionCl", values=channels_last_values)
def maxxvit_attention_cl(self: Any, x: Tensor, shared_rel_pos: Tensor | None = None) -> QK:
    # each head's q, k and v stand together, or all heads' q, then k, then v
    packed = "(h parts d)" if self.head_first else "(parts h d)"
    q, k = project(self.qkv, x, f"b ... {packed} -> parts b h (...) d", parts=2, of=3, h=self.num_heads)
    bias = shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias()
    return QK(q, k, scale=scale_of(self), bias=bias)


layout("timm.models.maxxvit.AttentionCl")(channels_last_tokens)


@recipe("timm.models.maxxvit.Attention2d", values=channels_first_values)
def maxxvit_attention_2d(self: Any, x: Tensor, shared_rel_pos: Tensor | None = None) -> QK:
    packed = "(h parts d)" if self.head_first else "(parts h d)"
    q, k = project(self.qkv, x, f"b {packed} y x -> parts b h (y x) d", parts=2, of=3, h=self.num_heads)
    bias = shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias()
    return QK(q, k, scale=scale_of(self), bias=bias)


layout("timm.models.maxxvit.Attention2d")(channels_first_tokens)


@partition("timm.models.maxxvit.PartitionAttentionCl")
def partition_attention_cl(self: Any, geometry: Geometry) -> Tokens:
    _, rows, columns, _ = geometry.block_argument(self, "x")
    return cut_windows((rows, columns), self.partition_size, strided=not self.partition_block)


@partition("timm.models.maxxvit.PartitionAttention2d")
def partition_attention_2d(self: Any, geometry: Geometry) -> Tokens:
    _, _, rows, columns = geometry.block_argument(self, "x")
    return cut_windows((rows, columns), self.partition_size, strided=not self.partition_block)


@partition("timm.models.maxxvit.ParallelPartitionAttention")
def parallel_partition_attention(self: Any, geometry: Geometry) -> Tokens:
    _, rows, columns, _ = geometry.block_argument(self, "x")
    # two attentions in one block: one sees neighbours, the other a grid over the image
    return cut_windows((rows, columns), self.partition_size, strided=geometry.module is self.attn_grid)


# DaViT, GCViT, NesT, TinyViT, EfficientViT, MobileViT


@recipe("timm.models.davit.WindowAttention", values=packed_values)
def davit_window_attention(self: Any, x: Tensor) -> QK:
    q, k = project(self.qkv, x, "b n (parts h d) -> parts b h n d", parts=2, of=3, h=self.num_heads)
    return QK(q, k, scale=scale_of(self))


@partition("timm.models.davit.SpatialBlock")
def davit_spatial_block(self: Any, geometry: Geometry) -> Tokens:
    _, _, rows, columns = geometry.block_argument(self, "x")
    return cut_windows((rows, columns), self.window_size)


@partition("timm.models.gcvit.GlobalContextVitBlock")
def gcvit_block(self: Any, geometry: Geometry) -> Tokens:
    """A global query has the place of the token that its row makes, though it was pooled from the whole image."""
    _, rows, columns, _ = geometry.block_argument(self, "x")
    return cut_windows((rows, columns), self.window_size)


def nest_values(self: Any, x: Tensor) -> Tensor:
    return project_last(self.qkv, x, "b w n (parts h d) -> parts (b w) h n d", of=3, h=self.num_heads)


@recipe("timm.models.nest.Attention", axes="b h w q k", values=nest_values)
def nest_attention(self: Any, x: Tensor) -> QK:
    q, k = project(self.qkv, x, "b w n (parts h d) -> parts (b w) h n d", parts=2, of=3, h=self.num_heads)
    return QK(q, k, scale=scale_of(self))


@partition("timm.models.nest.NestLevel")
def nest_level(self: Any, geometry: Geometry) -> Tokens:
    grid_size = size_after(geometry.block_argument(self, "x"), self.pool)
    return cut_windows(grid_size, self.block_size)


def split_tiny_vit(self: Any, x: Tensor) -> tuple[Tensor, ...]:
    qkv = rearrange(self.qkv(self.norm(x)), "b n (h d) -> b h n d", h=self.num_heads)
    return torch.split(qkv, [self.key_dim, self.key_dim, self.val_dim], dim=-1)


@recipe("timm.models.tiny_vit.Attention", values=lambda self, x: split_tiny_vit(self, x)[2])
def tiny_vit_attention(self: Any, x: Tensor) -> QK:
    q, k, _ = split_tiny_vit(self, x)
    return QK(q, k, scale=scale_of(self), bias=self.get_attention_biases(x.device))  # (heads, queries, keys)


@partition("timm.models.tiny_vit.TinyVitBlock")
def tiny_vit_block(self: Any, geometry: Geometry) -> Tokens:
    """An image as large as the window is one window."""
    _, rows, columns, _ = geometry.block_argument(self, "x")
    return cut_windows((rows, columns), self.window_size)


@recipe("timm.models.efficientvit_msra.CascadedGroupAttention", axes="b q k")
def cascaded_group_attention(self: Any, x: Tensor) -> Scores:
    """Queries and keys of a head are made of what the head before it gave out, so the attention itself has to run."""
    scores, head, biases = [], torch.zeros((), device=x.device), self.get_attention_biases(x.device)  # (heads, queries, keys)
    for n, (qkv, depthwise, part) in enumerate(zip(self.qkvs, self.dws, x.chunk(len(self.qkvs), dim=1))):
        widths = (self.key_dim, self.key_dim, self.val_dim)
        q, k, v = qkv(head + part if n else part).split(widths, dim=1)
        q, k, v = depthwise(q).flatten(2) * self.scale, k.flatten(2), v.flatten(2)
        scores.append(q.mT @ k + biases[n])
        head = (v @ scores[-1].softmax(-1).mT).unflatten(2, x.shape[2:])
    return Scores(torch.stack(scores, 1))


@partition("timm.models.efficientvit_msra.LocalWindowAttention")
def efficientvit_msra_local_window_attention(self: Any, geometry: Geometry) -> Tokens:
    """The window is made smaller where the image that the model is made for is."""
    _, _, rows, columns = geometry.block_argument(self, "x")
    # not `self.attn.resolution`, which `set_input_size` may have changed since
    return cut_windows((rows, columns), min(self.window_resolution, self.resolution))


@partition("timm.models.mobilevit.MobileVitBlock")
def mobilevit_block(self: Any, geometry: Geometry) -> Tokens:
    """A window takes one pixel of each patch; the grid is resized to whole patches before, and it is that grid that is cut."""
    grid_size = size_after(geometry.block_argument(self, "x"), self.conv_kxk)
    rows, columns = (-(-n // patch) for n, patch in zip(grid_size, self.patch_size))
    return cut_windows((rows * self.patch_size[0], columns * self.patch_size[1]), (rows, columns), strided=True)


# SAM


@recipe("timm.models.vision_transformer_sam.Attention", axes="(b h) q k", values=channels_last_values)
def sam_attention(self: Any, x: Tensor) -> QK:
    _, height, width, _ = x.shape
    x = rearrange(x, "b y x c -> b (y x) c")
    q, k = project(self.qkv, x, "b n (parts h d) -> parts b h n d", parts=2, of=3, h=self.num_heads)
    dtype = k.dtype  # what is rotated comes out in the dtype of the embedding
    q, k = self.q_norm(q), self.k_norm(k)
    if self.use_rel_pos:
        rel_h = resize_table(self.rel_pos_h, 2 * height - 1)[number_offsets(height, height, x.device)]
        rel_w = resize_table(self.rel_pos_w, 2 * width - 1)[number_offsets(width, width, x.device)]
        return read_off_query(q, k, rel_h, rel_w, scale=self.scale)
    if self.rope is not None:
        rope = self.rope.get_embed()
        q, k = (rotate(t, rope).to(dtype) for t in (q, k))
    return QK(q, k, scale=self.scale)


layout("timm.models.vision_transformer_sam.Attention")(channels_last_tokens)


@partition("timm.models.vision_transformer_sam.Block")
def sam_block(self: Any, geometry: Geometry) -> Tokens:
    _, rows, columns, _ = geometry.block_argument(self, "x")
    return cut_windows((rows, columns), self.window_size) if self.window_size > 0 else whole_grid((rows, columns))


# Attention that cuts its own windows


def project_windows(self: Any, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, ...]:
    height, width = size
    x = rearrange(x, "b (y x) c -> b y x c", y=height, x=width)
    x = F.pad(x, (0, 0, 0, -width % self.ws, 0, -height % self.ws))
    x = rearrange(x, "b (row y) (col x) c -> b row col y x c", y=self.ws, x=self.ws)
    pattern = "b row col y x (parts h d) -> parts (b row col) h (y x) d"
    return project(self.qkv, x, pattern, parts=3, of=3, h=self.num_heads)


@recipe(
    "timm.models.twins.LocallyGroupedAttn", axes="b w h q k", values=lambda self, x, size: project_windows(self, x, size)[2]
)
def locally_grouped_attention(self: Any, x: Tensor, size: tuple[int, int]) -> QK:
    """Keys that only pad the image to whole windows are attended to, as in the module."""
    q, k, _ = project_windows(self, x, size)
    return QK(q, k, scale=scale_of(self))


@layout("timm.models.twins.LocallyGroupedAttn")
def locally_grouped_attention_tokens(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    tokens = cut_windows(geometry.argument("size"), geometry.module.ws)
    return tokens, tokens


def split_halo(self: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Keys and values of the windows around each block, (batch * blocks, heads, window * window, d)."""
    kv = F.pad(self.kv(x), [self.halo_size] * 4).unfold(2, self.win_size, self.block_size)
    kv = kv.unfold(3, self.win_size, self.block_size)  # (batch, channels, rows of blocks, columns of blocks, window, window)
    kv = rearrange(kv, "b (h d) row col y x -> (b row col) h (y x) d", h=self.num_heads)
    return torch.split(kv, [self.dim_head_qk, self.dim_head_v], dim=-1)


@recipe("timm.layers.halo_attn.HaloAttn", axes="(b h) w q k", values=lambda self, x: split_halo(self, x)[1])
def halo_attention(self: Any, x: Tensor) -> QK:
    """Each block looks at itself and a halo around it (Vaswani et al. 2021, arXiv 2103.12731); zero padding is attended to."""
    block, window = self.block_size_ds, self.win_size
    pattern = "b (h d) (row y) (col x) -> (b row col) h (y x) d"
    q = rearrange(self.q(x), pattern, h=self.num_heads, y=block, x=block)
    k, _ = split_halo(self, x)
    key, query = torch.arange(window, device=x.device), torch.arange(block, device=x.device)
    distance = key - query[:, None] + window - 1  # (rows of queries, rows of keys): where the tables have that offset
    rel_h, rel_w = self.pos_embed.height_rel[distance], self.pos_embed.width_rel[distance]  # (queries, keys, d)
    position_scale = self.scale if self.scale_pos_embed else 1.0
    return read_off_query(q, k, rel_h, rel_w, scale=self.scale, position_scale=position_scale)


@layout("timm.layers.halo_attn.HaloAttn")
def halo_attention_tokens(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    """A block of queries looks at itself and a halo around it, which is zero where it is outside of the image.

    Where the query is strided, the queries have a coarser grid.
    """
    self = geometry.module
    _, _, rows, columns = geometry.argument("x")
    queries = cut_windows((rows // self.block_stride, columns // self.block_stride), self.block_size_ds)
    return queries, slide_windows((rows, columns), self.win_size, self.block_size, self.halo_size)
