"""Photos in folders, in files, and in lists of files."""

from __future__ import annotations

import os
import posixpath
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

from ...errors import HookattnError
from ...image.pixels import import_pillow
from ..clients import is_address
from .images import Images, check_names, readable
from .places import join, read_bytes


@cache
def photo_suffixes() -> frozenset[str]:
    """Endings of the files that PIL opens as photos; pages of print are none."""
    pil = import_pillow()
    suffixes = {suffix for suffix, kind in pil.registered_extensions().items() if kind in pil.OPEN}
    return frozenset(suffixes - {".pdf", ".eps", ".ps"})


class Named(NamedTuple):
    """A file, the name it goes by, and its label."""

    file: str
    name: str
    label: str


class Photos(Images):
    """Files with one photo each, in a folder or anywhere."""

    def __init__(self, folder: str, photos: Iterable[Named]) -> None:
        listed = list(photos)
        self.names, self.labels = [each.name for each in listed], [each.label for each in listed]
        self._folder, self._files = folder, [each.file for each in listed]
        check_names(self.names, "leave one of the two out, or name a folder around both")

    def read(self, index: int) -> bytes:
        return read_bytes(join(self._folder, self._files[index]))


def name_photos(folder: str, files: Sequence[str]) -> Iterator[Named]:
    """Photos of a folder, labelled by the first folder in it that they lie in.

    Args:
        folder: seen from where all files are seen from, "" for that itself.
        files: relative to the folder.
    """
    for file in files:
        label, inside, _ = file.partition("/")
        path = join(folder, file)
        yield Named(path, readable(path), sys.intern(readable(label)) if inside else "")


def name_listed(address: str, folder: str) -> Iterator[Named]:
    """Photos of a list: a path a line, seen from the list, and a label after a tab where there is one.

    Args:
        address: of the list.
        folder: that it lies in, seen from where all files are seen from.

    Raises:
        HookattnError: the list cannot be read, or none of its files is there.
    """
    lines = [line.rstrip("\r") for line in read_bytes(address).decode("utf-8-sig", "surrogateescape").split("\n")]
    listed = [line.split("\t") for line in lines if line.strip()]
    # one that is missing is found when it is read, but all of them are missing where a list was moved
    if listed and not is_address(address) and not _is_any_there(posixpath.dirname(address), [path for path, *_ in listed]):
        raise HookattnError(
            f"no file that {address!r} lists is there, such as {listed[0][0]!r}: write a path a line, as seen from the list."
        )
    for path, *label in listed:
        name = path if is_address(path) else posixpath.normpath(path)
        yield Named(join(folder, name), readable(name), readable(label[0]) if label else "")


def _is_any_there(folder: str, paths: Sequence[str]) -> bool:
    return any(is_address(path) or os.path.exists(join(folder, path)) for path in paths)
