"""Columns of tables: which holds the images and which the labels, and what rows are called."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence

from ...errors import HookattnError, did_you_mean, listed
from .images import readable, write_label

# where files of the hub lie: below that, they are called what they are called in their repository
_FETCHED = re.compile(r".*/datasets--[^/]+/snapshots/[0-9a-f]{40}/")


def choose_images(wanted: str | None, fitting: Sequence[str], kinds: Mapping[str, object], place: str) -> str:
    """The column of images: the one asked for, or the only one that fits.

    Args:
        wanted: a name, or None.
        fitting: columns that may be images.
        kinds: of all columns.
        place: where they are, for errors.

    Raises:
        HookattnError: there is none, it cannot hold images, or there are several.
    """
    if wanted is None and len(fitting) == 1:
        return fitting[0]
    if wanted is not None and wanted in fitting:
        return wanted
    if wanted is not None and wanted in kinds:
        raise HookattnError(f"column {wanted!r} of {place!r} is {kinds[wanted]}: no image. There is: {listed(fitting)}.")
    if wanted is not None:
        raise HookattnError(f"{place!r} has no column {wanted!r}. {did_you_mean(wanted, fitting or kinds)}")
    if fitting:
        raise HookattnError(
            f"several columns of {place!r} may be images: {listed(fitting)}. Choose one: image_column={fitting[0]!r}, or "
            f"--image-column {fitting[0]}."
        )
    columns = listed(f"{name} ({kind})" for name, kind in kinds.items())
    raise HookattnError(f"no column of {place!r} holds images. There is: {columns}.")


def choose_labels(wanted: str | None, names: Iterable[str], place: str) -> str | None:
    """The column of labels: the one asked for, or "label" where there is one, or "cls" of samples of WebDataset.

    Raises:
        HookattnError: there is none of the name asked for.
    """
    names = list(names)
    if wanted is not None and wanted not in names:
        raise HookattnError(f"{place!r} has no column {wanted!r} for labels. {did_you_mean(wanted, names)}")
    own = "cls" if "__key__" in names else "label"
    return wanted or next((each for each in ("label", own) if each in names), None)


def name_rows(paths: Sequence[str | None], rows: Sequence[str]) -> list[str]:
    """Names of the rows of a table: the paths written in it, where each has one of its own, else the numbers of the rows."""
    # an absolute path tells of the machine that wrote it, and is another one when the images have moved
    seen = [_FETCHED.sub("", path) if path else path for path in paths]
    written = {path for path in seen if path and not os.path.isabs(path)}
    return [readable(str(name)) for name in (seen if len(written) == len(rows) else rows)]


def name_label(value: object, classes: Sequence[str] | None) -> str:
    """A label in words: the class whose number it is, "" where there is none."""
    if value is None or (classes is not None and value == -1):  # as Hugging Face numbers what has no label
        return ""
    return classes[value] if classes is not None and isinstance(value, int) else write_label(value)
