"""What zarr, file systems and clients say while a store is read or written, turned into errors that say what to do."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import HookattnError, MissingExtraError, StoreError
from .clients import advise, describe_missing, is_address, reason_of


@contextmanager
def answering_writes(where: str) -> Iterator[None]:
    """Turn what a file system or a client says while something is written into an error that says what to do."""
    try:
        yield
    except (HookattnError, MemoryError):
        raise
    except Exception as error:  # those of clients share no base
        if is_address(where):
            told = tell(where, "written", error)
            raise StoreError(f"{told} What is there is whole, and the same again goes on from there.") from error
        if not isinstance(error, OSError):
            raise
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise StoreError(
            f"{where} cannot be written ({error.strerror or reason_of(error)}). What is there is whole: "
            f"{'make room' if is_full else 'mend that'}, and run the same again to go on from there."
        ) from error


@contextmanager
def answering_reads(where: str) -> Iterator[None]:
    """Turn what a client says of an address while something is read into an error that says what to do."""
    try:
        yield
    except (HookattnError, MemoryError):
        raise
    except Exception as error:
        if not is_address(where):
            raise
        raise tell(where, "read", error) from error


@contextmanager
def answering_damage(where: str, array: Any) -> Iterator[None]:
    """Turn what the codecs of zarr say of a file that is not what was written into an error that says what to do."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if is_address(where) or isinstance(error, HookattnError):  # whose client may have raised it
            raise
        name, dims = array.basename, array.metadata.dimension_names
        folders = " and from ".join(dict.fromkeys((f"{where}/{name}/c", f"{where}/status/c")))
        advice = (
            f"Where N is removed, the number of a block, from {folders}, the same extract again takes its images anew."
            if "image" in dims and name != "image"
            else "It is written when a store is made: remove the store, or name another, and run the same again."
        )
        raise StoreError(f"{where} is damaged: {name!r} cannot be read: {reason_of(error)} {advice}") from error


def find_dead_link(path: Path) -> str:
    """The first link on the way to a path that leads nowhere, in words; "" where there is none."""
    for each in (*reversed(path.absolute().parents), path.absolute()):
        if os.path.islink(each):
            try:
                each.stat()
            except OSError as error:
                return f"{each} is a link that leads nowhere: {os.readlink(each)} ({error.strerror})"
    return ""


def tell(where: str, done: str, error: Exception) -> HookattnError:
    """Why a store cannot be opened, read or written."""
    if isinstance(error, ImportError):
        return MissingExtraError(f"{where} cannot be {done}: {describe_missing(error, where)}")
    advice = advise(where, error) if is_address(where) else ""
    return StoreError(f"{where} cannot be {done}: {reason_of(error)} {advice}".rstrip())
