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
from PIL import Image, ImageSequence

from hookattn import AttentionRecorder
from hookattn.analysis import compute_statistics, entropy, mean_attention_distance, summarize_heads, to_frame
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
