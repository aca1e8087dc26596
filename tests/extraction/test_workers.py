"""Which process reads which images: each a run of its own of a block, so that none reads what another has to read, too."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.drawn import Drawn, draw, small_vit
from support.stores import everything, same
from torch.utils.data import Dataset

from hookattn import HookattnError
from hookattn.image import Photo

extraction = pytest.importorskip("hookattn.extraction", exc_type=ImportError)
pytest.importorskip("zarr")
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more processes than there are cores
IMAGES, BLOCK, BATCH = 23, 10, 2
Read = list[tuple[int, int]]


def note(folder: Path, number: int) -> None:
    """Leave a file that says who has read what, and when."""
    folder.mkdir(exist_ok=True)
    (folder / f"{time.time_ns()} {os.getpid()} {number}").touch()


def noted(folder: Path) -> Read:
    """Processes and numbers, in the order they were read; but for what this process read, to see what the model gives."""
    names = sorted(map(str.split, os.listdir(folder)), key=lambda name: int(name[0]))
    return [(int(pid), int(number)) for _, pid, number in names if int(pid) != os.getpid()]


def by_process(read: Read) -> list[list[int]]:
    return [[number for _, number in own] for _, own in groupby(sorted(read, key=lambda each: each[0]), lambda each: each[0])]


def runs(numbers: Iterable[int]) -> int:
    """How many runs of numbers that follow one another there are."""
    return len([*groupby(enumerate(numbers), lambda each: each[1] - each[0])])


@pytest.mark.parametrize("workers", [2, 3])
def test_each_process_reads_images_of_a_block_that_follow_one_another(tmp_path: Path, workers: int) -> None:
    model, how = small_vit(), {"batch_size": BATCH, "block": BLOCK, "what": "cls,entropy"}
    images = Drawn(IMAGES, broken=[3, 12, 13], account=partial(note, tmp_path / "read"))
    extraction.extract(model, Drawn(IMAGES, broken=[3, 12, 13]), tmp_path / "one.zarr", **how)
    extraction.extract(model, images, tmp_path / "more.zarr", workers=workers, **how)
    assert same(everything(tmp_path / "more.zarr"), everything(tmp_path / "one.zarr"))
    read = noted(tmp_path / "read")
    assert sorted(number for _, number in read) == [*range(IMAGES)]
    assert len({pid for pid, _ in read}) == workers
    for own in by_process(read):
        blocks = [[*numbers] for _, numbers in groupby(own, lambda number: number // BLOCK)]
        assert len(blocks) <= 3  # one block after the other
        assert [runs(each) for each in blocks] == [1] * len(blocks)


@pytest.mark.parametrize(("workers", "expected"), [(2, 3), (3, 5)])
def test_groups_of_rows_are_read_by_one_process_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, expected: int
) -> None:
    table, whole = pa.table({"image": [draw(i) for i in range(24)]}), pq.ParquetFile.read_row_group
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=6)

    def read(file: Any, group: int, **options: Any) -> Any:
        note(tmp_path / "read", group)
        return whole(file, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", read)
    extraction.extract(
        small_vit(), tmp_path / "x.parquet", tmp_path / "x.zarr", "entropy", batch_size=2, block=24, workers=workers
    )
    # of four, the first of which was read to see what the model gives; in three parts, two groups lie across where they are cut
    assert len(noted(tmp_path / "read")) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_of_several_images_that_cannot_be_read_the_first_ends_a_strict_run(tmp_path: Path, workers: int) -> None:
    images = Drawn(IMAGES, broken=[3, 5, 6])
    with pytest.raises(HookattnError, match=r"photo 003\.png cannot be read"):
        extraction.extract(
            small_vit(), images, tmp_path / "x.zarr", batch_size=BATCH, block=BLOCK, workers=workers, strict=True
        )


class Numbered(Dataset[Any]):
    def __init__(self, folder: Path) -> None:
        self._folder, self._model = folder, small_vit()

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> Any:
        note(self._folder, index)
        return Photo.open(draw(index), self._model, crop="center").tensor


def test_a_data_set_of_torch_is_asked_in_its_order(tmp_path: Path) -> None:
    extraction.extract(small_vit(), Numbered(tmp_path / "read"), tmp_path / "x.zarr", "cls", batch_size=BATCH, workers=2)
    first, second = by_process(noted(tmp_path / "read"))
    assert {tuple(first), tuple(second)} == {tuple(i for i in range(IMAGES) if i // BATCH % 2 == turn) for turn in (0, 1)}
