"""The store of a run: arrays of Zarr v3 with names and coordinates, written a block of images at a time."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import MissingExtraError, StoreError
from .answers import answering_damage, answering_reads, answering_writes, find_dead_link, tell
from .clients import is_address
from .gone import check_there, find_gone
from .layout import BROKEN, PENDING, TAKEN, Array, Block, Layout, Pending, Spec, encode

Facts = dict[str, Any]
FORMAT = 1  # counted up when a reader of the one before would misread what is written
_CHUNK = 2**20  # bytes that are compressed together, and have to be read for one image
_MARK = "hookattn"
_UNFINISHED = re.compile(r".+\.[0-9a-f]{32}\.partial")  # as zarr names what it writes, before that is put in its place


class Store:
    """A store that is there.

    Beside an array for each quantity it has, for each image, `status` (0 not there yet, 1 taken, 2 not to be read),
    `label`, `sha256` of what it was made of, `error`, and `grid_rows` and `grid_cols` of its patches.

    An image is there once its `status` is, which is removed first and written last; each file of a block is replaced as a
    whole, in which images that are there already stay as they are. So a run that is killed leaves images that are whole, and
    others that count for nothing and are taken again. So are those that were taken and whose file is gone.

    Args:
        where: a folder, or an address that fsspec knows (s3://, gs://).
    """

    def __init__(self, where: str | os.PathLike[str]) -> None:
        self.where = os.path.expanduser(os.fspath(where).removeprefix("file://").removeprefix("local://"))
        if not self.where.strip():
            raise StoreError(f"{where!r} names no store: give a folder, such as NAME.zarr, or an address.")
        if self.folder is not None and (dead := find_dead_link(self.folder)):
            raise StoreError(f"{dead}. Make that folder, or name another store.")
        self.group: Any = None

    @property
    def folder(self) -> Path | None:
        """The folder it is in; None for one at an address."""
        return None if is_address(self.where) else Path(self.where)

    def find_facts(self, mode: Literal["r", "r+"] = "r+") -> Facts | None:
        """What a run has noted there; None where there is no store, or one that was not finished being made.

        Raises:
            StoreError: there is something else.
        """
        zarr, self.group = import_zarr(), None
        if self.folder is not None and not self.folder.exists():
            return None
        try:
            self.group = zarr.open_group(self.where, mode=mode, zarr_format=3)
        except (FileNotFoundError, FileExistsError, NotADirectoryError) as error:
            if self._is_empty():
                return None
            raise StoreError(f"{self.where} is there, and is no store of Zarr v3; name another.") from error
        except Exception as error:  # whatever zarr, fsspec and a store's client raise
            raise tell(self.where, "opened", error) from error
        facts = self.group.attrs.get(_MARK)
        if facts is None:
            raise StoreError(f"{self.where} is a Zarr group that hookattn has not written; name another.")
        if facts.get("state") == "being made":
            return None
        if facts["format"] > FORMAT:
            raise StoreError(
                f"{self.where} is of format {facts['format']}, and this hookattn knows up to {FORMAT}: pip install --upgrade "
                "hookattn."
            )
        return dict(facts)

    def create(self, layout: Layout, coordinates: Mapping[str, tuple[tuple[str, ...], Array]], facts: Facts) -> None:
        """Make the arrays, those of coordinates filled; facts are noted last: a store which is only half made is seen to be.

        That it is being made is noted first, and stays noted while what a run left there that was killed before is removed.

        Raises:
            StoreError: it cannot be written.
        """
        zarr = import_zarr()
        with answering_writes(self.where):
            if self.group is None:
                self.group = zarr.create_group(self.where, zarr_format=3, attributes={_MARK: {"state": "being made"}})
            else:
                self.group = zarr.open_group(self.where, mode="r+", zarr_format=3, use_consolidated=False)
            self.remove_leftovers()
            for name in self._list_arrays():
                del self.group[name]
            for spec in layout.specs:
                self._create(spec, layout)
            for name, kind, fill in _OF_IMAGES:
                self._create_small(name, kind, fill, layout)
            for name, (dims, values) in coordinates.items():
                self._put(name, dims, values)
        self.note(facts)

    def note(self, facts: Facts) -> None:
        """Note facts of the run, and put the metadata of all arrays beside them, where readers find it in one piece."""
        zarr = import_zarr()
        names = ("label", "status", "sha256", "error", "grid_rows", "grid_cols", "depth", "key_token", "key_row", "key_col")
        with answering_writes(self.where), warnings.catch_warnings():
            warnings.simplefilter("ignore", zarr.errors.ZarrUserWarning)  # that other implementations may not look for it
            coordinates = " ".join(name for name in names if name in self.group)
            self.group = zarr.consolidate_metadata(self.group.store)
            self.group.update_attributes({_MARK: facts, "coordinates": coordinates})  # last, and in one piece

    def _is_empty(self) -> bool:
        """Whether there is nothing at all where the store is to be, or no more than the first file of one, not finished."""
        if self.folder is not None:
            return self.folder.is_dir() and all(_UNFINISHED.fullmatch(each.name) for each in self.folder.iterdir())
        from fsspec.core import url_to_fs

        with answering_reads(self.where):
            files, path = url_to_fs(self.where)
            files.invalidate_cache()  # others may have put something there
            return not files.exists(path)

    def _list_arrays(self) -> list[str]:
        """Names of the arrays in the group, whole or not; other folders are somebody else's."""
        if self.folder is not None:
            folders = [each for each in os.scandir(self.folder) if each.is_dir(follow_symlinks=False)]
            return [each.name for each in folders if _is_array(os.listdir(each))]
        from fsspec.core import url_to_fs

        files, path = url_to_fs(self.where)
        files.invalidate_cache()
        found = [each["name"].rstrip("/") for each in files.ls(path, detail=True) if each["type"] == "directory"]
        return [_last_of(each) for each in found if _is_array([_last_of(one) for one in files.ls(each, detail=False)])]

    def status(self) -> Array:
        """What became of each image; of a block that has lost a file, those that were taken are not there."""
        found, block = self.read("status"), self.group["status"].chunks[0]
        numbers = np.unique(np.flatnonzero(found == TAKEN) // block)
        for number in find_gone(self.where, self.group, numbers.tolist()):
            of_block = found[number * block : (number + 1) * block]
            of_block[of_block == TAKEN] = PENDING
        return found

    def read(self, name: str, rows: Any = ...) -> Array:
        """Values of an array: all of them, or of some images.

        Raises:
            StoreError: they are damaged, or cannot be read at an address.
        """
        with answering_reads(self.where), answering_damage(self.where, array := self.group[name]):
            return np.asarray(array[rows])

    def read_image(self, name: str, number: int) -> Array:
        """Values of an array of one image that was taken.

        Raises:
            StoreError: they are damaged or gone, or cannot be read at an address.
        """
        values = self.read(name, number)
        check_there(self.where, self.group[name], number, values)
        return values

    def find_pending(self, layout: Layout, *, retry: bool = False) -> Pending:
        """The images that are not there yet, or not any more; with `retry`, those that could not be read, too."""
        status = self.status()
        with answering_writes(self.where):
            for number in np.unique(np.flatnonzero(status != self.read("status")) // layout.block).tolist():
                rows = slice(*layout.range_of(number))
                self.group["status"][rows] = status[rows]  # or the rest would be there where only some of them are taken anew
        numbers = np.flatnonzero(np.isin(status, [PENDING, BROKEN] if retry else [PENDING]))
        begins = np.flatnonzero(np.diff(numbers // layout.block, prepend=-1))
        parts = np.split(numbers, begins[1:]) if len(numbers) else []
        return {int(part[0]) // layout.block: _shorten(part) for part in parts}

    def write(self, block: Block, specs: Sequence[Spec]) -> None:
        """Write the images of a block that were taken, which count once all of it is there; the others stay as they are.

        Raises:
            StoreError: it cannot be written, as where the disk is full.
        """
        with answering_writes(self.where):
            # what was there of them counts no longer before the first of it is replaced
            self._replace(self.group["status"], block, np.full_like(block.status, PENDING))
            for spec in specs:
                for name, values in encode(spec, block.values[spec.name]).items():
                    self._replace(self._open(name), block, values)
            for name in ("label", "sha256", "error"):
                self._replace(self.group[name], block, getattr(block, name))
            for name, values in zip(("grid_rows", "grid_cols"), block.grid.T):
                self._replace(self.group[name], block, values)
            self._replace(self.group["status"], block, block.status)  # last

    def _replace(self, array: Any, block: Block, values: Array) -> None:
        """Write what an array has of a block: of the images that were taken their values, of the others what is there."""
        rows, taken = slice(block.start, block.start + len(block.status)), block.status != PENDING
        with answering_damage(self.where, array):
            if not taken.all():
                there = array[rows]
                there[taken] = values[taken]
                values = there
            array[rows] = values  # which has zarr read what it replaces

    def _open(self, name: str) -> Any:
        """An array of values, to be written to: whether some are all as in an array that is empty takes long to look for."""
        with import_zarr().config.set({"array.write_empty_chunks": True}):
            return self.group[name]

    def remove_leftovers(self) -> None:
        """Remove files that a run which was killed had not finished."""
        if self.folder is not None:
            for path in self.folder.rglob("*.partial"):
                if _UNFINISHED.fullmatch(path.name):
                    path.unlink(missing_ok=True)

    def _create(self, spec: Spec, layout: Layout) -> None:
        chunk = _divisor(layout.block, max(1, _CHUNK // max(1, spec.bytes)))
        codecs = import_zarr().codecs
        self.group.create_array(
            spec.name,
            shape=(layout.images, *spec.shape),
            chunks=(chunk, *_at_least_one(spec.shape)),
            shards=(layout.block, *_at_least_one(spec.shape)),
            dtype=spec.dtype,
            fill_value=0 if spec.dtype == "uint8" else np.nan,
            compressors=codecs.BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle"),
            dimension_names=("image", *spec.dims),
            attributes={"units": spec.units} if spec.units else {},
        )
        if spec.dtype == "uint8":
            self._create(Spec(f"{spec.name}_max", spec.dims[:-1], spec.shape[:-1], "float32"), layout)

    def _create_small(self, name: str, kind: Any, fill: Any, layout: Layout) -> None:
        self.group.create_array(
            name,
            shape=(layout.images,),
            chunks=(layout.block,),
            dtype=kind,
            fill_value=fill,
            dimension_names=("image",),
        )

    def _put(self, name: str, dims: tuple[str, ...], values: Array) -> None:
        kind = str if values.dtype == object else values.dtype
        # names of many images in pieces, since a reader takes whole pieces
        chunks = tuple(max(1, min(size, 2**16)) for size in values.shape)
        self.group.create_array(name, shape=values.shape, chunks=chunks, dtype=kind, dimension_names=dims)[...] = values


_OF_IMAGES = (
    ("status", "uint8", PENDING),
    ("label", str, ""),
    ("sha256", str, ""),
    ("error", str, ""),
    ("grid_rows", "int32", 0),
    ("grid_cols", "int32", 0),
)


def _shorten(numbers: Array) -> Sequence[int]:
    """Numbers as a range, where they follow one another."""
    first, last = int(numbers[0]), int(numbers[-1])
    return range(first, last + 1) if last - first + 1 == len(numbers) else numbers.tolist()


def import_zarr() -> Any:
    """The module `zarr`, imported when the first store is opened."""
    try:
        import zarr
    except ImportError as error:
        raise MissingExtraError('stores need zarr 3, and it Python 3.11: pip install "hookattn[store]".') from error
    if int(zarr.__version__.split(".")[0]) < 3:
        raise MissingExtraError(f'stores need zarr 3, and this is {zarr.__version__}: pip install "hookattn[store]".')
    return zarr


def _is_array(names: Sequence[str]) -> bool:
    """Whether a folder in which there is this is an array of zarr, or what is left of one: it may be killed while it goes."""
    return "zarr.json" in names or {name for name in names if not name.startswith(".")} <= {"c"}


def _last_of(address: str) -> str:
    return address.rstrip("/").rpartition("/")[2]


def _divisor(number: int, most: int) -> int:
    """The largest number up to `most` that divides another."""
    return next(each for each in range(min(number, most), 0, -1) if number % each == 0)


def _at_least_one(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(max(1, size) for size in shape)
