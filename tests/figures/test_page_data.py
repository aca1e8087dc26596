"""Rows in bytes: how far they are from the map is what they say, whatever the values."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from support.image import SIZES, naflex
from support.pages import unpacked
from support.reading import record

from hookattn import QK
from hookattn.figures import page


@pytest.mark.parametrize(
    ("name", "options", "size", "dtype"),
    [
        ("vit_tiny_patch16_224", {"img_size": 64}, 64, torch.float32),
        ("vit_tiny_patch16_224", {"img_size": 64}, 64, torch.float64),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": (1, 1, 2, 1)}, 224, torch.float32),
        ("mvitv2_tiny", {"img_size": 96}, 96, torch.float32),
        ("nextvit_small", {"depths": (1, 1, 5, 1)}, 128, torch.float32),
    ],
)
def test_the_largest_error_is_what_is_said(name: str, options: dict[str, Any], size: int, dtype: torch.dtype) -> None:
    model = timm.create_model(name, **options).eval().to(dtype)
    rec = record(model, torch.randn(2, 3, size, size, dtype=dtype))
    shown = rec.maps[:3]
    found = [each for each in unpacked(rec.show(None, index=1).html) if each[0]["kind"] == "map"][:3]
    assert len(found) == 3
    for m, (layer, rows) in zip(shown, found):
        windows = m.tokens.windows
        own = m[windows : 2 * windows].double()
        error = float((rows[:, :, :-1] - own).abs().max())
        assert error == pytest.approx(layer["error"], rel=0.05, abs=1e-9)
        # half a step of a square root in 255 steps, of rows that reach up to 1
        assert layer["error"] <= float(own.max()) / 255 * 1.01
        small = (own < own.amax(-1, keepdim=True) / 100) & (own > 0)
        if small.any():
            assert float((rows[:, :, :-1] - own).abs()[small].max()) < float(own.max()) / 1500


def test_images_with_grids_of_their_own_stand_on_them() -> None:
    rec, _ = naflex()
    for i, grid in enumerate(SIZES):
        for layer, _ in unpacked(rec.show(None, index=i).html):
            assert layer["kind"] == "map"
            assert tuple(layer["keys"]["grid"]) == grid
    places = json.loads(re.findall(r'"places": (\[\[.*?\]\])', rec.show(None, index=1).html)[0])
    rows, columns = SIZES[1]
    assert [place for place in places[0] if place >= 0] == list(range(rows * columns))


def test_a_vit_b_fits_into_eight_megabytes() -> None:
    model = timm.create_model("vit_base_patch16_224", depth=3, num_classes=0).eval()  # a quarter of its layers
    rec = record(model, torch.randn(1, 3, 224, 224))
    assert 4 * len(rec.show(None).html) < 8e6


def test_a_row_of_nothing_is_kept_as_nothing() -> None:
    m = record(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1).eval(), torch.randn(1, 3, 32, 32)).maps[0]
    whole = m[...].clone()
    whole[0, 1, 2] = torch.nan
    whole[0, 0, 3] = 0
    whole[0, 2, 1, :2] = torch.tensor([-0.5, 1.2])
    ((layer, rows),) = unpacked(page.show_page(m.kept(whole), None).html)
    assert layer["signed"]
    assert rows[0, 1, 2].isnan().all()
    assert (rows[0, 0, 3] == 0).all()
    assert float((rows[0, :, :-1] - whole[0]).abs().nan_to_num().max()) == pytest.approx(layer["error"], rel=1e-3)
    assert layer["error"] < 0.01


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_a_notebook_shows_a_map_and_a_table_of_maps_and_computes_nothing_for_the_table(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rec = record(timm.create_model(name).eval(), torch.randn(1, 3, 224, 224))
    m = rec.maps[0]
    shown = m._repr_html_()
    (picture,) = re.findall(r"data:image/png;base64,([^\"]+)", shown)
    assert base64.b64decode(picture).startswith(b"\x89PNG")
    assert " x ".join(map(str, m.shape)) in shown

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("computed")

    monkeypatch.setattr(QK, "values", fail)
    table = rec.maps._repr_html_()
    assert table.count("<tr>") == len(rec.maps) + 1
    assert f"{4 * m.shape[0] * m.shape[1] * m.shape[2] * m.shape[3]:,}" in table
    assert f"{m.tokens.grid_size[0]} x {m.tokens.grid_size[1]}" in table
    assert "no picture" in m._repr_html_()  # where a map cannot be computed its facts are told all the same


def test_the_colours_of_a_map_in_a_notebook_are_those_of_its_patches(tmp_path: Path) -> None:
    from matplotlib import colormaps
    from PIL import Image

    m = record(timm.create_model("vit_tiny_patch16_224", img_size=64).eval(), torch.randn(1, 3, 64, 64)).maps[-1]
    (text,) = re.findall(r"data:image/png;base64,([^\"]+)", m._repr_html_())
    path = tmp_path / "map.png"
    path.write_bytes(base64.b64decode(text))
    with Image.open(path) as picture:
        got = np.asarray(picture).astype(float)
    values = m.image("cls")[0].numpy()
    expected = colormaps["inferno"](values / values.max())[..., :3] * 255
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() < 16


def test_names_in_a_notebook_are_text() -> None:
    m = record(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1).eval(), torch.randn(1, 3, 32, 32)).maps[0]
    m.name = "<img src=x onerror=alert(1)>"
    assert "<img src=x" not in m._repr_html_()
