"""Every mechanism: recipe == replay == the softmax that the module forms itself, unfused, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import pytest
import timm
import torch
from packaging.version import Version
from support.inside import call_of, find_recipe, ignore_shift_masks, registered, replay_of
from support.mechanisms import MODELS, lively
from support.models import TINY, randomise, tiny
from support.modes import Largest
from support.oracle import exists, own_softmax, short_name
from torch import Tensor, nn

from hookattn import AttentionMap, AttentionRecorder


def own_map(m: AttentionMap) -> Tensor:
    module, args, kwargs = call_of(m)
    return own_softmax(module, *args, **kwargs)


@lru_cache(maxsize=1)
def recorded(name: str) -> dict[str, list[AttentionMap]]:
    """Maps of a model by class."""
    model, x = lively(name)
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    found: dict[str, list[AttentionMap]] = {}
    for m in rec.maps.values():
        found.setdefault(short_name(call_of(m)[0]), []).append(m)
    return found


def same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


def check(m: AttentionMap, expected: Tensor) -> None:
    """The map is the expected one and replay's; rows and heads read alone are those of the whole; verify agrees."""
    assert find_recipe(call_of(m)[0]) is not None
    shape, whole = m.shape, m[...]
    assert shape == whole.shape
    assert m.dtype == whole.dtype == torch.float64
    same(whole, expected)
    same(whole, replay_of(m))
    same(whole.sum(-1), torch.ones(shape[:3], dtype=torch.float64))
    assert (whole - 1 / shape[-1]).abs().max() > 1e-4  # a flat map would prove nothing
    same(m[:, :, -1], whole[:, :, -1])
    same(m[:, -1], whole[:, -1])
    same(m[-1, :, [1 % shape[2], 0]], whole[-1][:, [1 % shape[2], 0]])
    m.verify()


@pytest.mark.parametrize("name", MODELS)
def test_recipe_is_replay_is_the_unfused_softmax(name: str) -> None:
    maps = recorded(name)
    assert set(MODELS[name][3]) <= set(maps)
    for m in [m for kind in MODELS[name][3] for m in {id(m): m for m in (*maps[kind][:2], maps[kind][-1])}.values()]:
        check(m, own_map(m))


def test_every_recipe_is_compared() -> None:
    compared = {kind for case in MODELS.values() for kind in case[3]} | {
        short_name(module) for module, _ in variants().values()
    }
    elsewhere = {short_name(module) for name in TINY for module in tiny(name)[0].modules()}
    known = [name for name in registered() if name.startswith("timm") and exists(name)]
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
    check(m, replay_of(m) if name == "latent_bool_mask" else own_map(m))  # unfused, the module adds the bools


# Mutations: one term at a time is taken out of what the recipe sees


def without(**attributes: Any) -> Callable[[Any, pytest.MonkeyPatch], None]:
    """Replace attributes of a module, "a.b" written a__b."""

    def mutate(module: Any, patch: pytest.MonkeyPatch) -> None:
        for path, value in attributes.items():
            *parents, name = path.split("__")
            holder = module
            for parent in parents:
                holder = getattr(holder, parent)
            old = getattr(holder, name)
            if value == "zero":
                patch.setitem(holder._parameters, name, nn.Parameter(torch.zeros_like(old)))
            elif isinstance(old, nn.Module):
                patch.setitem(holder._modules, name, value)
            else:
                patch.setattr(holder, name, value)
        if "scale" in attributes:
            patch.setattr(module, "fused_attn", False, raising=False)  # fused, `scale` is not looked at

    return mutate


def no_mask(module: Any, patch: pytest.MonkeyPatch) -> None:

    ignore_shift_masks(patch)


def no_biases(module: Any, patch: pytest.MonkeyPatch) -> None:
    whole = module.get_attention_biases
    patch.setattr(module, "get_attention_biases", lambda device: torch.zeros_like(whole(device)))


# (model, class, position among its maps, what is taken out)
MUTATIONS: dict[str, tuple[str, str, int, Any]] = {
    "swin: bias": ("swin", "swin_transformer.WindowAttention", 0, without(relative_position_bias_table="zero")),
    "swin: shift mask": ("swin", "swin_transformer.WindowAttention", 1, no_mask),
    "swin: scale": ("swin", "swin_transformer.WindowAttention", 0, without(scale=1.0)),
    "swin v2: logit scale": ("swin_v2", "swin_transformer_v2.WindowAttention", 0, without(logit_scale="zero")),
    "swin v2: bias": ("swin_v2", "swin_transformer_v2.WindowAttention", 0, without(cpb_mlp__2__weight="zero")),
    "swin v2: shift mask": ("swin_v2", "swin_transformer_v2.WindowAttention", 1, no_mask),
    "swin v2: query bias": ("swin_v2", "swin_transformer_v2.WindowAttention", 0, without(q_bias="zero")),
    "swin v2 cr: logit scale": (
        "swin_v2_cr",
        "swin_transformer_v2_cr.WindowMultiHeadAttention",
        0,
        without(logit_scale="zero"),
    ),
    "swin v2 cr: bias": (
        "swin_v2_cr",
        "swin_transformer_v2_cr.WindowMultiHeadAttention",
        0,
        without(meta_mlp__fc2__weight="zero"),
    ),
    "davit channels: scale": ("davit", "davit.ChannelAttention", 0, without(scale=1.0)),
    "davit channels: tokens": ("davit_v2", "davit.ChannelAttentionV2", 0, without(dynamic_scale=False)),
    "twins: window": ("twins_svt", "twins.LocallyGroupedAttn", 0, without(qkv__bias="zero")),
    "twins: norm of the reduced": ("twins_pcpvt", "twins.GlobalSubSampleAttn", 0, without(norm=nn.Identity())),
    "maxvit: bias": ("maxvit", "maxxvit.AttentionCl", 0, without(rel_pos__relative_position_bias_table="zero")),
    "maxvit: layout": ("maxvit", "maxxvit.AttentionCl", 2, without(head_first=False)),
    "coatnet: bias": ("coatnet", "maxxvit.Attention2d", 0, without(rel_pos=None)),
    "pvt: norm of the reduced": ("pvt_v2", "pvt_v2.Attention", 0, without(norm=nn.Identity())),
    "pvt linear: activation": ("pvt_v2_linear", "pvt_v2.Attention", 0, without(act=nn.Identity())),
    "multi query: norm": ("mqa", "attention2d.MultiQueryAttention2d", 0, without(key__norm=nn.Identity())),
    "nextvit: norm": ("nextvit", "nextvit.EfficientAttention", 0, without(norm=nn.Identity())),
    "hieradet: pooling": ("hieradet", "hieradet_sam2.MultiScaleAttention", 1, without(q_pool=nn.AvgPool2d(2))),
    "sam: rows": ("sam", "vision_transformer_sam.Attention", 1, without(rel_pos_h="zero")),
    "sam: columns": ("sam", "vision_transformer_sam.Attention", 0, without(rel_pos_w="zero")),
    "mvit: rows": ("mvit", "mvitv2.MultiScaleAttention", 0, without(rel_pos_h="zero")),
    "mvit: norm": ("mvit", "mvitv2.MultiScaleAttention", 0, without(norm_k=None)),
    "halo: columns": ("halo", "halo_attn.HaloAttn", 0, without(pos_embed__width_rel="zero")),
    "halo: scale": ("halo", "halo_attn.HaloAttn", 0, without(scale_pos_embed=True)),
    "bottleneck: rows": ("botnet", "bottleneck_attn.BottleneckAttn", 0, without(pos_embed__height_rel="zero")),
    "talking heads: mix": ("cait", "cait.TalkingHeadAttn", 0, without(proj_l=nn.Identity())),
    "talking heads: bias": ("efficientformer_v2", "efficientformer_v2.Attention2d", 0, no_biases),
    "talking heads: stride": ("efficientformer_v2", "efficientformer_v2.Attention2dDownsample", 0, no_biases),
    "positions next to content": ("convit", "convit.GPSA", 0, without(pos_proj__weight="zero")),
    "channels: temperature": ("xcit", "xcit.XCA", 0, without(temperature="zero")),
    "outlook: scale": ("volo", "volo.OutlookAttention", 0, without(scale=1.0)),
    "latent": ("latent", "attention_pool.AttentionPoolLatent", 0, without(latent="zero")),
    "shvit: norm": ("shvit", "shvit.SHSA", 0, without(pre_norm=nn.Identity())),
    "tiny vit: norm": ("tiny_vit", "tiny_vit.Attention", 0, without(norm=nn.Identity())),
    "tiny vit: bias": ("tiny_vit", "tiny_vit.Attention", 0, no_biases),
    "levit: bias": ("levit", "levit.Attention", 0, no_biases),
    "levit downsampled: bias": ("levit_conv", "levit.AttentionDownsample", 0, no_biases),
    "gemma4: norm": ("gemma4", "gemma4_vit.Gemma4Attention", 0, without(k_norm=nn.Identity())),
}


@pytest.mark.parametrize("mutation", sorted((m for m in MUTATIONS if MUTATIONS[m][0] in MODELS), key=lambda m: MUTATIONS[m][0]))
def test_a_recipe_that_drops_a_term_is_caught(mutation: str) -> None:
    name, kind, place, mutate = MUTATIONS[mutation]
    m = recorded(name)[kind][place]
    module, args, kwargs = call_of(m)
    recipe = find_recipe(module)
    assert recipe is not None
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        mutate(module, patch)
        got = recipe(module, *args, **kwargs).narrow().probabilities()
    same(m[...], own_map(m))
    assert got.shape == m.shape
    assert (got - own_map(m)).abs().max() > 1e-5
    assert (got - replay_of(m)).abs().max() > 1e-5


# Cheap rows


def large() -> dict[str, tuple[nn.Module, tuple[Any, ...]]]:
    """Modules on so many tokens that the map is larger than all else."""
    from timm.layers import attention2d, bottleneck_attn
    from timm.models import cait, levit, mvitv2, pvt_v2, twins
    from timm.models import vision_transformer_sam as sam

    tokens = torch.randn(1, 400, 16)
    image = torch.randn(1, 16, 20, 20)
    return {
        "sam": (sam.Attention(16, 4, use_rel_pos=True, input_size=(20, 20)), (torch.randn(1, 20, 20, 16),)),
        "mvit": (mvitv2.MultiScaleAttention(16, 16, (20, 20), 4, has_cls_token=False), (tokens, [20, 20])),
        "bottleneck": (bottleneck_attn.BottleneckAttn(16, num_heads=4, feat_size=(20, 20)), (image,)),
        "cait": (cait.TalkingHeadAttn(16, 4), (tokens,)),
        "levit": (levit.Attention(16, 4, 4, attn_ratio=1, resolution=20), (tokens,)),
        "pvt": (pvt_v2.Attention(16, 4, sr_ratio=2), (tokens, [20, 20])),
        "twins": (twins.GlobalSubSampleAttn(16, 4, sr_ratio=2), (tokens, (20, 20))),
        "multi_query": (attention2d.MultiQueryAttention2d(16, num_heads=4), (image,)),
    }


@pytest.mark.parametrize("name", large())
def test_a_row_never_forms_the_map(name: str) -> None:
    module, args = large()[name]
    randomise(module).eval()
    with torch.no_grad():
        module(*args)  # LeViT looks its biases up once
        with AttentionRecorder(module) as rec:
            module(*args)
    (m,) = rec.maps.values()
    queries, keys = m.shape[2:]
    with Largest() as row:
        m[:, :, 0]
    with Largest() as head:
        m[:, 0]
    with Largest() as whole:
        m[...]
    assert row.elements < queries * keys
    assert queries * keys <= head.elements < whole.elements == 4 * queries * keys or name == "cait"


# What somebody has put on, and what a training step draws


class Nonlinear(nn.Module):
    """Somebody's wrapper, which is random in train mode."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.drop = layer, nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(self.drop(x))
        return y + 0.5 * y.sin()


def wrapped() -> dict[str, tuple[nn.Module, tuple[Any, ...], tuple[str, ...]]]:
    """Modules, what they take, and which of their layers are wrapped."""
    from timm.layers import RelPosMlp
    from timm.layers.attention_pool import AttentionPoolLatent
    from timm.models import cait, convit, davit, efficientformer_v2, levit, maxxvit, swin_transformer_v2_cr, visformer, volo

    tokens, image = torch.randn(2, 16, 32), torch.randn(2, 32, 4, 4)
    rel_pos = partial(RelPosMlp, window_size=(4, 4))
    found: dict[str, tuple[nn.Module, tuple[Any, ...], tuple[str, ...]]] = {
        "heads_first": (maxxvit.AttentionCl(32, dim_head=8, rel_pos_cls=rel_pos), (tokens,), ("qkv", "rel_pos.mlp")),
        "heads_first_2d": (maxxvit.Attention2d(32, dim_head=8, rel_pos_cls=rel_pos), (image,), ("qkv",)),
        "parts_first_2d": (visformer.Attention(32, 4), (image,), ("qkv",)),
        "swin_v2_cr": (swin_transformer_v2_cr.WindowMultiHeadAttention(32, 4, (4, 4)), (tokens,), ("qkv",)),
        "latent": (AttentionPoolLatent(32, num_heads=4), (tokens,), ("q", "kv")),
        "talking_heads": (cait.TalkingHeadAttn(32, 4), (tokens,), ("qkv", "proj_l")),
        "talking_heads_2d": (efficientformer_v2.Attention2d(32, 8, 4, resolution=4), (image,), ("v", "talking_head1")),
        "channels": (davit.ChannelAttention(32, 4), (tokens,), ("qkv",)),
        "outlook": (volo.OutlookAttention(32, 4), (image.permute(0, 2, 3, 1),), ("v", "attn")),
        "gated": (convit.GPSA(32, 4), (tokens,), ("qk", "v")),
        "batch_norm": (levit.Attention(32, 8, 4, resolution=4), (tokens,), ()),
        "batch_norm_stride": (efficientformer_v2.Attention2d(32, 8, 4, resolution=4, stride=2), (image,), ()),
    }
    if exists("timm.models.iformer.SHMA"):
        from timm.models.iformer import SHMA

        found["single_head"] = SHMA(32), (image,), ("q", "v_gate")
    return found


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", wrapped())
def test_wrapped_layers_are_called_and_training_is_the_training_of_the_call(name: str, training: bool) -> None:
    module, args, layers = wrapped()[name]
    for layer in layers:
        *parents, last = layer.split(".")
        holder = module.get_submodule(".".join(parents))
        setattr(holder, last, Nonlinear(getattr(holder, last)))
    randomise(module).double()
    if name == "gated":  # its forward reads the dtype of this weight
        module.qk.weight = module.qk.layer.weight  # type: ignore[union-attr]
    module.train(training)
    args = torch.utils._pytree.tree_map_only(Tensor, Tensor.double, args)
    twin = copy.deepcopy(module)
    torch.manual_seed(3)
    with AttentionRecorder(module) as rec, torch.no_grad():
        module(*args)
    (m,) = rec.maps.values()
    after = [buffer.clone() for buffer in module.buffers()]
    torch.manual_seed(3)
    expected = own_softmax(twin, *args)
    assert find_recipe(module) is not None
    assert m.shape == expected.shape
    same(m[...], expected)
    same(m[:, -1], expected[:, -1])
    assert all(torch.equal(a, b) for a, b in zip(module.buffers(), after))


def test_reading_leaves_caches_and_buffers_alone() -> None:
    from timm.models import convit, levit

    positional, cached = randomise(convit.GPSA(16, 4)), randomise(levit.Attention(16, 4, 4, resolution=3))
    for module, x in ((positional, torch.randn(2, 9, 16)), (cached, torch.randn(2, 9, 16))):
        module.eval()
        before = [id(buffer) for buffer in module.buffers()]
        with AttentionRecorder(module, keep="maps") as rec, torch.no_grad():
            module.register_forward_pre_hook(lambda *_: 1 / 0)  # what was read was read before any forward
            with pytest.raises(ZeroDivisionError):
                module(x)
        assert rec.maps[0].shape[2:] == (9, 9)
        assert [id(buffer) for buffer in module.buffers()] == before
    assert cached.attention_bias_cache == {}


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
            eager = own_map(m).double()
        assert m.dtype == torch.float32
        assert rms(m[...] - exact) <= 1.02 * rms(eager - exact)  # where q and k make nearly all of the error, chance decides
        assert (m[...] - exact).abs().max() < 3e-2


def rms(difference: Tensor) -> float:
    return float(difference.square().mean().sqrt())
