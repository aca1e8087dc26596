"""Every mechanism: recipe == replay == the softmax that the module forms itself, unfused, in float64."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import timm
import torch
from packaging.version import Version
from support.inside import call_of, find_recipe, formed_by, list_recipes, replay_of
from support.mechanisms import MODELS, lively, maps_by_class
from support.models import ANY_DTYPE, TINY, randomise, tiny, tiny_double
from support.oracle import agree, exists, own_softmax, short_name
from support.reading import record
from torch import Tensor, nn

from hookattn import AttentionMap, AttentionRecorder


def check(m: AttentionMap, expected: Tensor) -> None:
    """The map is the expected one and replay's; rows and heads read alone are those of the whole; verify agrees."""
    assert find_recipe(call_of(m)[0]) is not None
    shape, whole = m.shape, m[...]
    assert shape == whole.shape
    assert m.dtype == whole.dtype == torch.float64
    agree(whole, expected)
    agree(whole, replay_of(m))
    agree(whole.sum(-1), torch.ones(shape[:3], dtype=torch.float64))
    assert (whole - 1 / shape[-1]).abs().max() > 1e-4  # a flat map would prove nothing
    agree(m[:, :, -1], whole[:, :, -1])
    agree(m[:, -1], whole[:, -1])
    agree(m[-1, :, [1 % shape[2], 0]], whole[-1][:, [1 % shape[2], 0]])
    m.verify()


@pytest.mark.parametrize("name", ANY_DTYPE)
def test_recipe_is_replay_is_the_unfused_softmax_of_plain_attention(name: str) -> None:
    maps = record(*tiny_double(name)).maps
    assert maps
    for m in maps.values():
        check(m, formed_by(m))


@pytest.mark.parametrize("name", MODELS)
def test_recipe_is_replay_is_the_unfused_softmax(name: str) -> None:
    maps = maps_by_class(name)
    assert set(MODELS[name][3]) <= set(maps)
    for m in [m for kind in MODELS[name][3] for m in {id(m): m for m in (*maps[kind][:2], maps[kind][-1])}.values()]:
        check(m, formed_by(m))


def test_every_recipe_is_compared() -> None:
    compared = {kind for case in MODELS.values() for kind in case[3]} | {
        short_name(module) for module, _ in variants().values()
    }
    elsewhere = {short_name(module) for name in TINY for module in tiny(name)[0].modules()}
    known = [name for name in list_recipes() if name.startswith("timm") and exists(name)]
    assert len(known) > 30
    assert {".".join(name.split(".")[-2:]) for name in known} <= compared | elsewhere


# Options that no registered model uses, but the classes take


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


@pytest.mark.parametrize("name", variants())
def test_variants(name: str) -> None:
    torch.manual_seed(0)
    module, args = variants()[name]
    randomise(module).double()
    module.eval()
    args = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, args)
    with AttentionRecorder(module) as rec, torch.no_grad():
        module(*args)
    (m,) = rec.maps.values()
    check(m, replay_of(m) if name == "latent_bool_mask" else formed_by(m))  # unfused, the module adds the bools


# Half precision

HALF = ["swin", "swin_v2", "sam", "pvt_v2_linear", "cait", "xcit", "levit", "volo", "botnet", "hiera"]
HALF += ["convit"] * (Version(timm.__version__) >= Version("1.0.31"))  # before, its positions stay in float64


@pytest.mark.parametrize("name", [name for name in HALF if name in MODELS])
def test_under_autocast_maps_are_no_further_from_float64_than_the_unfused_path(name: str) -> None:
    model, x = lively(name)
    model = copy.deepcopy(model).float()
    with AttentionRecorder(model) as rec, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(x.float())
    for kind in MODELS[name][3]:
        m = next(m for m in rec.maps.values() if short_name(call_of(m)[0]) == kind)
        module, *given = call_of(m)
        args, kwargs = torch.utils._pytree.tree_map_only(Tensor, Tensor.double, tuple(given))
        exact = own_softmax(copy.deepcopy(module).double(), *args, **kwargs)
        with torch.autocast("cpu", torch.bfloat16):
            eager = formed_by(m).double()
        assert m.dtype == torch.float32
        assert rms(m[...] - exact) <= 1.02 * rms(eager - exact)  # where q and k make nearly all of the error, chance decides
        assert (m[...] - exact).abs().max() < 3e-2


def rms(difference: Tensor) -> float:
    return float(difference.square().mean().sqrt())
