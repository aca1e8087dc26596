"""Paths in whatever gives them one after the other; parts of data sets of torch, several as one, and what their labels are."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from PIL import Image
from support.drawn import draw, small_vit
from support.stores import everything, same
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset, random_split

from hookattn import HookattnError
from hookattn.errors import StoreError
from hookattn.image import Photo

extraction = pytest.importorskip("hookattn.extraction", exc_type=ImportError)
pytest.importorskip("zarr")
xarray = pytest.importorskip("xarray")
model = cache(small_vit)
NAMES = ["cat/a.png", "cat/b.png", "dog/a.png"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two folders of the same photos."""
    for number, name in enumerate(NAMES):
        for root in ("one", "two"):
            path = tmp_path / root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(draw(number))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(source: Any, out: str = "x.zarr") -> Any:
    extraction.extract(model(), source, out, "entropy", batch_size=2)
    return extraction.open(out)


GIVEN: dict[str, Callable[[list[str]], Any]] = {
    "a tuple": tuple,
    "an array": np.array,
    "an array of paths": lambda paths: np.array([Path(path) for path in paths], object),
    "a column": lambda paths: pd.Series(paths, index=[7, 8, 9]),
    "an index": pd.Index,
    "an array of Arrow": pa.array,
    "a column of Arrow": lambda paths: pa.chunked_array([paths[:1], paths[1:]]),
    "categories of Arrow": lambda paths: pa.array(paths).dictionary_encode(),
    "a deque": deque,
    "a generator": lambda paths: (path for path in paths),
    "a map": lambda paths: map(Path, paths),
    "names of a dict": lambda paths: dict.fromkeys(paths).keys(),
    "a set": set,
    "a set of paths": lambda paths: frozenset(map(Path, paths)),
}


@pytest.mark.parametrize("given", GIVEN)
def test_whatever_gives_paths_is_a_list_of_them(folder: Path, given: str) -> None:
    paths = [f"one/{name}" for name in NAMES]
    found = run(GIVEN[given](paths))
    assert found.names == NAMES
    assert found.photo(1).size == (48, 64)  # where they can be found again is noted
    assert same(everything("x.zarr"), everything_of(paths))
    assert extraction.extract(model(), GIVEN[given](paths), "x.zarr", "entropy").resumed == 3


def everything_of(paths: list[str]) -> Any:
    run(paths, "list.zarr")
    return everything("list.zarr")


def test_files_of_a_folder_that_are_listed_are_taken_as_they_are_listed(folder: Path) -> None:
    for number, listed in enumerate((Path("one").rglob("*.png"), Path("one/cat").iterdir(), os.scandir("one/cat"))):
        assert {*run(listed, f"{number}.zarr").names} == ({*NAMES} if number == 0 else {"a.png", "b.png"})
    with pytest.raises(FileNotFoundError):
        run(Path("nowhere").iterdir(), "3.zarr")


class Folder(Dataset[Any]):
    """As torchvision has them."""

    def __init__(self, root: str, transform: Any = None) -> None:
        self.root, self.transform = root, transform
        self.samples = [(f"{root}/{name}", int(name.startswith("dog"))) for name in NAMES]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        path, label = self.samples[index]
        return Photo.open(path, model(), crop="center").tensor, label


class Own(Dataset[Any]):
    """Images with labels of one's own, one of which may be broken."""

    def __init__(self, label: Callable[[int], Any] = lambda i: i, broken: int | None = None) -> None:
        self.label, self.broken = label, broken

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        if index == self.broken:
            raise OSError("is broken")
        return torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(index)), self.label(index)


PARTS: dict[str, tuple[Callable[[], Any], list[str], list[str]]] = {
    "a part": (lambda: Subset(Folder("one"), [2, 0]), ["dog/a.png", "cat/a.png"], ["1", "0"]),
    "an array of numbers": (lambda: Subset(Folder("one"), np.array([1])), ["cat/b.png"], ["0"]),
    "a part of a part": (lambda: Subset(Subset(Folder("./one/"), [2, 1, 0]), [0, 2]), ["dog/a.png", "cat/a.png"], ["1", "0"]),
    "several": (
        lambda: ConcatDataset([Folder("one"), Subset(Folder("two"), [2])]),
        [*(f"one/{name}" for name in NAMES), "two/dog/a.png"],
        ["0", "0", "1", "1"],
    ),
    "a sum": (lambda: Subset(Folder("one") + Folder("two"), [4, 1]), ["two/cat/b.png", "one/cat/b.png"], ["0", "0"]),
    "a part without names": (lambda: Subset(Own(), [3, 1]), ["00000003", "00000001"], ["3", "1"]),
    "several without names": (lambda: Subset(Own() + Own(), [1, 5]), ["00000001", "00000005"], ["1", "1"]),
    "one twice": (lambda: Subset(Folder("one"), [2, 0, 2]), ["00000000", "00000001", "00000002"], ["1", "0", "1"]),
}


@pytest.mark.parametrize("part", PARTS)
def test_parts_of_data_sets_have_the_names_and_labels_of_their_images(folder: Path, part: str) -> None:
    make, names, labels = PARTS[part]
    found = run(make())
    assert (found.names, found.labels) == (names, labels)


def test_another_split_is_refused(folder: Path) -> None:
    for make in (lambda: Folder("one"), Own):
        first, second = random_split(make(), [1, len(make()) - 1], torch.Generator().manual_seed(1))
        run(first, out := f"{make().__class__.__name__}.zarr")
        with pytest.raises(StoreError, match=r"images\.names: 1 gone \('.*'\), 1 new \('.*'\)\. Ask"):
            run(Subset(second, [0]), out)


class Made(Subset[Any]):
    """A part whose images are made in a way of its own."""

    def __init__(self, dataset: Any, indices: Any, transform: Any = None) -> None:
        super().__init__(dataset, indices)
        self.transform = transform

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[self.indices[index % len(self.indices)]]


class Again(Made):
    def __len__(self) -> int:
        return 2 * len(self.indices)


MADE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "of what it is of": (lambda how: Subset(Folder("one", how), [1]), "{}"),
    "of a class of one's own": (lambda how: Made(Folder("one"), [1], how), "{}; None"),
    "of one of several": (lambda how: ConcatDataset([Folder("one", "a"), Folder("two", how), Own()]), "'a'; {}; None"),
    "of one of several with the same": (
        lambda how: ConcatDataset([Folder("one", how), Folder("two", "one" if how == "other" else "other")]),
        "{0}; {1}",
    ),
}


@pytest.mark.parametrize("of", MADE)
def test_another_transform_is_refused(folder: Path, of: str) -> None:
    make, told = MADE[of]
    run(make("one"))
    before, now = told.format("'one'", "'other'"), told.format("'other'", "'one'")
    with pytest.raises(StoreError, match=rf"preprocessing\.transform: {before} \| {now}\. Ask"):
        run(make("other"))


def test_one_transform_of_all_is_told_once(folder: Path) -> None:
    told = run(ConcatDataset([Folder("one", "how"), Subset(Folder("two", "how"), [0])])).facts["run"]["preprocessing"]
    assert (told["dataset"], told["transform"]) == ("Folder", "'how'")


class Keyed(Own):
    """Asked by words."""

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__("abcd".index(index))


UNKNOWN: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "words": (lambda: Subset(Keyed(), "db"), ["3", "1"]),  # type: ignore[arg-type]
    "more than there are": (lambda: Again(Own(), [2, 0]), ["2", "0", "2", "0"]),
    "beyond the end": (lambda: Subset(Own(broken=9), [3, 9]), ["3", ""]),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_parts_of_which_it_is_not_known_which_images_they_are_have_numbers(folder: Path, kind: str) -> None:
    make, labels = UNKNOWN[kind]
    found = run(make())
    assert (found.names, found.labels) == ([f"{number:08d}" for number in range(len(labels))], labels)


LABELS: dict[str, tuple[Callable[[int], Any], list[str]]] = {
    "one-hot": (lambda i: torch.eye(4, dtype=torch.int64)[i], ["[1, 0, 0, 0]", "[0, 1, 0, 0]"]),
    "one-hot of numpy": (lambda i: np.eye(2)[i % 2], ["[1.0, 0.0]", "[0.0, 1.0]"]),
    "one-hot of many": (lambda i: torch.eye(2000)[i].int(), [str([1, *[0] * 1999]), str([0, 1, *[0] * 1998])]),
    "one in a vector": (lambda i: torch.tensor([[i]]), ["0", "1"]),
    "none": (lambda _: None, ["", ""]),
    "bytes": (lambda i: f"dög {i}".encode(), ["dög 0", "dög 1"]),
    "numbers of numpy": (lambda i: np.int64(i), ["0", "1"]),
    "numbers of numpy in a list": (lambda i: [np.int64(i), np.float32(0.5)], ["[0, 0.5]", "[1, 0.5]"]),
    "tensors in a tuple": (lambda i: (torch.tensor(i), torch.tensor([0, i])), ["[0, [0, 0]]", "[1, [0, 1]]"]),
    "words": (lambda i: ["dög", i], ['["dög", 0]', '["dög", 1]']),
    "a dict": (lambda i: {"labels": torch.tensor([i, 2])}, ['{"labels": [0, 2]}', '{"labels": [1, 2]}']),
    "no text": (lambda i: f"{i}\udcff", ["0\\xff", "1\\xff"]),
    "a date": (lambda i: date(2024, 5, 1 + i), ["2024-05-01", "2024-05-02"]),
    "a mask": (lambda i: torch.zeros(40, 40), ["", ""]),
    "a mask of numpy": (lambda i: np.zeros((40, 40)), ["", ""]),
    "a mask in a dict": (lambda i: {"mask": torch.zeros(4, 4)}, ["", ""]),
    "a mask of PIL": (lambda i: Image.new("L", (4, 4)), ["", ""]),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_are_stored_whole(folder: Path, kind: str) -> None:
    label, expected = LABELS[kind]
    assert run(Own(label)).labels[:2] == expected
    with xarray.open_zarr("x.zarr", consolidated=True) as found:
        assert found.label.values[:2].tolist() == expected
    if kind.startswith("one-hot"):
        assert np.array([json.loads(each) for each in expected]).argmax(1).tolist() == [0, 1]


class Iterated(Own):
    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))


class Untyped:
    """A data set in all but its class."""

    __init__, __len__, __getitem__, __iter__ = Own.__init__, Own.__len__, Own.__getitem__, Iterated.__iter__


@pytest.mark.parametrize("kind", [Iterated, Untyped])
def test_a_data_set_that_can_be_iterated_over_is_asked_by_number(folder: Path, kind: Any) -> None:
    assert run(kind(broken=0)).broken() == {"00000000": "OSError: is broken"}


REASONS: list[tuple[Exception, str]] = [
    (OSError("a\n  long story\n"), "OSError: a long story"),
    (ValueError(), "ValueError: no reason is told"),
    (KeyError(1), "KeyError: 1"),
]


@pytest.mark.parametrize(("error", "expected"), REASONS)
def test_why_an_image_cannot_be_read_is_told_in_a_line_with_its_kind(folder: Path, error: Exception, expected: str) -> None:
    def label(index: int) -> int:
        if index == 2:
            raise error
        return index

    assert run(Own(label)).broken() == {"00000002": expected}
    with pytest.raises(HookattnError, match=f"none of the images can be read\\. 00000002: {expected}\\.$"):
        run(Subset(Own(label), [2]), "y.zarr")


def test_samples_that_are_no_files_give_no_names(folder: Path) -> None:
    data = TensorDataset(torch.rand(2, 3, 64, 64))
    data.samples = [(image, 0) for image in data.tensors[0]]  # type: ignore[attr-defined]
    assert run(data).names == ["00000000", "00000001"]


def test_a_data_set_is_asked_for_its_first_image_once_before_and_once_in_the_run(folder: Path) -> None:
    asked: list[Any] = []

    def load() -> Any:
        asked.append("model")
        return model()

    extraction.extract(load, Own(lambda i: asked.append(i)), "x.zarr", "entropy", batch_size=2)
    assert asked == [0, "model", 0, 1, 2, 3]
