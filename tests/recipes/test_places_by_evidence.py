"""`check_recipe` proves where tokens lie: every class of timm that cuts or pools a grid, and what it must not let through.

The evidence is what changes when one place of the input does; layouts and partitions are what is judged.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
from einops import rearrange
from support.inside import registry
from torch import Tensor, nn

from hookattn import TokenError, UnfaithfulMapError
from hookattn.image import Tokens, cut_padded_windows, cut_windows, pool_windows, slide_windows
from hookattn.testing import check_recipe

Made = tuple[nn.Module, tuple[Any, ...]]


def timm_class(name: str) -> Any:
    module, _, cls = f"timm.{name}".rpartition(".")
    if not exists(f"timm.{name}"):
        pytest.skip(f"this timm has no {name}")
    return getattr(importlib.import_module(module), cls)


def of(name: str, *shape: int, more: tuple[Any, ...] = (), **options: Any) -> Callable[[], Made]:
    """A module of a class of timm, and two images or more for it."""
    return lambda: (timm_class(name)(**options), (torch.randn(shape), *more))


def model(name: str, *size: int, **options: Any) -> Callable[[], Made]:
    """A model of timm, and two images for it."""

    def make() -> Made:
        if not timm.is_model(name):
            pytest.skip(f"this timm has no {name}")
        return timm.create_model(name, **options), (torch.randn(2, 3, *size),)

    return make


def maxvit_options() -> Any:
    return timm_class("models.maxxvit.MaxxVitTransformerCfg")(window_size=(2, 3), grid_size=(2, 3), dim_head=8)


def maxvit(cls: str, channels_last: bool, **options: Any) -> Callable[[], Made]:
    shape = (2, 4, 9, 16) if channels_last else (2, 16, 4, 9)
    return lambda: (timm_class(f"models.maxxvit.{cls}")(dim=16, cfg=maxvit_options(), **options), (torch.randn(shape),))


def metaformer() -> Made:
    attention = timm_class("models.metaformer.Attention")
    stage = timm_class("models.metaformer.MetaFormerStage")
    made = stage(16, 32, depth=1, token_mixer=attention, norm_layer=nn.LayerNorm)
    return made, (torch.randn(2, 16, 9, 13),)


class FirstOf(nn.Module):
    """A model up to the attention of its first block, in which tokens come in the order of the model."""

    def __init__(self, hiera: Any) -> None:
        super().__init__()
        self.hiera = hiera

    def forward(self, x: Tensor) -> Tensor:
        x = self.hiera.unroll(self.hiera._pos_embed(self.hiera.patch_embed(x)))
        return self.hiera.blocks[0](x)  # type: ignore[no-any-return]


def hiera() -> Made:
    made, args = model("hiera_tiny_224", 32, 64, img_size=(32, 64), embed_dim=16, stages=[1, 1, 1, 1])()
    made.blocks = made.blocks[:1]  # type: ignore[index]
    return FirstOf(made), args


def pit(pool: bool) -> Callable[[], Made]:
    def make() -> Made:
        pooling = timm_class("models.pit.Pooling")(16, 16, 2) if pool else None
        block = timm_class("models.pit.Transformer")(8, 1, 2, 2.0, pool=pooling, drop_path_prob=[0.0])
        return block, ((torch.randn(2, 16, 7, 12), torch.randn(2, 1, 16)),)

    return make


SWIN: dict[str, Any] = {"dim": 16, "num_heads": 2, "window_size": (3, 4)}
SHIFTED: dict[str, Any] = SWIN | {"shift_size": (1, 2)}
MSRA: dict[str, Any] = {"dim": 16, "key_dim": 8, "num_heads": 2, "attn_ratio": 1, "window_resolution": 4, "kernels": (3, 3)}
MVIT: dict[str, Any] = {
    "dim": 16,
    "dim_out": 16,
    "num_heads": 2,
    "feat_size": (12, 12),
    "kernel_kv": (3, 3),
    "stride_kv": (2, 2),
}

# every class of timm that cuts or pools a grid, or is given one; tokens in a row that have no grid of their own are left out
CASES: dict[str, Callable[[], Made]] = {
    # blocks that cut windows
    "swin": of("models.swin_transformer.SwinTransformerBlock", 2, 5, 7, 16, **SWIN, input_resolution=(5, 7)),
    "swin shifted": of("models.swin_transformer.SwinTransformerBlock", 2, 5, 7, 16, **SHIFTED, input_resolution=(5, 7)),
    "swin v2": of("models.swin_transformer_v2.SwinTransformerV2Block", 2, 6, 8, 16, **SHIFTED, input_resolution=(6, 8)),
    "swin v2 cr": of("models.swin_transformer_v2_cr.SwinTransformerV2CrBlock", 2, 6, 8, 16, **SHIFTED, feat_size=(6, 8)),
    "maxvit block": maxvit("PartitionAttentionCl", True, partition_type="block"),
    "maxvit grid": maxvit("PartitionAttentionCl", True, partition_type="grid"),
    "maxvit channels first, block": maxvit("PartitionAttention2d", False, partition_type="block"),
    "maxvit channels first, grid": maxvit("PartitionAttention2d", False, partition_type="grid"),
    "maxvit parallel": maxvit("ParallelPartitionAttention", True),
    "davit": of("models.davit.SpatialBlock", 2, 16, 7, 10, dim=16, num_heads=2, window_size=(3, 4)),
    "gcvit": of(
        "models.gcvit.GlobalContextVitBlock",
        *(2, 4, 8, 16),
        dim=16,
        feat_size=(4, 8),
        num_heads=2,
        window_size=4,
        use_global=False,
    ),
    "gcvit, global query": of(
        "models.gcvit.GlobalContextVitBlock",
        *(2, 4, 8, 16),
        more=(torch.ones(2, 4, 4, 16),),
        dim=16,
        feat_size=(4, 8),
        num_heads=2,
        window_size=4,
    ),
    "tiny vit": of("models.tiny_vit.TinyVitBlock", 2, 6, 9, 16, dim=16, num_heads=2, window_size=4),
    "tiny vit, one window": of("models.tiny_vit.TinyVitBlock", 2, 4, 4, 16, dim=16, num_heads=2, window_size=4),
    "efficientvit msra": of("models.efficientvit_msra.LocalWindowAttention", 2, 16, 6, 10, **MSRA, resolution=10),
    "sam": of("models.vision_transformer_sam.Block", 2, 6, 7, 16, dim=16, num_heads=2, window_size=4, input_size=(6, 7)),
    "sam global": of("models.vision_transformer_sam.Block", 2, 4, 6, 16, dim=16, num_heads=2, window_size=0, input_size=(4, 6)),
    "nest": of(
        "models.nest.NestLevel",
        *(2, 16, 12, 12),
        num_blocks=4,
        block_size=3,
        seq_length=9,
        num_heads=2,
        depth=1,
        embed_dim=32,
        prev_embed_dim=16,
        norm_layer=nn.LayerNorm,
        drop_path=[0.0],
        act_layer=nn.GELU,
    ),
    "mobilevit": of("models.mobilevit.MobileVitBlock", 2, 16, 6, 10, in_chs=16, patch_size=2, transformer_depth=1),
    "hieradet": of("models.hieradet_sam2.MultiScaleBlock", 2, 7, 10, 16, dim=16, dim_out=16, num_heads=2, window_size=4),
    "hieradet pooled": of(
        "models.hieradet_sam2.MultiScaleBlock", *(2, 7, 10, 16), dim=16, dim_out=32, num_heads=2, window_size=4, q_stride=(2, 2)
    ),
    "tnt": model("tnt_s_legacy_patch16_224", 32, 32, img_size=32, depth=1, embed_dim=48, num_heads_outer=3),
    "pit": pit(pool=False),
    "pit pooled": pit(pool=True),
    "metaformer": metaformer,
    "csatv2": of("models.csatv2.TransformerBlock", 2, 16, 4, 6, inp=16, oup=16, num_heads=2, attn_head_dim=8),
    "nextvit": of("models.nextvit.NextTransformerBlock", 2, 64, 6, 9, in_chs=64, out_chs=128, drop_path=0.0, sr_ratio=2),
    # attention that cuts or pools a grid itself
    "twins groups": of("models.twins.LocallyGroupedAttn", 2, 70, 16, more=((7, 10),), dim=16, num_heads=2, ws=4),
    "twins sub-sampled": of("models.twins.GlobalSubSampleAttn", 2, 60, 16, more=((6, 10),), dim=16, num_heads=2, sr_ratio=2),
    "pvt": of("models.pvt_v2.Attention", 2, 70, 16, more=([7, 10],), dim=16, num_heads=2, sr_ratio=3),
    "pvt linear": of("models.pvt_v2.Attention", 2, 98, 16, more=([7, 14],), dim=16, num_heads=2, sr_ratio=2, linear_attn=True),
    "mvit": of("models.mvitv2.MultiScaleAttention", 2, 61, 16, more=([6, 10],), **MVIT),
    "hiera": hiera,
    "halo": of("layers.halo_attn.HaloAttn", 2, 16, 4, 8, dim=16, num_heads=2, block_size=4, halo_size=1),
    "halo strided": of("layers.halo_attn.HaloAttn", 2, 16, 4, 8, dim=16, num_heads=2, block_size=4, halo_size=1, stride=2),
    "iformer": of("models.iformer.SHMA", 2, 16, 4, 6, dim=16),
    "iformer windows": of("models.iformer.SHMA", 2, 16, 6, 9, dim=16, window_size=4),
    "volo": of("models.volo.Attention", 2, 4, 6, 16, dim=16, num_heads=2),
    "coatnet": of("models.maxxvit.Attention2d", 2, 16, 4, 6, dim=16, dim_head=8),
    "fastvit": of("models.fastvit.Attention", 2, 32, 4, 6, dim=32, head_dim=16),
    "visformer": of("models.visformer.Attention", 2, 16, 4, 6, dim=16, num_heads=2),
    "shvit": of("models.shvit.SHSA", 2, 16, 4, 6, dim=16, qk_dim=8, pdim=8, norm_layer=nn.Identity),
    "botnet": of("layers.bottleneck_attn.BottleneckAttn", 2, 32, 4, 6, dim=32, feat_size=(4, 6), num_heads=2),
    "attention 2d": of("layers.attention2d.Attention2d", 2, 16, 4, 6, dim=16, num_heads=2),
    "multi query": of("layers.attention2d.MultiQueryAttention2d", 2, 16, 7, 12, dim=16, num_heads=2, kv_stride=2),
    "multi query, queries pooled": of(
        "layers.attention2d.MultiQueryAttention2d",
        *(2, 16, 8, 12),
        dim=16,
        num_heads=2,
        kv_stride=2,
        query_strides=2,
        padding="same",
    ),
    "multi query, one key": of(
        "layers.attention2d.MultiQueryAttentionV2", 2, 16, 4, 6, dim=16, num_heads=2, key_dim=8, value_dim=8
    ),
    "levit": of("models.levit.Attention", 2, 24, 16, dim=16, key_dim=8, num_heads=2, resolution=(4, 6)),
    "levit down": of(
        "models.levit.AttentionDownsample", 2, 15, 16, in_dim=16, out_dim=16, key_dim=8, num_heads=2, resolution=(3, 5)
    ),
    "efficientformer v2": of(
        "models.efficientformer_v2.Attention2d", 2, 16, 7, 12, dim=16, key_dim=8, num_heads=2, resolution=(7, 12), stride=2
    ),
    "efficientformer v2 down": of(
        "models.efficientformer_v2.Attention2dDownsample", 2, 16, 7, 12, dim=16, key_dim=8, num_heads=2, resolution=(7, 12)
    ),
    "lowformer": of("models.lowformer.ConvAttention", 2, 32, 7, 12, input_dim=32, att_stride=2, att_kernel=5),
    "cpubone": of("models.cpubone.ConvAttention", 2, 32, 7, 11, input_dim=32, att_stride=2, small_kernels=True),
    # all tokens of an image
    "vit": model("vit_tiny_patch16_224", 32, 48, img_size=(32, 48), depth=1, embed_dim=48, num_heads=3),
    "convit": model("convit_tiny", 64, 64, img_size=64, depth=1, local_up_to_layer=1),
    "pooled features": of("layers.attention_pool2d.AttentionPool2d", 2, 16, 4, 4, in_features=16, feat_size=(4, 4), head_dim=8),
}

# what no change of an input can tell, by the function that tells the places
ELSEWHERE = {
    "outlook_attention_tokens": "it has no keys: a token predicts the weights of its neighbours",
    "crossvit_block": "the model resizes the image for each branch",
    "class_attention_tokens": "it comes after blocks in which all tokens are mixed",
    "attention_pool_latent_tokens": "likewise",
    "attention_pool_prr_tokens": "likewise",
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")  # of timm, about its own classes
def test_the_places_of_every_class_are_those_that_change_its_tokens(name: str, prove: Callable[..., int]) -> None:
    torch.manual_seed(0)
    module, args = CASES[name]()
    assert prove(module, *args) >= 2  # queries and keys


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("table", [registry._LAYOUTS, registry._PARTITIONS], ids=lambda table: table.what)
def test_every_layout_and_partition_of_timm_has_a_case(table: Any) -> None:
    functions: dict[str, set[str]] = {}
    for name, function in table.as_dict().items():
        if name.startswith("timm.") and exists(name):
            functions.setdefault(function.__name__, set()).add(name)
    seen = {registry.qualified_name(type(m)) for module in made() for m in module.modules()}
    assert {name for name, classes in functions.items() if not classes & seen} == set(ELSEWHERE) & set(functions)


def exists(name: str) -> bool:
    module, _, cls = name.rpartition(".")
    return importlib.util.find_spec(module) is not None and hasattr(importlib.import_module(module), cls)


def made() -> Iterator[nn.Module]:
    """The modules of all cases, but for those that an older timm does not have."""
    for make in CASES.values():
        with contextlib.suppress(pytest.skip.Exception):
            yield make()[0]


# What must not go through

Changed = Callable[[Tokens], Tokens]


def places_of(tokens: Tokens, places: Tensor) -> Tokens:
    return Tokens(tokens.prefix, tokens.grid_size, places)


MUTATIONS: dict[str, Changed] = {
    "shift forgotten": lambda _: cut_windows((5, 7), (3, 4)),
    "rolled the other way": lambda _: cut_windows((5, 7), (3, 4), (-1, -2)),
    "rolled by rows for columns": lambda _: cut_windows((5, 7), (3, 4), (2, 1)),
    "padded before it is rolled": lambda _: cut_padded_windows((5, 7), (3, 4), (1, 2)),
    "strided": lambda _: cut_windows((5, 7), (3, 4), (1, 2), strided=True),
    "rows for columns": lambda _: cut_windows((7, 5), (3, 4), (1, 2)),
    "window of columns by rows": lambda _: cut_windows((5, 7), (4, 3), (1, 2)),
    "window column by column": lambda t: places_of(t, rearrange(t.patches, "i w (y x) -> i w (x y)", y=3)),
    "windows column by column": lambda t: places_of(t, rearrange(t.patches, "i (h w) n -> i (w h) n", h=2)),
    "padding has a place": lambda t: places_of(t, t.patches.clamp(min=0)),
    "a token taken for padding": lambda t: places_of(t, t.patches.masked_fill(t.patches == 33, -1)),
    "two tokens exchanged": lambda t: places_of(t, t.patches.clone().index_copy(1, torch.tensor([0, 1]), t.patches[:, [1, 0]])),
    "a coarser grid": lambda t: pool_windows(t, (3, 4), (1, 2)),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.filterwarnings("ignore")
def test_a_partition_that_is_wrong_is_caught(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, args = CASES["swin shifted"]()
    name = registry.qualified_name(type(module))
    right = registry.find_partition(module)
    assert right is not None
    wrong = {name: lambda self, geometry: MUTATIONS[mutation](right(self, geometry))}
    monkeypatch.setattr(registry._PARTITIONS, "_facts", registry._PARTITIONS.as_dict() | wrong)
    with pytest.raises((UnfaithfulMapError, TokenError)):
        check_recipe(module, *args)


# name of a case and what is made of its (queries, keys)
LAYOUT_MUTATIONS: dict[str, tuple[str, Callable[[Tokens, Tokens], tuple[Tokens, Tokens]]]] = {
    "halo: a window too far": ("halo", lambda q, k: (q, places_of(k, k.patches.roll(1, 1)))),
    "halo: no border": ("halo", lambda q, k: (q, places_of(k, k.patches.clamp(min=0)))),
    "halo: another border": ("halo", lambda q, k: (q, slide_windows((4, 8), 6, 4, 2))),
    "halo strided: queries on the grid of the keys": ("halo strided", lambda q, k: (places_of(k, q.patches), k)),
    "iformer: whole for windows": ("iformer windows", lambda q, k: (places_of(q, q.patches.roll(1, 1)), k)),
    "twins: keys column by column": (
        "twins sub-sampled",
        lambda q, k: (q, places_of(k, torch.arange(15).reshape(3, 5).T.reshape(1, 1, 15))),
    ),
    "mobile: keys reversed": ("multi query", lambda q, k: (q, places_of(k, k.patches.flip(-1)))),
    "hieradet: queries of another window": ("hieradet pooled", lambda q, k: (places_of(q, q.patches.flip(1)), k)),
    "nextvit: runs begin one later": ("nextvit", lambda q, k: (q, Tokens((), k.grid_size, k.patches + 1, k.spread))),
    "convolution: a cell too far": ("lowformer", lambda q, k: (q, places_of(k, k.patches.roll(1, -1)))),
    "vit: columns for rows": ("vit", lambda q, k: (places_of(q, torch.arange(6).reshape(2, 3).T.reshape(1, 1, 6)), k)),
}


@pytest.mark.parametrize("mutation", LAYOUT_MUTATIONS)
@pytest.mark.filterwarnings("ignore")
def test_a_layout_that_is_wrong_is_caught(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, change = LAYOUT_MUTATIONS[mutation]
    module, args = CASES[case]()
    right = registry._LAYOUTS.as_dict()
    wrong = {name: lambda geometry, shape, of=of: change(*of(geometry, shape)) for name, of in right.items()}
    monkeypatch.setattr(registry._LAYOUTS, "_facts", wrong)
    with pytest.raises((UnfaithfulMapError, TokenError)):
        check_recipe(module, *args)
