"""Attention with options that no registered model uses, but the classes take."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from support.oracle import exists

# Options of PyTorch's own, and what it is called with

MULTIHEAD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "batch_second": ({"batch_first": False}, {}),
    "no_bias": ({"bias": False}, {}),
    "bias_kv": ({"add_bias_kv": True}, {}),
    "zero_attn": ({"add_zero_attn": True}, {}),
    "bias_kv_zero_attn_masked": ({"add_bias_kv": True, "add_zero_attn": True}, {"attn_mask": "bool", "key_padding_mask": True}),
    "other_widths": ({"kdim": 20, "vdim": 12}, {}),
    "bool_mask": ({}, {"attn_mask": "bool"}),
    "float_mask": ({}, {"attn_mask": "float"}),
    "mask_per_head": ({}, {"attn_mask": "heads"}),
    "padding": ({}, {"key_padding_mask": True}),
    "padding_and_mask": ({}, {"attn_mask": "bool", "key_padding_mask": True}),
    "causal_hint": ({}, {"attn_mask": "causal", "is_causal": True}),
}


def variants() -> dict[str, tuple[nn.Module, tuple[Any, ...]]]:
    from timm.layers import RelPosBiasTf, attention2d, attention_pool2d, bottleneck_attn, halo_attn
    from timm.layers.attention_pool import AttentionPoolLatent
    from timm.models import cait, davit, hiera, levit, maxxvit, pvt_v2, swin_transformer, swin_transformer_v2
    from timm.models import vision_transformer_sam as sam

    tokens, image = torch.randn(2, 16, 32), torch.randn(2, 32, 8, 8)
    window = torch.randn(6, 16, 32)
    shifts = torch.where(torch.rand(3, 16, 16) > 0.7, -100.0, 0.0)
    rel_pos = partial(RelPosBiasTf, window_size=(4, 4))
    mask, bools = torch.randn(2, 1, 1, 16), torch.rand(2, 1, 1, 16) > 0.3
    return {
        "swin_head_dim": (swin_transformer.WindowAttention(32, 4, head_dim=5, window_size=4), (window, shifts)),
        "swin_v2_bias_separate": (
            swin_transformer_v2.WindowAttention(32, (4, 4), 4, qkv_bias_separate=True),
            (window, shifts),
        ),
        "swin_v2_no_bias": (swin_transformer_v2.WindowAttention(32, (4, 4), 4, qkv_bias=False), (window,)),
        "maxvit_tf": (
            maxxvit.AttentionCl(32, dim_head=8, head_first=False, rel_pos_cls=rel_pos),
            (window.unflatten(1, (4, 4)),),
        ),
        "maxvit_shared": (maxxvit.AttentionCl(32, dim_head=8), (window, torch.randn(1, 4, 16, 16))),
        "maxvit_2d_parts_first": (maxxvit.Attention2d(32, dim_head=8, head_first=False), (image, torch.randn(1, 4, 64, 64))),
        "attention_2d": (attention2d.Attention2d(32, num_heads=4), (image, torch.randn(64, 64))),
        "attention_2d_head_first": (attention2d.Attention2d(32, num_heads=4, head_first=True), (image,)),
        "multi_query_v2": (attention2d.MultiQueryAttentionV2(32, num_heads=4, key_dim=8, value_dim=8), (image,)),
        "multi_query_v2_memory": (attention2d.MultiQueryAttentionV2(32, num_heads=4, key_dim=8), (image, image[..., :5])),
        "multi_query_strided": (
            attention2d.MultiQueryAttention2d(32, num_heads=4, query_strides=2, kv_stride=2),
            (image, torch.randn(2, 1, 16, 16)),
        ),
        "latent_mask": (AttentionPoolLatent(32, num_heads=4, latent_len=3, pool_type="avg"), (tokens, mask)),
        "latent_bool_mask": (AttentionPoolLatent(32, num_heads=4), (tokens, bools)),
        "latent_norms": (
            AttentionPoolLatent(32, num_heads=4, pos_embed="abs", feat_size=16, qk_norm=True, norm_layer=nn.LayerNorm),
            (tokens,),
        ),
        "rot_pool": (attention_pool2d.RotAttentionPool2d(32, num_heads=4, class_token=True), (image,)),
        "rot_pool_separate": (attention_pool2d.RotAttentionPool2d(32, num_heads=4, qkv_separate=True), (image[..., :5],)),
        "halo_scaled": (
            halo_attn.HaloAttn(32, num_heads=4, block_size=4, halo_size=2, scale_pos_embed=True, qkv_bias=True),
            (torch.randn(2, 32, 8, 8),),
        ),
        "halo_strided": (
            halo_attn.HaloAttn(32, num_heads=4, block_size=4, halo_size=1, stride=2, dim_head=6),
            (image[..., :4],),
        ),
        "halo_pooled": (
            halo_attn.HaloAttn(32, num_heads=4, block_size=4, halo_size=1, stride=2, avg_down=True),
            (image[..., :4],),
        ),
        "bottleneck_scaled": (
            bottleneck_attn.BottleneckAttn(32, num_heads=4, feat_size=(8, 6), scale_pos_embed=True, dim_head=5),
            (image[..., :6],),
        ),
        "sam_resized": (
            sam.Attention(32, 4, qk_norm=True, use_rel_pos=True, input_size=(4, 4)),
            (torch.randn(2, 6, 5, 32),),
        ),
        "sam_plain": (sam.Attention(32, 4), (torch.randn(2, 6, 5, 32),)),
        "davit_channels_static": (davit.ChannelAttentionV2(32, 4, dynamic_scale=False), (tokens,)),
        "hiera_pooled_windows": (hiera.MaskUnitAttention(32, 64, 4, 4, 2, use_mask_unit_attn=True), (tokens,)),
        "hiera_pooled_global": (hiera.MaskUnitAttention(32, 64, 4, q_stride=4), (tokens,)),
        "levit_pool": (levit.AttentionDownsample(32, 48, 8, 4, resolution=4, use_pool=True), (tokens,)),
        "levit_conv_pool": (levit.AttentionDownsample(32, 48, 8, 4, resolution=8, use_conv=True, use_pool=True), (image,)),
        "pvt_whole": (pvt_v2.Attention(32, 4), (tokens, [4, 4])),
        "talking_heads": (cait.TalkingHeadAttn(32, 4, qkv_bias=True), (tokens,)),
        **late_variants(image),
        **mvit_variants(torch.randn(2, 65, 32)),
    }


def mvit_variants(tokens: Tensor) -> dict[str, tuple[nn.Module, tuple[Any, ...]]]:
    from timm.models.mvitv2 import MultiScaleAttention

    def made(has_cls_token: bool, **options: Any) -> tuple[nn.Module, tuple[Any, ...]]:
        module = MultiScaleAttention(32, 32, (8, 8), 4, has_cls_token=has_cls_token, **options)
        return module, (tokens[:, int(not has_cls_token) :], [8, 8])

    three, two, four = (3, 3), (2, 2), (4, 4)
    return {
        "mvit_max": made(True, mode="max", kernel_q=three, stride_q=two, kernel_kv=three, stride_kv=four),
        "mvit_average": made(False, mode="avg", kernel_kv=three, stride_kv=two),
        "mvit_fewer_queries": made(True, kernel_q=three, stride_q=four, kernel_kv=three, stride_kv=two),
        "mvit_no_positions": made(True, rel_pos_type="", kernel_q=three, stride_q=two),
    }


def late_variants(image: Tensor) -> dict[str, tuple[nn.Module, tuple[Any, ...]]]:
    """Of classes that older timm does not have."""
    found: dict[str, tuple[nn.Module, tuple[Any, ...]]] = {}
    if exists("timm.models.iformer.SHMA"):
        from timm.models.iformer import SHMA

        found["shma_windows"] = SHMA(32, window_size=5), (image,)
    if exists("timm.models.gemma4_vit.Gemma4Attention"):
        from timm.models.gemma4_vit import Gemma4Attention

        gemma = Gemma4Attention(32, 4, head_dim=8, num_kv_heads=2, use_clipped_linears=True)
        gemma.k_proj.output_max.fill_(0.3)
        found["gemma4_grouped"] = gemma, (torch.randn(2, 6, 32), *torch.randn(2, 2, 6, 8), torch.randn(2, 1, 1, 6))
    if exists("timm.models.cpubone.ConvAttention"):
        from timm.models.cpubone import ConvAttention

        found["cpubone_small"] = ConvAttention(32, att_stride=2, small_kernels=True), (image[..., :7],)
    return found


def attention_modules() -> dict[str, nn.Module]:
    """Modules of the timm at hand, with those of the options that it knows."""
    from timm.layers import Attention, AttentionRope, LayerNorm
    from timm.models import vision_transformer
    from timm.models.eva import EvaAttention

    def made(cls: Any, *args: int, **options: Any) -> nn.Module:
        known = inspect.signature(cls).parameters
        module: nn.Module = cls(*args, **{name: value for name, value in options.items() if name in known})
        return module

    norms = {"norm_layer": LayerNorm, "qk_norm": True, "gated": True}
    works = hasattr(EvaAttention(32, 4, scale_norm=False), "head_dim")  # timm 1.0.24 and before raise on qk_norm
    eva = norms if works else {"norm_layer": LayerNorm}
    modules = {
        "attention": made(Attention, 32, 4, qkv_bias=True, scale_norm=True, attn_head_dim=12, **norms),
        "rope_fused": made(AttentionRope, 32, 4, **norms),
        "rope_gqa": made(AttentionRope, 32, 4, qkv_fused=False, num_kv_heads=2, rotate_half=True, **norms),
        "eva_fused": made(EvaAttention, 32, 4, **eva),
        "eva_bias_separate": made(EvaAttention, 32, 4, qkv_bias_separate=True, norm_layer=LayerNorm),
        "eva_split": made(EvaAttention, 32, 4, qkv_fused=False, **eva),
        "parallel": vision_transformer.ParallelScalingBlock(32, 4, qkv_bias=True, qk_norm=True),
    }
    if hasattr(vision_transformer, "DiffParallelScalingBlock"):
        from timm.layers.diff_attention import DiffAttention

        modules["diff_attention"] = DiffAttention(32, 2, qkv_bias=True, qk_norm=True)
        modules["diff_parallel"] = vision_transformer.DiffParallelScalingBlock(32, 2, qkv_bias=True, qk_norm=True)
    return modules
