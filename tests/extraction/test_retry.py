"""Images that could not be read are tried again when it is asked for, and they alone: what is there of others stays."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support.drawn import Drawn, small_vit
from support.stores import alike, everything, full_after, same

from hookattn.errors import StoreError

extraction = pytest.importorskip("hookattn.extraction", exc_type=ImportError)
pytest.importorskip("zarr")
BLOCK = 4
model = cache(small_vit)


def run(out: Path | str, images: Any, **options: Any) -> Any:
    asked = {"what": "cls,entropy", "batch_size": 3, "block": BLOCK, "dtype": "float32", **options}
    return extraction.extract(model(), images, out, **asked)


def test_images_that_were_broken_are_tried_again_and_no_others(tmp_path: Path) -> None:
    read = list[int]()
    whole = run(tmp_path / "whole.zarr", Drawn(10))
    run(tmp_path / "x.zarr", Drawn(10, broken=[1, 6, 7]))
    assert run(tmp_path / "x.zarr", Drawn(10, account=read.append)).broken == 3
    assert read == [0]  # to see what the model gives
    summary = run(tmp_path / "x.zarr", Drawn(10, account=read.append), retry=True)
    assert read == [0, 0, 1, 6, 7]
    assert (summary.resumed, summary.taken, summary.broken) == (7, whole.taken, 0)
    assert alike(everything(tmp_path / "x.zarr"), everything(tmp_path / "whole.zarr"))
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
    assert (summary.resumed, extraction.open(tmp_path / "x.zarr").find(1)) == (9, 1)


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_what_was_taken_stays_bit_for_bit_where_its_images_are_gone_or_others_now(
    tmp_path: Path, dtype: str, scheme: str
) -> None:
    class Others(Drawn):
        def read(self, index: int) -> bytes:
            return super().read(index + 1)

    out, how = f"{scheme}{tmp_path}/x.zarr", {"dtype": dtype, "what": "cls,entropy,maps"}
    run(out, Drawn(10, broken=[1, 6, 9]), **how)
    before = everything(out)
    for images in (Drawn(10, broken=[2, 3, 5, 6, 8]), Others(10, broken=[7])):
        run(out, images, retry=True, **how)
        after = everything(out)
        assert same(rows_of(before, [0, 2, 3, 4, 5, 7, 8]), rows_of(after, [0, 2, 3, 4, 5, 7, 8]))
    assert list(after["status"]) == [1, 1, 1, 1, 1, 1, 2, 1, 1, 1]
    assert [not array.any() for array in (after["sha256"][[1, 9]] == "", after["error"][[1, 9]] != "")] == [True, True]
    run(tmp_path / "whole.zarr", Drawn(10), **how)
    assert alike(rows_of(after, [1, 9]), rows_of(everything(tmp_path / "whole.zarr"), [1, 9]))


def test_steps_of_a_retry_count_the_images_that_are_tried(tmp_path: Path) -> None:
    steps = list[Any]()
    run(tmp_path / "x.zarr", Drawn(10, broken=[0, 4, 5, 6, 7, 9]))
    run(tmp_path / "x.zarr", Drawn(10, broken=[6]), retry=True, report=steps.append)
    assert [(step.done, step.images, [*step.broken]) for step in steps] == [
        (5, 10, []),
        (8, 10, ["photo 006.png"]),
        (9, 10, []),
        (10, 10, []),
    ]


def test_a_retry_that_ends_anywhere_tears_nothing(tmp_path: Path) -> None:
    """Each image is what it was, what it becomes, or not there, and there if it was taken: wherever the disk is full."""
    before, after = Drawn(6, broken=[1, 4, 5]), Drawn(6, broken=[0, 2, 5])
    run(tmp_path / "before.zarr", before)
    shutil.copytree(tmp_path / "before.zarr", tmp_path / "after.zarr")
    run(tmp_path / "after.zarr", after, retry=True)
    known = [everything(tmp_path / name) for name in ("before.zarr", "after.zarr")]
    seen, writes = list[str](), 0
    while True:
        shutil.copytree(tmp_path / "before.zarr", tmp_path / "x.zarr")
        try:
            with full_after(writes):
                run(tmp_path / "x.zarr", after, retry=True)
            break
        except StoreError:
            pass
        found, tried = everything(tmp_path / "x.zarr"), [*seen]
        for number in range(6):
            is_there = [same(rows_of(found, [number]), rows_of(each, [number])) for each in known]
            assert any(is_there) or (number in (1, 4, 5) and not found["status"][number]), (writes, number)
            seen.append("before" if is_there[0] else "after" if is_there[1] else "not there")
        assert seen[len(tried) :].count("not there") <= 2  # of one block at most
        run(tmp_path / "x.zarr", after)  # what is not there is taken, also where it is not asked for
        assert same(rows_of(everything(tmp_path / "x.zarr"), [0, 2, 3]), rows_of(known[0], [0, 2, 3]))
        assert everything(tmp_path / "x.zarr")["status"].all()
        shutil.rmtree(tmp_path / "x.zarr")
        writes += 1
    assert {*seen} == {"before", "after", "not there"}
    assert same(everything(tmp_path / "x.zarr"), everything(tmp_path / "after.zarr"))


@pytest.mark.parametrize("array", ["cls", "label"])
def test_a_block_that_is_damaged_is_told_and_can_be_taken_anew(tmp_path: Path, array: str) -> None:
    out = tmp_path / "x.zarr"
    run(out, Drawn(10, broken=[1, 6, 9]))
    file = next(path for path in sorted((out / array / "c").rglob("*")) if path.is_file() and "/c/1" in path.as_posix())
    file.write_bytes(file.read_bytes()[:5])
    for _ in range(2):
        with pytest.raises(
            StoreError, match=rf"is damaged: '{array}' cannot be read: .* Where N is removed, .*zarr/{array}/c and"
        ):
            run(out, Drawn(10), retry=True)
    file.unlink()
    (out / "status/c/1").unlink()
    assert run(out, Drawn(10), retry=True).taken == 10
    run(tmp_path / "whole.zarr", Drawn(10))
    assert alike(everything(out), everything(tmp_path / "whole.zarr"))


AGAIN = r"removed, the number of a block, from [^ ]*/{}, the same extract again takes its images anew\.$"
DAMAGED: dict[str, str] = {
    "status": AGAIN.format(r"status/c"),
    "sha256": AGAIN.format(r"sha256/c and from [^ ]*/status/c"),
    "image": r"It is written when a store is made: remove the store, or name another, and run the same again\.$",
}


@pytest.mark.parametrize("array", DAMAGED)
def test_what_is_to_be_removed_is_told_of_what_is_taken_anew_alone(tmp_path: Path, array: str) -> None:
    run(tmp_path / "x.zarr", Drawn(4, broken=[1]))
    file = tmp_path / "x.zarr" / array / "c/0"
    file.write_bytes(file.read_bytes()[:5])
    with pytest.raises(StoreError, match=rf"is damaged: '{array}' cannot be read: .* {DAMAGED[array]}"):
        read_and_retry(tmp_path / "x.zarr")


def read_and_retry(out: Path) -> None:
    _ = extraction.open(out).names
    run(out, Drawn(4), retry=True)


def rows_of(found: dict[str, Any], numbers: list[int]) -> dict[str, Any]:
    """What a store holds of some images."""
    return {name: array[numbers] for name, array in found.items() if len(array) == len(found["image"])}
