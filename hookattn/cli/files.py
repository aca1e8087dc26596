"""Files that are written: looked at before the work, and whole or not there after it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from ..errors import HookattnError
from ..extraction.answers import find_dead_link
from .output import printable

MAPS = ".safetensors"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".pdf", ".svg")


def check_out(out: Path, kinds: tuple[str, ...], given: Iterable[Path | None] = ()) -> Path:
    """Check that a file can be written, before the work begins.

    Args:
        out: what was asked for; without a suffix it gets the first of the kinds.
        kinds: suffixes that there are.
        given: files that are read, which are not written over.

    Returns:
        The file that will be written.

    Raises:
        HookattnError: it cannot be.
    """
    _check_links(out.parent)
    try:
        if os.path.isdir(out):
            raise HookattnError(f"{out} is a folder; name a file in it: -o {out / 'NAME'}{kinds[0]}.")
        if out.exists() and not out.is_file():
            raise HookattnError(f"{out} is no file that can be written over.")
        found = out.resolve() if out.suffix else out.resolve().with_name(f"{out.name}{kinds[0]}")
        if found.suffix.lower() not in kinds:
            raise HookattnError(f"{out} is no kind of file that is written here: {', '.join(kinds)}.")
        if os.path.isdir(found):
            raise HookattnError(f"{found} is a folder; name a file.")
        if any(each is not None and each.resolve() == found for each in given):
            raise HookattnError(f"{out} is what is read; name another file to write.")
        found.with_name(f".{found.name}").exists()  # a name that is too long says so
        check_folder(found.parent)
    except (OSError, ValueError, RuntimeError) as error:  # of a name with a zero in it; of links in a circle, until Python 3.13
        raise HookattnError(f"{out} cannot be written: {_reason(error)}") from error
    return found if out.is_absolute() else _as_typed(out, found)


def check_folder(folder: Path) -> None:
    """Check that files can be made in a folder, or in the first of its parents that is there.

    Raises:
        HookattnError: they cannot.
    """
    _check_links(folder)
    try:
        there = next(each for each in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(each))
        with tempfile.TemporaryFile(dir=there):
            pass
    except (OSError, ValueError) as error:
        raise HookattnError(f"{folder} takes no files: {_reason(error)}") from error


def _check_links(folder: Path) -> None:
    if dead := find_dead_link(folder):
        raise HookattnError(f"{dead}. Make that folder, or name another.")


def write_out(out: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name beside it, and rename that once it is whole.

    Raises:
        HookattnError: it cannot be written.
    """
    # as short as can be: the name that was asked for may be as long as names can be
    beside = out.with_name(f".{os.getpid()}{out.suffix}")
    made: list[Path] = []
    try:
        made = [each for each in (out.parent, *out.parent.parents) if not each.exists()]
        out.parent.mkdir(parents=True, exist_ok=True)
        write(beside)
        beside.replace(out)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        for each in made:
            if each.is_dir() and not any(each.iterdir()):
                each.rmdir()
        if isinstance(error, (OSError, ValueError)):
            raise HookattnError(f"{printable(out)} cannot be written: {_reason(error)}") from error
        raise


def _as_typed(out: Path, found: Path) -> Path:
    return out.with_name(found.name) if out.parent.resolve() == found.parent else found


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
