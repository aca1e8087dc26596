"""Images that could not be read are tried again when it is asked for, with their blocks, which are whole, or not there."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support.drawn import Drawn, small_vit
from support.stores import everything, full_after, same

from hookattn.errors import StoreError

extraction = pytest.importorskip("hookattn.extraction", exc_type=ImportError)
pytest.importorskip("zarr")
BLOCK = 4
model = cache(small_vit)


def run(out: Path, images: Any, **options: Any) -> Any:
    return extraction.extract(model(), images, out, "cls,entropy", batch_size=3, block=BLOCK, dtype="float32", **options)


def test_images_that_were_broken_are_tried_again_with_their_blocks_and_no_others(tmp_path: Path) -> None:
    read = list[int]()
    whole = run(tmp_path / "whole.zarr", Drawn(10))
    run(tmp_path / "x.zarr", Drawn(10, broken=[1, 6, 7]))
    assert run(tmp_path / "x.zarr", Drawn(10, account=read.append)).broken == 3
    assert read == [0]  # to see what the model gives
    summary = run(tmp_path / "x.zarr", Drawn(10, account=read.append), retry=True)
    assert read == [0, 0, *range(2 * BLOCK)]
    assert (summary.resumed, summary.taken, summary.broken) == (2, whole.taken, 0)
    assert same(everything(tmp_path / "x.zarr"), everything(tmp_path / "whole.zarr"))
    again = run(tmp_path / "x.zarr", Drawn(10), retry=True)
    assert (again.resumed, again.seconds) == (10, 0.0)


def test_an_image_that_is_still_broken_has_the_new_reason(tmp_path: Path) -> None:
    class Gone(Drawn):
        def read(self, index: int) -> bytes:
            if index == 6:
                raise ConnectionError("the network is gone")
            return super().read(index)

    run(tmp_path / "x.zarr", Drawn(10, broken=[1, 6]))
    for _ in range(2):
        summary = run(tmp_path / "x.zarr", Gone(10), retry=True)
        assert extraction.open(tmp_path / "x.zarr").broken() == {"photo 006.png": "ConnectionError: the network is gone"}
        assert (summary.taken, summary.broken) == (9, 1)
    assert (summary.resumed, extraction.open(tmp_path / "x.zarr").find(1)) == (6, 1)


def test_a_retry_that_ends_anywhere_tears_nothing(tmp_path: Path) -> None:
    """Each block is what it was, what it becomes, or not there: wherever the disk is full."""
    before, after = Drawn(6, broken=[1, 4]), Drawn(6, broken=[2])
    run(tmp_path / "before.zarr", before)
    run(tmp_path / "after.zarr", after)
    known = [blocks_of(tmp_path / name) for name in ("before.zarr", "after.zarr")]
    seen, writes = set[str](), 0
    while True:
        shutil.copytree(tmp_path / "before.zarr", tmp_path / "x.zarr")
        try:
            with full_after(writes):
                run(tmp_path / "x.zarr", after, retry=True)
            break
        except StoreError:
            pass
        for number, block in enumerate(blocks_of(tmp_path / "x.zarr")):
            is_there = [same(block, each[number]) for each in known]
            assert any(is_there) or not block["status"].any(), (writes, number)
            seen.add("before" if is_there[0] else "after" if is_there[1] else "not there")
        shutil.rmtree(tmp_path / "x.zarr")
        writes += 1
    assert seen == {"before", "after", "not there"}
    assert same(everything(tmp_path / "x.zarr"), everything(tmp_path / "after.zarr"))


def blocks_of(where: Path) -> list[dict[str, Any]]:
    """What a store holds of the images of each block."""
    arrays = {name: array for name, array in everything(where).items() if len(array) == 6}
    return [{name: array[start : start + BLOCK] for name, array in arrays.items()} for start in (0, BLOCK)]
