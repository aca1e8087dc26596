"""All tokens attend to all tokens: ViT, DeiT, DINO, BEiT, EVA and their kin, with masks, relative and rotary positions.

Dosovitskiy et al. 2021, "ViT", arXiv 2010.11929; Dehghani et al. 2023, "ViT-22B", arXiv 2302.05442, for norms of queries and
keys and for blocks whose attention shares a projection with the MLP; Bao et al. 2022, "BEiT", arXiv 2106.08254, for a learned
bias for the offset between query and key, added to the scores; Su et al. 2021, "RoFormer", arXiv 2104.09864, for queries and
keys that are turned by their positions.
"""

from __future__ import annotations

from typing import Any

from einops import rearrange
from torch import Tensor

from ..attention.projection import project, project_heads, scale_of
from ..attention.sources import QK
from ..errors import TokenError
from ..image.geometry import Geometry
from ..image.sizes import pair, size_after
from ..image.tokens import Tokens
from ..image.windows import cut_windows, whole_grid
from .mechanisms import (
    additive_or_bool,
    patch_tokens,
    prefix_and_patch_tokens,
    project_in_parallel,
    project_with_biases,
    repeat_for_groups,
    rotate_by_axis,
    rotate_patches,
)
from .registry import layout, partition, recipe
from .values import grouped_values, packed_values, separate_values, values_with_bias

# One packed projection


@recipe("timm.layers.attention.Attention", "timm.models.vision_transformer.Attention", values=packed_values)
def attention(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> QK:
    q, k = project(self.qkv, x, "b n (parts h d) -> parts b h n d", parts=2, of=3, h=self.num_heads)
    q, k = self.q_norm(q), self.k_norm(k)
    return QK(q, k, scale=scale_of(self), is_causal=is_causal, **additive_or_bool(attn_mask))


layout("timm.layers.attention.Attention", "timm.models.vision_transformer.Attention")(prefix_and_patch_tokens)


def parallel_scaling_values(self: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    return rearrange(project_in_parallel(self, x)[2], "b n (h d) -> b h n d", h=self.num_heads)


@recipe("timm.models.vision_transformer.ParallelScalingBlock", values=parallel_scaling_values)
def parallel_scaling_block(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> QK:
    q, k, _ = project_in_parallel(self, x)  # (batch, tokens, dim)
    q = self.q_norm(rearrange(q, "b n (h d) -> b n h d", h=self.num_heads))
    k = self.k_norm(rearrange(k, "b n (h d) -> b n h d", h=self.num_heads))
    q, k = rearrange(q, "b n h d -> b h n d"), rearrange(k, "b n h d -> b h n d")
    return QK(q, k, scale=scale_of(self), is_causal=is_causal, **additive_or_bool(attn_mask))


layout("timm.models.vision_transformer.ParallelScalingBlock")(prefix_and_patch_tokens)


@recipe("timm.models.metaformer.Attention", "timm.models.convit.MHSA", values=packed_values)
def packed_attention(self: Any, x: Tensor) -> QK:
    q, k = project(self.qkv, x, "b n (parts h d) -> parts b h n d", parts=2, of=3, h=self.num_heads)
    return QK(q, k, scale=scale_of(self))


layout("timm.models.metaformer.Attention")(patch_tokens)


layout("timm.models.convit.MHSA")(prefix_and_patch_tokens)


# A bias for the offset between query and key


@recipe("timm.models.beit.Attention", values=values_with_bias)
def beit_attention(self: Any, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> QK:
    q, k = project_with_biases(self, x)
    bias = None if self.relative_position_bias_table is None else self._get_rel_pos_bias()  # (1, heads, queries, keys)
    if shared_rel_pos_bias is not None:  # one bias for all blocks
        bias = shared_rel_pos_bias if bias is None else bias + shared_rel_pos_bias
    return QK(q, k, scale=scale_of(self), bias=bias)


layout("timm.models.beit.Attention")(prefix_and_patch_tokens)


@recipe("timm.models.vision_transformer_relpos.RelPosAttention", values=packed_values)
def relpos_attention(self: Any, x: Tensor, shared_rel_pos: Tensor | None = None) -> QK:
    q, k = project(self.qkv, x, "b n (parts h d) -> parts b h n d", parts=2, of=3, h=self.num_heads)
    q, k = self.q_norm(q), self.k_norm(k)
    bias = shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias()
    return QK(q, k, scale=scale_of(self), bias=bias)


layout("timm.models.vision_transformer_relpos.RelPosAttention")(prefix_and_patch_tokens)


# Rotary positions


def attention_rope_values(self: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    return packed_values(self, x) if self.qkv is not None else grouped_values(self, self.v_proj, x)


@recipe("timm.layers.attention.AttentionRope", values=attention_rope_values)
def attention_rope(
    self: Any, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
) -> QK:
    if self.qkv is not None:
        q, k = project(self.qkv, x, "b n (parts h d) -> parts b h n d", parts=2, of=3, h=self.num_heads)
    else:
        q = project_heads(self.q_proj, x, self.num_heads)
        (k,) = project(self.k_proj, x, "b n (parts h d) -> parts b h n d", parts=1, of=1, d=q.shape[-1])
    dtype = k.dtype  # what is rotated comes out in the dtype of the embedding
    q, k = self.q_norm(q), self.k_norm(k)
    if rope is not None:
        q, k = (rotate_patches(self, t, rope).to(dtype) for t in (q, k))
    k = repeat_for_groups(k, q.shape[1])
    return QK(q, k, scale=scale_of(self), is_causal=is_causal, **additive_or_bool(attn_mask))


layout("timm.layers.attention.AttentionRope")(prefix_and_patch_tokens)


def eva_values(self: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    return values_with_bias(self, x) if self.qkv is not None else project_heads(self.v_proj, x, self.num_heads)


@recipe("timm.models.eva.EvaAttention", values=eva_values)
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


layout("timm.models.eva.EvaAttention")(prefix_and_patch_tokens)


def gemma4_values(self: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    v = self.v_norm(rearrange(self.v_proj(x), "b n (h d) -> b h n d", d=self.head_dim))
    return repeat_for_groups(v, self.num_heads)


@recipe("timm.models.gemma4_vit.Gemma4Attention", values=gemma4_values)
def gemma4_attention(self: Any, x: Tensor, rope_cos: Tensor, rope_sin: Tensor, attn_mask: Tensor | None = None) -> QK:
    pattern = "b n (parts h d) -> parts b h n d"
    q, k = (project(each, x, pattern, parts=1, of=1, d=self.head_dim)[0] for each in (self.q_proj, self.k_proj))
    q, k = self.q_norm(q), self.k_norm(k)
    q, k = (rotate_by_axis(t, rope_cos, rope_sin) for t in (q, k))
    k = repeat_for_groups(k, q.shape[1])
    return QK(q, k, scale=1.0, **additive_or_bool(attn_mask))


layout("timm.models.gemma4_vit.Gemma4Attention")(prefix_and_patch_tokens)


# Blocks that pool the grid before their attention sees it


@partition("timm.models.pit.Transformer")
def pit_transformer(self: Any, geometry: Geometry) -> Tokens:
    """A stage may pool the patches first."""
    patches, tokens = geometry.block_argument(self, "x")  # (batch, channels, rows, columns), (batch, class tokens, channels)
    return whole_grid(size_after(patches, None if self.pool is None else self.pool.conv), ("cls", "dist")[: tokens[1]])


@partition("timm.models.metaformer.MetaFormerStage")
def metaformer_stage(self: Any, geometry: Geometry) -> Tokens:
    return whole_grid(size_after(geometry.block_argument(self, "x"), self.downsample))


@partition("timm.models.csatv2.TransformerBlock")
def csatv2_transformer_block(self: Any, geometry: Geometry) -> Tokens:
    return whole_grid(size_after(geometry.block_argument(self, "x"), self.pool2))


# Models of several grids


@partition("timm.models.crossvit.MultiScaleBlock")
def crossvit_block(self: Any, geometry: Geometry) -> Tokens:
    """Two branches with patches of two sizes; a class token that changes branches looks at the patches of the other.

    The image is resized for each branch, which leaves a grid where it is on the image; it may be cropped instead, which does
    not.
    """
    path, branches = list(geometry.path()), len(self.projs)
    # a fusion asks with the class token of its own branch, and its keys are the patches of the next
    fused = next((i for i, fusion in enumerate(self.fusion) if fusion in path), None)
    branch = (fused + 1) % branches if fused is not None else next(i for i, own in enumerate(self.blocks) if own in path)
    model = geometry.find_holder("img_size_scaled")
    size = pair(model.patch_embed[branch].img_size)
    seen = geometry.image_size or size
    if model.crop_scale and seen != size and size[0] <= seen[0] and size[1] <= seen[1]:
        raise TokenError(
            f"{geometry.name!r} sees {size[0]} x {size[1]} pixels that were cropped out of the image (crop_scale of the "
            f"{type(model).__name__}); slice the map itself, m[...]."
        )
    return whole_grid(size_after(size, model.patch_embed[branch].proj), ("cls",))


@recipe("timm.models.tnt.Attention", values=separate_values)
def tnt_attention(self: Any, x: Tensor) -> QK:
    q, k = project(self.qk, x, "b n (parts h d) -> parts b h n d", parts=2, of=2, h=self.num_heads)
    return QK(q, k, scale=scale_of(self))


@partition("timm.models.tnt.Block")
def tnt_block(self: Any, geometry: Geometry) -> Tokens:
    """The inner attention sees the pixels of a patch, the outer one all patches."""
    if geometry.module is not self.attn_in:  # (batch, class token and patches, channels)
        return geometry.tokens(geometry.block_argument(self, "patch_embed")[1], prefix=True)
    pixels = geometry.find_holder("pixel_embed").pixel_embed.new_patch_size
    _, tokens, _ = geometry.block_argument(self, "patch_embed")
    rows, columns = geometry.tokens(tokens, prefix=True).grid_size
    # the inner grid covers the image too: a window of it is a patch
    return cut_windows((rows * pixels[0], columns * pixels[1]), pixels)
