"""What somebody typed, opened as images in a fixed order."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

from ...errors import HookattnError, listed
from ..clients import is_address
from .folders import Named, Photos, name_listed, name_photos, photo_suffixes
from .images import Images, check_names, readable
from .named import NamedImages, is_named
from .places import common_folder, find_places, is_folder, join, list_files, relative, suffix_of
from .shards import Shards

Source = str | os.PathLike[str]

_SHARDS, _TABLES, _LISTS, _PHOTOS = ".tar", ".parquet", ".txt", "photos"
_UNREADABLE = {
    ".gz": "unpack it to a .tar, which can be read in parts",
    ".tgz": "unpack it to a .tar, which can be read in parts",
    ".zip": "unpack it, and give the folder",
    ".csv": "write a .txt of it, with a path a line, and a label after a tab",
    ".tsv": "write a .txt of it, with a path a line, and a label after a tab",
}


class Found(NamedTuple):
    """Files of one kind: one that was typed, or those of a folder that was."""

    address: str
    kind: str
    inside: list[str] | None  # relative to the folder; None for a file


def open_images(source: Source | Sequence[Source], *, image: str | None = None, label: str | None = None) -> Images:
    """Open images in a fixed order, that can be read by number and in several processes.

        open_images("photos")                            # a folder and those below it; the first one is the label
        open_images(["a.jpg", "b.jpg"]); open_images("list.txt")  # a path a line, and a label after a tab
        open_images("shards/train-{000000..000012}.tar")          # WebDataset; globs and folders of .tar, too
        open_images("s3://bucket/train-*.parquet", image="photo")
        open_images("datasets:food101:validation")                # Hugging Face; or a folder of save_to_disk
        open_images("hf://datasets/food101@COMMIT/data/*.parquet")  # files of it; datasets:food101@COMMIT:validation, too

    Images are named as seen from the folder that is given, or from the one around all that is given; of a list, as they are
    written there.

    Args:
        source: a path, a glob, a range of numbers in braces, a remote address that fsspec knows, a data set by name; or
            several, all of one kind.
        image: the column of images in a table or a data set, where there are several; of shards, how images end.
        label: the column of labels, "label" where there is one; of shards, how what holds the label ends, "cls".

    Raises:
        HookattnError: there are no images, or not of one kind, or something cannot be read, or two have one name. An image
            that is missing or broken is none of this: `read` says so.
        MissingExtraError: what reads such a source is not installed.
    """
    typed = [os.fspath(each) for each in ([source] if isinstance(source, (str, os.PathLike)) else source)]
    named = [each for each in typed if is_named(each)]
    if named and len(typed) > 1:
        raise HookattnError(f"{named[0]!r} is a data set of its own: give it alone.")
    if named:
        return NamedImages(named[0], image, label)
    if of_hub := [each for each in typed if each.startswith("hf://")]:
        from .hub import asking_hub  # whose client takes a while to import

        with asking_hub(of_hub[0]):
            return _open_addresses(typed, image, label)
    return _open_addresses(typed, image, label)


def _open_addresses(typed: Sequence[str], image: str | None, label: str | None) -> Images:
    addresses = list(chain.from_iterable(find_places(each) for each in typed))
    if not addresses:
        raise HookattnError("no source of images is given: a folder, files, .tar shards, .parquet tables or datasets:NAME.")
    check_names(addresses, "give each once, as list(dict.fromkeys(paths)) has them, since images are found by their names")
    return _open_found([_look_at(address) for address in addresses], image, label)


def _look_at(address: str) -> Found:
    """Tell what lies at an address.

    Raises:
        HookattnError: nothing that images can be read from, or several kinds.
    """
    if not is_folder(address):
        return Found(address, _kind_of(address), None)
    kinds: dict[str, list[str]] = {}
    for file in list_files(address):
        suffix = suffix_of(file)
        kinds.setdefault(_PHOTOS if suffix in photo_suffixes() else suffix, []).append(file)
    found = {kind: kinds[kind] for kind in (_PHOTOS, _SHARDS, _TABLES) if kind in kinds}
    if not found:
        there = listed(kind or "names without an ending" for kind in kinds)
        raise HookattnError(f"{address!r} has no photos, .tar or .parquet files in it; there is: {there}.")
    if len(found) > 1:
        raise HookattnError(_tell_kinds({kind: join(address, inside[0]) for kind, inside in found.items()}))
    ((kind, inside),) = found.items()
    return Found(address, kind, inside)


def _kind_of(file: str) -> str:
    suffix = suffix_of(file)
    if suffix in (_SHARDS, _TABLES, _LISTS):
        return suffix
    if suffix in _UNREADABLE:
        raise HookattnError(f"{file!r} is not read as it is: {_UNREADABLE[suffix]}.")
    # on the web, an image may be called anything
    if suffix and suffix not in photo_suffixes() and not is_address(file):
        raise HookattnError(f"{file!r} is no image that PIL knows, no .tar, no .parquet and no list (.txt) of files.")
    return _PHOTOS


def _tell_kinds(examples: dict[str, str]) -> str:
    shown = ", ".join(f"{kind} ({example!r})" for kind, example in examples.items())
    return (
        f"there are several kinds of sources: {shown}. Give one kind at a time: a folder of its own, or a glob as 'data/*.tar'."
    )


def _open_found(found: Sequence[Found], image: str | None, label: str | None) -> Images:
    kinds = {_PHOTOS if each.kind == _LISTS else each.kind: each.address for each in found}
    if len(kinds) > 1:
        raise HookattnError(_tell_kinds(kinds))
    alone = found[0].address if len(found) == 1 and found[0].inside is not None else None
    around = alone or common_folder([each.address for each in found])
    if _PHOTOS in kinds:
        return _open_photos(found, around, image, label)
    places = [(relative(each.address, around), each.inside) for each in found]
    files = [file for place, inside in places for file in ([place] if inside is None else [join(place, x) for x in inside])]
    if _SHARDS in kinds:
        return Shards(around, files, image, label)
    from .tables import Tables  # which needs an extra

    return Tables(around, files, image, label)


def _open_photos(found: Sequence[Found], around: str, image: str | None, label: str | None) -> Images:
    if image is not None or label is not None:
        raise HookattnError(
            "columns of images and labels are those of tables, or endings in shards: photos in folders and lists have none."
        )
    photos: list[Named] = []
    for address, kind, inside in found:
        place = relative(address, around)
        if kind == _LISTS:
            photos += name_listed(address, place.rpartition("/")[0])
        elif inside is None:
            photos.append(Named(place, readable(place), ""))
        else:
            photos += name_photos(place, inside)
    if not photos:
        raise HookattnError(f"there are no photos in {found[0].address!r}: write a path a line.")
    return Photos(around, photos)
