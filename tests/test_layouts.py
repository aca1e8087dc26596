"""Where queries and keys lie on the image, against what moves when one place of a feature map does.

The oracle knows nothing of layouts: it changes the feature map that goes into a block at one (row, col), sees which queries and
keys of the map are others than before, and these must be the ones that are named for (row, col).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from support.image import MVIT, SHRUNK, SIZES, SWIN, VIT, as_patches, build, marked, naflex, swin_places, the_class
from support.inside import Tokens, cut, form_of, size_after
from support.models import tiny
from support.reading import record
from torch import Tensor, nn

from hookattn import QK, AttentionMap, AttentionRecorder, TokenError

Place = tuple[int, int]
Size = tuple[int, int]


# The oracle


def nhwc(x: Tensor, image: int, place: Place) -> Tensor:
    return x[image, place[0], place[1]]


def nchw(x: Tensor, image: int, place: Place) -> Tensor:
    return x[image, :, place[0], place[1]]


def tokens(columns: int, prefix: int = 0) -> Callable[[Tensor, int, Place], Tensor]:
    return lambda x, image, place: x[image, prefix + place[0] * columns + place[1]]


def patches(side: int) -> Callable[[Tensor, int, Place], Tensor]:
    return lambda x, image, place: x[image, :, place[0] * side :, place[1] * side :][:, :side, :side]


@contextmanager
def moving(model: nn.Module, site: str, part: Callable[[Tensor, int, Place], Tensor], places: list[Place]) -> Iterator[None]:
    """Add noise to what goes into a module ("block:in") or comes out of it ("block:out"): in image i + 1 at the i-th place."""
    name, _, side = site.partition(":")

    def moved(x: Tensor) -> Tensor:
        x = x.clone()
        for image, place in enumerate(places, start=1):
            part(x, image, place).add_(torch.randn_like(part(x, image, place)))
        return x

    module = model.get_submodule(name)
    if side == "in":
        handle = module.register_forward_pre_hook(lambda module, args: (moved(args[0]), *args[1:]))
    else:
        handle = module.register_forward_hook(lambda module, args, out: moved(out))
    with handle:
        yield


def what_moved(m: AttentionMap, images: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(windows, queries) and (windows, keys) that are others than in the first image, image by image."""
    source = form_of(m)
    if isinstance(source, QK):
        parts = [part.unflatten(0, (images, -1)) for part in (source.q, source.k)]
        yield from zip(*(differ(part[1:], part[0]).any(2).any(-1) for part in parts))
        return
    scores = source.scores[:, :1].unflatten(0, (images, -1))  # of one head: the next may be made of what this one gives
    for moved in differ(scores[1:], scores[0])[:, :, 0]:
        queries = moved.double().mean(-1) > 0.5
        yield queries, (moved & ~queries[..., None]).any(1)


def differ(a: Tensor, b: Tensor) -> Tensor:
    """Where two results differ by more than the last bits, which are others for images in other places of a batch."""
    return (a - b).abs() > 1e-9 * b.abs().max()


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


SAM: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3, "window_size": 4, "global_attn_indexes": [1]}
SVT: dict[str, Any] = {"embed_dims": [16, 32, 64, 128], "num_heads": [1, 2, 4, 8], "depths": [1, 1, 1, 2]}
DAVIT: dict[str, Any] = {"depths": [1, 1, 1, 1], "embed_dims": [16, 32, 48, 64], "num_heads": [1, 2, 3, 4]}
HIERA: dict[str, Any] = {"img_size": (64, 96), "embed_dim": 24, "stages": [1, 1, 2, 1]}
MAXVIT: dict[str, Any] = {"img_size": (64, 96)}
PARTITION = ("timm.models.maxxvit.MaxxVitTransformerCfg", {"window_size": (2, 3), "grid_size": (2, 3)})
GCVIT: dict[str, Any] = {"dim": 16, "feat_size": (8, 12), "num_heads": 2, "window_size": 4}
GEMMA: dict[str, Any] = {"head_dim": 16, "intermediate_size": 96, "position_embedding_size": 64, "img_size": (96, 144)}
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


def some_places(grid: Size) -> list[Place]:
    """The corners and some others."""
    rows, columns = grid
    corners = [(0, 0), (0, columns - 1), (rows - 1, 0), (rows - 1, columns - 1), (0, 1), (1, 0)]
    others = torch.randperm(rows * columns)[:6].tolist()
    return list(dict.fromkeys([*corners, *((i // columns, i % columns) for i in others)]))


def named(tokens: Tokens, place: Place, how: str, found: Tensor) -> Tensor:
    """(windows, tokens): those that are named for a place; of what has been found, those that stand for nothing."""
    kind, *sides = how.split()
    cell = [int(side) for side in sides] * 2 if len(sides) < 2 else [int(side) for side in sides]
    row, column = (place[0] // cell[0], place[1] // cell[1]) if cell else place
    nothing = torch.zeros_like(tokens.select("mean")[0])
    if kind == "every" and (place[0] % cell[0] or place[1] % cell[1]):
        return nothing
    if row < tokens.grid_size[0] and column < tokens.grid_size[1]:
        try:
            return tokens.select((row, column))[0]
        except TokenError:
            return nothing
    return nothing if tokens.places is None else found & (tokens.places[0] < 0)  # a cell that is not full


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_is_named_for_a_place_is_what_moves_with_it(case: Case) -> None:
    model = build(case.model, *case.more, **case.options)
    places = some_places(case.grid)
    shape = case.size[1:] if len(case.size) > 2 else (3, *case.size)
    x = torch.randn(1, *shape).double().expand(len(places) + 1, *shape)
    block = case.attention.rpartition(".")[0]
    site = {"image": ":in", "block": f"{block}:in", "attention": f"{case.attention}:in"}.get(case.site, case.site)
    with moving(model, site, case.part, places):
        m = record(model, x, layers=case.attention).maps[0]
        moved = list(what_moved(m, len(x)))
    assert m.query_tokens.windows == m.tokens.windows
    assert m.axes[0] == ("batch" if m.tokens.windows == 1 else "batch * windows")
    for place, (queries, keys) in zip(places, moved):
        for tokens, found, how in ((m.query_tokens, queries, case.queries), (m.tokens, keys, case.keys)):
            expected = found if how == "none" else named(tokens, place, how, found)
            if how.startswith("near"):
                assert (found | ~expected).all() or not found.any(), (how, place, found.nonzero(), expected.nonzero())
                assert found.sum() <= 9
            else:
                assert torch.equal(found, expected), (how, place, found.nonzero(), expected.nonzero())


@pytest.mark.parametrize("block", range(1, 5))
def test_the_tokens_of_hiera_are_named_for_where_reroll_puts_them(block: int) -> None:
    """Queries and keys of a block that comes later are unrolled; the model's own `reroll` tells which is which."""
    model = build("hiera_tiny_224", **HIERA)
    attention = model.blocks[block].attn
    m = record(model, torch.randn(1, 3, 64, 96).double()).maps[f"blocks.{block}.attn"]
    (rows, columns), count = m.tokens.grid_size, m.x.shape[1]
    assert rows * columns == count
    order = model.reroll(torch.arange(count).reshape(1, -1, 1), block - 1)[0, ..., 0]
    windows = m.shape[0]
    assert windows == (count // attention.q_stride // attention.window_size if attention.use_mask_unit_attn else 1)
    for row in range(rows):
        for column in range(columns):
            selected = m.tokens.select((row, column))[0].nonzero().tolist()
            token = int(order[row, column])
            assert selected == [[token % windows, token // windows]]
    pooled = model.reroll(torch.arange(count // attention.q_stride).reshape(1, -1, 1), block)[0, ..., 0]
    assert m.query_tokens.grid_size == tuple(pooled.shape)
    for (row, column), token in zip(torch.cartesian_prod(*map(torch.arange, pooled.shape)).tolist(), pooled.flatten().tolist()):
        assert m.query_tokens.select((row, column))[0].nonzero().tolist() == [[token % windows, token // windows]]


# Whole pictures, put together by hand


def naive(m: AttentionMap, places: Tensor, query: Place, area: int) -> Tensor:
    """(images, places): the picture of one query, by loops; `places` tells the place of every (window, token), -1 for none."""
    windows, count = places.shape
    attention = m[...].double().mean(1).unflatten(0, (-1, windows))
    number = query[0] * m.query_tokens.grid_size[1] + query[1]
    picture = torch.zeros(len(attention), area, dtype=torch.float64)
    for window in range(windows):
        for row in range(count):
            for key in range(count):
                if places[window, row] == number and places[window, key] >= 0:
                    picture[:, places[window, key]] += attention[:, window, row, key]
    return picture


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_224"])
@pytest.mark.parametrize("block", [0, 1])
def test_pictures_of_swin_are_those_put_together_by_hand(name: str, block: int) -> None:
    size = (40, 72) if name.startswith("swin_") else (64, 96)  # a shifted v2 needs whole windows in older timm
    model = build(name, **SWIN, img_size=size)
    rows, columns = size[0] // 4, size[1] // 4
    rec = record(model, torch.randn(2, 3, *size).double())
    m = rec.maps[block]
    places = swin_places(rec.model.get_submodule(m.name.removesuffix(".attn")), rows, columns)
    for query in some_places((rows, columns))[:6]:
        picture = naive(m, places, query, rows * columns).reshape(2, rows, columns)
        torch.testing.assert_close(m.image(query).double(), picture)
        assert (picture.sum((1, 2)) > 0).all()


@pytest.mark.parametrize("kind", ["block", "grid"])
def test_pictures_of_maxvit_are_those_put_together_by_hand(kind: str) -> None:
    reverse = the_class(f"timm.models.maxxvit.{'window' if kind == 'block' else 'grid'}_reverse")
    m = record(build("test_maxvit", **MAXVIT), torch.randn(2, 3, 64, 96).double()).maps[f"stages.0.blocks.0.attn_{kind}.attn"]
    windows, count = m.shape[0] // 2, m.shape[2]
    tokens = torch.arange(windows * count).reshape(windows, 2, 3, 1)
    lies = reverse(tokens, (2, 3), (16, 24))[0, ..., 0].flatten()
    places = torch.empty(windows * count, dtype=torch.long).scatter_(0, lies, torch.arange(windows * count))
    for query in some_places((16, 24))[:8]:
        picture = naive(m, places.reshape(windows, count), query, 16 * 24).reshape(2, 16, 24)
        torch.testing.assert_close(m.image(query).double(), picture)


def test_pictures_of_sam_leave_padding_out() -> None:
    unpartition = the_class("timm.models.vision_transformer_sam.window_unpartition")
    m = record(build("samvit_base_patch16_224", **SAM, img_size=(96, 112)), torch.randn(2, 3, 96, 112).double()).maps[0]
    lies = unpartition(torch.arange(64).reshape(4, 4, 4, 1), 4, (6, 7), (8, 8))[0, ..., 0].flatten()
    places = torch.full((64,), -1).scatter_(0, lies, torch.arange(42)).reshape(4, 16)
    for query in some_places((6, 7)):
        torch.testing.assert_close(m.image(query).double(), naive(m, places, query, 42).reshape(2, 6, 7))
    assert (m.image((5, 6)).sum((1, 2)) < 0.9).all()  # padding is attended to


def test_pictures_of_pooled_keys_lie_on_the_grid_of_the_keys() -> None:
    m = record(build("pvt_v2_b0", **SHRUNK), torch.randn(2, 3, 96, 160).double(), layers="stages.1.blocks.0.attn").maps[0]
    assert m.shape[2:] == (12 * 20, 3 * 5)
    expected = m[...].mean(1)[:, 7 * 20 + 11].reshape(2, 3, 5)
    torch.testing.assert_close(m.image((7, 11)), expected)
    assert m.image((7, 11), size=(96, 160)).shape == (2, 96, 160)


@pytest.mark.parametrize("prefix", [0, 1])
def test_pictures_of_mvit_lie_on_the_grid_of_the_keys(prefix: int) -> None:
    options = MVIT | {"kernel_q": (3, 3), "stride_q": (2, 2), "kernel_kv": (3, 3), "stride_kv": (4, 4)}
    name = "timm.models.mvitv2.MultiScaleAttention"
    model = build(name, [8, 12], **options, has_cls_token=bool(prefix))
    m = record(model, torch.randn(2, prefix + 96, 16).double()).maps[0]
    assert m.shape[2:] == (prefix + 24, prefix + 6)
    assert m.query_tokens.prefix == m.tokens.prefix == ("cls",) * prefix
    expected = m[...].mean(1)[:, prefix + 2 * 6 + 5, prefix:].reshape(2, 2, 3)
    torch.testing.assert_close(m.image((2, 5)), expected)
    torch.testing.assert_close(m.image((0.7, 0.9)), expected)


def test_a_key_of_nextvit_is_spread_over_the_tokens_it_is_made_of() -> None:
    options = {"in_chs": 64, "out_chs": 128, "drop_path": 0.0, "sr_ratio": 2}
    model = build("timm.models.nextvit.NextTransformerBlock", **options)
    m = record(model, torch.randn(2, 64, 7, 9).double()).maps[0]
    assert m.shape[2:] == (63, 15)
    row = m[:, :, 13].mean(1)
    expected = torch.zeros(2, 63, dtype=row.dtype)
    for key in range(15):
        expected[:, key * 4 : key * 4 + 4] = row[:, key, None] / 4
    torch.testing.assert_close(m.image((1, 4)), expected.reshape(2, 7, 9))
    torch.testing.assert_close(m.image("mean").sum((1, 2)), torch.ones(2, dtype=row.dtype))


@pytest.mark.parametrize("size", [(7, 9), (8, 12)])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_place_of_outlook_attention_stands_in_every_window_around_it(size: Size, stride: int) -> None:
    options = {"dim": 12, "num_heads": 2, "stride": stride}
    model = build("timm.models.volo.OutlookAttention", **options)
    m = record(model, torch.randn(2, *size, 12).double()).maps[0]
    lies = model.inner.unfold(marked(*size).permute(0, 3, 1, 2))[0].long() - 1  # (places of a window, windows), by timm
    for query in some_places(size):
        number = query[0] * size[1] + query[1]
        windows = [(w, p) for w in range(lies.shape[1]) for p in range(9) if lies[p, w] == number]
        expected = torch.zeros(2, size[0] * size[1], dtype=torch.float64)
        for window, place in windows:
            for key in range(9):
                if lies[key, window] >= 0:
                    row = m[...].mean(1).unflatten(0, (2, -1))[:, window, place, key]
                    expected[:, lies[key, window]] += row / len(windows)
        torch.testing.assert_close(m.image(query), expected.reshape(2, *size))


def test_one_pair_of_a_map_is_one_place_of_one_picture() -> None:
    m = record(build("swin_tiny_patch4_window7_224", **SWIN, img_size=(40, 72)), torch.randn(2, 3, 40, 72).double()).maps[1]
    tokens, windows = m.tokens, m.tokens.windows
    assert tokens.places is not None
    for window, key in [(0, 0), (3, 7), (windows - 1, 0), (windows - 1, 15)]:
        rows = torch.zeros(2, windows, 1, len(tokens))
        rows[1, window, 0, key] = 1
        place = int(tokens.places[0, window, key])
        expected = torch.zeros(2, 1, 10, 18)
        if place >= 0:
            expected[1, 0, place // 18, place % 18] = 1
        assert torch.equal(tokens.lay_out(rows), expected)


# Mutations: what would be wrong must not go through


@pytest.mark.parametrize("mutation", ["none", "no shift", "rows for columns", "pad before the shift", "strided"])
def test_the_oracle_sees_a_mutation(mutation: str) -> None:
    model = build("swin_tiny_patch4_window7_224", **SWIN, img_size=(40, 72))
    block = model.layers[0].blocks[1]
    true, shift = swin_places(block, 10, 18), (2, 2)
    if mutation == "pad before the shift":
        grid = F.pad(torch.arange(180).reshape(10, 18), (0, 2, 0, 2), value=-1).roll((-2, -2), (0, 1))
        places = rearrange(grid, "(h p) (w q) -> (h w) (p q)", p=4, q=4)
    elif mutation == "rows for columns":
        places = cut((18, 10), (4, 4), shift).places[0]  # type: ignore[index]
    else:
        moved = (0, 0) if mutation == "no shift" else shift
        places = cut((10, 18), (4, 4), moved, strided=mutation == "strided").places[0]  # type: ignore[index]
    assert torch.equal(places, true) == (mutation == "none")


# Prefix tokens


class Dropping(nn.Module):
    """Attention that is handed fewer tokens than there are."""

    def __init__(self, attention: nn.Module, tokens: int) -> None:
        super().__init__()
        self.attention, self.tokens = attention, tokens

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        return torch.cat((self.attention(x[:, : x.shape[1] - self.tokens]), x[:, x.shape[1] - self.tokens :]), dim=1)


@pytest.mark.parametrize("name", ["vit", "vit_registers", "deit_distilled", "beit_shared", "eva_no_rope", "parallel_things"])
def test_dropped_tokens_are_not_taken_for_a_grid_without_prefix(name: str) -> None:
    model, x = tiny(name)
    model(x)
    attention = next(n for n, m in model.named_modules() if n.endswith("attn"))
    holder, _, child = attention.rpartition(".")
    prefix = model.num_prefix_tokens
    setattr(model.get_submodule(holder), child, Dropping(model.get_submodule(attention), prefix))
    m = record(model, x, layers=f"{attention}.attention").maps[0]
    assert m.shape[3] == 16
    with pytest.raises(TokenError, match=rf"16 tokens are no grid of patches over .* with {prefix} prefix tokens"):
        m.image("mean")


@pytest.mark.parametrize(("rate", "left"), [(0.4375, 9), (0.75, 4)])
def test_patch_dropout_leaves_no_grid(rate: float, left: int) -> None:
    """Not even where a square is left, or the patches that a coarser grid would have."""
    model, x = tiny("vit", patch_drop_rate=rate)
    model.train()
    m = record(model, x).maps[0]
    assert m.shape[3] == 1 + left
    with pytest.raises(TokenError, match=f"{1 + left} tokens are no grid of patches over an image of 64 x 64 pixels"):
        m.image("cls")


# Queries that are no patches


def test_a_class_token_between_branches_looks_at_the_patches_of_the_other() -> None:
    rec = record(build("crossvit_tiny_240", img_size=(120, 240), depth=[[1, 1, 0]]), torch.randn(2, 3, 120, 240).double())
    sizes = {name: m.tokens.grid_size for name, m in rec.maps.items()}
    assert sizes == {
        "blocks.0.blocks.0.0.attn": (10, 20),
        "blocks.0.blocks.1.0.attn": (7, 14),
        "blocks.0.fusion.0.attn": (7, 14),
        "blocks.0.fusion.1.attn": (10, 20),
    }
    m = rec.maps["blocks.0.fusion.1.attn"]
    assert m.query_tokens.prefix == m.tokens.prefix == ("cls",)
    torch.testing.assert_close(m.image("cls"), m[:, :, 0, 1:].mean(1).reshape(2, 10, 20))


def test_a_crop_of_the_image_lies_nowhere() -> None:
    model = build("crossvit_tiny_240", img_size=120, depth=[[1, 1, 0]], crop_scale=True)
    rec = record(model, torch.randn(2, 3, 120, 120).double())
    assert rec.maps["blocks.0.blocks.0.0.attn"].image("cls").shape == (2, 10, 10)
    for name in ("blocks.0.blocks.1.0.attn", "blocks.0.fusion.0.attn"):
        with pytest.raises(TokenError, match="112 x 112 pixels that were cropped out"):
            rec.maps[name].image("cls")


@pytest.mark.parametrize("name", ["xcit_nano_12_p16_224", "cait_xxs24_224"])
def test_class_attention_looks_at_all_patches(name: str) -> None:
    model = build(name, img_size=(64, 96), depth=1)
    m = record(model, torch.randn(2, 3, 64, 96).double()).maps[-1]
    assert (m.query_tokens.prefix, m.tokens.prefix, m.tokens.grid_size) == (("cls",), ("cls",), (4, 6))
    torch.testing.assert_close(m.image("cls"), m[:, :, 0, 1:].mean(1).reshape(2, 4, 6))


@pytest.mark.parametrize(("class_token", "first"), [(True, "cls"), (False, "pool")])
def test_attention_pooling_of_features_has_one_token_more(class_token: bool, first: str) -> None:
    options = {"in_features": 32, "feat_size": (4, 4), "head_dim": 16, "class_token": class_token}
    m = record(build("timm.layers.attention_pool2d.AttentionPool2d", **options), torch.randn(2, 32, 4, 4).double()).maps[0]
    assert m.tokens.prefix == (first,)
    torch.testing.assert_close(m.image(first), m[:, :, 0, 1:].mean(1).reshape(2, 4, 4))
    torch.testing.assert_close(m.image((2, 3)), m[:, :, 12, 1:].mean(1).reshape(2, 4, 4))


@pytest.mark.parametrize("include", [True, False])
def test_a_latent_pools_the_prefix_tokens_if_the_model_says_so(include: bool) -> None:
    options = {"img_size": (64, 96), "global_pool": "map", "class_token": False, "reg_tokens": 2}
    model = build("vit_tiny_patch16_224", **VIT, **options, pool_include_prefix=include)
    m = record(model, torch.randn(2, 3, 64, 96).double()).maps["attn_pool"]
    assert m.tokens.prefix == (("reg0", "reg1") if include else ())
    assert m.query_tokens.prefix == ("latent0",)
    torch.testing.assert_close(m.image("latent0"), m[:, :, 0, 2 * include :].mean(1).reshape(2, 4, 6))


@pytest.mark.parametrize(
    ("name", "options", "attention"),
    [
        ("xcit_nano_12_p16_224", {"img_size": 64, "depth": 1}, "blocks.0.attn"),
        ("davit_tiny", DAVIT, "stages.0.blocks.0.1.attn"),
        ("edgenext_xx_small", {}, "stages.1.blocks.1.xca"),
    ],
)
def test_channels_lie_nowhere(name: str, options: dict[str, Any], attention: str) -> None:
    m = record(build(name, **options), torch.randn(2, 3, 64, 64).double(), layers=attention).maps[0]
    assert m.axes == ("batch", "head", "channel", "channel")
    with pytest.raises(TokenError, match="from channels to channels"):
        m.image("mean")


# Odds and ends of windows


def test_a_grid_that_is_resized_to_whole_patches_is_the_one_that_is_cut() -> None:
    options = {"in_chs": 16, "patch_size": 2, "transformer_depth": 1}
    m = record(build("timm.models.mobilevit.MobileVitBlock", **options), torch.randn(2, 16, 7, 9).double()).maps[0]
    assert m.shape[::2] == (2 * 4, 20)
    assert m.tokens.grid_size == (8, 10)
    picture = m.image((3, 5))
    assert (picture > 0).sum() == 2 * 20
    assert (picture[:, 1::2, 1::2] > 0).all()


@pytest.mark.parametrize("name", ["tnt_s_legacy_patch16_224", "tnt_b_patch16_224"])
def test_the_inner_attention_of_tnt_sees_the_pixels_of_a_patch(name: str) -> None:
    model = build(name, img_size=(64, 96), depth=1, embed_dim=48, num_heads_outer=3)
    places = some_places((16, 24))
    x = torch.randn(1, 3, 64, 96).double().repeat(len(places) + 1, 1, 1, 1)
    with moving(model, ":in", patches(4), places):
        m = record(model, x, layers="blocks.0.attn_in").maps[0]
    assert m.tokens.grid_size == (16, 24)
    assert m.tokens.windows == 24
    moved = (m.x.unflatten(0, (len(x), -1))[1:] - m.x.unflatten(0, (len(x), -1))[0]).abs().sum(-1)
    for place, change in zip(places, moved):
        selected = m.tokens.select(place)[0]
        assert change[selected].min() > 0
        around = m.tokens.lay_out(change[None, :, None])[0, 0].nonzero() - torch.tensor(place)
        assert around.abs().max() <= 2  # convolutions of 7 x 7, 4 apart


def test_windows_without_the_block_that_cut_them_lie_nowhere() -> None:
    model = build("swin_tiny_patch4_window7_224", **SWIN, img_size=(40, 72))
    m = record(nn.Sequential(model.layers[0].blocks[1].attn), torch.randn(30, 16, 24).double()).maps[0]
    with pytest.raises(TokenError):
        m.image("mean")
    with AttentionRecorder(model) as rec, torch.no_grad():
        model.layers[0].blocks[1].attn(torch.randn(30, 16, 24).double())
    with pytest.raises(TokenError, match="was called, but not the SwinTransformerBlock around it"):
        rec.maps[0].image("mean")


def test_windows_are_known_where_no_image_was_seen() -> None:
    block = build("swin_tiny_patch4_window7_224", **SWIN, img_size=(40, 72)).layers[0].blocks[1]
    m = record(nn.Sequential(nn.Identity(), block), torch.randn(2, 10, 18, 24).double()).maps[0]
    assert m.axes[0] == "batch * windows"
    assert m.image((3, 4)).shape == (2, 10, 18)


@pytest.mark.filterwarnings("ignore")  # of timm's resampling
@pytest.mark.parametrize("size", [(64, 64), (96, 64)])
def test_an_input_size_that_was_set_anew_is_the_one_that_counts(size: Size) -> None:
    model = build("swin_tiny_patch4_window7_224", **SWIN, img_size=(48, 64))
    model.set_input_size(img_size=size, window_size=(3, 5))
    for m in record(model, torch.randn(2, 3, *size).double()).maps.values():
        assert m.tokens.grid_size in [(size[0] // 4, size[1] // 4), (size[0] // 8, size[1] // 8)]
        assert m.image("mean").shape == (2, *m.tokens.grid_size)


# Models inside models


def test_features_only_models_tell_the_same() -> None:
    for name, options, count in (("swin_tiny_patch4_window7_224", SWIN, 4), ("vit_tiny_patch16_224", VIT, 1)):
        model = build(name, **options, img_size=(64, 96), features_only=True, out_indices=[0])
        maps = record(model, torch.randn(2, 3, 64, 96).double()).maps
        assert 1 <= len(maps) <= count
        for m in maps.values():
            rows, columns = m.tokens.grid_size
            assert rows * 3 == columns * 2
            assert m.image((1, 2)).shape == (2, rows, columns)


class Towers(nn.Module):
    """Two models, each with images of its own."""

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.left(a), self.right(b)


def test_two_towers_each_have_their_own_grid() -> None:
    left = build("vit_tiny_patch16_224", **VIT, img_size=(64, 96))
    right = build("swin_tiny_patch4_window7_224", **SWIN, img_size=(48, 32))
    with AttentionRecorder(Towers(left, right)) as rec, torch.no_grad():
        rec.model(torch.randn(2, 3, 64, 96).double(), torch.randn(3, 3, 48, 32).double())
    assert rec.maps["left.blocks.0.attn"].image("cls").shape == (2, 4, 6)
    assert rec.maps["right.layers.0.blocks.1.attn"].image((5, 7)).shape == (3, 12, 8)


# Images that come as patches


@pytest.mark.parametrize("prefix", [(), ("cls",), ("cls", "reg0", "reg1")])
def test_images_of_their_own_grids_lie_each_on_its_own(prefix: tuple[str, ...]) -> None:
    rec, _ = naflex(class_token="cls" in prefix, reg_tokens=max(0, len(prefix) - 1))
    for m in (rec.maps["blocks.0.attn"], rec.maps["attn_pool"]):
        assert m.tokens.grid_size == (4, 5)
        names = m.tokens.prefix
        assert names == (prefix if m.name == "blocks.0.attn" else ())
        attention = m[...].mean(1)[:, 0, len(names) :]
        picture = m.image(0)
        whole_size = m.image(0, size=(8, 9))
        for i, (rows, columns) in enumerate(SIZES):
            expected = torch.zeros(4, 5, dtype=attention.dtype)
            expected[:rows, :columns] = attention[i, : rows * columns].reshape(rows, columns)
            torch.testing.assert_close(picture[i], expected)
            small = expected[None, None, :rows, :columns]
            torch.testing.assert_close(whole_size[i], F.interpolate(small, (8, 9), mode="bilinear")[0, 0])
            assert (attention[i, rows * columns :] == 0).all()  # padding gets nothing


def test_a_point_lies_on_another_patch_in_each_image() -> None:
    m = naflex()[0].maps["blocks.0.attn"]
    for point in ((0.0, 0.0), (0.6, 0.5), (1.0, 1.0)):
        picture = m.image(point)
        for i, (rows, columns) in enumerate(SIZES):
            patch = min(int(point[0] * rows), rows - 1) * columns + min(int(point[1] * columns), columns - 1)
            expected = m[i, :, patch, : rows * columns].mean(0).reshape(rows, columns)
            torch.testing.assert_close(picture[i, :rows, :columns], expected)
    with pytest.raises(TokenError, match="not among the tokens of every image"):
        m.image((3, 2))


def test_means_of_images_of_their_own_grids_are_of_their_own_patches() -> None:
    m = naflex()[0].maps["blocks.0.attn"]
    for i, (rows, columns) in enumerate(SIZES):
        expected = m[i, :, : rows * columns, : rows * columns].mean((0, 1)).reshape(rows, columns)
        torch.testing.assert_close(m.image("mean")[i, :rows, :columns], expected)


def test_patches_whose_coordinates_mark_them_as_padding_lie_nowhere() -> None:
    model = build("gemma4_vit_167m", **(VIT | GEMMA))
    batch = as_patches([torch.rand(3, 16 * h, 16 * w, dtype=torch.float64) for h, w in ((3, 6), (6, 3))], 16, 20)
    batch["patch_coord"][~batch.pop("patch_valid")] = -1
    m = record(model, batch).maps[0]
    assert m.tokens.grid_size == (6, 6)
    torch.testing.assert_close(m.image((2, 2))[0, :3], m[0, :, 14, :18].mean(0).reshape(3, 6))
    torch.testing.assert_close(m.image((2, 2))[1, :, :3], m[1, :, 8, :18].mean(0).reshape(6, 3))


# Sizes


@pytest.mark.parametrize("size", [(7, 12), (16, 9), (1, 5)])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 2, 3, 2, 1),
        nn.Conv2d(2, 2, (3, 1), (2, 3), (1, 0)),
        nn.Conv2d(2, 2, 3, padding="same"),
        nn.Conv2d(2, 2, 1, padding="valid"),
        nn.Conv2d(2, 2, 3, 1, 2, dilation=2),
        nn.MaxPool2d(3, 2, 1),
        nn.AvgPool2d(2, 2, ceil_mode=True),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True),
        nn.AvgPool2d(1, 2),
        nn.AdaptiveAvgPool2d(7),
        nn.AdaptiveAvgPool2d((None, 3)),
        nn.Sequential(nn.ZeroPad2d((1, 0, 2, 0)), nn.Conv2d(2, 2, 2), nn.ReLU(), nn.Conv2d(2, 2, 3, 2, 1)),
        timm.layers.create_conv2d(2, 2, 3, stride=2, padding="same"),
        timm.layers.create_pool2d("avg", 2, stride=2, padding="same"),
        timm.layers.create_pool2d("max", 3, stride=2, padding="same"),
        timm.layers.create_pool2d("max", 3, stride=2),
    ],
    ids=str,
)
def test_a_size_after_a_layer_is_what_comes_out_of_it(layer: nn.Module, size: Size) -> None:
    assert size_after((2, *size), layer) == tuple(layer(torch.randn(1, 2, *size)).shape[2:])
    assert size_after(size, None) == size


@pytest.mark.parametrize("keep", ["inputs", "maps"])
@pytest.mark.filterwarnings("ignore")  # of timm, when it resizes
def test_a_picture_is_that_of_the_forward_when_windows_are_resized_later(keep: Any) -> None:
    sizes: Any = {"window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=32, **sizes).eval()
    with AttentionRecorder(model, keep=keep) as rec, torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
    m = rec.maps["layers.1.blocks.1.attn"]
    before = m.image((1, 1))
    model.set_input_size((64, 64), window_size=(4, 4))
    assert model.layers[1].blocks[1].shift_size != (0, 0)
    assert torch.equal(m.tokens.select((1, 1)).nonzero(), torch.tensor([[0, 0, 5]]))
    if keep == "maps":
        assert torch.equal(m.image((1, 1)), before)
