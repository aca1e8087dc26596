"""Attention of timm by what is moved in its input: where a place is found, and how queries and keys are named for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from support.image import DAVIT, GEMMA, MAXVIT, MVIT, SAM, SHRUNK, SWIN, VIT, Place, Size


def nhwc(x: Tensor, image: int, place: Place) -> Tensor:
    return x[image, place[0], place[1]]


def nchw(x: Tensor, image: int, place: Place) -> Tensor:
    return x[image, :, place[0], place[1]]


def tokens(columns: int, prefix: int = 0) -> Callable[[Tensor, int, Place], Tensor]:
    return lambda x, image, place: x[image, prefix + place[0] * columns + place[1]]


def patches(side: int) -> Callable[[Tensor, int, Place], Tensor]:
    return lambda x, image, place: x[image, :, place[0] * side :, place[1] * side :][:, :side, :side]


class Case(NamedTuple):
    """One attention of one model.

    Attributes:
        model: the name of a model of timm, or of a class that is `inner` of a module.
        size: of the images, or shape of what the class is called with.
        site: what is moved: what goes into the "attention", the "block" that holds it, the model ("image"), or see `moving`.
        part: how a place of it is found.
        grid: rows and columns of the places there.
        queries, keys: how a place is named: "same" by itself, "cell 2" by the cell of 2 x 2 places it is in, "every 2" by the
            cell it is the first of, "near 2" likewise by the cell of 2 x 2, though those next to it move as well; "none" if
            queries are not looked at.
        more: what the class is called with besides.
    """

    model: str
    options: dict[str, Any]
    size: tuple[int, ...]
    attention: str
    site: str
    part: Callable[[Tensor, int, Place], Tensor]
    grid: Size
    queries: str = "same"
    keys: str = "same"
    more: tuple[Any, ...] = ()


SVT: dict[str, Any] = {"embed_dims": [16, 32, 64, 128], "num_heads": [1, 2, 4, 8], "depths": [1, 1, 1, 2]}


HIERA: dict[str, Any] = {"img_size": (64, 96), "embed_dim": 24, "stages": [1, 1, 2, 1]}


PARTITION = ("timm.models.maxxvit.MaxxVitTransformerCfg", {"window_size": (2, 3), "grid_size": (2, 3)})


GCVIT: dict[str, Any] = {"dim": 16, "feat_size": (8, 12), "num_heads": 2, "window_size": 4}


METAFORMER: dict[str, Any] = {"token_mixer": "timm.models.metaformer.Attention", "norm_layer": "torch.nn.LayerNorm"}


def alone(
    cls: str,
    options: dict[str, Any],
    shape: tuple[int, ...],
    part: Callable[[Tensor, int, Place], Tensor],
    attention: str = "inner",
    site: str = "attention",
    grid: tuple[int, ...] | None = None,
    **more: Any,
) -> Case:
    """A case of one class of timm, called with a grid of its own."""
    rows, columns = grid or (shape[1:3] if part is nhwc else shape[2:])
    return Case(f"timm.{cls}", options, shape, attention, site, part, (rows, columns), **more)


CASES: dict[str, Case] = {
    # windows that a block cuts
    "swin": Case(
        "swin_tiny_patch4_window7_224",
        SWIN | {"img_size": (40, 72)},
        (40, 72),
        "layers.0.blocks.0.attn",
        "patch_embed:out",
        nhwc,
        (10, 18),
    ),
    "swin shifted": Case(
        "swin_tiny_patch4_window7_224",
        SWIN | {"img_size": (40, 72)},
        (40, 72),
        "layers.0.blocks.1.attn",
        "block",
        nhwc,
        (10, 18),
    ),
    "swin any size": Case(
        "swin_tiny_patch4_window7_224",
        SWIN | {"img_size": 64, "strict_img_size": False},
        (52, 88),
        "layers.0.blocks.1.attn",
        "block",
        nhwc,
        (13, 22),
    ),
    "swin always cut": Case(
        "swin_tiny_patch4_window7_224",
        SWIN | {"img_size": (32, 48), "always_partition": True, "window_size": 8},
        (32, 48),
        "layers.1.blocks.1.attn",
        "block",
        nhwc,
        (4, 6),
    ),
    "swin v2 shifted": Case(
        "swinv2_tiny_window8_256", SWIN | {"img_size": (64, 96)}, (64, 96), "layers.0.blocks.1.attn", "block", nhwc, (16, 24)
    ),
    "swin v2 cr shifted": Case(
        "swinv2_cr_tiny_224", SWIN | {"img_size": (64, 96)}, (64, 96), "stages.0.blocks.1.attn", "block", nhwc, (16, 24)
    ),
    "maxvit block": Case("test_maxvit", MAXVIT, (64, 96), "stages.0.blocks.0.attn_block.attn", "block", nhwc, (16, 24)),
    "maxvit grid": Case("test_maxvit", MAXVIT, (64, 96), "stages.0.blocks.0.attn_grid.attn", "block", nhwc, (16, 24)),
    "maxvit parallel block": alone(
        "models.maxxvit.ParallelPartitionAttention",
        {"dim": 64, "cfg": PARTITION},
        (1, 8, 9, 64),
        nhwc,
        "inner.attn_block",
        site="block",
    ),
    "maxvit parallel grid": alone(
        "models.maxxvit.ParallelPartitionAttention",
        {"dim": 64, "cfg": PARTITION},
        (1, 8, 9, 64),
        nhwc,
        "inner.attn_grid",
        site="block",
    ),
    "maxvit channels first, block": alone(
        "models.maxxvit.PartitionAttention2d",
        {"dim": 32, "partition_type": "block", "cfg": PARTITION},
        (1, 32, 8, 9),
        nchw,
        "inner.attn",
        site="block",
    ),
    "maxvit channels first, grid": alone(
        "models.maxxvit.PartitionAttention2d",
        {"dim": 32, "partition_type": "grid", "cfg": PARTITION},
        (1, 32, 8, 9),
        nchw,
        "inner.attn",
        site="block",
    ),
    "sam": Case(
        "samvit_base_patch16_224", SAM | {"img_size": (96, 112)}, (96, 112), "blocks.0.attn", "patch_embed:out", nhwc, (6, 7)
    ),
    "sam global": Case(
        "samvit_base_patch16_224", SAM | {"img_size": (96, 112)}, (96, 112), "blocks.1.attn", "block", nhwc, (6, 7)
    ),
    "davit": Case(
        "davit_tiny", DAVIT, (64, 96), "stages.0.blocks.0.0.attn", "stages.0.blocks.0.0.norm1:out", tokens(24), (16, 24)
    ),
    "gcvit": alone(
        "models.gcvit.GlobalContextVitBlock", GCVIT | {"use_global": False}, (1, 8, 12, 16), nhwc, "inner.attn", site="block"
    ),
    "gcvit, global query": alone(
        "models.gcvit.GlobalContextVitBlock",
        GCVIT,
        (1, 8, 12, 16),
        nhwc,
        "inner.attn",
        site="block",
        queries="none",
        more=(torch.ones(7, 4, 4, 16),),
    ),
    "tiny_vit": alone(
        "models.tiny_vit.TinyVitBlock",
        {"dim": 16, "num_heads": 2, "window_size": 4},
        (1, 6, 9, 16),
        nhwc,
        "inner.attn",
        site="block",
    ),
    "tiny_vit, one window": alone(
        "models.tiny_vit.TinyVitBlock",
        {"dim": 16, "num_heads": 2, "window_size": 4},
        (1, 4, 4, 16),
        nhwc,
        "inner.attn",
        site="block",
    ),
    "efficientvit_msra": alone(
        "models.efficientvit_msra.LocalWindowAttention",
        {"dim": 32, "key_dim": 8, "num_heads": 2, "attn_ratio": 2, "resolution": 10, "window_resolution": 7, "kernels": (3, 3)},
        (1, 32, 10, 10),
        nchw,
        "inner.attn",
        site="block",
        queries="none",
    ),
    "efficientvit_msra, one window": alone(
        "models.efficientvit_msra.LocalWindowAttention",
        {"dim": 32, "key_dim": 8, "num_heads": 2, "attn_ratio": 2, "resolution": 5, "window_resolution": 7, "kernels": (3, 3)},
        (1, 32, 5, 5),
        nchw,
        "inner.attn",
        site="block",
        queries="none",
    ),
    "nest": alone(
        "models.nest.Nest",
        {"img_size": 64, "embed_dims": (24, 48, 96), "depths": (1, 1, 1)},
        (1, 3, 64, 64),
        nchw,
        "inner.levels.1.transformer_encoder.0.attn",
        site="inner.levels.1.pool:out",
        grid=(8, 8),
    ),
    "nest, same padding": alone(
        "models.nest.Nest",
        {"img_size": 64, "embed_dims": (24, 48, 96), "depths": (1, 1, 1), "pad_type": "same"},
        (1, 3, 64, 64),
        nchw,
        "inner.levels.1.transformer_encoder.0.attn",
        site="inner.levels.1.pool:out",
        grid=(8, 8),
    ),
    "mobilevit": alone(
        "models.mobilevit.MobileVitBlock",
        {"in_chs": 16, "patch_size": 2, "transformer_depth": 1},
        (1, 16, 8, 12),
        nchw,
        "inner.transformer.0.attn",
        site="inner.conv_1x1:out",
    ),
    "hieradet": Case("sam2_hiera_tiny", {"embed_dim": 16}, (64, 96), "blocks.0.attn", "block", nhwc, (16, 24)),
    "hieradet pooled": Case(
        "sam2_hiera_tiny", {"embed_dim": 16}, (64, 96), "blocks.1.attn", "block", nhwc, (16, 24), queries="cell 2"
    ),
    "hieradet pooled and padded": Case(
        "sam2_hiera_tiny", {"embed_dim": 16}, (64, 96), "blocks.10.attn", "block", nhwc, (4, 6), queries="cell 2"
    ),
    "hieradet, odd": alone(
        "models.hieradet_sam2.MultiScaleBlock",
        {"dim": 16, "dim_out": 32, "num_heads": 2, "q_stride": (2, 2), "window_size": 4},
        (1, 11, 15, 16),
        nhwc,
        "inner.attn",
        site="block",
        queries="cell 2",
    ),
    "tnt outer": Case(
        "tnt_s_legacy_patch16_224",
        {"img_size": (64, 96), "depth": 1},
        (64, 96),
        "blocks.0.attn_out",
        "blocks.0.norm_out:out",
        tokens(6, 1),
        (4, 6),
    ),
    "csatv2": Case("csatv2", {}, (128, 192), "stages.2.7.attn", "stages.2.7.pos_embed:out", tokens(6), (4, 6)),
    "pit": Case("pit_ti_224", {"img_size": (64, 96)}, (64, 96), "transformers.1.blocks.0.attn", "block", tokens(6, 1), (4, 6)),
    "metaformer": alone(
        "models.metaformer.MetaFormerStage",
        METAFORMER | {"in_chs": 16, "out_chs": 32, "depth": 1},
        (1, 16, 9, 13),
        tokens(7),
        "inner.blocks.0.token_mixer",
        site="block",
        grid=(5, 7),
    ),
    "nextvit": alone(
        "models.nextvit.NextTransformerBlock",
        {"in_chs": 64, "out_chs": 128, "drop_path": 0.0, "stride": 2, "sr_ratio": 2},
        (1, 64, 13, 18),
        nchw,
        "inner.e_mhsa",
        site="inner.norm1:out",
        grid=(7, 9),
    ),
    # windows that an attention cuts
    "twins groups": Case(
        "twins_svt_small", SVT | {"img_size": (64, 96)}, (64, 96), "blocks.0.0.attn", "block", tokens(24), (16, 24)
    ),
    "iformer": alone("models.iformer.SHMA", {"dim": 16}, (1, 16, 6, 9), nchw),
    "iformer windows": alone("models.iformer.SHMA", {"dim": 16, "window_size": 4}, (1, 16, 6, 9), nchw),
    "halo": alone(
        "layers.halo_attn.HaloAttn", {"dim": 16, "num_heads": 2, "block_size": 4, "halo_size": 2}, (1, 16, 8, 12), nchw
    ),
    "halo strided": alone(
        "layers.halo_attn.HaloAttn",
        {"dim": 16, "num_heads": 2, "block_size": 4, "halo_size": 1, "stride": 2},
        (1, 16, 8, 12),
        nchw,
        queries="every 2",
    ),
    "hiera": Case("hiera_tiny_224", HIERA, (64, 96), "blocks.0.attn", "patch_embed:out", tokens(24), (16, 24)),
    # all of a grid, keys or queries pooled
    "mvit": alone(
        "models.mvitv2.MultiScaleAttention",
        MVIT | {"kernel_kv": (3, 3), "stride_kv": (4, 4)},
        (1, 1 + 8 * 12, 16),
        tokens(12, 1),
        grid=(8, 12),
        keys="near 4",
        more=([8, 12],),
    ),
    "mvit pooled": alone(
        "models.mvitv2.MultiScaleAttention",
        MVIT | {"kernel_q": (3, 3), "stride_q": (2, 2), "kernel_kv": (3, 3), "stride_kv": (2, 2), "has_cls_token": False},
        (1, 7 * 12, 16),
        tokens(12),
        grid=(7, 12),
        queries="near 2",
        keys="near 2",
        more=([7, 12],),
    ),
    "pvt": Case("pvt_v2_b0", SHRUNK, (96, 128), "stages.0.blocks.0.attn", "block", tokens(32), (24, 32), keys="cell 8"),
    "pvt, a rest": Case("pvt_v2_b0", SHRUNK, (80, 112), "stages.1.blocks.0.attn", "block", tokens(14), (10, 14), keys="cell 4"),
    "pvt linear": Case(
        "pvt_v2_b2_li", SHRUNK, (112, 168), "stages.0.blocks.0.attn", "block", tokens(42), (28, 42), keys="cell 4 6"
    ),
    "twins sub-sampled": Case(
        "twins_pcpvt_small",
        SHRUNK | {"img_size": (64, 96)},
        (64, 96),
        "blocks.0.0.attn",
        "block",
        tokens(24),
        (16, 24),
        keys="cell 8",
    ),
    "mobilenet v4": alone(
        "layers.attention2d.MultiQueryAttention2d",
        {"dim": 16, "num_heads": 2, "kv_stride": 2},
        (1, 16, 7, 12),
        nchw,
        keys="near 2",
    ),
    "mobilenet v4, queries pooled": alone(
        "layers.attention2d.MultiQueryAttention2d",
        {"dim": 16, "num_heads": 2, "kv_stride": 2, "query_strides": 2, "padding": "same"},
        (1, 16, 8, 12),
        nchw,
        queries="cell 2",
        keys="near 2",
    ),
    "efficientformer v2": alone(
        "models.efficientformer_v2.Attention2d",
        {"dim": 16, "key_dim": 8, "num_heads": 2, "resolution": (7, 12), "stride": 2},
        (1, 16, 7, 12),
        nchw,
        queries="near 2",
        keys="near 2",
    ),
    "efficientformer v2 down": alone(
        "models.efficientformer_v2.Attention2dDownsample",
        {"dim": 16, "key_dim": 8, "num_heads": 2, "resolution": (7, 12)},
        (1, 16, 7, 12),
        nchw,
        queries="near 2",
    ),
    "levit": Case("levit_128s", {"img_size": (96, 160)}, (96, 160), "stages.0.blocks.0.attn", "attention", tokens(10), (6, 10)),
    "levit down": Case(
        "levit_128s",
        {"img_size": (96, 160)},
        (96, 160),
        "stages.2.downsample.attn_downsample",
        "attention",
        tokens(5),
        (3, 5),
        queries="every 2",
    ),
    "levit conv down": alone(
        "models.levit.AttentionDownsample",
        {"in_dim": 16, "out_dim": 16, "key_dim": 8, "num_heads": 2, "resolution": (3, 5), "use_conv": True},
        (1, 16, 3, 5),
        nchw,
        queries="every 2",
    ),
    "lowformer": alone(
        "models.lowformer.ConvAttention",
        {"input_dim": 32, "att_stride": 2, "att_kernel": 5},
        (1, 32, 7, 12),
        nchw,
        queries="near 2",
        keys="near 2",
    ),
    "cpubone": alone(
        "models.cpubone.ConvAttention",
        {"input_dim": 32, "att_stride": 2, "small_kernels": True},
        (1, 32, 7, 11),
        nchw,
        queries="cell 2",
        keys="cell 2",
    ),
    # all of a grid
    "coatnet": Case("test_coatnet", {"img_size": (64, 96)}, (64, 96), "stages.2.blocks.0.attn", "attention", nchw, (4, 6)),
    "fastvit": alone("models.fastvit.Attention", {"dim": 64}, (1, 64, 4, 6), nchw),
    "visformer": alone("models.visformer.Attention", {"dim": 64}, (1, 64, 4, 6), nchw),
    "botnet": alone("layers.bottleneck_attn.BottleneckAttn", {"dim": 32, "feat_size": (4, 6)}, (1, 32, 4, 6), nchw),
    "attention 2d": alone("layers.attention2d.Attention2d", {"dim": 32, "num_heads": 2}, (1, 32, 4, 6), nchw),
    "volo": alone("models.volo.Attention", {"dim": 32}, (1, 4, 6, 32), nhwc),
    # all tokens of the image
    "vit": Case("vit_tiny_patch16_224", VIT | {"img_size": (64, 96)}, (64, 96), "blocks.0.attn", "image", patches(16), (4, 6)),
    "eva": Case(
        "eva02_base_patch16_clip_224", VIT | {"img_size": (64, 96)}, (64, 96), "blocks.0.attn", "image", patches(16), (4, 6)
    ),
    "beit": Case(
        "beit_base_patch16_224", VIT | {"img_size": (64, 96)}, (64, 96), "blocks.0.attn", "image", patches(16), (4, 6)
    ),
    "cait": Case("cait_xxs24_224", {"img_size": (64, 96), "depth": 1}, (64, 96), "blocks.0.attn", "image", patches(16), (4, 6)),
    "convit": Case(
        "convit_tiny",
        {"img_size": 64, "depth": 2, "local_up_to_layer": 1},
        (64, 64),
        "blocks.0.attn",
        "image",
        patches(16),
        (4, 4),
    ),
    "gemma 4": Case("gemma4_vit_167m", VIT | GEMMA, (96, 144), "encoder.blocks.0.attn", "image", patches(16), (6, 9)),
    "naflex": Case("naflexvit_base_patch16_map", VIT, (64, 96), "blocks.0.attn", "image", patches(16), (4, 6)),
}
