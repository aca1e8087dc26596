"""Fewer keys than tokens, or fewer queries: pooled or strided.

Wang et al. 2021, "Pyramid Vision Transformer", arXiv 2102.12122; Chu et al. 2021, "Twins", arXiv 2104.13840; Li et al. 2022,
"MViTv2", arXiv 2112.01526, equation 4; Ryali et al. 2023, "Hiera", arXiv 2306.00989.

A pooled axis has a coarser grid of its own over the image, as large as the pooling makes it. Where its cells do not tile the
image (an odd number of rows that is halved, padding), the coarser grid is taken to cover the image all the same, so that a
cell may lie up to half a cell off on a picture.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..attention.projection import project, project_heads, scale_of
from ..attention.sources import QK
from ..image.geometry import Geometry
from ..image.sizes import pair, size_after
from ..image.tokens import Tokens
from ..image.windows import cut_windows, pool_windows, whole_grid
from .mechanisms import (
    flatten_grid,
    group_in_mask_units,
    number_offsets,
    pool_on_grid,
    read_off_query,
    unflatten_grid,
    unroll_tokens,
)
from .places import find_windows
from .registry import Shape, layout, partition, recipe
from .values import channels_last_values, packed_values, project_last, separate_values

# Keys of a coarser grid


def reduce_tokens(self: Any, x: Tensor, size: list[int] | tuple[int, int]) -> Tensor:
    """The tokens of a coarser grid, (batch, keys, channels)."""
    if getattr(self, "pool", None) is not None:  # linear attention, PVT v2: pooled to 7 x 7, whatever the image
        return self.act(self.norm(flatten_grid(self.sr(self.pool(unflatten_grid(x, size))))))  # type: ignore[no-any-return]
    return x if self.sr is None else self.norm(flatten_grid(self.sr(unflatten_grid(x, size))))


def values_of_coarser_grid(self: Any, x: Tensor, size: Any) -> Tensor:
    return project_last(self.kv, reduce_tokens(self, x, size), "b n (parts h d) -> parts b h n d", of=2, h=self.num_heads)


def pvt_v2_values(self: Any, x: Tensor, feat_size: list[int]) -> Tensor:
    return values_of_coarser_grid(self, x, feat_size)


@recipe("timm.models.pvt_v2.Attention", values=pvt_v2_values)
def pvt_v2_attention(self: Any, x: Tensor, feat_size: list[int]) -> QK:
    q, x = project_heads(self.q, x, self.num_heads), reduce_tokens(self, x, feat_size)
    (k,) = project(self.kv, x, "b n (parts h d) -> parts b h n d", parts=1, of=2, h=self.num_heads)
    return QK(q, k, scale=scale_of(self))


@layout("timm.models.pvt_v2.Attention")
def pvt_v2_attention_tokens(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    size = geometry.argument("feat_size")
    return whole_grid(size), whole_grid(size_after(size, geometry.module.pool, geometry.module.sr))


@recipe("timm.models.twins.GlobalSubSampleAttn", values=values_of_coarser_grid)
def global_sub_sample_attention(self: Any, x: Tensor, size: tuple[int, int]) -> QK:
    q, x = project_heads(self.q, x, self.num_heads), reduce_tokens(self, x, size)
    (k,) = project(self.kv, x, "b n (parts h d) -> parts b h n d", parts=1, of=2, h=self.num_heads)
    return QK(q, k, scale=scale_of(self))


@layout("timm.models.twins.GlobalSubSampleAttn")
def global_sub_sample_attention_tokens(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    size = geometry.argument("size")
    return whole_grid(size), whole_grid(size_after(size, geometry.module.sr))


def reduce_runs(self: Any, x: Tensor) -> Tensor:
    """Means of tokens one after the other, (batch, keys, channels)."""
    return x if self.sr is None else rearrange(self.norm(self.sr(rearrange(x, "b n c -> b c n"))), "b c n -> b n c")


@recipe("timm.models.nextvit.EfficientAttention", values=lambda self, x: separate_values(self, reduce_runs(self, x)))
def nextvit_attention(self: Any, x: Tensor) -> QK:
    q = project_heads(self.q, x, self.num_heads)
    k = project_heads(self.k, reduce_runs(self, x), self.num_heads)
    return QK(q, k, scale=scale_of(self))


@layout("timm.models.nextvit.EfficientAttention")
def nextvit_attention_tokens(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    """A key is the mean of so many tokens one after the other, which are seldom a square; each of them gets its share.

    Tokens that are left over at the end of the image are in no key.
    """
    queries, run = find_windows(geometry) or geometry.tokens(shape[2], prefix=False), geometry.module.N_ratio
    if geometry.module.sr is None:
        return queries, queries
    places = torch.arange(shape[2] // run * run, device="cpu")[None, None]  # (1, 1, keys * run)
    return queries, Tokens((), queries.grid_size, places, spread=run)


@partition("timm.models.nextvit.NextTransformerBlock")
def next_transformer_block(self: Any, geometry: Geometry) -> Tokens:
    return whole_grid(size_after(geometry.block_argument(self, "x"), self.patch_embed))


# Queries and keys pooled head by head


def multi_scale_values(self: Any, x: Tensor, feat_size: list[int]) -> Tensor:
    v, _ = pool_on_grid(packed_values(self, x), self.pool_v, feat_size, int(self.has_cls_token))
    return v if self.norm_v is None else self.norm_v(v)


@recipe("timm.models.mvitv2.MultiScaleAttention", values=multi_scale_values)
def multi_scale_attention(self: Any, x: Tensor, feat_size: list[int]) -> QK:
    q, k = project(self.qkv, x, "b n (parts h d) -> parts b h n d", parts=2, of=3, h=self.num_heads)
    prefix = int(self.has_cls_token)
    q, q_size = pool_on_grid(q, self.pool_q, feat_size, prefix)
    q = q if self.norm_q is None else self.norm_q(q)
    k, k_size = pool_on_grid(k, self.pool_k, feat_size, prefix)
    k = k if self.norm_k is None else self.norm_k(k)
    if self.rel_pos_type != "spatial":  # no positions
        return QK(q, k, scale=self.scale)
    rel_h = self.rel_pos_h[number_offsets(q_size[0], k_size[0], x.device)]  # (rows of queries, rows of keys, d)
    rel_w = self.rel_pos_w[number_offsets(q_size[1], k_size[1], x.device)]
    return read_off_query(q, k, rel_h, rel_w, scale=self.scale, prefix=prefix)


@layout("timm.models.mvitv2.MultiScaleAttention", "timm.models.mvitv2.MultiScaleAttentionPoolFirst")
def multi_scale_attention_tokens(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    self, size = geometry.module, geometry.argument("feat_size")
    prefix = ("cls",) if self.has_cls_token else ()
    return whole_grid(size_after(size, self.pool_q), prefix), whole_grid(size_after(size, self.pool_k), prefix)


# Queries pooled inside their windows


def mask_unit_values(self: Any, x: Tensor) -> Tensor:
    windows = x.shape[1] // (self.q_stride * self.window_size) if self.use_mask_unit_attn else 1
    return project_last(self.qkv, x, "b (n w) (parts h d) -> parts (b w) h n d", of=3, h=self.heads, w=windows)


@recipe("timm.models.hiera.MaskUnitAttention", axes="b h w q k", values=mask_unit_values)
def mask_unit_attention(self: Any, x: Tensor) -> QK:
    """Tokens come unroll_tokens: the tokens that are pooled into one query lie `windows * window_size` apart."""
    windows = x.shape[1] // (self.q_stride * self.window_size) if self.use_mask_unit_attn else 1
    pattern = "b (n w) (parts h d) -> parts (b w) h n d"
    q, k = project(self.qkv, x, pattern, parts=2, of=3, h=self.heads, w=windows)
    if self.q_stride > 1:  # max pooling over what unrolling has put apart
        q = rearrange(q, "b h (stride n) d -> b h stride n d", stride=self.q_stride).amax(2)
    return QK(q, k, scale=scale_of(self))


@layout("timm.models.hiera.MaskUnitAttention")
def mask_unit_attention_tokens(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    """Tokens come unroll_tokens, and a mask unit is every `windows`-th of them; queries are pooled over the last unrolling."""
    self, model = geometry.module, geometry.find_holder("reroll")
    path = list(geometry.path())
    block = next(i for i, block in enumerate(model.blocks) if block in path)
    # a block that pools its queries is the first of a stage: its keys are in the order of the stage before
    queries = unroll_tokens(*model.reroll.schedule[block])
    keys = unroll_tokens(*model.reroll.schedule[block - 1]) if self.q_stride > 1 else queries
    windows = len(keys) // (self.q_stride * self.window_size) if self.use_mask_unit_attn else 1
    return group_in_mask_units(queries, windows), group_in_mask_units(keys, windows)


@recipe("timm.models.hieradet_sam2.MultiScaleAttention", values=channels_last_values)
def hieradet_attention(self: Any, x: Tensor) -> QK:
    q, k = project(self.qkv, x, "b y x (parts c) -> parts b y x c", parts=2, of=3)  # heads are told apart after pooling
    if self.q_pool is not None:
        q = rearrange(self.q_pool(rearrange(q, "b y x c -> b c y x")), "b c y x -> b y x c")
    q, k = (rearrange(t, "b y x (h d) -> b h (y x) d", h=self.num_heads) for t in (q, k))
    return QK(q, k, scale=scale_of(self))


@layout("timm.models.hieradet_sam2.MultiScaleAttention")
def hieradet_attention_tokens(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    """Queries are pooled inside their window, and stand for the cells of a coarser grid."""
    window = geometry.argument("x")[1:3]
    keys = find_windows(geometry) or whole_grid(window)
    pool = geometry.module.q_pool
    return keys if pool is None else pool_windows(keys, window, pair(pool.stride)), keys


@partition("timm.models.hieradet_sam2.MultiScaleBlock")
def hieradet_block(self: Any, geometry: Geometry) -> Tokens:
    _, rows, columns, _ = geometry.block_argument(self, "x")
    return cut_windows((rows, columns), self.window_size) if any(self.window_size) else whole_grid((rows, columns))
