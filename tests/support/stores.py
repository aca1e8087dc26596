"""Everything that a store holds, and whether two hold the same."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np


def everything(where: Path | str) -> dict[str, Any]:
    """All arrays of a store."""
    import zarr

    return {name: array[...] for name, array in zarr.open_group(where, mode="r").arrays()}


def metadata(where: Path | str) -> dict[str, Any]:
    """What a store notes of itself and of each array, but for the versions of packages."""
    import zarr

    group = zarr.open_group(where, mode="r")
    facts = {name: value for name, value in group.attrs["hookattn"].items() if name != "versions"}
    return {"facts": facts, **{name: array.metadata.to_dict() for name, array in group.arrays()}}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two stores hold the same, bit for bit."""

    def alike(a: Any, b: Any) -> bool:
        return a.dtype == b.dtype and bool((a == b).all() if a.dtype.kind in "TO" else a.tobytes() == b.tobytes())

    return one.keys() == other.keys() and all(alike(array, other[name]) for name, array in one.items())


def alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two stores hold the same, but for what the size of a batch changes in the last places."""
    near = {name for name, array in one.items() if array.dtype.kind == "f" or f"{name}_max" in one}
    for name in near:
        kind = one[name].dtype
        least = {"float32": 1e-6, "float16": 1e-3}.get(kind.name, 1)
        np.testing.assert_allclose(one[name].astype(float), other[name].astype(float), rtol=1e-4, atol=least)
    exact = one.keys() - near
    return one.keys() == other.keys() and same({name: one[name] for name in exact}, {name: other[name] for name in exact})


def full_after(writes: int) -> Any:
    """A disk on which so many files find room, until the test makes some."""
    from zarr.storage import LocalStore

    whole, left = LocalStore.set, iter(range(writes))

    async def set_or_fail(store: Any, key: str, value: Any) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        await whole(store, key, value)

    return mock.patch.object(LocalStore, "set", set_or_fail)


_TOUCHED = ("open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir")


def states_of(folder: Path, kept: Path, job: Callable[[], object]) -> list[Path]:
    """What a folder is before each time that a job touches something in it: what a kill there would leave, as copies.

    The job is done by a fork, since nobody can be rid of a hook that hears what is touched.
    """
    if (child := os.fork()) == 0:
        status = 1
        try:
            _keep_states(folder, kept)
            job()
            status = 0
        except BaseException:  # which nothing else would tell
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0, "the job failed"
    return sorted(kept.iterdir())


def _keep_states(folder: Path, kept: Path) -> None:
    import zarr

    zarr.config.set({"async.concurrency": 1})  # one thing after another, as far as zarr can
    copying, last, count = False, dict[Path, bytes | None](), 0

    def keep(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal copying, last, count
        reads = event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if copying or reads or event not in _TOUCHED:
            return
        copying = True
        if (found := _read_all(folder)) and found != last:
            last, count = found, count + 1
            for path, data in found.items():
                copied = kept / f"{count:04}" / path
                copied.mkdir(parents=True, exist_ok=True) if data is None else copied.write_bytes(data)
        copying = False

    sys.addaudithook(keep)


def _read_all(folder: Path) -> dict[Path, bytes | None]:
    """All files in a folder, and folders, which hold None, before what they hold."""
    found: dict[Path, bytes | None] = {Path(): None} if folder.exists() else {}
    for path in sorted(folder.rglob("*")):
        with suppress(FileNotFoundError):  # another thread has put it in its place
            found[path.relative_to(folder)] = None if path.is_dir() else path.read_bytes()
    return found
