"""Mean attention distance, against the definition measured point by point on the image."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from support import reference
from support.image import MVIT, SHRUNK, SIZES, SWIN, VIT, as_patches, build, made_of, naflex, swin_places
from support.inside import kept, read_in_chunks, show_image
from support.models import tiny
from support.modes import operators_of
from support.reading import record_one
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hookattn import AttentionMap, AttentionRecorder, TokenError
from hookattn.analysis import mean_attention_distance
from hookattn.image import Geometry


def distances(m: AttentionMap, queries: list[Any], keys: list[Any]) -> Tensor:
    """(images, heads), where all tokens of the image are one window."""
    images = m[...].tolist()
    rows = [[reference.attention_distance(torch.tensor(h, dtype=torch.float64), queries, keys) for h in i] for i in images]
    return torch.tensor([[sum(head) / len(head) for head in heads] for heads in rows], dtype=torch.float64)


@pytest.fixture(params=[1, 3 * 25 * 7, 10**9], ids="chunk {}".format)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    read_in_chunks(monkeypatch, request.param)
    return int(request.param)


@pytest.mark.parametrize("keep", ["inputs", "maps"])
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize(
    ("size", "patch"),
    [((48, 80), (16, 16)), ((48, 80), (8, 16)), ((39, 66), (16, 16))],
    ids=["square patches", "wide patches", "padded at the border"],
)
@pytest.mark.usefixtures("chunk")
def test_distances_are_between_centres_of_patches(keep: Any, prefix: int, size: Any, patch: Any) -> None:
    options = VIT | {"patch_size": patch, "class_token": prefix > 0, "reg_tokens": max(0, prefix - 1), "global_pool": "avg"}
    model = build("vit_tiny_patch16_224", **options, img_size=(48, 80), dynamic_img_size=True, dynamic_img_pad=True)
    m = record_one(model, torch.randn(2, 3, *size).double(), keep=keep)
    tokens = [None] * prefix + reference.centres(48 // patch[0], 5, *patch)
    torch.testing.assert_close(mean_attention_distance(m), distances(m, tokens, tokens), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("grid", "cell"), [((2, 6), (16, 16)), ((3, 7), (16, 16)), ((1, 3), (32, 32)), ((2, 5), (47 / 2, 111 / 5))], ids=str
)
@pytest.mark.parametrize("told", [True, False], ids=["steps", "patch_size"])
def test_cells_are_patches_or_whole_numbers_of_them_and_else_parts_of_the_image(grid: Any, cell: Any, told: bool) -> None:
    model = nn.Module()
    model.patch_embed = nn.Conv2d(3, 8, 16, 16) if told else nn.Flatten()
    model.patch_embed.patch_size = 16
    # 2 x 6 patches and a rest, 3 x 7 and padding, two patches in one, or no number of patches
    assert Geometry(model, "patch_embed", model.patch_embed, (1, 47, 111)).cell_size(grid) == cell


@pytest.mark.parametrize("block", [0, 1], ids=["plain", "shifted"])
@pytest.mark.usefixtures("chunk")
def test_distances_in_windows_are_those_on_the_image(block: int) -> None:
    model = build("swin_tiny_patch4_window7_224", **SWIN, img_size=(40, 72))
    m = record_one(model, torch.randn(2, 3, 40, 72).double(), block)
    places = swin_places(model.get_submodule(m.name.removesuffix(".attn")), 10, 18)  # padding says -1
    assert (places < 0).any()
    at = reference.centres(10, 18, 4, 4)
    expected = torch.zeros(2, 2, dtype=torch.float64)
    for image, attention in enumerate(m[...].unflatten(0, (2, -1))):
        for head in range(2):
            found = []
            for window, numbers in zip(attention[:, head], places.tolist()):
                points = [at[n] if n >= 0 else None for n in numbers]
                found += reference.attention_distance(window, points, points)
            assert len(found) == 180
            expected[image, head] = sum(found) / 180
    torch.testing.assert_close(mean_attention_distance(m), expected, rtol=1e-9, atol=0)


def from_pictures(m: AttentionMap, size: tuple[int, int]) -> Tensor:
    """(images, heads): each query's picture, measured on the image."""
    (rows, columns), keys = m.query_tokens.grid_size, m.tokens.grid_size
    starts, ends = (reference.centres(r, c, size[0] / r, size[1] / c) for r, c in ((rows, columns), keys))
    found = []
    for start, query in zip(starts, [(i, j) for i in range(rows) for j in range(columns)]):
        picture = m.image(query, heads=None).double()
        apart = torch.tensor([math.dist(start, end) for end in ends], dtype=torch.float64).reshape(keys)
        found.append((picture * apart).sum((2, 3)) / picture.sum((2, 3)))
    return torch.stack(found).mean(0)


NEXTVIT = "timm.models.nextvit.NextTransformerBlock"


POOLED: dict[str, tuple[Callable[[], tuple[nn.Module, Any]], Any, tuple[int, int]]] = {
    "pvt": (made_of("pvt_v2_b0", (64, 96), **SHRUNK), "stages.1.blocks.0.attn", (64, 96)),
    "queries pooled": (made_of("sam2_hiera_tiny", (64, 96), embed_dim=16), "blocks.1.attn", (64, 96)),
    "a grid of windows": (made_of("test_maxvit", (64, 96), img_size=(64, 96)), "stages.0.blocks.0.attn_grid.attn", (64, 96)),
    "padded windows": (
        made_of("samvit_base_patch16_224", (96, 112), depth=1, embed_dim=48, num_heads=3, window_size=4, img_size=(96, 112)),
        0,
        (96, 112),
    ),
    "keys that are no cells": (
        lambda: (build(NEXTVIT, in_chs=64, out_chs=128, drop_path=0.0, sr_ratio=2), torch.randn(2, 64, 7, 9).double()),
        0,
        (7, 9),
    ),
    "halos": (
        lambda: (
            build("timm.layers.halo_attn.HaloAttn", dim=16, num_heads=2, block_size=4, halo_size=2),
            torch.randn(2, 16, 8, 12).double(),
        ),
        0,
        (8, 12),
    ),
}


@pytest.mark.parametrize("name", POOLED)
def test_distances_are_those_on_the_pictures_of_all_queries(name: str) -> None:
    make, layer, size = POOLED[name]
    m = record_one(*make(), layer)
    torch.testing.assert_close(mean_attention_distance(m).double(), from_pictures(m, size), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prefix", [0, 1])
def test_distances_between_grids_of_two_sizes_leave_the_class_token_out(prefix: int) -> None:
    options = MVIT | {"kernel_q": (3, 3), "stride_q": (2, 2), "kernel_kv": (3, 3), "stride_kv": (4, 4)}
    model = build("timm.models.mvitv2.MultiScaleAttention", [8, 12], **options, has_cls_token=bool(prefix))
    m = record_one(model, torch.randn(2, prefix + 96, 16).double())
    with pytest.raises(TokenError, match="no image was seen"):
        mean_attention_distance(m)
    show_image(m, (2, 128, 96))
    queries, keys = ([None] * prefix + reference.centres(r, c, 128 / r, 96 / c) for r, c in ((4, 6), (2, 3)))
    torch.testing.assert_close(mean_attention_distance(m), distances(m, queries, keys), rtol=1e-9, atol=0)


@pytest.mark.parametrize("size", [None, (8, 16)], ids=["patches of the model's size", "patches of a size of their own"])
@pytest.mark.usefixtures("chunk")
def test_distances_of_images_of_their_own_grids_are_each_on_its_own(size: Any) -> None:
    if size is None:
        m, size = naflex(class_token=True)[0].maps["blocks.0.attn"], (16, 16)
    else:
        model = build("naflexvit_base_patch16_map", **VIT, class_token=True, reg_tokens=0, enable_patch_interpolator=True)
        batch = as_patches([torch.randn(3, 16 * h, 16 * w).double() for h, w in SIZES], 16, 14)
        batch["patches"] = torch.randn(3, 14, *size, 3).double()
        m = record_one(model, batch)
    for image, (rows, columns) in enumerate(SIZES):
        tokens = [None, *reference.centres(rows, columns, *size), *[None] * (14 - rows * columns)]
        for head, attention in enumerate(m[image]):
            found = reference.attention_distance(attention, tokens, tokens)
            assert len(found) == rows * columns
            torch.testing.assert_close(float(mean_attention_distance(m)[image, head]), sum(found) / len(found))


def test_a_patch_that_looks_at_no_patch_is_left_out_of_the_mean_distance() -> None:
    model, x = tiny("vit_registers")
    m = record_one(model.double(), x.double())
    tokens = [None] * 5 + reference.centres(4, 4, 14, 14)
    attention = m[...].clone()
    attention[:, 0, 7, 5:] = 0
    attention[1, 2, :, 5:] = 0
    m = kept(attention, m)
    got = mean_attention_distance(m)
    found = reference.attention_distance(attention[0, 0], tokens, tokens)
    assert len(found) == 15
    torch.testing.assert_close(float(got[0, 0]), sum(found) / 15)
    assert got.isnan().nonzero().tolist() == [[1, 2]]


def test_distances_of_patches_of_no_known_size_are_refused() -> None:
    rec, _ = naflex()
    before = mean_attention_distance(rec.maps["blocks.0.attn"])
    del rec.model.embeds.patch_size
    assert torch.equal(mean_attention_distance(rec.maps["blocks.0.attn"]), before)  # it was known in the forward
    m = rec.maps["blocks.0.attn"]
    never: Any = m._geometry._replace(cut=None)  # type: ignore[union-attr]  # as where the stem is not called
    m._geometry = never
    with pytest.raises(TokenError, match="has no `patch_size`"):
        mean_attention_distance(m)


def test_places_are_worked_out_once_for_all_layers_and_forwards_of_images_of_a_size() -> None:
    model, x = tiny("vit", depth=3, dynamic_img_size=True)
    other = torch.nn.functional.interpolate(x, scale_factor=2)

    def step(images: torch.Tensor) -> int:
        def run() -> None:
            model(images)
            for m in rec.maps.values():
                mean_attention_distance(m)

        return sum("nansum" in each for each in operators_of(run))

    with torch.no_grad(), AttentionRecorder(model) as rec:
        assert [step(each) for each in (x, x, other, x, other)] == [1, 0, 1, 0, 0]


@pytest.mark.parametrize("first", [torch.inference_mode, lambda: FakeTensorMode(allow_non_fake_inputs=True)])
def test_places_that_were_made_under_a_mode_are_not_those_of_others(first: Callable[[], Any]) -> None:
    model: Any
    model, x = tiny("vit")
    alone = copy.deepcopy(model)
    with AttentionRecorder(model, detach=False) as rec:
        model(x)
        with first(), suppress(Exception):
            mean_attention_distance(rec.maps[0])
        mean_attention_distance(rec.maps[1]).sum().backward()
    with AttentionRecorder(alone, detach=False) as other:
        alone(x)
        mean_attention_distance(other.maps[1]).sum().backward()
    grads = [each.blocks[1].attn.qkv.weight.grad for each in (model, alone)]
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)
