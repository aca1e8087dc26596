"""Classes whose input is a grid itself, or that are told its size: all of it is one window.

A pooled axis has a coarser grid of its own over the image, as large as the pooling makes it. Where its cells do not tile the
image (an odd number of rows that is halved, padding), the coarser grid is taken to cover the image all the same, so that a cell
may lie up to half a cell off on a picture.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import TokenError
from ..tokens import Tokens, whole
from .registry import Shape, layout, partition, received
from .setting import Setting
from .sizes import pair, size_after


@layout(
    "timm.models.maxxvit.Attention2d",
    "timm.models.fastvit.Attention",
    "timm.models.visformer.Attention",
    "timm.models.shvit.SHSA",
    "timm.layers.bottleneck_attn.BottleneckAttn",
    "timm.layers.attention2d.Attention2d",
)
def channels_first(setting: Setting, shape: Shape) -> tuple[Tokens, Tokens]:
    tokens = received(setting, lambda: whole(setting.argument("x")[2:]))
    return tokens, tokens


@layout("timm.models.volo.Attention", "timm.models.vision_transformer_sam.Attention", "timm.models.maxxvit.AttentionCl")
def channels_last(setting: Setting, shape: Shape) -> tuple[Tokens, Tokens]:
    tokens = received(setting, lambda: whole(setting.argument("x")[1:-1]))
    return tokens, tokens


@layout("timm.layers.attention_pool2d.AttentionPool2d", "timm.layers.attention_pool2d.RotAttentionPool2d")
def attention_pool_2d(setting: Setting, shape: Shape) -> tuple[Tokens, Tokens]:
    """One token more comes first: a class token, or the mean of all the others, which is called "pool"."""
    first = "pool" if setting.module.cls_token is None else "cls"
    tokens = whole(setting.argument("x")[2:], (first,))
    return tokens, tokens


@layout("timm.models.cpubone.ConvAttention", "timm.models.lowformer.ConvAttention")
def conv_attention(setting: Setting, shape: Shape) -> tuple[Tokens, Tokens]:
    """A strided convolution makes fewer tokens of all three, queries too."""
    self = setting.module
    rows, columns = setting.argument("x")[2:]
    if getattr(self, "small_kernels", False) and self.att_stride > 1:
        rows, columns = rows + -rows % self.att_stride, columns + -columns % self.att_stride
    tokens = whole(size_after((rows, columns), self.conv_proj))
    return tokens, tokens


@layout("timm.layers.attention2d.MultiQueryAttention2d")
def multi_query_attention_2d(setting: Setting, shape: Shape) -> tuple[Tokens, Tokens]:
    size = setting.argument("x")[2:]
    return whole(size_after(size, setting.module.query)), whole(size_after(size, setting.module.key))


@layout("timm.layers.attention2d.MultiQueryAttentionV2")
def multi_query_attention_v2(setting: Setting, shape: Shape) -> tuple[Tokens, Tokens]:
    size, other = setting.argument("x")[2:], setting.argument("m")
    return whole(size), whole(size if other is None else other[2:])


@layout("timm.models.efficientformer_v2.Attention2d")
def efficientformer_v2_attention(setting: Setting, shape: Shape) -> tuple[Tokens, Tokens]:
    tokens = whole(size_after(setting.argument("x"), setting.module.stride_conv))
    return tokens, tokens


@layout("timm.models.efficientformer_v2.Attention2dDownsample")
def efficientformer_v2_downsample(setting: Setting, shape: Shape) -> tuple[Tokens, Tokens]:
    size = setting.argument("x")[2:]
    return whole(size_after(size, setting.module.q.pool)), whole(size)


@layout("timm.models.levit.Attention")
def levit_attention(setting: Setting, shape: Shape) -> tuple[Tokens, Tokens]:
    tokens = at_resolution(setting)
    return tokens, tokens


@layout("timm.models.levit.AttentionDownsample")
def levit_attention_downsample(setting: Setting, shape: Shape) -> tuple[Tokens, Tokens]:
    """A query is every `stride`-th token, or the mean around it."""
    keys, stride = at_resolution(setting), setting.module.stride
    rows, columns = keys.grid_size
    return whole((-(-rows // stride), -(-columns // stride))), keys


def at_resolution(setting: Setting) -> Tokens:
    """All tokens on the grid that a module is made for, if the image gives that grid too."""
    x, (rows, columns) = setting.argument("x"), pair(setting.module.resolution)
    if len(x) == 4:
        return whole(x[2:])
    if setting.images is not None and setting.tokens(x[1], prefix=False).grid_size != (rows, columns):
        raise TokenError(
            f"{setting.name!r} is made for a grid of {rows} x {columns}, which is not the one an image of this size makes; "
            "slice the map itself, m[...]."
        )
    return whole((rows, columns))


@layout("timm.models.pvt_v2.Attention")
def pvt_v2_attention(setting: Setting, shape: Shape) -> tuple[Tokens, Tokens]:
    size = setting.argument("feat_size")
    return whole(size), whole(size_after(size, setting.module.pool, setting.module.sr))


@layout("timm.models.twins.GlobalSubSampleAttn")
def global_sub_sample_attention(setting: Setting, shape: Shape) -> tuple[Tokens, Tokens]:
    size = setting.argument("size")
    return whole(size), whole(size_after(size, setting.module.sr))


@layout("timm.models.mvitv2.MultiScaleAttention", "timm.models.mvitv2.MultiScaleAttentionPoolFirst")
def multi_scale_attention(setting: Setting, shape: Shape) -> tuple[Tokens, Tokens]:
    self, size = setting.module, setting.argument("feat_size")
    prefix = ("cls",) if self.has_cls_token else ()
    return whole(size_after(size, self.pool_q), prefix), whole(size_after(size, self.pool_k), prefix)


@partition("timm.models.nextvit.NextTransformerBlock")
def next_transformer_block(self: Any, setting: Setting) -> Tokens:
    return whole(size_after(setting.block_argument(self, "x"), self.patch_embed))


@layout("timm.models.nextvit.EfficientAttention")
def nextvit_attention(setting: Setting, shape: Shape) -> tuple[Tokens, Tokens]:
    """A key is the mean of so many tokens one after the other, which are seldom a square; each of them gets its share.

    Tokens that are left over at the end of the image are in no key.
    """
    queries, run = received(setting, lambda: setting.tokens(shape[2], prefix=False)), setting.module.N_ratio
    if setting.module.sr is None:
        return queries, queries
    places = torch.arange(shape[2] // run * run)[None, None]
    return queries, Tokens((), queries.grid_size, places, spread=run)
