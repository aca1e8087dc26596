"""`hookattn analyze`: the mean of figures of heads over photos."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from hookattn import AttentionRecorder
from hookattn.analysis import summarize_heads
from hookattn.cli import demo
from hookattn.cli.app import app
from hookattn.image import Photo


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "photos"
    found.mkdir()
    for seed, height in ((1, 120), (2, 90), (3, 60)):
        Image.fromarray(demo.draw(seed, 120).image[:height]).save(found / f"{seed}.png")
    return found


def analyze(folder: Path, weights: Path, *args: str | Path) -> Result:
    result = CliRunner().invoke(app, ["analyze", str(folder), "-m", "test_vit", "-c", str(weights), *map(str, args)])
    assert result.exit_code == 0, result.output
    return result


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_is_the_mean_over_photos(folder: Path, weights: Path, tmp_path: Path) -> None:
    model = timm.create_model("test_vit").eval()
    model.load_state_dict(load_file(str(weights)))
    each = []
    for path in sorted(folder.iterdir()):
        with AttentionRecorder(model) as rec, torch.no_grad():
            model(Photo.open(path, model, crop="center").tensor[None])
        each.append(summarize_heads(rec))
    result = analyze(folder, weights, "-o", tmp_path / "heads.csv", "--json")
    rows = table(tmp_path / "heads.csv")
    assert [(row["layer"], int(row["head"])) for row in rows] == [(row.layer, row.head) for row in each[0]]
    assert {row["photos"] for row in rows} == {"3"}
    for name in ("entropy", "distance", "patches", "prefix", "keys"):
        expected = np.mean([[getattr(row, name) for row in rows] for rows in each], 0)
        assert np.allclose([float(row[name]) for row in rows], expected, rtol=1e-4), name
    told = json.loads(result.stdout)
    assert told["photos"] == 3
    assert math.isclose(told["heads"][0]["entropy"], float(rows[0]["entropy"]))


def test_each_photo_has_its_rows_where_they_are_asked_for(folder: Path, weights: Path, tmp_path: Path) -> None:
    analyze(folder, weights, "-o", tmp_path / "each.csv", "--per-photo", "--layers", "-1")
    rows = table(tmp_path / "each.csv")
    assert [Path(row["photo"]).name for row in rows] == ["1.png", "1.png", "2.png", "2.png", "3.png", "3.png"]
    assert len({row["entropy"] for row in rows}) == 6


def test_a_picture_is_drawn_of_the_means(folder: Path, weights: Path, tmp_path: Path) -> None:
    result = analyze(folder, weights, "-o", tmp_path / "heads.png")
    assert f"3 photos, 12 heads of test_vit; wrote {tmp_path / 'heads.png'}" in result.stdout
    with Image.open(tmp_path / "heads.png") as picture:
        assert picture.size[0] > 1000


def test_a_parquet_file_is_the_same_table_or_says_what_it_needs(folder: Path, weights: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow.parquet")
    analyze(folder, weights, "-o", tmp_path / "heads.csv")
    analyze(folder, weights, "-o", tmp_path / "heads.parquet")
    rows = pyarrow.read_table(tmp_path / "heads.parquet").to_pylist()
    assert [{k: str(v) for k, v in row.items()} for row in rows] == table(tmp_path / "heads.csv")
