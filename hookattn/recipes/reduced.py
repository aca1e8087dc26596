"""Fewer keys than tokens, or fewer queries: pooled, strided or shared between heads.

Wang et al. 2021, "Pyramid Vision Transformer", arXiv 2102.12122; Ryali et al. 2023, "Hiera", arXiv 2306.00989; Shazeer 2019,
arXiv 1911.02150, for one key that all heads share.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from ..functional import QK
from .plain import additive_or_bool
from .projections import project, project_heads, scale_of
from .registry import recipe


@recipe("timm.models.pvt_v2.Attention")
def pvt_v2_attention(self: Any, x: Tensor, feat_size: list[int]) -> QK:
    q = project_heads(self.q, x, self.num_heads)
    if self.pool is not None:
        x = self.act(self.norm(flat(self.sr(self.pool(unflat(x, feat_size))))))
    elif self.sr is not None:
        x = self.norm(flat(self.sr(unflat(x, feat_size))))
    (k,) = project(self.kv, x, "b n (parts h d) -> parts b h n d", parts=1, of=2, h=self.num_heads)
    return QK(q, k, scale=scale_of(self))


@recipe("timm.models.twins.GlobalSubSampleAttn")
def global_sub_sample_attention(self: Any, x: Tensor, size: tuple[int, int]) -> QK:
    q = project_heads(self.q, x, self.num_heads)
    if self.sr is not None:
        x = self.norm(flat(self.sr(unflat(x, size))))
    (k,) = project(self.kv, x, "b n (parts h d) -> parts b h n d", parts=1, of=2, h=self.num_heads)
    return QK(q, k, scale=scale_of(self))


@recipe("timm.models.nextvit.EfficientAttention")
def nextvit_attention(self: Any, x: Tensor) -> QK:
    q = project_heads(self.q, x, self.num_heads)
    if self.sr is not None:
        x = rearrange(self.norm(self.sr(rearrange(x, "b n c -> b c n"))), "b c n -> b n c")
    k = project_heads(self.k, x, self.num_heads)
    return QK(q, k, scale=scale_of(self))


@recipe("timm.layers.attention2d.MultiQueryAttention2d")
def multi_query_attention_2d(self: Any, x: Tensor, attn_mask: Tensor | None = None) -> QK:
    q = rearrange(self.query(x), "b (h d) y x -> b h (y x) d", h=self.num_heads)
    k = repeat(flat(self.key(x)), "b n d -> b h n d", h=self.num_heads)
    return QK(q, k, scale=scale_of(self), **additive_or_bool(attn_mask))


@recipe("timm.layers.attention2d.MultiQueryAttentionV2", form="b q h k")
def multi_query_attention_v2(self: Any, x: Tensor, m: Tensor | None = None) -> QK:
    q = torch.einsum("bnc,hdc->bhnd", flat(x), self.query_proj)
    k = torch.einsum("bnc,cd->bnd", flat(x if m is None else m), self.key_proj)
    return QK(q, repeat(k, "b n d -> b h n d", h=self.num_heads), scale=scale_of(self))


@recipe("timm.models.hiera.MaskUnitAttention", form="b h w q k")
def mask_unit_attention(self: Any, x: Tensor) -> QK:
    """Tokens come unrolled: the tokens that are pooled into one query lie `windows * window_size` apart."""
    windows = x.shape[1] // (self.q_stride * self.window_size) if self.use_mask_unit_attn else 1
    pattern = "b (n w) (parts h d) -> parts (b w) h n d"
    q, k = project(self.qkv, x, pattern, parts=2, of=3, h=self.heads, w=windows)
    if self.q_stride > 1:
        q = rearrange(q, "b h (stride n) d -> b h stride n d", stride=self.q_stride).amax(2)
    return QK(q, k, scale=scale_of(self))


@recipe("timm.models.hieradet_sam2.MultiScaleAttention")
def hieradet_attention(self: Any, x: Tensor) -> QK:
    q, k = project(self.qkv, x, "b y x (parts c) -> parts b y x c", parts=2, of=3)
    if self.q_pool is not None:
        q = rearrange(self.q_pool(rearrange(q, "b y x c -> b c y x")), "b c y x -> b y x c")
    q, k = (rearrange(t, "b y x (h d) -> b h (y x) d", h=self.num_heads) for t in (q, k))
    return QK(q, k, scale=scale_of(self))


@recipe("timm.models.cpubone.ConvAttention", "timm.models.lowformer.ConvAttention")
def conv_attention(self: Any, x: Tensor) -> QK:
    """A strided convolution makes fewer tokens of all three, queries too."""
    if getattr(self, "small_kernels", False) and self.att_stride > 1:
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % self.att_stride, 0, -height % self.att_stride))
    pattern = "b (h parts d) y x -> parts b h (y x) d"
    q, k = project(self.pwise, self.conv_proj(x), pattern, parts=2, of=3, h=self.num_heads)
    return QK(q, k, scale=scale_of(self))


def flat(x: Tensor) -> Tensor:
    """(batch, channels, height, width) as tokens, row by row."""
    return rearrange(x, "b c y x -> b (y x) c")


def unflat(x: Tensor, size: list[int] | tuple[int, int]) -> Tensor:
    """(batch, tokens, channels) on its grid of (height, width)."""
    return rearrange(x, "b (y x) c -> b c y x", y=size[0], x=size[1])
