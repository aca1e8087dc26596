"""`hookattn show`, run as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.drawn import draw
from support.inside import load_model
from support.pages import facts_of, unpacked
from typer.testing import CliRunner, Result

import hookattn
from hookattn.cli.app import app
from hookattn.image import Photo

pytest.importorskip("zarr")
ODD = "odd\nname [red]x.png"


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two of other shapes, and one that is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "broken.jpg").write_bytes(b"hello")
    (folder / "dog.png").write_bytes(draw(1, 90, 60))
    (folder / ODD).write_bytes(draw(2, 60, 90))
    return folder


def size_of(picture: Path) -> tuple[int, int]:
    with Image.open(picture) as image:
        return image.size


def store(photos: Path, weights: Path, *args: str) -> Path:
    out = photos.with_name("x.zarr")
    asked = ("-m", "test_vit", "-c", weights, "--workers", "0", "--crop", "none", "--img-size", "96")
    result = run("extract", photos, "-o", out, *asked, *args)
    assert result.exit_code == 0, result.output
    return out


def test_a_page_of_a_stored_image_is_that_of_the_image(tmp_path: Path, weights: Path, photos: Path) -> None:
    where, page = store(photos, weights, "--what", "maps", "--store-dtype", "float32"), tmp_path / "page.html"
    model = load_model("test_vit", weights, (96, 96), whole=True)
    # as it is printed, by number, and as it is
    for name, typed in ((ODD, "odd\\nname [red]x.png"), (ODD, "-1"), (ODD, ODD), ("dog.png", "dog.png")):
        result = run("show", where, "--image", typed, "-o", page)
        assert result.exit_code == 0, result.output
        photo = Photo.open(photos / name, model, size=96, crop="none")
        with hookattn.AttentionRecorder(model) as rec, torch.no_grad():
            model(photo.tensor[None])
        written, own_page = page.read_text(), rec.show(photo).html
        (stored,), (own_photo,) = facts_of(written)["photos"], facts_of(own_page)["photos"]
        for fact in ("src", "origin", "side", "seen", "steps"):
            assert stored[fact] == own_photo[fact]
        found, expected = unpacked(written), unpacked(own_page)
        assert len(found) == len(expected) > 6
        for (layer, rows), (own, own_rows) in zip(found, expected):
            assert (layer["name"], layer["keys"]) == (own["name"], own["keys"])
            torch.testing.assert_close(rows, own_rows, rtol=0, atol=1e-5)


def test_a_store_of_class_rows_makes_pictures_and_says_what_pages_need(tmp_path: Path, weights: Path, photos: Path) -> None:
    where, out = store(photos, weights, "--store-dtype", "uint8", "--layers", "-1"), tmp_path / "x.png"
    told = run("show", where, "--json")
    facts = json.loads(told.stdout)
    assert (facts["taken"], list(facts["left_out"]), facts["what"]) == (2, ["broken.jpg"], ["cls", "entropy", "distance"])
    assert "left out: broken.jpg: a file of 5 bytes" in told.stderr
    assert run("show", where, "--image", "dog.png", "-o", out).exit_code == 0
    with_photo = size_of(out)
    (photos / "dog.png").rename(tmp_path / "moved.png")
    (photos / "dog.png").write_bytes(draw(3, 90, 60))
    assert "(dog.png is another file now than the run was shown)" in run("show", where, "--image", "1", "-o", out).output
    assert size_of(out) != with_photo
    (photos / "dog.png").unlink()
    without = run("show", where, "--image", "1", "-o", out)
    assert "drawn without the photo, which cannot be read again" in without.output
    assert size_of(out) != with_photo
    assert run("show", where, "--image", "1", "-o", out, "--photo", tmp_path / "moved.png").exit_code == 0
    assert size_of(out) == with_photo
    for asked in (("-o", tmp_path / "x.html"), ("-o", out, "--query", "2,2")):
        refused = run("show", where, "--image", "1", "--photo", tmp_path / "moved.png", *asked)
        assert refused.exit_code == 1
        assert "need whole maps: hookattn extract --what maps into another store" in refused.stderr
    assert "image 0 could not be read: a file of 5 bytes" in run("show", where, "--image", "0").stderr
    assert "Did you mean 'dog.png'?" in run("show", where, "--image", "dog").stderr
    assert "name the image that is to be drawn" in run("show", where, "-o", out).stderr


def test_a_file_of_maps_is_shown_as_it_was_recorded(tmp_path: Path, weights: Path, photos: Path) -> None:
    file, page = tmp_path / "x.safetensors", tmp_path / "x.html"
    asked = (photos / "dog.png", "-m", "test_vit", "-c", weights, "--img-size", "96")
    assert run("record", *asked, "-o", file).exit_code == 0
    assert run("explore", *asked, "-o", page).exit_code == 0
    expected = unpacked(page.read_text())
    shown = run("show", file, "--image", "0", "--photo", photos / "dog.png", "-o", page)
    assert shown.exit_code == 0, shown.output
    assert "x.safetensors: 6 maps of test_vit" in shown.output
    for (layer, rows), (own, own_rows) in zip(unpacked(page.read_text()), expected, strict=True):
        assert layer["name"] == own["name"]
        torch.testing.assert_close(rows, own_rows, rtol=0, atol=1e-6)
    assert "--image '1' is no image of it: a number from 0 to 0" in run("show", file, "--image", "1").stderr
