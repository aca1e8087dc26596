"""What was taken and is gone is seen: zarr reads a file that is not there as an array that is empty."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import pytest
from support.drawn import Drawn, small_vit
from support.stores import alike, everything

from hookattn.errors import StoreError

extraction = pytest.importorskip("hookattn.extraction", exc_type=ImportError)
pytest.importorskip("zarr")
model = cache(small_vit)
GONE = ["cls/c/1/0/0/0", "entropy/c/1/0/0", "maps/c/1/0/0/0/0", "maps_max/c/1/0/0/0", "sha256/c/1"]


def run(out: Path | str, images: Any = None, **options: Any) -> Any:
    asked = {"what": "cls,entropy,maps", "batch_size": 4, "block": 4, "dtype": "uint8", **options}
    return extraction.extract(model(), Drawn(10, broken=[5]) if images is None else images, out, **asked)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run(out := tmp_path_factory.mktemp("whole") / "x.zarr")
    return everything(out)


@pytest.mark.parametrize("file", GONE)
def test_images_whose_file_is_gone_are_not_there_and_are_taken_anew(tmp_path: Path, whole: Any, file: str) -> None:
    run(out := tmp_path / "x.zarr")
    (out / file).unlink()
    found = extraction.open(out)
    assert (found.count(), list(found.broken())) == ((6, 1, 3), ["photo 005.png"])
    summary = run(out)
    assert (summary.taken, summary.broken, summary.resumed) == (9, 1, 7)
    assert alike(everything(out), whole)
    assert run(out).resumed == 10


@pytest.mark.parametrize("file", GONE[:-1])
def test_what_is_read_of_them_is_refused_and_that_of_others_is_not(tmp_path: Path, whole: Any, file: str) -> None:
    run(out := tmp_path / "x.zarr")
    (out / file).unlink()
    name = file.partition("/")[0].removesuffix("_max")
    found = extraction.open(out)
    for number in (4, 6, 7):
        with pytest.raises(StoreError, match=rf"damaged: {file}, in which image {number} is, is gone\. The same extract again"):
            found.read(name, number)
    assert found.read(name, 3).isfinite().all()
    assert found.read("cls" if name != "cls" else "entropy", 6).isfinite().all()


def test_where_they_are_taken_anew_in_part_the_others_are_not_there(tmp_path: Path, whole: Any) -> None:
    run(out := tmp_path / "x.zarr")
    (out / GONE[0]).unlink()

    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(out, batch_size=1, report=stop)
    assert extraction.open(out).count() == (7, 1, 2)
    assert extraction.open(out).read("entropy", 4).isfinite().all()
    assert run(out).resumed == 8
    assert alike(everything(out), whole)


def test_at_an_address_that_is_a_request_for_each_array_and_none_for_an_image_that_is_there(whole: Any) -> None:
    files = fsspec.filesystem("memory")
    run(out := "memory://gone/x.zarr")
    files.rm(f"/gone/x.zarr/{GONE[0]}")
    found = extraction.open(out)
    kind = type(files)
    with mock.patch.object(kind, "find", autospec=True, side_effect=kind.find) as find:
        assert found.count() == (6, 1, 3)
        asked = [call.args[1].rpartition("x.zarr/")[2] for call in find.call_args_list]
        assert sorted(asked) == ["cls", "cls_max", "entropy", "maps", "maps_max", "sha256"]
        assert found.maps(3)[0].shape == found.maps(6)[0].shape
        assert find.call_count == 6
        with pytest.raises(StoreError, match=rf"damaged: {GONE[0]}, in which image 6 is, is gone"):
            found.read("cls", 6)
    assert run(out).resumed == 7
    assert alike(everything(out), whole)


def test_a_store_without_the_names_of_its_images_is_damaged(tmp_path: Path) -> None:
    run(out := tmp_path / "x.zarr")
    (out / "image/c/0").unlink()
    with pytest.raises(StoreError, match="names of images are gone: remove the store"):
        extraction.open(out)
