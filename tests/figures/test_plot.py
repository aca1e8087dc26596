"""Pictures show what maps hold, mark who asks, and fill their sheet; read off the artists of matplotlib."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from matplotlib.colors import LogNorm
from PIL import Image
from support.image import SIZES, naflex
from torch import Tensor

from hookattn import AttentionMap, AttentionRecorder, TokenError
from hookattn.figures import plot
from hookattn.image import Photo

CLS = 5  # tokens before the patches of the small model: class token and four registers


def record(name: str, size: int = 64, batch: int = 2, **options: Any) -> Any:
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=size, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
        with AttentionRecorder(model) as rec:
            model(torch.randn(batch, 3, size, size))
    return rec.maps


@pytest.fixture(scope="module")
def vit() -> Any:
    return record("vit_small_patch14_reg4_dinov2", 56, embed_dim=24, num_heads=3, depth=3)


@pytest.fixture(scope="module")
def swin() -> Any:
    sizes: Any = {"window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
    return record("swin_tiny_patch4_window7_224", **sizes)


def image(height: int = 56, width: int = 56) -> Any:
    return np.random.default_rng(0).random((height, width, 3))


def given(m: AttentionMap, row: Tensor) -> AttentionMap:
    """The map with this row for every token of every head: (keys,) of what each key gets."""
    return m.kept((row / row.sum()).expand(m.shape).clone())


def marked(ax: Any) -> list[tuple[float, float, float, float]]:
    """(left, top, width, height) of what is outlined."""
    return [(*p.get_xy(), p.get_width(), p.get_height()) for p in ax.patches if p.get_gid() == "query"]


def brightness(artist: Any) -> float:
    return float(np.asarray(artist.norm(artist.get_array())).mean())


def written(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.texts]


@pytest.mark.parametrize("head", [0, 2, "mean", "max"])
@pytest.mark.parametrize(("query", "row"), [("cls", 0), ("reg2", 3), ((1, 2), CLS + 6), ((0.3, 0.6), CLS + 6), (7, 7)])
def test_what_is_drawn_is_the_row_in_units_of_what_is_uniform(vit: Any, head: Any, query: Any, row: int) -> None:
    values = vit[1][1, :, row, CLS:]
    expected = {"mean": values.mean(0), "max": values.amax(0)}.get(head, values[head if isinstance(head, int) else 0])
    artist = plot.attention(vit[1], query, head, index=1)
    torch.testing.assert_close(torch.tensor(artist.get_array()).float(), expected.unflatten(0, (4, 4)) * 21)


@pytest.mark.parametrize("query", [(0.3, 0.9), (0.99, 0.01), (5, 6)])
@pytest.mark.parametrize("layer", [0, 1])
def test_windows_lie_where_they_were_cut(swin: Any, layer: int, query: Any) -> None:
    artist = plot.attention(swin[layer], query, 1, index=-1)
    expected = swin[layer].image(query, heads=1)[-1] * 16
    torch.testing.assert_close(torch.tensor(artist.get_array()).float(), expected)
    assert (expected > 0).sum() <= 16, "of one window"


@pytest.mark.parametrize("ground", [None, image(), image(112, 112)])
@pytest.mark.parametrize(("query", "place"), [((1, 2), (2, 1)), ((0.99, 0.0), (0, 3)), ("cls", None), ("mean", None)])
def test_the_patch_that_asks_is_outlined(vit: Any, ground: Any, query: Any, place: Any) -> None:
    ax = plot.attention(vit[0], query, image=ground).axes
    side = (56 if ground is None else len(ground)) / 4
    assert marked(ax) == ([] if place is None else [pytest.approx((place[0] * side, place[1] * side, side, side))])
    asked = {"cls": "class token", "mean": "mean of all patches"}.get(query, str(query)[:4] if isinstance(query, str) else "")
    assert asked in ax.get_title()
    assert "blocks.0" in ax.get_title()
    assert "mean of heads" in ax.get_title()


def test_a_point_is_one_of_the_photo_and_its_patch_is_outlined_there(vit: Any) -> None:
    """The middle of a photo twice as wide as high is shown to the model: its left border is at a quarter of the width."""
    config = {"input_size": (3, 56, 56), "crop_pct": 1.0, "interpolation": "bilinear", "mean": (0, 0, 0), "std": (1, 1, 1)}
    photo = Photo.open(Image.fromarray((image(100, 200) * 255).astype(np.uint8)), config, crop="center")
    artist = plot.attention(vit[0], (0.1, 0.3), image=photo)
    assert marked(artist.axes) == [pytest.approx((50, 0, 25, 25))]
    assert artist.get_extent() == pytest.approx([50, 150, 100, 0])
    assert artist.axes.get_xlim() == (0, 200)
    grounds = [each for each in artist.axes.images if each is not artist]
    light = grounds[0].get_array().mean((0, 2))
    assert light[:50].max() < light[60:140].min(), "what the model did not see is darker"
    with pytest.raises(TokenError, match=r"did not see the point"):
        plot.attention(vit[0], (0.1, 0.1), image=photo)


def test_a_head_that_looks_at_registers_looks_empty(vit: Any) -> None:
    """Alike on patches, one head gives them all of its attention, one 5 %."""
    patches = torch.tensor([1.0, 3.0, 2.0, 5.0]).repeat(4)
    own = patches.sum() / 0.05 * 0.95
    full = given(vit[0], torch.cat((torch.zeros(CLS), patches)))
    hardly = given(vit[0], torch.cat((torch.zeros(1), torch.full((4,), own / 4), patches)))
    assert brightness(plot.attention(full)) > 0.4
    assert brightness(plot.attention(hardly)) < 0.05
    below = plot.attention(hardly).axes.texts[0].get_text()
    assert "5.0% patches" in below
    assert "95.0% reg" in below
    entropy = -torch.special.xlogy(hardly[0, 0, 0], hardly[0, 0, 0]).sum()
    assert f"entropy {entropy:.2f} nats" in below


def test_a_peak_that_is_clipped_is_marked_and_counted() -> None:
    m = record("vit_small_patch16_224", 256, 1, embed_dim=24, num_heads=3, depth=1)[0]
    row = torch.ones(257)
    row[7] = 64  # patch 6, far above what all others get
    artist = plot.attention(given(m, row))
    crosses = [line for line in artist.axes.lines if line.get_gid() == "clipped"]
    assert [line.get_xydata().tolist() for line in crosses] == [[[6.5 * 16, 8.0]]]
    assert "1 over 1x" in artist.axes.texts[0].get_text()
    assert artist.norm.vmax == pytest.approx(1.0, rel=0.01)
    assert float(artist.get_array().max()) == pytest.approx(257 * 64 / 320)
    assert not [line for line in plot.attention(given(m, row), vmax=60).axes.lines if line.get_gid() == "clipped"]


def test_scales(vit: Any) -> None:
    def tops(**style: Any) -> list[float]:
        figure = plot.overview(vit, "cls", **style)
        return [ax.images[-1].norm.vmax for ax in figure.axes if ax.images and ax.images[-1].get_array().shape == (4, 4)]

    layer, joint = tops(scale="layer"), tops(scale="all")
    assert len(set(tops(scale="panel"))) == 13, "the rollout and four panels in each layer"
    assert len(set(joint[1:])) == 1
    assert len(set(layer[1:5])) == len(set(layer[5:9])) == 1
    assert max(layer[1:]) == joint[1]
    assert set(tops(vmax=7.0)) == {7.0}
    assert isinstance(plot.attention(vit[0], scale="log").norm, LogNorm)
    norm = LogNorm(0.1, 3)
    assert plot.attention(vit[0], norm=norm).norm is norm
    with pytest.raises(ValueError, match=r"scale='heads' is no choice: 'panel', 'layer', 'all', 'log'"):
        plot.attention(vit[0], scale="heads")


def layouts() -> list[Any]:
    small: Any = {"embed_dim": 48, "patch_size": 16}
    ragged: Any = {"window_size": 4, "embed_dim": 24, "depths": (1, 1, 1), "num_heads": (3, 6, 24)}
    return [
        pytest.param(("vit_small_patch16_224", {**small, "num_heads": 1, "depth": 1}), id="1 x 1"),
        pytest.param(("vit_small_patch16_224", {**small, "num_heads": 6, "depth": 3}), id="3 x 6"),
        pytest.param(("vit_small_patch16_224", {**small, "embed_dim": 32, "num_heads": 16, "depth": 10}), id="10 x 16"),
        pytest.param(("swin_tiny_patch4_window7_224", ragged), id="ragged"),
    ]


@pytest.mark.parametrize("made", layouts())
def test_a_sheet_is_full_and_everything_on_it_can_be_read(made: Any) -> None:
    maps = record(made[0], 64, 1, **made[1])
    figure = plot.overview(maps, (0.3, 0.7), image=image(64, 64), title="$x$ [b] photo.jpg", dpi=50)
    texts = [text for text in figure.texts if text.get_text()]
    assert min(text.get_fontsize() for text in texts) >= 7
    boxes = [text.get_window_extent() for text in texts] + [ax.get_window_extent() for ax in figure.axes]
    sheet, ends = figure.bbox, np.array([box.extents for box in boxes])
    assert ends.min() >= 0
    assert (ends[:, 2:] <= [sheet.x1, sheet.y1]).all()
    low, high = (np.array([box.shrunk(0.98, 0.9).extents[half] for box in boxes]) for half in (slice(2), slice(2, 4)))
    overlapping = ((low[:, None] < high) & (low < high[:, None])).all(-1)
    np.fill_diagonal(overlapping, False)
    assert not overlapping.any()
    drawn = sum(ax.get_window_extent().width * ax.get_window_extent().height for ax in figure.axes)
    assert drawn / (sheet.width * sheet.height) > (0.38 if made[0].startswith("swin") else 0.42)
    assert "$x$ [b] photo.jpg, point (0.3, 0.7)" in written(figure)


def test_each_layer_is_drawn_on_its_own_grid_and_windows_are_no_rollout(swin: Any) -> None:
    figure = plot.overview(swin[:], (0.3, 0.9))
    assert [each for each in written(figure) if each.startswith("head")] == ["head 0", "head 1", "head 2", "head 3"]
    assert not any("rollout" in each for each in written(figure))
    panels = [ax.images[-1].get_array() for ax in figure.axes if ax.images]
    assert [panel.shape for panel in panels] == [(16, 16)] * 6 + [(8, 8)] * 10
    torch.testing.assert_close(torch.tensor(panels[4]).float(), swin[1].image((0.3, 0.9), heads=0)[0] * 16)


@pytest.mark.parametrize(
    ("picked", "named"),
    [
        (slice(None), ["rollout, blocks.0 to blocks.2"]),
        (slice(1, None), ["rollout, blocks.1 to blocks.2"]),
        (slice(None, None, 2), []),
        (slice(1), []),
    ],
)
def test_a_rollout_is_of_layers_that_follow_each_other(vit: Any, picked: slice, named: list[str]) -> None:
    assert [each for each in written(plot.overview(vit[picked])) if "rollout" in each] == named


def test_the_rollout_of_tokens_in_another_order_lies_where_they_do() -> None:
    """Hiera's tokens come unrolled; A'_2 A'_1 by hand, of the row of one patch."""
    sizes: Any = {"embed_dim": 24, "stages": (1, 1, 3, 1)}
    torch.manual_seed(0)
    model = timm.create_model("hiera_tiny_224", img_size=128, **sizes).eval()
    with AttentionRecorder(model, ["blocks.3.attn", "blocks.4.attn"]) as rec, torch.no_grad():
        model(torch.randn(1, 3, 128, 128))
    first, second = rec.maps[:]
    assert second.tokens.places is not None
    one, two = (0.5 * m[0].mean(0) + 0.5 * torch.eye(64) for m in (first, second))
    at = second.tokens.places.flatten().tolist()
    expected = torch.zeros(64)
    expected[at] = (two @ one)[at.index(3 * 8 + 2)]
    figure = plot.overview(rec, (3, 2))
    panel = torch.tensor(figure.axes[0].images[-1].get_array()).float()
    torch.testing.assert_close(panel, expected.unflatten(0, (8, 8)) * 64)


def test_images_that_have_grids_of_their_own_are_drawn_on_these() -> None:
    maps = naflex(depth=2)[0].maps
    for index, (rows, columns) in enumerate(SIZES):
        figure = plot.overview(maps[:-1], (0.9, 0.9), index=index)
        panels = [ax for ax in figure.axes if ax.images]
        assert len(panels) == 9, "the rollout, and the mean and three heads of two layers"
        for ax in panels:
            assert ax.images[-1].get_array().shape == (rows, columns)
            assert ax.get_xlim() == (0, columns * 16)
            assert marked(ax) == [pytest.approx((int(0.9 * columns) * 16, int(0.9 * rows) * 16, 16, 16))]


@pytest.mark.parametrize("query", [(3, 4), 7])
def test_a_patch_that_is_another_place_in_each_layer_is_refused(swin: Any, query: Any) -> None:
    for draw in (plot.overview, plot.layers):
        with pytest.raises(TokenError, match=r"grids of 16 x 16, 8 x 8 patches.*query=\(0\.4, 0\.6\)"):
            draw(swin, query)
    plot.overview(swin[:2], query)


def test_what_there_is_not_is_refused_by_name(vit: Any) -> None:
    for wrong, match in (
        ({"head": 3}, "no head 3: .* 0 to 2"),
        ({"index": 2}, "no image 2: .* 0 to 1"),
        ({"query": "x"}, "'x'"),
    ):
        with pytest.raises(TokenError, match=match):
            plot.attention(vit[0], **wrong)
    for draw in (plot.overview, plot.layers, plot.statistics):
        with pytest.raises(ValueError, match="no map to draw"):
            draw([])
    with pytest.raises(ValueError, match=r"\(height, width, 3\), not \(8, 8\)"):
        plot.attention(vit[0], image=np.zeros((8, 8)))
    with pytest.raises(TypeError, match="colour"):
        plot.heads(vit[0], colour="red")
    with pytest.raises(ValueError, match=r"inches.*fewer layers"):
        plot.overview(vit, dpi=20_000)


def test_heads_and_layers_for_one_query_or_several(vit: Any) -> None:
    one, several = plot.heads(vit[0], "cls"), plot.heads(vit[0], ["cls", (0, 1)], heads=[2, "max"])
    assert [each for each in written(one) if "head" in each] == ["head 0", "head 1", "head 2"]
    assert "blocks.0, class token" in written(one)
    assert {"class token", "patch (0, 1)", "head 2", "largest of heads"} <= set(written(several))
    panels = [ax.images[-1].get_array() for ax in several.axes if ax.images]
    torch.testing.assert_close(torch.tensor(panels[2]).float(), vit[0].image((0, 1), heads=2)[0] * 21)
    layers = plot.layers(vit, ["reg0", "mean"], head=1)
    panels = [ax.images[-1].get_array() for ax in layers.axes if ax.images]
    assert len(panels) == 6
    torch.testing.assert_close(torch.tensor(panels[4]).float(), vit[1].image("mean", heads=1)[0] * 21)
    queries = plot.overview(vit, ["cls", "reg0", (1, 1)])
    assert len([ax for ax in queries.axes if ax.images]) == 9


@pytest.mark.parametrize("of", ["recorder", "maps", "slice", "list"])
def test_pictures_take_a_recorder_or_maps(of: str) -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=24, img_size=32).eval()
    with AttentionRecorder(model) as rec:
        model(torch.randn(1, 3, 32, 32))
    taken = {"recorder": rec, "maps": rec.maps, "slice": rec.maps[:2], "list": [*rec.maps.values()]}[of]
    assert len([ax for ax in plot.layers(taken).axes if ax.images]) == 2


def test_comparison_is_on_one_scale_and_shows_what_the_second_has_more(vit: Any) -> None:
    figure = plot.compare(vit[:2], vit[1:], "cls", 0)
    first, second, more = (ax.images[-1] for ax in [ax for ax in figure.axes if ax.images][:3])
    assert first.norm.vmax == second.norm.vmax
    expected = (vit[1][0, 0, 0, CLS:] - vit[0][0, 0, 0, CLS:]).unflatten(0, (4, 4))
    torch.testing.assert_close(torch.tensor(more.get_array()).float(), expected * 21)
    assert f"moved {expected.abs().sum() / 2:.1%}" in written(figure)
    with pytest.raises(ValueError, match="3 maps on one side and 1 on the other"):
        plot.compare(vit, vit[0])


def test_pictures_of_nan_are_drawn_as_that(vit: Any) -> None:
    m = given(vit[0], torch.full((21,), float("nan")))
    assert np.isnan(np.asarray(plot.attention(m).get_array(), dtype=float)).all()
    assert "NaN" in written(plot.heads(m))


def test_a_line_goes_around_the_patches_that_hold_most(vit: Any) -> None:
    row = torch.cat((torch.zeros(CLS), torch.tensor([9.0] * 2 + [1.0] * 14)))
    ax = plot.attention(given(vit[0], row), threshold=0.5).axes
    ends = np.concatenate([np.concatenate(each.get_segments()) for each in ax.collections])
    assert ends.min(0).tolist() == [0, 0]
    assert ends.max(0).tolist() == [28, 14]
    edges = sum(len(each.get_segments()) for each in ax.collections)
    assert edges == 6, "of two patches side by side"


@pytest.mark.parametrize("draw", [plot.attention, plot.heads])
def test_pictures_of_one_map_say_so_where_they_are_given_several(draw: Any, vit: Any) -> None:
    with pytest.raises(TypeError, match=rf"plot\.{draw.__name__} is of one map, and this Maps is of several"):
        draw(vit)
