"""A small timm model for every mechanism that has a recipe, with every parameter moved."""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import timm
import torch
from torch import Tensor, nn

from hookattn import AttentionMap, AttentionRecorder
from support.inside import call_of
from support.models import enliven
from support.oracle import exists, short_name

# name of a test: (timm model, arguments, input size, classes whose maps are compared)
SMALL: dict[str, Any] = {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4]}
DAVIT: dict[str, Any] = {"depths": [1, 1, 1, 1], "embed_dims": [16, 32, 48, 64], "num_heads": [1, 2, 3, 4]}
PYRAMID: dict[str, Any] = {"depths": [1, 1, 1, 1], "embed_dims": [16, 32, 40, 64], "num_heads": [1, 2, 5, 8]}
SVT: dict[str, Any] = {"depths": [1, 1, 1, 2], "embed_dims": [16, 32, 64, 128], "num_heads": [1, 2, 4, 8], "img_size": 64}
SAM: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3, "window_size": 4, "global_attn_indexes": [1]}
GEMMA: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3, "head_dim": 16, "intermediate_size": 96}
LEVIT: dict[str, Any] = {"img_size": 128, "embed_dim": (32, 32, 32), "num_heads": (2, 2, 2), "depth": (1, 1, 1)}
MVIT = ("timm.models.mvitv2.MultiScaleVitCfg", {"depths": (1, 1, 1, 1), "embed_dim": 24})
NORMS = ("timm.models.metaformer.LayerNorm2dNoBias",) * 2 + ("timm.models.metaformer.LayerNormNoBias",) * 2
MIXERS = ("timm.models.metaformer.SepConv",) * 2 + ("timm.models.metaformer.Attention",) * 2
CAFORMER: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (16, 32, 64, 64), "token_mixers": MIXERS, "norm_layers": NORMS}
MODELS: dict[str, tuple[str, dict[str, Any], int, tuple[str, ...]]] = {
    "swin": ("swin_tiny_patch4_window7_224", SMALL, 64, ("swin_transformer.WindowAttention",)),
    "swin_v2": ("swinv2_tiny_window8_256", SMALL, 64, ("swin_transformer_v2.WindowAttention",)),
    "swin_v2_cr": ("swinv2_cr_tiny_224", SMALL, 64, ("swin_transformer_v2_cr.WindowMultiHeadAttention",)),
    "davit": ("davit_tiny", DAVIT, 64, ("davit.WindowAttention", "davit.ChannelAttention")),
    "davit_v2": ("davit_base_fl", DAVIT, 64, ("davit.ChannelAttentionV2",)),
    "twins_svt": ("twins_svt_small", SVT, 64, ("twins.LocallyGroupedAttn", "twins.GlobalSubSampleAttn")),
    "twins_pcpvt": ("twins_pcpvt_small", {**PYRAMID, "img_size": 64}, 64, ("twins.GlobalSubSampleAttn",)),
    "efficientvit": ("efficientvit_m0", {}, 224, ("efficientvit_msra.CascadedGroupAttention",)),
    "nest": (
        "timm.models.nest.Nest",
        {"img_size": 64, "embed_dims": (24, 48, 96), "depths": (1, 1, 1), "num_heads": (2, 3, 4)},
        64,
        ("nest.Attention",),
    ),
    "maxvit": ("test_maxvit", {"img_size": 64}, 64, ("maxxvit.AttentionCl",)),
    "coatnet": ("test_coatnet", {"img_size": 64}, 64, ("maxxvit.Attention2d",)),
    "pvt_v2": ("pvt_v2_b0", PYRAMID, 64, ("pvt_v2.Attention",)),
    "pvt_v2_linear": ("pvt_v2_b2_li", PYRAMID, 64, ("pvt_v2.Attention",)),
    "mqa": ("mobilenetv4_hybrid_medium_075", {}, 64, ("attention2d.MultiQueryAttention2d",)),
    "nextvit": ("nextvit_small", {"depths": (1, 1, 5, 1)}, 64, ("nextvit.EfficientAttention",)),
    "hiera": ("hiera_tiny_224", {"img_size": 64, "embed_dim": 24, "stages": [1, 1, 2, 1]}, 64, ("hiera.MaskUnitAttention",)),
    "hieradet": ("sam2_hiera_tiny", {"embed_dim": 16}, 64, ("hieradet_sam2.MultiScaleAttention",)),
    "cpubone": ("cpubone_nano", {}, 128, ("cpubone.ConvAttention",)),
    "lowformer": ("lowformer_b0", {"width_list": (8, 16, 16, 32, 64)}, 128, ("lowformer.ConvAttention",)),
    "sam": ("samvit_base_patch16_224", {**SAM, "img_size": 96}, 96, ("vision_transformer_sam.Attention",)),
    "mvit": ("timm.models.mvitv2.MultiScaleVit", {"cfg": MVIT, "img_size": (64, 64)}, 64, ("mvitv2.MultiScaleAttention",)),
    "halo": ("halonet26t", {"width_factor": 0.25}, 256, ("halo_attn.HaloAttn",)),
    "botnet": ("botnet26t_256", {"img_size": 64, "width_factor": 0.25}, 64, ("bottleneck_attn.BottleneckAttn",)),
    "cait": ("cait_xxs24_224", {"img_size": 64, "depth": 2, "embed_dim": 64}, 64, ("cait.TalkingHeadAttn", "cait.ClassAttn")),
    "efficientformer_v2": (
        "efficientformerv2_s0",
        {"img_size": 64, "depths": (1, 1, 3, 3), "embed_dims": (16, 24, 32, 48)},
        64,
        ("efficientformer_v2.Attention2d", "efficientformer_v2.Attention2dDownsample"),
    ),
    "convit": ("convit_tiny", {"img_size": 64, "depth": 3, "local_up_to_layer": 2}, 64, ("convit.GPSA", "convit.MHSA")),
    "xcit": ("xcit_nano_12_p16_224", {"depth": 2}, 64, ("xcit.XCA", "cait.ClassAttn")),
    "crossvit": (
        "crossvit_tiny_240",
        {"img_size": 120, "depth": [[1, 1, 0]], "embed_dim": (32, 64), "num_heads": (2, 2)},
        120,
        ("crossvit.CrossAttention",),
    ),
    "volo": (
        "timm.models.volo.VOLO",
        {"layers": (1, 1, 1, 1), "img_size": 64, "embed_dims": (24, 48, 48, 48), "num_heads": (2, 4, 4, 4)},
        64,
        ("volo.OutlookAttention", "volo.Attention", "volo.ClassAttention"),
    ),
    "latent": ("test_vit3", {"img_size": 64}, 64, ("attention_pool.AttentionPoolLatent",)),
    "prr": ("test_vit", {"global_pool": "prr"}, 64, ("attention_pool.AttentionPoolPrr",)),
    "fastvit": ("fastvit_mci0", {"layers": (1, 1, 1, 1), "embed_dims": (16, 32, 64, 128)}, 128, ("fastvit.Attention",)),
    "visformer": (
        "visformer_tiny",
        {"img_size": 64, "embed_dim": 48, "num_heads": 3, "depth": 2},
        64,
        ("visformer.Attention",),
    ),
    "iformer": ("iformer_t", {"dims": (16, 32, 48, 64)}, 64, ("iformer.SHMA",)),
    "shvit": ("shvit_s1", {"embed_dim": (64, 80, 96), "partial_dim": (16, 16, 16)}, 128, ("shvit.SHSA",)),
    "tiny_vit": (
        "tiny_vit_5m_224",
        {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4)},
        64,
        ("tiny_vit.Attention",),
    ),
    "efficientformer": (
        "efficientformer_l1",
        {"depths": (1, 1, 1, 2), "embed_dims": (16, 32, 48, 96)},
        224,
        ("efficientformer.Attention",),
    ),
    "levit": ("levit_128s", LEVIT, 128, ("levit.Attention", "levit.AttentionDownsample")),
    "levit_conv": ("levit_conv_128s", LEVIT, 128, ("levit.Attention", "levit.AttentionDownsample")),
    "edgenext": (
        "edgenext_xx_small",
        {"depths": (1, 2, 2, 2), "dims": (16, 32, 48, 64)},
        64,
        ("edgenext.CrossCovarianceAttn",),
    ),
    "caformer": ("timm.models.metaformer.MetaFormer", CAFORMER, 64, ("metaformer.Attention",)),
    "tnt": (
        "tnt_s_legacy_patch16_224",
        {"img_size": 64, "depth": 2, "embed_dim": 96, "num_heads_outer": 3},
        64,
        ("tnt.Attention",),
    ),
    "gemma4": (
        "gemma4_vit_167m",
        {**GEMMA, "img_size": 96, "position_embedding_size": 64},
        96,
        ("gemma4_vit.Gemma4Attention",),
    ),
}

MODELS = {
    name: case for name, case in MODELS.items() if timm.is_model(case[0]) or ("." in case[0] and exists(case[0]))
}  # older timm has fewer


def made(option: Any) -> Any:
    """A class for its name, an object for the name of its class and arguments; also in tuples."""
    if isinstance(option, tuple) and len(option) == 2 and isinstance(option[1], dict):
        return made(option[0])(**option[1])
    if isinstance(option, tuple):
        return tuple(made(part) for part in option)
    if isinstance(option, str) and "." in option:
        module, _, name = option.rpartition(".")
        return getattr(importlib.import_module(module), name)
    return option


def moved(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """A model whose parameters are moved, and images for it."""
    architecture, arguments, size, _ = MODELS[name]
    x = torch.randn(2, 3, size, size, dtype=dtype)
    arguments = {key: made(value) for key, value in arguments.items()}
    model = made(architecture)(**arguments) if "." in architecture else timm.create_model(architecture, **arguments)
    return enliven(model.to(dtype), x), x


@lru_cache(maxsize=1)
def lively(name: str) -> tuple[nn.Module, Tensor]:
    """A model in float64 whose parameters are moved, and images for it."""
    torch.manual_seed(0)
    return moved(name, torch.float64)


@lru_cache(maxsize=1)
def maps_by_class(name: str) -> dict[str, list[AttentionMap]]:
    """Maps of a model by class."""
    model, x = lively(name)
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    found: dict[str, list[AttentionMap]] = {}
    for m in rec.maps.values():
        found.setdefault(short_name(call_of(m)[0]), []).append(m)
    return found
