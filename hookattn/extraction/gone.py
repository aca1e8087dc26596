"""Files of a store that are gone, of which zarr gives the values of an array that is empty: looked for, and not read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Set
from typing import Any

import numpy as np

from ..errors import StoreError
from .answers import answering_reads
from .clients import is_address
from .layout import Array


def find_gone(where: str, group: Any, blocks: Iterable[int]) -> list[int]:
    """Which of the blocks that were taken have lost a file; at an address, that is a request for each array.

    Of arrays that may be empty, such as labels, nobody knows.
    """
    arrays = [array for _, array in group.arrays() if array.shards is not None] + [group["sha256"]]
    files = [(array, _list_files(where, array)) for array in arrays]
    return [number for number in blocks if not all(is_there(_name_file(array, number)) for array, is_there in files)]


def check_there(where: str, array: Any, image: int, values: Array) -> None:
    """Check that what was read of an image was in the store: looked for where it is what an array that is empty has.

    Raises:
        StoreError: its file is gone.
    """
    is_empty = np.isnan(values).all() if values.dtype.kind == "f" else not values.any()
    file = _name_file(array, image // (array.shards or array.chunks)[0])
    if is_empty and not _list_files(where, array)(file):
        raise StoreError(
            f"{where} is damaged: {array.basename}/{file}, in which image {image} is, is gone. The same extract again takes "
            "its images anew."
        )


def _name_file(array: Any, block: int) -> str:
    """The file of a block, as seen from its array: there is one, since it is not divided along other axes."""
    return str(array.metadata.encode_chunk_key((block, *[0] * (array.ndim - 1))))


def _list_files(where: str, array: Any) -> Callable[[str], bool]:
    """Whether an array has a file: asked of a folder for each, and listed at once at an address."""
    folder = f"{where.rstrip('/')}/{array.basename}"
    if not is_address(where):
        return lambda name: os.path.exists(f"{folder}/{name}")
    from fsspec.core import url_to_fs

    with answering_reads(where):
        files, path = url_to_fs(folder)
        files.invalidate_cache()  # others may have put something there
        there: Set[str] = {each[len(path) + 1 :] for each in files.find(path)}
    return there.__contains__
