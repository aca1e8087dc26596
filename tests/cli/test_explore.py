"""`hookattn explore`, run as a user runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from hookattn.cli import demo
from hookattn.cli.app import app


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "one.png", tmp_path / "two<b>[x].png"]
    for seed, path in enumerate(paths):
        Image.fromarray(demo.draw(seed, 120).image[:, :90]).save(path)
    return paths


def run(tmp_path: Path, *args: str | Path) -> Result:
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), str(weights))
    return CliRunner().invoke(app, ["explore", *map(str, args), "-m", "test_vit", "-c", str(weights)])


def test_explore_writes_a_page_of_all_photos(tmp_path: Path, photos: list[Path]) -> None:
    out = tmp_path / "new" / "page.html"
    result = run(tmp_path, *photos, "-o", out, "--query", "0.5,0.5", "--layers", "-1")
    assert result.exit_code == 0, result.output
    assert "two<b>[x].png, 120 x 90" in result.output
    assert f"wrote {out}" in result.output
    page = out.read_text()
    assert page.count('id="block-') == 2
    assert "two\\u003cb\\u003e[x].png" in page


def test_explore_keeps_to_its_budget(tmp_path: Path, photos: list[Path]) -> None:
    out = tmp_path / "page.html"
    result = run(tmp_path, photos[0], "-o", out, "--budget", "200kB")
    assert result.exit_code == 0, result.output
    assert out.stat().st_size <= 200_000
    assert "the page would be too large" in out.read_text()


@pytest.mark.parametrize("budget", ["", "20 XB", "-1MB", "nan", "1e999"])
def test_explore_says_what_a_budget_is(tmp_path: Path, photos: list[Path], budget: str) -> None:
    result = run(tmp_path, photos[0], "-o", tmp_path / "page.html", "--budget", budget)
    assert result.exit_code == 1
    assert "20MB, 500KB" in result.output
