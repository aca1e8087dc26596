"""A run that stops anywhere is gone on with, or refused if it is another; what was written is whole, or not there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from support.drawn import Drawn, draw, small_vit
from support.stores import everything, full_after, same, states_of

from hookattn import HookattnError
from hookattn.errors import StoreError

extraction = pytest.importorskip("hookattn.extraction", exc_type=ImportError)
zarr, fsspec = pytest.importorskip("zarr"), pytest.importorskip("fsspec")
BEGUN = {"hookattn": {"state": "being made"}}
KILLED = Path(__file__).parents[1] / "support" / "killed.py"


def test_kill_9_at_random_moments_tears_nothing_and_repeats_little(tmp_path: Path) -> None:
    # one process imports torch once; each run is a fork of it, killed after a random while, and looked at by another fork
    done = subprocess.run(
        [sys.executable, str(KILLED), str(tmp_path), "20"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["kills"] >= 20
    assert told["begun"] >= 10, "too many were killed before there was a store"
    assert told["torn"] == []
    assert told["done_again"] == []
    # of 3 images each: the block in work, and the one that is written
    assert max(told["lost"]) <= 6
    assert same(everything(tmp_path / "killed.zarr"), everything(tmp_path / "whole.zarr"))
    assert not [*tmp_path.rglob("*.partial")]
    assert not [*tmp_path.glob(".*lock")]


def run(out: Path | str, model: Any = None, images: Any = None, **options: Any) -> Any:
    asked = {"what": "cls,entropy", "batch_size": 2, "block": 4, "dtype": "float32", **options}
    return extraction.extract(small_vit() if model is None else model, Drawn(10) if images is None else images, out, **asked)


def files_of(store: Path) -> set[str]:
    return {path.relative_to(store).as_posix() for path in store.rglob("*")}


def find_taken(store: Path) -> int | None:
    """How many images of a store are there; None where a reader is told that there is no store."""
    try:
        return extraction.open(store).count()[0]
    except StoreError as error:
        if "there is no store" not in str(error):
            raise
        return None


class StoppedError(Exception):
    """What ends a run in these tests."""


def stop_after(batches: int) -> Callable[[Any], None]:
    left = iter(range(batches))

    def report(_: Any) -> None:
        if next(left, None) is None:
            raise StoppedError

    return report


def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    model, read = small_vit(), list[int]()
    whole = run(tmp_path / "whole.zarr", model)
    with pytest.raises(StoppedError):
        run(tmp_path / "x.zarr", model, report=stop_after(2))
    assert extraction.open(tmp_path / "x.zarr").read("entropy", 5).shape == (2, 3)
    with pytest.raises(HookattnError, match=r"image 9 is not there yet; the same extract again goes on"):
        extraction.open(tmp_path / "x.zarr").maps(9)
    summary = run(tmp_path / "x.zarr", model, Drawn(10, account=read.append))
    assert sorted(set(read)) == [0, *range(summary.resumed, 10)]  # the first, to see what the model gives
    assert summary.resumed == 6  # what was done when it was stopped has been written, be it a part of a block
    assert (summary.taken, whole.taken) == (10, 10)
    assert same(everything(tmp_path / "x.zarr"), everything(tmp_path / "whole.zarr"))
    again = run(tmp_path / "x.zarr", model)
    assert (again.resumed, again.seconds) == (10, 0.0)


@pytest.mark.parametrize("error", ["interrupt", "model", "strict", "worker"])
def test_whatever_ends_a_run_what_was_taken_before_is_written(tmp_path: Path, error: str) -> None:
    model, images, options = small_vit(), Drawn(10), dict[str, Any]()
    run(tmp_path / "whole.zarr", model)
    if error in ("interrupt", "model"):
        calls = iter(range(10))

        def stop(*_: Any) -> None:
            if next(calls) == 4:  # once to see what the model gives, and three batches before
                raise KeyboardInterrupt if error == "interrupt" else ZeroDivisionError

        handle = model.blocks[1].mlp.register_forward_pre_hook(stop)
    else:
        images, options = Drawn(10, broken=[6]), {"strict": True, "workers": int(error == "worker")}
    with pytest.raises((KeyboardInterrupt, HookattnError, ZeroDivisionError)):
        run(tmp_path / "x.zarr", model, images, **options)
    if error in ("interrupt", "model"):
        handle.remove()
    there, whole = everything(tmp_path / "x.zarr"), everything(tmp_path / "whole.zarr")
    assert (there["status"] == 1).tolist() == [True] * 6 + [False] * 4
    assert all((there[name][:6] == whole[name][:6]).all() for name in ("cls", "entropy", "label", "sha256", "grid_rows"))
    assert run(tmp_path / "x.zarr", model).resumed == 6
    assert same(everything(tmp_path / "x.zarr"), whole)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_so_is_what_is_still_on_its_way_from_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any) -> None:
    """There a batch is looked at when the next has been begun."""
    monkeypatch.setattr("hookattn.extraction.work._Begun.has_ended", False)
    model, calls = small_vit(), iter(range(10))

    def stop(*_: Any) -> None:
        if next(calls) == 4:  # once to see what the model gives, and three batches before
            raise error

    handle = model.blocks[1].mlp.register_forward_pre_hook(stop)
    with pytest.raises((KeyboardInterrupt, HookattnError)):
        run(tmp_path / "x.zarr", model)
    handle.remove()
    assert (everything(tmp_path / "x.zarr")["status"] == 1).tolist() == [True] * 6 + [False] * 4


def other_weights(model: Any) -> Any:
    with torch.no_grad():
        model.blocks[1].attn.qkv.bias[3] += 1e-3
    return model


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "weights": (r"model\.weights: \w+\.\.\.\w+ \| \w+", {"model": other_weights}),
    "name": (r"model\.name: \w+ \| mine", {"name": "mine"}),
    "precision": (r"dtype: float32 \| float64", {"model": lambda model: model.double()}),
    "size": (r"preprocessing\.size: None \| 64", {"size": 64}),
    "colours": (r"preprocessing\.mean: .* \| \[0\.4, 0\.5, 0\.5\]", {"preprocessing": {"mean": (0.4, 0.5, 0.5)}}),
    "quantities": (r"what\.distance: None \|", {"what": "cls,entropy,distance"}),
    "dtype": (r"what\.cls\.dtype: float32 \| float16", {"dtype": "float16"}),
    "layers": (r"layers: \['blocks\.0\.attn', 'blocks\.1\.attn'\] \| \['blocks\.1\.attn'\]", {"layers": -1}),
    "blocks": (r"block: 4 \| 8", {"block": 8}),
    "more images": (r"images\.names: 1 new \('photo 010\.png'\); images\.count: 10 \| 11\.", {"images": Drawn(11)}),
    "fewer images": (
        r"images\.names: 4 gone \('photo 006\.png', 'photo 007\.png', 'photo 008\.png', \.\.\.\); images\.count: 10 \| 6\.",
        {"images": Drawn(6)},
    ),
    "other images": (
        r"images\.names: 1 gone \('photo 004\.png'\), 1 new \('another\\\\xff\.png'\)\.",
        {"images": lambda names: [*names[:4], "another\\xff.png", *names[5:]]},
    ),
    "another order": (
        r"images\.names: 2 in another order \('photo 005\.png' now where 'photo 003\.png' was, 'photo 003\.png' now where",
        {"images": lambda names: [*names[:3], names[5], names[4], names[3], *names[6:]]},
    ),
    "another order of those that stay": (
        r"names: 1 gone \('photo 000\.png'\), 8 in another order \('photo 009\.png' now where 'photo 001\.png' was, ",
        {"images": lambda names: names[:0:-1]},
    ),
}


@pytest.mark.parametrize("which", OTHERS)
def test_a_run_with_other_settings_is_refused_and_says_what_differs(tmp_path: Path, which: str) -> None:
    model = small_vit()
    with pytest.raises(StoppedError):
        run(tmp_path / "x.zarr", model, report=stop_after(2))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    message, options = OTHERS[which]
    options = {**options}
    if "model" in options:
        model = options.pop("model")(model)
    if callable(rename := options.get("images")):
        options["images"] = Drawn(10)
        options["images"].names = rename(options["images"].names)
    if "preprocessing" in options:
        options["preprocessing"] = {**model.pretrained_cfg, **options["preprocessing"], "input_size": (3, 64, 64)}
    with pytest.raises(StoreError, match=message) as refused:
        run(tmp_path / "x.zarr", model, **options)
    assert "Ask for the same to go on with it, or name another store." in str(refused.value)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_names_in_a_store_are_read_where_they_differ_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, read, whole = small_vit(), list[str](), zarr.Array.__getitem__
    monkeypatch.setattr(zarr.Array, "__getitem__", lambda array, rows: read.append(array.basename) or whole(array, rows))
    for _ in range(2):
        run(tmp_path / "x.zarr", model)
        assert {*read} == {"status"}
    with pytest.raises(StoreError):
        run(tmp_path / "x.zarr", model, Drawn(11))
    assert read.count("image") == 1


def test_batches_and_workers_may_be_others(tmp_path: Path) -> None:
    model = small_vit()
    with pytest.raises(StoppedError):
        run(tmp_path / "x.zarr", model, report=stop_after(2))
    assert run(tmp_path / "x.zarr", model, batch_size=3, workers=1).taken == 10
    with pytest.raises(StoppedError):
        run(tmp_path / "y.zarr", model, what="maps", block=None, report=stop_after(2))
    assert run(tmp_path / "y.zarr", model, what="maps", block=None, batch_size=7).taken == 10


def test_versions_of_later_runs_are_noted(tmp_path: Path) -> None:
    model = small_vit()
    with pytest.raises(StoppedError):
        run(tmp_path / "x.zarr", model, report=stop_after(2))
    with mock.patch("hookattn.extraction.extract.list_versions", return_value={"torch": "9.9"}):
        run(tmp_path / "x.zarr", model)
    noted = extraction.open(tmp_path / "x.zarr").facts["versions"]
    assert [each["torch"] for each in noted] == [metadata.version("torch"), "9.9"]
    assert (everything(tmp_path / "x.zarr")["status"] == 1).all()
    consolidated = zarr.open_consolidated(tmp_path / "x.zarr")
    assert consolidated.attrs["hookattn"]["versions"][1]["torch"] == "9.9"
    assert {"cls", "entropy", "image", "layer", "status"} <= {*consolidated.array_keys()}


@pytest.mark.parametrize("writes", [0, 3, 14, 30, 36, 41])
def test_a_full_disk_is_an_error_that_says_so_and_the_run_goes_on_later(tmp_path: Path, writes: int) -> None:
    model = small_vit()
    run(tmp_path / "whole.zarr", model)
    with full_after(writes), pytest.raises(StoreError, match=r"No space left on device.*make room, and run the same again"):
        run(tmp_path / "x.zarr", model)
    assert run(tmp_path / "x.zarr", model).taken == 10
    assert same(everything(tmp_path / "x.zarr"), everything(tmp_path / "whole.zarr"))


def test_a_store_that_was_half_made_is_made_again(tmp_path: Path) -> None:
    with full_after(6), pytest.raises(StoreError):
        run(tmp_path / "x.zarr")
    with pytest.raises(StoreError, match="there is no store"):
        extraction.open(tmp_path / "x.zarr")
    assert run(tmp_path / "x.zarr").taken == 10


def test_what_somebody_has_put_into_a_store_that_was_half_made_stays(tmp_path: Path) -> None:
    with full_after(9), pytest.raises(StoreError):
        run(tmp_path / "x.zarr", what="maps")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a").write_text("kept")
    (tmp_path / "x.zarr/maps/.DS_Store").write_text("of an array that goes")
    (tmp_path / "x.zarr/.DS_Store").write_text("kept")
    (tmp_path / "x.zarr/notes").symlink_to(tmp_path / "notes")
    (tmp_path / "x.zarr/own").mkdir()
    (tmp_path / "x.zarr/own/model.partial").write_text("kept")
    assert run(tmp_path / "x.zarr").taken == 10
    assert not (tmp_path / "x.zarr/maps").exists()
    kept = "x.zarr/.DS_Store", "x.zarr/notes/a", "x.zarr/own/model.partial"
    assert [(tmp_path / name).read_text() for name in kept] == ["kept"] * 3


def test_at_an_address_it_stays_likewise() -> None:
    where, files = "memory://half/x.zarr", fsspec.filesystem("memory")
    files.pipe(f"{where}/zarr.json", json.dumps({"zarr_format": 3, "node_type": "group", "attributes": BEGUN}).encode())
    files.pipe(f"{where}/maps/c/0", b"of an array that goes")
    files.pipe(f"{where}/own/a/b", b"kept")
    assert run(where).taken == 10
    assert not files.exists(f"{where}/maps")
    assert files.cat(f"{where}/own/a/b") == b"kept"
    files.rm("/half", recursive=True)


def test_only_what_zarr_had_not_finished_is_removed_of_a_store(tmp_path: Path) -> None:
    model = small_vit()
    run(tmp_path / "x.zarr", model)
    mine, unfinished = tmp_path / "x.zarr/mine.partial", tmp_path / f"x.zarr/cls/c/0/0/0/0.{'0f' * 16}.partial"
    for path in (mine, unfinished):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"begun")
    run(tmp_path / "x.zarr", model)
    assert (mine.exists(), unfinished.exists()) == (True, False)


@pytest.mark.parametrize("half_made", [False, True])
def test_wherever_it_is_killed_a_store_that_is_made_is_there_whole_or_not_at_all(tmp_path: Path, half_made: bool) -> None:
    model, out, kept = small_vit(), tmp_path / "x.zarr", tmp_path / "kept"
    run(tmp_path / "whole.zarr", model)
    if half_made:  # by a run with other settings
        with full_after(20), pytest.raises(StoreError):
            run(out, model, what="cls,entropy,distance,maps")

    def make() -> None:
        with pytest.raises(StoppedError):
            run(out, model, report=stop_after(0))

    states = states_of(out, kept, make)
    assert len(states) > 50
    told = [find_taken(state) for state in states]
    made = told.index(0)
    assert None not in told[made:]
    assert all(zarr.open_consolidated(state).attrs["coordinates"].startswith("label status") for state in states[made:])
    for state in [*states[::8], states[made - 1], states[made]]:
        assert run(state, model).taken == 10
        assert same(everything(state), everything(tmp_path / "whole.zarr"))
        assert files_of(state) == files_of(tmp_path / "whole.zarr")


def test_what_is_no_store_of_ours_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "dog.jpg").write_bytes(b"a dog")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "zarr.notes.partial").write_bytes(b"what somebody has begun to write")
    (tmp_path / "file").write_bytes(b"a file")
    zarr.create_group(tmp_path / "group", attributes={"whose": "mine"})
    zarr.create_array(tmp_path / "array", shape=(3,), dtype="int8")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name, message in {
        "photos": "no store of Zarr v3; name another",
        "notes": "no store of Zarr v3; name another",
        "file": "name another|cannot be opened",
        "group": "a Zarr group that hookattn has not written",
        "array": "name another|cannot be opened",
    }.items():
        with pytest.raises(StoreError, match=message):
            run(tmp_path / name)
        with pytest.raises(StoreError, match=message):
            extraction.open(tmp_path / name)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_an_empty_folder_takes_a_store(tmp_path: Path) -> None:
    (tmp_path / "x.zarr").mkdir()
    assert run(tmp_path / "x.zarr").taken == 10


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "x.zarr")
    group = zarr.open_group(tmp_path / "x.zarr", mode="r+")
    group.attrs["hookattn"] = {**group.attrs["hookattn"], "format": 99}
    for go_on in (lambda: extraction.open(tmp_path / "x.zarr"), lambda: run(tmp_path / "x.zarr")):
        with pytest.raises(StoreError, match=r"is of format 99.*pip install --upgrade hookattn"):
            go_on()


def test_an_address_in_place_of_a_folder(tmp_path: Path) -> None:
    where, model = "memory://folder/x.zarr", small_vit()
    with pytest.raises(StoppedError):
        run(where, model, report=stop_after(4))
    assert run(where, model).taken == 10
    run(tmp_path / "whole.zarr", model)
    assert same(everything(where), everything(tmp_path / "whole.zarr"))
    assert extraction.open(where).maps(2)[0][:, :, 0].shape == (1, 3, 17)
    with pytest.raises(StoreError, match="there is no store memory://folder/y"):
        extraction.open("memory://folder/y.zarr")
    fsspec.filesystem("memory").rm("/folder", recursive=True)


def test_the_address_of_a_folder_is_that_folder(tmp_path: Path) -> None:
    assert run(f"file://{tmp_path}/x.zarr").taken == 10
    assert extraction.open(tmp_path / "x.zarr").find(3) == 3


def test_a_photo_that_is_read_again_is_not_one_of_other_images(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(3):
        (tmp_path / f"photos/{number}.png").write_bytes(draw(number))
    run(tmp_path / "x.zarr", images=str(tmp_path / "photos"))
    assert extraction.open(tmp_path / "x.zarr").photo("1.png").size == (48, 64)
    (tmp_path / "photos/0.png").rename(tmp_path / "photos/a.png")
    with pytest.raises(HookattnError, match=r"other images in .*photos now: 1 gone \('0\.png'\), 1 new \('a\.png'\)$"):
        extraction.open(tmp_path / "x.zarr").photo("1.png")


def test_numbers_may_be_of_numpy(tmp_path: Path) -> None:
    model, how = small_vit(), {"block": np.int64(4), "batch_size": np.int64(3)}
    colours = {**model.pretrained_cfg, "mean": (*np.array([0.5, 0.5, 0.5], np.float32),), "input_size": (3, 64, 64)}
    arrays = {**colours, "mean": np.array([0.5, 0.5, 0.5]), "std": torch.tensor(colours["std"], dtype=torch.float64)}
    for resumed, told in ((0, colours), (10, colours), (10, arrays)):
        assert run(tmp_path / "x.zarr", model, **how, preprocessing=told).resumed == resumed


def test_a_store_is_where_it_is_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    run(Path("~/deep/x.zarr"))
    assert len(extraction.open("~/deep/x.zarr")) == len(extraction.open(tmp_path / "deep/x.zarr")) == 10
    for nothing in ("", " "):
        with pytest.raises(StoreError, match=r"' ?' names no store: give a folder, such as NAME\.zarr, or an address"):
            run(nothing)


def test_an_image_is_found_by_a_path_and_by_nothing_but_names_and_numbers(tmp_path: Path) -> None:
    run(tmp_path / "x.zarr")
    found = extraction.open(tmp_path / "x.zarr")
    assert [found.find(each) for each in (Path("photo 003.png"), np.int64(3), -7, "photo 003.png")] == [3] * 4
    assert found.read("entropy", Path("photo 003.png")).equal(found.read("entropy", 3))
    for other, kind in ((slice(0, 2), "slice"), ([1, 2], "list"), (None, "NoneType"), (1.0, "float")):
        with pytest.raises(
            HookattnError, match=rf"not by a {kind}; for several at once there is xarray\.open_zarr\('.*x\.zarr'\)"
        ):
            found.read("entropy", other)
