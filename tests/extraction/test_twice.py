"""What is given twice has no two places under one name in a store: it is refused, or has numbers, and is never left out."""

from __future__ import annotations

import tarfile
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from support.drawn import draw, small_vit
from support.sources import table_of, write_tar

from hookattn import HookattnError

extraction = pytest.importorskip("hookattn.extraction", exc_type=ImportError)
zarr = pytest.importorskip("zarr")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two photos, an archive of them and a table of others."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for name in ("a.png", "b.png"):
        Path("photos", name).write_bytes(draw(ord(name[0])))
    with open("two.tar", "wb") as file:
        write_tar(file, {name: draw(ord(name[0])) for name in ("a.png", "b.png")})
    pq.write_table(table_of(["cat/00.png", "dog/06.png"]), "two.parquet")


def extract(source: Any) -> Any:
    return extraction.extract(small_vit, source, "x.zarr", "entropy")


A, B = "photos/a.png", "photos/b.png"
TWICE: dict[str, Callable[[], Any]] = {
    "in a list": lambda: [A, B, A],
    "by two names": lambda: [A, B, "./photos/../photos/a.png"],
    "in an array": lambda: np.array([A, A, B]),
    "in a column": lambda: pd.Series([A, B, A]),
    "in a stream": lambda: iter([A, B, A]),
    "in a deque": lambda: deque([A, A]),
    "in a set, as a path too": lambda: {A, Path(A)},
    "in a glob too": lambda: ["photos/*.png", A],
    "in a folder too": lambda: ["photos", A],
    "a folder": lambda: ["photos", "photos/"],
    "an archive": lambda: ["two.tar", "two.tar"],
    "a table": lambda: ["two.parquet", "two.parquet"],
}


@pytest.mark.parametrize("kind", TWICE)
def test_what_is_given_twice_is_refused_and_named(kind: str) -> None:
    with pytest.raises(HookattnError, match=r"^the name '[^']*(a\.png|photos|two\.\w+)' is there twice: ") as caught:
        extract(TWICE[kind]())
    assert "give each once, as list(dict.fromkeys(paths)) has them" in str(caught.value) or kind == "in a folder too"


def test_it_is_told_how_many_are_there_twice() -> None:
    with pytest.raises(HookattnError, match=r"a\.png' is there twice, and 2 more are: "):
        extract([A, B, A, B, A])


@pytest.mark.parametrize("again", ["a.png", "./a.png", "a.PNG"])
def test_a_file_that_is_twice_in_an_archive_is_refused(again: str) -> None:
    with tarfile.open("two.tar", "a") as tar:
        tar.add(B, again)
    with pytest.raises(HookattnError, match=r"^the name 'a\.png' is there twice: make '.*two\.tar' anew with each"):
        extract("two.tar")


def test_rows_of_one_name_have_numbers_and_stay_where_they_are() -> None:
    pq.write_table(table_of(["cat/00.png", "dog/06.png", "cat/00.png"]), "two.parquet")
    assert extract("two.parquet").taken == 3
    found = extraction.open("x.zarr")
    assert found.names == ["two.parquet/0", "two.parquet/1", "two.parquet/2"]
    assert found.read("entropy", 0).equal(found.read("entropy", 2))


def test_a_store_whose_list_had_one_twice_finds_its_photos() -> None:
    extract([A, B])
    group = zarr.open_group("x.zarr", mode="r+")
    facts = group.attrs["hookattn"]
    paths = facts["source"]["paths"]
    group.update_attributes({"hookattn": {**facts, "source": {**facts["source"], "paths": [*paths, paths[0]]}}})
    assert extraction.open("x.zarr").photo(1).size == (48, 64)
