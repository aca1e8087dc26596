"""Data sets of Hugging Face, by name or as they were saved."""

from __future__ import annotations

import os
import re
from typing import Any, NamedTuple

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
        typed: `datasets:NAME`, `datasets:NAME:SPLIT`, `datasets:NAME:CONFIG:SPLIT`, where NAME is one of the hub, or one of it
            at a branch, a tag or a commit (`NAME@REVISION`), or a folder; or a folder that a data set was saved to.
        image: the column of images; None for the only one.
        label: the column of labels; None for "label", where there is one.

    Raises:
        MissingExtraError: the package `datasets` is not installed.
        HookattnError: it cannot be loaded, there is no such split, or no such column.
    """

    def __init__(self, typed: str, image: str | None, label: str | None) -> None:
        package = _import_datasets()
        asked = _parse(typed)
        rows, self.revision = _load(package, asked)
        self.address = asked.pin(self.revision) if typed.startswith(_PREFIX) else None
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


class _Asked(NamedTuple):
    """What somebody typed: a name of the hub or a folder, and the revision, the configuration and the split, where given."""

    name: str
    revision: str | None
    config: str | None
    split: str | None

    def __str__(self) -> str:
        place = f"{self.name}@{self.revision}" if self.revision else self.name
        return _PREFIX + ":".join(filter(None, [place, self.config, self.split]))

    def pin(self, commit: str | None) -> str:
        """What is typed for the same from anywhere, and when the repository has moved on."""
        place = os.path.abspath(self.name) if os.path.isdir(self.name) else self.name
        return str(self._replace(name=place, revision=commit))


def _load(package: Any, asked: _Asked) -> tuple[Any, str | None]:
    """The rows, and the commit they are of."""
    name, commit, place = asked.name, None, os.path.abspath(asked.name)
    try:
        if is_saved := _is_saved(place):
            found = package.load_from_disk(place)
        elif os.path.isdir(place):
            found = package.load_dataset(place, asked.config, split=asked.split)
        else:
            found, commit = _fetch(package, asked)
    except HookattnError:
        raise
    except Exception as error:  # of the hub, of the network, of a builder: they share no base
        raise HookattnError(
            f"the data set {name!r} cannot be loaded: {_explain(error)} Of one on the hub, type {_PREFIX}NAME:SPLIT or "
            f"{_PREFIX}NAME:CONFIG:SPLIT; {_PREFIX}FOLDER, of one that lies here, needs no network."
        ) from error
    return (_take_split(found, asked) if isinstance(found, dict) or is_saved else found), commit


def _fetch(package: Any, asked: _Asked) -> tuple[Any, str | None]:
    """Rows of a data set of the hub or, where the hub does not answer, of what was fetched of it last; and their commit."""
    from .hub import not_waiting_for_hub

    with not_waiting_for_hub():
        builder = package.load_dataset_builder(asked.name, asked.config, revision=asked.revision)
        # a builder's hash is the commit, of what comes from a repository (datasets 2.16); and what is kept is taken whatever
        # revision is asked for
        is_other = type(builder).__name__ == "Cache" and not builder.hash.startswith(asked.revision or "")
        if is_other:
            raise HookattnError(
                f"the hub does not answer, and {asked.name!r} was fetched last at {builder.hash}, not at {asked.revision!r}: "
                f"type {asked.pin(builder.hash)}, or try again with a network."
            )
        builder.download_and_prepare()
        return builder.as_dataset(split=asked.split), (builder.hash if builder.repo_id else None)


def _explain(error: Exception) -> str:
    from .hub import LOG_IN, explain_refusal

    if type(error).__name__ == "DatasetNotFoundError":  # which does not keep what it came from
        return f"{reason_of(error)} If it is gated, ask for access on its page of the hub; to be known there, {LOG_IN}."
    told = explain_refusal(error)
    return f"{told}." if told else reason_of(error)


def _parse(typed: str) -> _Asked:
    """The name, the revision, the configuration and the split that somebody typed."""
    text = os.path.expanduser(typed.removeprefix(_PREFIX))
    name, *more = [text] if os.path.isdir(text) else _COLON.split(text)
    name, at, revision = (name, "", "") if os.path.isdir(name) else name.partition("@")
    if not name or len(more) > 2 or not all(more) or (at and not revision):
        raise HookattnError(
            f"{typed!r} is no data set: write {_PREFIX}NAME, {_PREFIX}NAME:SPLIT or {_PREFIX}NAME:CONFIG:SPLIT."
        )
    return _Asked(name, revision or None, (more[0] if len(more) == 2 else None), (more[-1] if more else None))


def _take_split(found: Any, asked: _Asked) -> Any:
    name, split = asked.name, asked.split
    splits = found if isinstance(found, dict) else {str(found.split): found}
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if split is None:
        raise HookattnError(
            f"{name!r} has several splits: type {asked._replace(split=next(iter(splits)))}. There is: {listed(splits)}."
        )
    if split not in splits:
        raise HookattnError(f"{name!r} has no split {split!r}. {did_you_mean(split, splits)}")
    return splits[split]


def _read_labels(rows: Any, column: str | None) -> list[str]:
    if column is None:
        return [""] * len(rows)
    classes = getattr(rows.features[column], "names", None)
    return [name_label(value, classes) for value in rows.select_columns([column])[:][column]]
