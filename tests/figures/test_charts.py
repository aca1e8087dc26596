"""Charts and films hold the figures of heads, and tables have them one by one."""

from __future__ import annotations

from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from matplotlib.animation import FFMpegWriter
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image, ImageSequence

from hookattn import AttentionRecorder
from hookattn.analysis import (
    HeadImportance,
    compare_with_mean,
    compute_statistics,
    entropy,
    mean_attention_distance,
    registers,
    summarize_heads,
    to_frame,
)
from hookattn.errors import MissingExtraError
from hookattn.figures import plot


@pytest.fixture(scope="module")
def rec() -> Any:
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224", img_size=64, embed_dim=48, num_heads=3, depth=4).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
        with AttentionRecorder(model) as rec:
            model(torch.randn(2, 3, 64, 64))
    return rec


def test_figures_of_heads_are_those_of_their_maps(rec: Any) -> None:
    rows = summarize_heads(rec)
    assert [(row.layer, row.depth, row.head) for row in rows[:4]] == [("blocks.0.attn", 0, h) for h in range(3)] + [
        ("blocks.1.attn", 1, 0)
    ]
    for row in rows:
        a = rec.maps[row.layer][:, row.head].double()
        assert row.entropy == pytest.approx(float(-(a * a.log()).sum(-1).mean()), rel=1e-4)
        assert row.prefix == pytest.approx(float(a[..., 0].mean()), rel=1e-4)
        assert row.patches == pytest.approx(1 - row.prefix, rel=1e-4)
        assert row.distance == pytest.approx(float(mean_attention_distance(rec.maps[row.layer])[:, row.head].mean()), rel=1e-5)
        assert row.keys == 17


def test_heads_whose_tokens_have_no_place_have_no_distance() -> None:
    encoder = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    with AttentionRecorder(encoder) as rec, torch.no_grad():
        encoder(x := torch.randn(1, 5, 8), x, x, need_weights=False)
    for row in summarize_heads(rec):
        assert np.isnan([row.distance, row.patches, row.prefix]).all()
        assert 0 < row.entropy < log(5)


def test_a_table_has_a_row_for_each_head(rec: Any) -> None:
    table = to_frame(rec.maps)
    assert list(table.columns)[:5] == ["layer", "depth", "head", "entropy", "distance"]
    assert len(table) == 12
    assert table.groupby("depth").entropy.mean()[2] == pytest.approx(
        np.mean([r.entropy for r in summarize_heads(rec.maps)[6:9]])
    )


def test_charts_show_each_head(rec: Any) -> None:
    rows = summarize_heads(rec)
    far = plot.distances(rec)
    np.testing.assert_allclose(far.get_offsets(), [(row.depth, row.distance) for row in rows], rtol=1e-6)
    ax = plot.scatter(rec.maps[1:], far.axes.figure.add_subplot()).axes
    np.testing.assert_allclose(ax.collections[-1].get_offsets(), [(r.distance, r.entropy) for r in rows[3:]], rtol=1e-6)
    left, _ = plot.statistics(rec).axes
    uniform, means = left.lines
    np.testing.assert_allclose(uniform.get_ydata(), [log(17)] * 4)
    own = [float(compute_statistics(m, entropy)[0].mean()) for m in rec.maps.values()]
    np.testing.assert_allclose(means.get_ydata(), own, rtol=1e-5)
    assert left.get_ylim()[1] > log(17)


def test_tables_are_joined_by_layer_and_head(rec: Any) -> None:
    importance = [
        HeadImportance(f"blocks.{layer}.attn", layer, head, layer + head / 10) for layer in (3, 1) for head in range(3)
    ]
    table = to_frame(rec, compare_with_mean(rec), registers(rec), importance)
    assert list(table.columns) == [*to_frame(rec).columns, "divergence", "high_norm", "cls", "importance"]
    assert len(table) == 12
    assert [(row.layer, row.head) for row in table.itertuples()] == [(r.layer, r.head) for r in summarize_heads(rec)]
    np.testing.assert_allclose(table.cls, table.prefix, rtol=1e-5)
    np.testing.assert_allclose(table.divergence, [row.divergence for row in compare_with_mean(rec)])
    nothing = [np.nan] * 3
    np.testing.assert_allclose(table.importance, [*nothing, 1, 1.1, 1.2, *nothing, 3, 3.1, 3.2])
    assert list(to_frame(importance).columns) == ["layer", "depth", "head", "importance"]
    assert to_frame(importance, rec).depth.tolist() == [3] * 3 + [1] * 3
    assert list(to_frame([]).columns) == list(to_frame(rec).columns)
    with pytest.raises(ValueError, match="several of the tables have 'importance'"):
        to_frame(rec, importance, importance)


def test_a_heat_map_has_a_cell_for_each_head(rec: Any) -> None:
    rows = summarize_heads(rec)
    drawn = plot.heatmap(rows, "entropy", (figure := Figure()).add_subplot())
    assert drawn.figure is figure
    np.testing.assert_allclose(drawn.get_array(), np.array([row.entropy for row in rows]).reshape(4, 3))
    assert plot.heatmap(rows).get_array()[0, 0] == 17, "the last column"
    assert drawn.colorbar.ax.get_ylabel() == "entropy"
    assert drawn.norm.vmin == 0
    ragged = [HeadImportance("a", 0, 0, 1.0), HeadImportance("b", 1, 0, -3.0), HeadImportance("b", 1, 1, 2.0)]
    drawn = plot.heatmap(ragged)
    assert np.ma.getmaskarray(drawn.get_array()).tolist() == [[False, True], [False, False]]
    assert drawn.norm(0.0) == 0.5
    assert drawn.norm.vmax == 3
    with pytest.raises(ValueError, match="there is no 'entropie' to draw: figures are layer, depth, head, entropy"):
        plot.heatmap(rows, "entropie")
    with pytest.raises(ValueError, match=r"head_importance\(\)"):
        plot.heatmap([])


def texts_on(axes: Axes) -> list[Text]:
    """What is written at axes; ticks that lie outside of them are not drawn."""
    texts = []
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        texts += [text for at, text in zip(axis.get_ticklocs(), axis.get_ticklabels()) if low <= at <= high]
        texts += [axis.label, axis.get_offset_text()]
    return [text for text in texts if text.get_text()]


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (5, 4), (12, 6), (48, 25)])
def test_everything_on_a_heat_map_can_be_read(layers: int, heads: int) -> None:
    rows = [HeadImportance(f"trunk.$x.blocks.{i}.attn", i, h, 1e-4 * (i + h)) for i in range(layers) for h in range(heads)]
    drawn = plot.heatmap(rows)
    figure, ax = drawn.figure, drawn.axes
    figure.draw_without_rendering()
    texts = [text for axes in figure.axes for text in texts_on(axes)]
    assert {f"trunk.$x.blocks.{i}" for i in range(layers)} <= {text.get_text() for text in texts}
    assert min(text.get_fontsize() for text in texts) >= 7
    boxes = [text.get_window_extent() for text in texts] + [axes.get_window_extent() for axes in figure.axes]
    ends = np.array([box.extents for box in boxes])
    assert ends.min() >= 0
    assert (ends[:, 2:] <= [figure.bbox.x1, figure.bbox.y1]).all()
    low, high = (np.array([box.shrunk(0.98, 0.9).extents[half] for box in boxes]) for half in (slice(2), slice(2, 4)))
    overlapping = ((low[:, None] < high) & (low < high[:, None])).all(-1)
    np.fill_diagonal(overlapping, False)
    assert not overlapping.any()
    assert ax.get_window_extent().width / heads > 20, "cells are wide enough"


def frames(count: int) -> list[Any]:
    generator = np.random.default_rng(0)
    return [(generator.random((40, 60, 3)), torch.eye(4, 6) * (i + 1)) for i in range(count)]


def test_overlays_have_one_scale_where_it_is_given() -> None:
    first, last = (plot.overlay(*frame, vmax=3) for frame in (frames(3)[0], frames(3)[2]))
    assert first.norm.vmax == last.norm.vmax == 3
    assert float(np.asarray(last.get_alpha()).max()) == pytest.approx(0.85)
    assert float(np.asarray(first.get_alpha()).max()) == pytest.approx(0.85 / 3**0.5)
    assert plot.overlay(*frames(2)[1]).norm.vmax == 2
    with pytest.raises(ValueError, match=r"attention is \(rows, columns\), not \(1, 4, 6\)"):
        plot.overlay(np.zeros((8, 8, 3)), torch.zeros(1, 4, 6))


def test_a_film_has_all_frames_in_one_scale(tmp_path: Path) -> None:
    path = plot.animate(frames(3), tmp_path / "film.gif", fps=5)
    with Image.open(path) as film:
        assert film.size == (60, 40)
        shown = [np.asarray(each.convert("RGB")).astype(float) for each in ImageSequence.Iterator(film)]
    assert len(shown) == 3
    image = frames(1)[0][0]
    assert np.abs(shown[0] / 255 - image).mean() < np.abs(shown[2] / 255 - frames(3)[2][0]).mean() + 0.2
    for given, name, match in (
        ([], "film.gif", "at least one; given are 0"),
        (frames(1), "film.avi", r"neither .gif nor .mp4"),
        ([*frames(1), (np.zeros((8, 8, 3)), torch.eye(4, 6))], "film.gif", "images of one size"),
    ):
        with pytest.raises(ValueError, match=match):
            plot.animate(given, tmp_path / name)


def test_a_film_for_which_there_is_no_program_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FFMpegWriter, "isAvailable", lambda: False)
    with pytest.raises(MissingExtraError, match=r"ffmpeg.*\.gif"):
        plot.animate(frames(1), tmp_path / "film.mp4")
    assert not list(tmp_path.iterdir())
