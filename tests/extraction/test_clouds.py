"""Stores and images at addresses of clouds, by their real clients: s3:// and gs:// are as good as a folder, or say why not."""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import timm
import torch
from safetensors.torch import save_file
from support.clouds import CLOUDS, WRITING, Cloud, kill_at, serve
from support.drawn import Drawn, draw, small_vit
from support.inside import hold_store, open_images
from support.sources import in_folder, in_shards, in_tables
from support.stores import everything, metadata, same
from typer.testing import CliRunner

from hookattn import HookattnError
from hookattn.cli.app import app
from hookattn.errors import MissingExtraError, StoreError

extraction = pytest.importorskip("hookattn.extraction", exc_type=ImportError)
zarr = pytest.importorskip("zarr")
# that a process is forked while a client of this one has a thread
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning", "ignore:This DataLoader will create")


@pytest.fixture(scope="module", params=CLOUDS)
def cloud(request: pytest.FixtureRequest) -> Iterator[Cloud]:
    with serve(request.param) as served:
        yield served


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return small_vit()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: Any) -> Path:
    """What `run` makes in a folder."""
    out = tmp_path_factory.mktemp("whole") / "x.zarr"
    run(model, out)
    return out


@pytest.fixture
def place(cloud: Cloud, request: pytest.FixtureRequest) -> str:
    """Where in the bucket a test has room of its own."""
    return str(request.node.originalname)


def run(model: Any, out: Path | str, images: Any = None, **options: Any) -> Any:
    asked = {"what": "cls,entropy", "batch_size": 2, "block": 2, **options}
    return extraction.extract(model, Drawn(4) if images is None else images, out, **asked)


def put(cloud: Cloud, folder: Path, place: str) -> str:
    for path in folder.rglob("*"):
        if path.is_file():
            cloud.files.pipe_file(f"bucket/{place}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return cloud.address(place)


def list_names(cloud: Cloud, place: str) -> list[str]:
    return sorted(name.removeprefix(f"bucket/{place}/") for name in cloud.files.find(f"bucket/{place}"))


def test_a_store_is_the_one_that_a_folder_would_hold(cloud: Cloud, place: str, model: Any, whole: Path) -> None:
    xarray = pytest.importorskip("xarray")
    where = cloud.address(f"{place}/x.zarr")
    assert run(model, where).taken == 4
    assert same(everything(where), everything(whole))
    assert metadata(where) == metadata(whole)
    assert list_names(cloud, place) == sorted(f"x.zarr/{p.relative_to(whole)}" for p in whole.rglob("*") if p.is_file())
    there, here = extraction.open(where), extraction.open(whole)
    assert (there.names, there.labels, there.count()) == (here.names, here.labels, (4, 0, 0))
    assert torch.equal(there.maps("photo 003.png")[1][:, :, 0], here.maps(3)[1][:, :, 0])
    with xarray.open_zarr(where, consolidated=True) as found, xarray.open_zarr(whole, consolidated=True) as expected:
        assert {"image", "layer", "head", "depth", "label", "status", "key_token"} <= {*found.coords}
        assert found.load().identical(expected.assign_attrs(found.attrs).load())
    assert (run(model, where).resumed, run(model, where + "/").resumed) == (4, 4)


def test_in_a_loop_that_runs_as_in_a_notebook(cloud: Cloud, place: str, model: Any, whole: Path) -> None:
    async def cell() -> Any:
        run(model, cloud.address(f"{place}/x.zarr"))
        return extraction.open(cloud.address(f"{place}/x.zarr")).read("entropy", 3)

    assert torch.equal(asyncio.run(cell()), extraction.open(whole).read("entropy", 3))


SOURCES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "folder": (in_folder, ""),
    "glob": (in_folder, "/*/*.[pjw]*"),
    "shards": (in_shards, "/photos-{000..002}.tar"),
    "tables": (in_tables, "/*.parquet"),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_images_are_those_of_a_folder_in_worker_processes_too(
    cloud: Cloud, place: str, model: Any, tmp_path: Path, kind: str
) -> None:
    make, asked = SOURCES[kind]
    make(tmp_path / "x")
    where = put(cloud, tmp_path / "x", f"{place}/{kind}") + asked
    there, here = open_images(where), open_images(f"{tmp_path}/x{asked}")
    assert (there.names, there.labels) == (here.names, here.labels)
    assert pickle.loads(pickle.dumps(there)).read(7) == here.read(7)
    run(model, tmp_path / "here.zarr", f"{tmp_path}/x{asked}", what="entropy", block=6)
    run(model, tmp_path / "there.zarr", where, what="entropy", block=6, workers=2)
    assert same(everything(tmp_path / "there.zarr"), everything(tmp_path / "here.zarr"))


@pytest.mark.parametrize("asked", ["", "/*/*.png"])
def test_images_are_looked_for_anew_each_time(cloud: Cloud, place: str, asked: str) -> None:
    place = f"{place}/{len(asked)}"
    for name in ("a/0.png", "b/1.png"):
        cloud.files.pipe_file(f"bucket/{place}/{name}", draw(0))
    assert open_images(cloud.address(place) + asked).names == ["a/0.png", "b/1.png"]
    cloud.files.rm_file(f"bucket/{place}/b/1.png")  # by somebody else
    cloud.files.pipe_file(f"bucket/{place}/c/2.png", draw(0))
    assert open_images(cloud.address(place) + asked).names == ["a/0.png", "c/2.png"]


def test_a_run_that_is_killed_wherever_it_writes_is_gone_on_with(cloud: Cloud, place: str, model: Any, whole: Path) -> None:
    where, other, expected = cloud.address(f"{place}/x.zarr"), cloud.address(f"{place}/y.zarr"), everything(whole)
    all_of_it = kill_at(cloud, 1000, lambda: run(model, other))
    for request in (1, 2, all_of_it - 4, 5):
        assert kill_at(cloud, request, lambda: run(model, where)) >= request
    found = everything(where)
    done = found["status"] == 1
    assert 0 < done.sum() < 4
    assert all((found[name][done] == expected[name][done]).all() for name in ("cls", "entropy", "sha256"))
    assert "x.zarr.lock" in list_names(cloud, place)
    note = json.loads(cloud.files.cat_file(f"bucket/{place}/x.zarr.lock"))
    for host, renewed in (("elsewhere", 5.0), ("elsewhere", 90.0)):
        told = {**note, "host": host, "renewed": time.time() - renewed}
        cloud.files.pipe_file(f"bucket/{place}/x.zarr.lock", json.dumps(told).encode())
        if renewed < 60:
            who = r"another run on elsewhere \(process \d+\) writes to .* was killed, the same again goes on a minute later"
            with pytest.raises(StoreError, match=who):
                run(model, where)
    assert run(model, where).resumed == done.sum()
    assert same(everything(where), expected)
    assert metadata(where) == metadata(whole)
    assert "x.zarr.lock" not in list_names(cloud, place)


def test_a_store_that_was_half_made_is_made_again_wherever_that_is_killed(
    cloud: Cloud, place: str, model: Any, whole: Path
) -> None:
    where = cloud.address(f"{place}/x.zarr")
    kill_at(cloud, 9, lambda: run(model, where, what="maps,cls,distance"))
    assert "x.zarr/maps/zarr.json" in list_names(cloud, place)
    for request in (2, 3, 4, 7):
        kill_at(cloud, request, lambda: run(model, where))
        with pytest.raises(StoreError, match="there is no store"):
            extraction.open(where)
    assert run(model, where).taken == 4
    assert same(everything(where), everything(whole))
    assert list_names(cloud, place) == sorted(f"x.zarr/{p.relative_to(whole)}" for p in whole.rglob("*") if p.is_file())


def test_of_two_runs_that_begin_together_one_is_refused(cloud: Cloud, place: str) -> None:
    where, lock = cloud.address(f"{place}/x.zarr"), f"bucket/{place}/x.zarr.lock"
    theirs = json.dumps({"run": "theirs", "host": "elsewhere", "pid": 7, "renewed": time.time()}).encode()

    def come_first(method: str) -> None:
        if method in WRITING:
            cloud.server.heard = lambda _: None
            cloud.files.pipe_file(lock, theirs)

    who = pytest.raises(StoreError, match=r"another run on elsewhere \(process 7\)")
    with cloud.hearing(come_first), who, hold_store(where):
        pass
    assert cloud.files.cat_file(lock) == theirs
    cloud.files.rm_file(lock)
    with hold_store(where):
        with pytest.raises(StoreError, match="another run of this process"), hold_store(f"{where}/"):
            pass
        cloud.files.pipe_file(lock, theirs)  # as where ours was not renewed for long
    assert cloud.files.cat_file(lock) == theirs


def test_what_is_no_store_is_not_touched(cloud: Cloud, place: str, model: Any) -> None:
    cloud.files.pipe_file(f"bucket/{place}/x.txt", b"x")
    assert len(fsspec.filesystem(cloud.scheme).ls(f"bucket/{place}")) == 1  # which it remembers
    for name in ("photos/a.png", "photos/b/c.png"):
        cloud.files.pipe_file(f"bucket/{place}/{name}", draw(0))
    before = list_names(cloud, place)
    where = cloud.address(f"{place}/photos")
    for ask in (lambda: extraction.open(where), lambda: run(model, where)):
        with pytest.raises(StoreError, match=r"photos is there, and is no store of Zarr v3; name another"):
            ask()
    with pytest.raises(StoreError, match=rf"bucket/? is a whole bucket: name a store in it, {cloud.scheme}://bucket/NAME.zarr"):
        run(model, f"{cloud.scheme}://bucket/")
    with pytest.raises(StoreError, match="there is no store"):
        extraction.open(cloud.address(f"{place}/x.zarr"))
    assert list_names(cloud, place) == before


LOGIN = {"s3": r"aws configure", "gs": r"gcloud auth application-default login"}


def test_a_bucket_that_is_missing_and_credentials_that_are_refused(
    cloud: Cloud, place: str, model: Any, tmp_path: Path
) -> None:
    missing = f"{cloud.scheme}://nobucket/x.zarr"
    with pytest.raises(StoreError, match=r"cannot be written: .*no bucket 'nobucket'.* make it, or name another"):
        run(model, missing)
    with pytest.raises(StoreError, match=f"there is no store {missing}"):
        extraction.open(missing)
    with pytest.raises(HookattnError, match=r"there is no '.*nobucket/x\.zarr'"):
        run(model, tmp_path / "x.zarr", missing)
    where = cloud.address(f"{place}/x.zarr")
    run(model, where)
    opened = extraction.open(where)
    with cloud.refusing():
        for refused in (
            lambda: run(model, where),
            lambda: run(model, tmp_path / "x.zarr", where),
            lambda: extraction.open(where),
            lambda: opened.read("entropy", 0),
        ):
            with pytest.raises(HookattnError, match=LOGIN[cloud.scheme]) as told:
                refused()
            assert "\n" not in str(told.value)
    assert not (tmp_path / "x.zarr").exists()


@pytest.mark.parametrize("writes", [0, 12, 38])
def test_a_server_that_is_away_is_an_error_and_the_run_goes_on_later(
    cloud: Cloud,
    place: str,
    model: Any,
    whole: Path,
    writes: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    where = cloud.address(f"{place}/{writes}.zarr")
    message = r"cannot be written: .*try the same again once it answers"
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as where nobody has said where logs go
    with cloud.away(writes), pytest.raises(StoreError, match=message) as told:
        run(model, where)
    assert ("What is there is whole, and the same again goes on from there" in str(told.value)) == (writes > 0)
    assert "\n" not in str(told.value)
    assert "Traceback" not in capsys.readouterr().err
    run(model, where)
    assert same(everything(where), everything(whole))
    opened = extraction.open(where)
    with cloud.away():
        for ask in (lambda: extraction.open(where), lambda: opened.maps(0), opened.broken, lambda: open_images(where)):
            with pytest.raises(HookattnError, match=r"try the same again once it answers"):
                ask()


def test_a_client_that_is_missing(cloud: Cloud, place: str, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client = {"s3": "s3fs", "gs": "gcsfs"}[cloud.scheme]
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, cloud.scheme, raising=False)
    monkeypatch.setitem(sys.modules, client, None)
    where = cloud.address(f"{place}/x.zarr")
    for ask in (lambda: run(model, where), lambda: extraction.open(where), lambda: open_images(where)):
        with pytest.raises(MissingExtraError, match=rf"pip install {client}"):
            ask()


def test_the_command_line(cloud: Cloud, place: str, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), str(weights))
    for number in range(3):
        cloud.files.pipe_file(f"bucket/{place}/photos/cat/{number}.png", draw(number))
    photos, out = cloud.address(f"{place}/photos"), cloud.address(f"{place}/run.zarr")
    typed = ["extract", photos, "-o", out, "-m", "test_vit", "-c", str(weights), "--batch", "2", "--workers", "0"]
    done = CliRunner().invoke(app, typed)
    assert (done.exit_code, f"wrote {out}" in done.output) == (0, True), done.output
    shown = CliRunner().invoke(app, ["show", out, "--image", "cat/1.png", "-o", str(tmp_path / "x.png")])
    assert (shown.exit_code, "3 of 3 images" in shown.output, "without the photo" in shown.output) == (0, True, False), (
        shown.output
    )
    assert (tmp_path / "x.png").stat().st_size > 1000
    with cloud.refusing():
        refused = CliRunner().invoke(app, ["show", out])
    assert refused.exit_code == 1
    assert "Traceback" not in refused.output
