"""Mutations: each term that a recipe could leave out is taken out of what it sees, and every oracle notices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.inside import call_of, find_recipe, formed_by, ignore_shift_masks, list_recipes, refile, replay, replay_of
from support.mechanisms import MODELS, maps_by_class
from support.models import TINY, tiny
from support.oracle import agree
from support.reading import record
from torch import nn

from hookattn import AttentionRecorder, UnfaithfulMapError


def mutations() -> dict[str, tuple[str, Any]]:
    """What is switched off while the recipe runs, and on which model."""

    def zero(attribute: str) -> Any:
        def mutate(module: Any, patch: pytest.MonkeyPatch) -> None:
            parts = attribute.split(".")
            for part in parts[:-1]:
                module = getattr(module, part)
            patch.setitem(module._parameters, parts[-1], nn.Parameter(torch.zeros_like(getattr(module, parts[-1]))))

        return mutate

    def identity(*attributes: str) -> Any:
        def mutate(module: Any, patch: pytest.MonkeyPatch) -> None:
            for attribute in attributes:
                patch.setitem(module._modules, attribute, nn.Identity())

        return mutate

    def nothing(attribute: str) -> Any:
        return lambda module, patch: patch.setitem(module._modules, attribute, None)

    def value(attribute: str, changed: Any) -> Any:
        def mutate(module: Any, patch: pytest.MonkeyPatch) -> None:
            patch.setattr(module, attribute, changed)
            if attribute == "scale":
                patch.setattr(module, "fused_attn", False)  # fused, `scale` is not looked at

        return mutate

    def no_table(module: Any, patch: pytest.MonkeyPatch) -> None:
        patch.setitem(module._parameters, "relative_position_bias_table", None)

    return {
        "vit: bias": ("vit", zero("qkv.bias")),
        "vit: scale": ("vit", value("scale", 1.0)),
        "vit: query norm": ("vit_qk_norm", identity("q_norm")),
        "vit: key norm": ("vit_qk_norm", identity("k_norm")),
        "rope: scale": ("rope_axial", value("scale", 1.0)),
        "rope: bias": ("rope_axial", zero("qkv.bias")),
        "rope: norms": ("rope_gqa", identity("q_norm", "k_norm")),
        "rope: query bias": ("rope_gqa", zero("q_proj.bias")),
        "eva: layout": ("rope_half", value("rotate_half", False)),
        "eva: scale": ("eva_fused", value("scale", 1.0)),
        "eva: query bias": ("eva_fused", zero("q_bias")),
        "eva: split query bias": ("eva_split", zero("q_proj.bias")),
        "beit: query bias": ("beit", zero("q_bias")),
        "beit: scale": ("beit", value("scale", 1.0)),
        "beit: table": ("beit", no_table),
        "relpos: scale": ("relpos", value("scale", 1.0)),
        "relpos: query norm": ("relpos_qk_norm", identity("q_norm")),
        "relpos: relative bias": ("relpos", nothing("rel_pos")),
        "parallel: scale": ("parallel", value("scale", 1.0)),
        "parallel: norm before": ("parallel", identity("in_norm")),
        "parallel: norms": ("parallel_qk_norm", identity("q_norm", "k_norm")),
        "differential: scale": ("differential", value("scale", 1.0)),
        "differential parallel: norm before": ("differential_parallel", identity("in_norm")),
    }


@pytest.mark.parametrize("mutation", [m for m, (name, _) in mutations().items() if name in TINY])
def test_a_recipe_that_drops_a_term_is_caught(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe sees a module with one term taken out; the oracles see the module as it is."""
    name, mutate = mutations()[mutation]
    model, x = tiny(name)
    m = record(model, x).maps[0]
    expected = formed_by(m)
    module, *_ = call_of(m)
    for class_name in (c for c in list_recipes() if c == f"{type(module).__module__}.{type(module).__qualname__}"):
        whole = list_recipes()[class_name]

        def without(self: Any, *args: Any, **kwargs: Any) -> Any:
            with pytest.MonkeyPatch.context() as patch:
                mutate(self, patch)
                return whole(self, *args, **kwargs)  # noqa: B023

        refile(monkeypatch, class_name, without)
    assert (m[...] - expected).abs().max() > 1e-3
    assert (m[...] - replay_of(m)).abs().max() > 1e-3
    with pytest.raises(UnfaithfulMapError, match="is not the one its output came from"):
        m.verify()


@pytest.mark.parametrize("argument", ["rope", "attn_mask", "shared_rel_pos_bias", "shared_rel_pos"])
def test_a_recipe_that_drops_an_argument_is_caught(argument: str) -> None:
    name = {"rope": "rope_axial", "shared_rel_pos_bias": "beit_shared", "shared_rel_pos": "relpos_shared"}.get(argument, "vit")
    model, x = tiny(name)
    module = next(m for m in model.modules() if find_recipe(m))
    received: dict[str, Any] = {}
    watching = module.register_forward_pre_hook(lambda _, a, kw: received.update(kw, x=a[0]), with_kwargs=True)
    with watching, torch.no_grad():
        model(x)
    x = received.pop("x")
    if argument == "attn_mask":
        received["attn_mask"] = torch.randn(x.shape[1], x.shape[1])
    with AttentionRecorder(module) as rec:
        module(x, **received)
    m = rec.maps[0]
    assert received[argument] is not None
    without = replay(module, x, **{**received, argument: None})
    torch.testing.assert_close(m[...], replay_of(m), rtol=0, atol=1e-6)
    assert (m[...] - without).abs().max() > 1e-3


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
def test_a_recipe_of_another_mechanism_that_drops_a_term_is_caught(mutation: str) -> None:
    name, kind, place, mutate = MUTATIONS[mutation]
    m = maps_by_class(name)[kind][place]
    module, args, kwargs = call_of(m)
    recipe = find_recipe(module)
    assert recipe is not None
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        mutate(module, patch)
        got = recipe(module, *args, **kwargs).narrow().values()
    agree(m[...], formed_by(m))
    assert got.shape == m.shape
    assert (got - formed_by(m)).abs().max() > 1e-5
    assert (got - replay_of(m)).abs().max() > 1e-5
