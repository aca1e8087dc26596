"""Calls that cannot be answered: one line that says why, no traceback, and nothing on the disk."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from hookattn.cli.app import app

RECORD = ("record", "photo.png", "-m", "test_vit", "-c", "weights.safetensors")
ANALYZE = ("analyze", "photo.png", "-m", "test_vit", "-c", "weights.safetensors")
NAMES = os.fsdecode(b"a\xff")

# a call in a folder that has photo.png, weights.safetensors, empty.png, bomb.png, strip.png and folder/; what is answered
ODD: list[tuple[tuple[str, ...], str]] = [
    (("recrd",), "No such command 'recrd'"),
    (("record",), "Missing argument"),
    (("record", "\x1b[31mred.png"), "there is no file \\x1b[31mred.png"),
    (("record", NAMES), "there is no file a\\udcff"),
    (("record", "[final].png"), "there is no file [final].png"),
    (("record", "x" * 300 + ".png"), "File name too long"),
    (("record", "folder"), "folder is a folder without photos"),
    (("record", "empty.png", *RECORD[2:]), "empty.png is no image that can be read"),
    (("record", "bomb.png", *RECORD[2:]), "bomb.png is no image that can be read"),
    (("record", "strip.png", *RECORD[2:]), "strip.png, test_vit is too long a strip to be drawn (the sheet would be"),
    (("record", "weights.safetensors", *RECORD[2:]), "weights.safetensors is no image that can be read"),
    ((*RECORD, "-o", "out.html"), "out.html is no kind of file that is written here: .png"),
    ((*RECORD, "-o", "photo.png"), "photo.png is what is read"),
    ((*RECORD, "-o", "photo.png/out.png"), "photo.png takes no files: Not a directory"),
    ((*RECORD, "-o", "/proc/none/out.png"), "takes no files"),
    ((*RECORD, "-o", "/dev/null"), "/dev/null is no file that can be written over"),
    ((*RECORD, "-o", "y" * 300 + ".png"), "File name too long"),
    (
        (*RECORD, "-o", "nowhere/out.png"),
        "nowhere is a link that leads nowhere: gone/deep (No such file or directory). Make that",
    ),
    ((*RECORD, "-o", "circle/out.png"), "circle is a link that leads nowhere: circle (Too many levels of symbolic links)"),
    (("record", "photo.png", "empty.png", *RECORD[2:], "-o", "nowhere"), "nowhere is a link that leads nowhere: gone"),
    ((*ANALYZE, "-o", "nowhere/out.csv"), "nowhere is a link that leads nowhere: gone/deep"),
    (("explore", *ANALYZE[1:], "-o", "nowhere/out.html"), "nowhere is a link that leads nowhere: gone/deep"),
    (("extract", *ANALYZE[1:], "-o", "nowhere"), "nowhere is a link that leads nowhere: gone/deep"),
    (("extract", *ANALYZE[1:], "-o", "nowhere/x.zarr"), "nowhere is a link that leads nowhere: gone/deep"),
    (("show", "nowhere"), "nowhere is a link that leads nowhere: gone/deep"),
    ((*RECORD, "-o", ""), "photo.png is what is read"),
    ((*RECORD, "--img-size", "0"), "--img-size '0' is no size"),
    ((*RECORD, "--img-size", "-3"), "--img-size '-3' is no size"),
    ((*RECORD, "--img-size", "²"), "--img-size '²' is no size"),
    ((*RECORD, "--img-size", "9999999999"), "is no size"),
    ((*RECORD, "--img-size", ""), "--img-size '' is no size"),
    ((*RECORD, "--crop", "left"), "--crop='left' is no choice"),
    ((*RECORD, "--layers", "²"), "no attention module is called '²'"),
    ((*RECORD, "--layers", ""), "--layers '' has an empty name"),
    ((*RECORD, "--layers", "99"), "99"),
    ((*RECORD, "--query", "²"), "'²'"),
    ((*RECORD, "--query", "nan,0.5"), "not on the photo"),
    ((*RECORD, "--query", "1e999,0.5"), "not on the photo"),
    ((*RECORD, "--query", "99,99"), "there is no patch (99, 99)"),
    ((*RECORD, "--device", "tpu9"), "--device 'tpu9' is not here"),
    ((*RECORD, "--device", "cuda:99"), "--device 'cuda:99' is not here"),
    ((*RECORD, "--device", "meta"), "--device meta computes nothing"),
    ((*RECORD, "--dtype", "int8"), "--dtype 'int8' is none of float32"),
    ((*RECORD, "--colour", "red"), "No such option: --colour"),
    (("record", "photo.png", "-m", ""), "timm has no model ''"),
    (("record", "photo.png", "-m", "[bold]x"), "timm has no model '[bold]x'"),
    (("record", "photo.png", "-m", "test_vit.none"), "timm has no weights 'none' of test_vit. There is: r160_in1k"),
    (("record", "photo.png", "-m", "gopher:x"), "'gopher' names no source of models"),
    (("record", "photo.png", "-m", "local-dir:folder"), "folder is no folder of a model of timm"),
    (("record", "photo.png", "-m", "transformers:./folder"), "transformers:./folder could not be fetched"),
    (("record", "photo.png", "-m", "open_clip:x"), "open_clip has no model 'x'"),
    (("record", "photo.png", "-m", "open_clip:ViT-B-32"), "needs weights to be named. There is: open_clip:ViT-B-32/openai"),
    (("record", "photo.png", "-m", "test_vit", "-c", "none.pth"), "--checkpoint none.pth is no file"),
    (("record", "photo.png", "-m", "test_vit", "-c", "folder"), "--checkpoint folder is no file"),
    (("record", "photo.png", "-m", "test_vit", "-c", "photo.png"), "photo.png is no file of weights that can be read"),
    ((*ANALYZE, "-o", "out.xls"), "out.xls is no kind of file that is written here: .csv"),
    ((*ANALYZE, "-o", "folder"), "folder is a folder; name a file in it"),
    (("demo", "-o", "out.html"), "out.html is no kind of file"),
    (("demo", "--seed", "-1"), "Invalid value for '--seed'"),
    (("inspect", "resnet18", "--batch", "0"), "Invalid value for '--batch'"),
    (("inspect", "test_vit", "--img-size", "0"), "--img-size '0' is no size"),
]


def run(*args: str) -> Result:
    return CliRunner().invoke(app, list(args))


def write_bomb(path: Path) -> None:
    """A PNG of a few bytes that says it has 20,000 x 20,000 pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")]
    data = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)


@pytest.fixture
def folder(tmp_path: Path, photo: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "weights.safetensors").symlink_to(weights)
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.png").touch()
    (tmp_path / "nowhere").symlink_to("gone/deep")
    (tmp_path / "circle").symlink_to("circle")
    write_bomb(tmp_path / "bomb.png")
    Image.new("RGB", (1, 3000)).save(tmp_path / "strip.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.mark.parametrize(("args", "answer"), ODD, ids=lambda value: None if isinstance(value, tuple) else value[:30])
def test_odd_calls_are_answered_in_one_line_and_leave_nothing(args: tuple[str, ...], answer: str, folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    result = run(*args)
    assert result.exit_code not in (0, None)
    assert isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    assert result.stderr.startswith("hookattn: ")
    assert result.stderr.count("\n") == 1
    assert result.stderr.rstrip("\n").isprintable()
    assert answer in result.stderr
    assert sorted(folder.rglob("*")) == before


def test_a_fault_in_drawing_is_not_told_as_a_photo_that_is_too_long(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("cannot broadcast")

    monkeypatch.setattr("hookattn.figures.plot.overview", fail)
    result = run(*RECORD, "--layers", "-1", "-o", "out.png")
    assert isinstance(result.exception, ValueError)
    assert "too long" not in result.output


@pytest.mark.parametrize("name", ["$x$ [b] \x1b[31m.png", os.fsdecode(b"caf\xe9.png"), "--.png"])
def test_odd_names_of_photos_are_drawn_and_printed_as_they_are(name: str, folder: Path) -> None:
    (folder / "photo.png").rename(folder / name)
    result = run("record", f"./{name}", *RECORD[2:], "--layers", "-1", "-o", f"./out {name}")
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output
    shown = name.encode("unicode_escape").decode() if not name.isprintable() else name
    assert f"{shown}, 120 x 90" in result.stdout
    assert f"wrote out {shown}" in result.stdout
    with Image.open(folder / f"out {name}") as picture:
        assert picture.size[0] > 300


@pytest.mark.parametrize(("out", "written"), [("noext", "noext.png"), ("folder", "folder/photo.png"), ("new/a.PDF",) * 2])
def test_the_name_that_is_printed_is_the_file_that_is_there(out: str, written: str, folder: Path) -> None:
    result = run(*RECORD, "--layers", "-1", "-o", out)
    assert result.exit_code == 0, result.output
    assert f"wrote {written}\n" in result.stdout
    assert (folder / written).stat().st_size > 1000
    assert [p.name for p in (folder / written).parent.iterdir() if p.name.startswith(".")] == []


def test_a_picture_that_cannot_be_finished_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_up(figure: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fill_up)
    before = sorted(folder.rglob("*"))
    result = run(*RECORD, "--layers", "-1", "-o", "new/deep/out.png")
    assert result.exit_code == 1
    assert result.stderr == "hookattn: new/deep/out.png cannot be written: No space left on device\n"
    assert sorted(folder.rglob("*")) == before
