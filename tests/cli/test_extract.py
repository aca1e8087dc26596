"""`hookattn extract`, run as a user runs it."""

from __future__ import annotations

import io
import json
import runpy
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
from rich.console import Console
from safetensors.torch import save_file
from support.drawn import draw
from support.inside import hold_store, load_model
from typer.testing import CliRunner, Result

from hookattn.cli.app import app

extraction = pytest.importorskip("hookattn.extraction", exc_type=ImportError)
zarr = pytest.importorskip("zarr")
ODD = "odd\nname [red]x.png"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five, and one that is none."""
    folder = tmp_path / "photos"
    for number, name in enumerate(("cat/a.png", "cat/b.png", "cat/c.png", "dog/d.png", f"dog/{ODD}")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(draw(number, 60, 40 + 10 * number))
    (folder / "dog/broken.jpg").write_bytes(b"hello")
    return folder


def run(weights: Path | str, *args: str | Path) -> Result:
    typed = ["extract", "-m", "test_vit", "-c", weights, "--workers", "0", "--batch", "2", "--block", "2", *args]
    return CliRunner().invoke(app, [str(arg) for arg in typed])


def arrays(where: Path) -> dict[str, Any]:
    group = zarr.open_group(str(where), mode="r")
    return {name: (group[name].metadata.dimension_names, group[name][...]) for name in sorted(group.array_keys())}


def test_what_is_stored_is_what_the_same_in_python_stores(tmp_path: Path, weights: Path, photos: Path) -> None:
    options = (
        "--what",
        "cls,entropy,keys",
        "--layers",
        "-2,blocks.0*",
        "--store-dtype",
        "uint8",
        "--crop",
        "none",
        "--img-size",
        "96",
    )
    result = run(weights, photos, "-o", tmp_path / "typed.zarr", *options, "--json")
    assert result.exit_code == 0, result.output
    model = load_model("test_vit", weights, (96, 96), whole=True)
    told = extraction.extract(
        model,
        photos,
        tmp_path / "called.zarr",
        ["cls", "entropy", "keys"],
        layers=[-2, "blocks.0*"],
        size=96,
        crop="none",
        dtype="uint8",
        batch_size=2,
        block=2,
    )
    found, expected = arrays(tmp_path / "typed.zarr"), arrays(tmp_path / "called.zarr")
    assert found.keys() == expected.keys()
    for name, (dims, values) in expected.items():
        assert found[name][0] == dims
        np.testing.assert_array_equal(found[name][1], values)
    facts = json.loads(result.stdout)
    assert (facts["images"], facts["taken"], facts["broken"], facts["resumed"]) == (6, 5, 1, 0) == told[:4]
    assert facts["left_out"] == extraction.open(tmp_path / "called.zarr").broken()
    assert list(facts["left_out"]) == ["dog/broken.jpg"]
    assert facts["bytes"] == sum(path.stat().st_size for path in (tmp_path / "typed.zarr").rglob("*") if path.is_file())


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, weights: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, told = tmp_path / "x.zarr", iter([None])

    def stop(*_: object) -> None:
        if next(told, 0) == 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hookattn.cli.extract._Told.add", stop)
        stopped = run(weights, photos, "-o", out)
    assert stopped.exit_code == 130
    assert stopped.stderr.endswith(f"hookattn: stopped; the same command goes on with what is in {out}.\n")
    again = run(weights, photos, "-o", out)
    assert (
        "5 of 6 images of test_vit, 1 could not be read (--retry tries them again); 4 were done before, the others at "
        in again.output
    )
    # it was of the run before that it was told
    over = run(weights, photos, "-o", out)
    assert "left out: dog/broken.jpg: a file of 5 bytes is no image that can be read" in over.output
    assert "1 could not be read (--retry tries them again); all were done before" in over.output
    # nobody looks at a bar in a file
    assert "waiting for images" not in over.output
    assert "\x1b" not in again.output + over.output


SIGNALLED = """
import os, signal, subprocess, sys, time
from unittest import mock
from hookattn.__main__ import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored where a shell runs the tests in the background

def end():
    subprocess.call(f"kill -NUMBER {WHOM or os.getpid()}", shell=True)
    time.sleep(1)

batches = iter(range(9))
with mock.patch("hookattn.cli.extract._Told.add", lambda *_: next(batches) == 2 and end()):
    main()
"""


@pytest.mark.parametrize("whom", ["", "0"], ids=["process", "all of its group"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_was_taken_before_a_signal_ends_a_run_is_written(
    tmp_path: Path, weights: Path, photos: Path, number: signal.Signals, whom: str
) -> None:
    """Be it sent to the process, or to those, too, that read images, as terminals and many batch systems do."""
    out = tmp_path / "x.zarr"
    asked = ["extract", photos, "-m", "test_vit", "-c", weights, "--workers", "1", "--batch", "1", "-o", out]
    code = SIGNALLED.replace("NUMBER", str(int(number))).replace("WHOM", repr(whom))
    typed = [sys.executable, "-c", code, *map(str, asked)]
    done = subprocess.run(typed, capture_output=True, text=True, timeout=120, check=False, start_new_session=True)
    assert done.returncode == 128 + number, done.stderr
    assert done.stderr.endswith(f"hookattn: stopped; the same command goes on with what is in {out}.\n")
    assert extraction.open(out).count().pending == 3


@pytest.mark.parametrize("code", [130, 143])
def test_who_stops_a_run_twice_is_told_once(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("hookattn.cli.app.app", lambda: sys.exit(code))
    try:
        with pytest.raises(SystemExit):
            runpy.run_module("hookattn", run_name="__main__")
        signal.raise_signal(signal.SIGINT)  # while what the run was made of is put away
    finally:
        signal.signal(signal.SIGINT, before)


def test_images_that_could_not_be_read_are_tried_again_when_it_is_asked_for(
    tmp_path: Path, weights: Path, photos: Path
) -> None:
    out, broken = tmp_path / "x.zarr", photos / "dog/broken.jpg"
    told = run(weights, photos, "-o", out)
    assert "5 of 6 images of test_vit, 1 could not be read (--retry tries them again); " in told.output
    broken.write_bytes(b"hello again")
    assert json.loads(run(weights, photos, "-o", out, "--json").stdout)["left_out"]["dog/broken.jpg"].startswith(
        "a file of 5 b"
    )
    facts = json.loads(run(weights, photos, "-o", out, "--json", "--retry").stdout)
    assert facts["left_out"]["dog/broken.jpg"].startswith("a file of 11 bytes is no image")
    assert (facts["broken"], facts["resumed"], facts["tried_again_by"]) == (1, 5, "--retry")
    assert "with --retry tries them again" in CliRunner().invoke(app, ["show", str(out)]).output
    broken.write_bytes(draw(9))
    facts = json.loads(run(weights, photos, "-o", out, "--json", "--retry").stdout)
    assert (facts["taken"], facts["left_out"], facts["tried_again_by"]) == (6, {}, None)


def test_what_cannot_be_is_told_in_a_line(tmp_path: Path, weights: Path, photos: Path) -> None:
    def refusal_of(source: Path, *args: str | Path) -> str:
        result = run(weights, source, "-o", tmp_path / "x.zarr", *args)
        assert result.exit_code == 1
        assert result.stderr.count("\n") == 1
        assert not (tmp_path / "x.zarr").exists()
        return result.stderr

    refusal = partial(refusal_of, photos)
    assert "nothing called 'clss' to take of an image. Did you mean 'cls'?" in refusal("--what", "clss")
    assert "--store-dtype 'int4' is none of float16, float32, uint8." in refusal("--store-dtype", "int4")
    assert "-o '' names no store: -o NAME.zarr." in refusal("-o", "")
    assert f"{photos} is there, and is no store of Zarr v3; name another." in refusal("-o", photos)
    assert f"{weights} is there, and is no store of Zarr v3; name another." in refusal("-o", weights)
    assert "nope://x.zarr cannot be written: Protocol not known: nope" in refusal("-o", "nope://x.zarr")
    assert "no attention module is called 'nope'. There is: blocks.0.attn" in refusal("--layers", "nope")
    assert "none of the images can be read. broken.jpg: a file" in refusal_of(photos / "dog/broken.jpg")
    assert "--budget 1MB is of a page, and" in show_refusal("x.zarr", "--image", "0", "--budget", "1MB")
    assert "name the image that is to be drawn" in show_refusal("x.zarr", "--budget", "1MB")
    strict = run(weights, photos, "-o", tmp_path / "x.zarr", "--strict")
    assert strict.exit_code == 1
    assert "dog/broken.jpg cannot be read (a file of 5 bytes is no image" in strict.stderr


def show_refusal(*args: str) -> str:
    result = CliRunner().invoke(app, ["show", *args])
    assert result.exit_code == 1
    return result.stderr


REFUSED = {
    "--what clss": "nothing called 'clss' to take",
    "--layers blocks.0*,": "--layers 'blocks.0*,' has an empty name in it",
    "--store-dtype int4": "--store-dtype 'int4' is none of float16",
    "-o photos": "photos is there, and is no store of Zarr v3; name another.",
    "-o held.zarr": "another run of this process writes to held.zarr",
    "--address auto": "--address would change nothing without Ray: add --engine ray, or leave it out.",
    "--actors 1 --gpus 0": "--actors, --gpus would change nothing without Ray",
    "--engine dask": "--engine 'dask' is none: local, or ray.",
    "--engine ray --actors many": "--actors 'many' is no number of actors: 4, or 1,8",
    "--engine ray --actors 0": "actors is a number from 1 on",
    "--engine ray --device cuda": "--device cuda would change nothing under Ray",
    "--image-column image": "columns of images and labels are those of tables",
    "--crop left": "--crop='left' is no choice",
    "--dtype int8": "--dtype 'int8' is none of",
    "nowhere": "nowhere'",
    "empty": "has no photos, .tar or .parquet files in it",
}


@pytest.mark.parametrize("typed", REFUSED)
def test_what_needs_no_model_is_refused_before_one_is_loaded(
    tmp_path: Path, photos: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, typed: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("hookattn.cli.photos.load_model", lambda *_, **__: pytest.fail("a model is loaded"))
    with hold_store("held.zarr"):
        result = run(weights, *(() if typed in ("nowhere", "empty") else ("photos",)), *typed.split())
    assert result.exit_code == 1, result.output
    assert REFUSED[typed] in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_narrow_terminal_gets_the_figures(
    tmp_path: Path, weights: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = io.StringIO()
    monkeypatch.setattr("hookattn.cli.extract.console", Console(file=file, force_terminal=True, width=40, color_system=None))
    assert run(weights, photos, "-o", tmp_path / "x.zarr").exit_code == 0
    assert " 6/6 " in file.getvalue().split("images ")[-1]


def test_a_terminal_gets_a_bar(tmp_path: Path, weights: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr("hookattn.cli.extract.console", Console(file=file, force_terminal=True, width=160, color_system=None))
    assert run(weights, photos, "-o", tmp_path / "x.zarr").exit_code == 0
    last = file.getvalue().split("\rimages ")[-1]
    assert " 6/6 " in last
    assert "waiting for images, 1 left out" in last


def test_layers_that_do_not_have_what_is_asked_for_are_told(tmp_path: Path, photos: Path) -> None:
    made = timm.create_model("cait_xxs24_224", depth=2)
    save_file({name: tensor.contiguous() for name, tensor in made.state_dict().items()}, tmp_path / "cait.safetensors")
    (tmp_path / "local").mkdir()
    out, config = tmp_path / "x.zarr", {"architecture": "cait_xxs24_224", "model_args": {"depth": 2}}
    (tmp_path / "local" / "config.json").write_text(json.dumps({**config, "pretrained_cfg": {"input_size": [3, 224, 224]}}))
    (tmp_path / "cait.safetensors").rename(tmp_path / "local" / "model.safetensors")
    asked = ("extract", photos, "-m", f"local-dir:{tmp_path / 'local'}", "-o", out, "--workers", "0")
    told = CliRunner().invoke(app, [str(each) for each in asked])
    assert told.exit_code == 0, told.output
    for output in (told.output, CliRunner().invoke(app, ["show", str(out)]).output):
        assert "cls: NaN in 2 of 4 layers, as in blocks.0.attn: there is no 'cls' token." in output
        assert "distance: NaN in 2 of 4 layers, as in blocks_token_only.0.attn: the queries of" in output
    facts = json.loads(CliRunner().invoke(app, ["show", str(out), "--json"]).stdout)
    assert list(facts["missing"]["cls"]) == ["blocks.0.attn", "blocks.1.attn"]
