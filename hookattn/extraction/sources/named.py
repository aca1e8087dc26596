"""Data sets of Hugging Face, by name or as they were saved."""

from __future__ import annotations

import os
import re
from typing import Any

from ...errors import HookattnError, MissingExtraError, did_you_mean, listed
from ..clients import reason_of
from .columns import choose_images, choose_labels, name_label, name_rows
from .images import Images
from .places import answering, read_bytes

_PREFIX = "datasets:"
_COLON = re.compile(r":(?![^\[]*\])")  # not that of a part of a split, as in train[:100]


def is_named(typed: str) -> bool:
    """Whether what somebody typed is a data set of Hugging Face: `datasets:NAME`, or a folder that one was saved to."""
    return typed.startswith(_PREFIX) or _is_saved(os.path.expanduser(typed))


def _is_saved(folder: str) -> bool:
    if not os.path.isdir(folder):
        return False
    there = {name for name in ("state.json", "dataset_info.json", "dataset_dict.json") if os.path.isfile(f"{folder}/{name}")}
    return "dataset_dict.json" in there or len(there) == 2


class NamedImages(Images):
    """Images of a data set of Hugging Face, in the order of its rows.

    Args:
        typed: `datasets:NAME`, `datasets:NAME:SPLIT`, `datasets:NAME:CONFIG:SPLIT`, where NAME is one of the hub or a folder;
            or a folder that a data set was saved to.
        image: the column of images; None for the only one.
        label: the column of labels; None for "label", where there is one.

    Raises:
        MissingExtraError: the package `datasets` is not installed.
        HookattnError: it cannot be loaded, there is no such split, or no such column.
    """

    def __init__(self, typed: str, image: str | None, label: str | None) -> None:
        package = _import_datasets()
        rows = _load(package, typed)
        fitting = [name for name, kind in rows.features.items() if isinstance(kind, package.Image)]
        self._column = choose_images(image, fitting, {n: type(k).__name__ for n, k in rows.features.items()}, typed)
        # other columns stay out of it: they would be decoded with each row
        self._rows = rows.select_columns([self._column]).cast_column(self._column, package.Image(decode=False))
        split = str(rows.split or "rows")
        self.names = name_rows(self._read_paths(), [f"{split}/{n}" for n in range(len(rows))])
        self.labels = _read_labels(rows, choose_labels(label, rows.features, typed))
        if not self.names:
            raise HookattnError(f"{typed!r} has no rows.")

    def read(self, index: int) -> bytes:
        with answering(self.names[index]):
            value = self._rows[index][self._column] or {}
        if value.get("bytes"):
            return bytes(value["bytes"])
        if value.get("path"):
            return read_bytes(value["path"])
        raise HookattnError(f"{self.names[index]!r} has no bytes and no path in column {self._column!r}.")

    def _read_paths(self) -> list[str | None]:
        # tables of Arrow are mapped into memory: of these, only the paths are looked at
        tables = self._rows.with_format("arrow").iter(1000)
        columns = (chunk for table in tables for chunk in table.column(0).chunks)
        return [path for column in columns for path in column.field("path").to_pylist()]


def _import_datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("data sets of Hugging Face need their package: pip install datasets.") from error
    return datasets


def _load(package: Any, typed: str) -> Any:
    name, config, split = _parse(typed)
    place = os.path.abspath(name) if os.path.isdir(name) else name
    try:
        found = package.load_from_disk(place) if _is_saved(place) else package.load_dataset(place, config, split=split)
    except Exception as error:  # of the hub, of the network, of a builder: they share no base
        raise HookattnError(
            f"the data set {name!r} cannot be loaded: {reason_of(error)} Of one on the hub, type {_PREFIX}NAME:SPLIT or "
            f"{_PREFIX}NAME:CONFIG:SPLIT; {_PREFIX}FOLDER, of one that lies here, needs no network."
        ) from error
    if isinstance(found, dict) or _is_saved(place):
        return _take_split(found, split, name)
    return found


def _parse(typed: str) -> tuple[str, str | None, str | None]:
    """The name, the configuration and the split that somebody typed."""
    text = os.path.expanduser(typed.removeprefix(_PREFIX))
    name, *more = [text] if os.path.isdir(text) else _COLON.split(text)
    if not name or len(more) > 2 or not all(more):
        raise HookattnError(
            f"{typed!r} is no data set: write {_PREFIX}NAME, {_PREFIX}NAME:SPLIT or {_PREFIX}NAME:CONFIG:SPLIT."
        )
    return name, (more[0] if len(more) == 2 else None), (more[-1] if more else None)


def _take_split(found: Any, split: str | None, name: str) -> Any:
    splits = found if isinstance(found, dict) else {str(found.split): found}
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if split is None:
        raise HookattnError(
            f"{name!r} has several splits: type {_PREFIX}{name}:{next(iter(splits))}. There is: {listed(splits)}."
        )
    if split not in splits:
        raise HookattnError(f"{name!r} has no split {split!r}. {did_you_mean(split, splits)}")
    return splits[split]


def _read_labels(rows: Any, column: str | None) -> list[str]:
    if column is None:
        return [""] * len(rows)
    classes = getattr(rows.features[column], "names", None)
    return [name_label(value, classes) for value in rows.select_columns([column])[:][column]]
