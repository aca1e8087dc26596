"""Everything that a store holds, and whether two hold the same."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any
from unittest import mock


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


def full_after(writes: int) -> Any:
    """A disk on which so many files find room, until the test makes some."""
    from zarr.storage import LocalStore

    whole, left = LocalStore.set, iter(range(writes))

    async def set_or_fail(store: Any, key: str, value: Any) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        await whole(store, key, value)

    return mock.patch.object(LocalStore, "set", set_or_fail)
