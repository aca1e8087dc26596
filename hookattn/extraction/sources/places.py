"""Where files lie: paths and remote addresses, as they are typed, in folders, and the bytes of them."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any, BinaryIO, cast

from fsspec.core import url_to_fs

from ...errors import HookattnError, MissingExtraError
from ..clients import advise, describe_missing, is_address, reason_of

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def suffix_of(address: str) -> str:
    """The ending of its name, in lower case, such as ".tar": without what follows a "?" in a remote address."""
    path = address.split("::")[0].split("?")[0] if is_address(address) else address
    return os.path.splitext(path)[1].lower()


@contextmanager
def answering(place: str) -> Iterator[None]:
    """Turn whatever goes wrong with a place into one error that names it."""
    try:
        yield
    except (HookattnError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise HookattnError(f"there is no {place!r} (any more).") from error
    except ImportError as error:
        raise MissingExtraError(f"{place!r} is out of reach: {describe_missing(error, place)}") from error
    except Exception as error:  # clients of remote stores, and readers of formats, raise errors that share no base
        advice = advise(place, error) if is_address(place) else ""
        raise HookattnError(f"{place!r} cannot be read: {reason_of(error)} {advice}".rstrip()) from error


def find_places(typed: str) -> list[str]:
    """What something typed stands for: a path, a remote address, a range of numbers `{000..012}`, a glob.

    Returns:
        Absolute paths and remote addresses, those of a glob in the order of their names.

    Raises:
        HookattnError: there is nothing of that name.
    """
    if not typed:
        raise HookattnError("images come from a folder, a file or an address, not from an empty name.")
    address = typed if is_address(typed) else os.path.abspath(os.path.expanduser(typed)).replace(os.sep, "/")
    if is_address(address):
        with answering(address):
            url_to_fs(address)[0].invalidate_cache()  # what it knows of folders since it was asked before
    # a name may well have brackets and stars in it: what is there by its name is meant by it
    if is_there(address):
        return [address]
    found = {one: _match(one) for one in _count_up(address)}
    for one, matched in found.items():
        if not matched:
            is_name = one == address and not is_address(one) and not glob.has_magic(one)
            raise HookattnError(
                f"there is no {one!r}.{f' A data set of Hugging Face is typed datasets:{typed}.' if is_name else ''}"
            )
    return [each for matched in found.values() for each in matched]


def _count_up(address: str) -> list[str]:
    """The addresses of ranges of numbers, with as many digits as the first has."""
    found = _RANGE.search(address)
    if found is None:
        return [address]
    first, last = found.groups()
    if int(last) < int(first):
        raise HookattnError(f"{found.group()} in {address!r} counts down: write {{{last}..{first}}}.")
    numbers = (str(n).zfill(len(first)) for n in range(int(first), int(last) + 1))
    return [each for n in numbers for each in _count_up(f"{address[: found.start()]}{n}{address[found.end() :]}")]


def _match(address: str) -> list[str]:
    """What is there by its name, or what matches a glob."""
    if is_there(address):
        return [address]
    with answering(address):
        if not glob.has_magic(address):
            return []
        if is_address(address):
            system, path = url_to_fs(address)
            return sorted(system.unstrip_protocol(each) for each in system.glob(path))
        return sorted(each.replace(os.sep, "/") for each in glob.glob(address, recursive=True))


def is_there(address: str) -> bool:
    """Whether there is a file or a folder of that name."""
    if not is_address(address):
        return os.path.exists(address)
    with answering(address):
        system, path = url_to_fs(address)
        return bool(system.exists(path))


def is_folder(address: str) -> bool:
    """Whether it is one; on the web, where pages and folders look alike, it is one whose address ends with "/"."""
    if not is_address(address):
        return os.path.isdir(address)
    with answering(address):
        system, path = url_to_fs(address)
        return address.endswith("/") if address.startswith("http") else bool(system.isdir(path))


def list_files(folder: str) -> list[str]:
    """Names of the files in a folder and in those below it, relative to it and sorted; hidden ones are left out.

    Raises:
        HookattnError: one of the folders cannot be read, or is a link to a folder around it.
    """
    if not is_address(folder):
        return sorted(_walk(folder))
    with answering(folder):
        system, path = url_to_fs(folder)
        below = len(path.rstrip("/")) + 1
        return sorted(name for each in system.find(path) if not re.search(r"(^|/)\.", name := each[below:]))


def _walk(folder: str) -> Iterator[str]:
    # of files nothing is asked but their names: on a network drive each question takes as long as an image
    waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", (_identify(os.stat(folder)),))]
    while waiting:
        inside, around = waiting.pop()
        with answering(f"{folder}/{inside}"), os.scandir(f"{folder}/{inside}") as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if _is_folder(entry):
                    waiting.append((f"{inside}{entry.name}/", (*around, _enter(entry, around))))
                elif entry.is_symlink() or entry.is_file():
                    yield f"{inside}{entry.name}"


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # of a link that leads to itself, through a file, or to where nobody may look: told when it is read
        return False


def _identify(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _enter(entry: os.DirEntry[str], around: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    folder = _identify(entry.stat())
    if entry.is_symlink() and folder in around:
        raise HookattnError(f"{entry.path!r} is a link to a folder around it, and has no end: take it away.")
    return folder


def common_folder(addresses: Sequence[str]) -> str:
    """The innermost folder that all of them lie in, "" where they have none in common."""
    parts = [address.rstrip("/").split("/")[:-1] for address in addresses]
    low, high = min(parts), max(parts)  # what these two begin with, all begin with
    shared = list(takewhile(lambda pair: pair[0] == pair[1], zip(low, high)))
    if len(shared) < (3 if is_address(addresses[0]) else 1):  # a scheme alone is no folder
        return ""
    return "/".join(part for part, _ in shared) or "/"


def relative(address: str, folder: str) -> str:
    """An address as seen from a folder, "" for the folder itself."""
    if address == folder or not folder:
        return "" if folder else address
    return address.removeprefix(f"{folder.rstrip('/')}/")


def name_file(name: str, folder: str) -> str:
    """What a file that is seen from a folder is called: on the web, without the key to it, which is another each time."""
    return name.partition("?")[0] if join(folder, name).startswith(("http://", "https://")) else name


def join(folder: str, name: str) -> str:
    """The address of what a name stands for in a folder: names may be absolute and remote themselves."""
    if not folder or is_address(name) or os.path.isabs(name):
        return name
    return f"{folder.rstrip('/')}/{name}"


def open_file(address: str) -> BinaryIO:
    """A file to be read, with `seek`."""
    if not is_address(address):
        return open(address, "rb")
    system, path = url_to_fs(address)
    return cast(BinaryIO, system.open(path, "rb"))


def read_bytes(address: str, start: int = 0, size: int | None = None) -> bytes:
    """The bytes of a file, or `size` of them from `start` on; nothing stays open.

    Raises:
        HookattnError: it cannot be read, or ends before that.
    """
    with answering(address):
        found = _read_remote(address, start, size) if is_address(address) else _read_local(address, start, size)
    if size is not None and len(found) != size:
        raise HookattnError(
            f"{address!r} gave {len(found)} bytes where {size} were asked for: it has changed since it was opened, or lies on "
            "a server that sends no parts of files. Open it anew, or fetch it first."
        )
    return found


def _read_local(address: str, start: int, size: int | None) -> bytes:
    with open(address, "rb") as file:
        file.seek(start)
        return file.read(-1 if size is None else size)


def _read_remote(address: str, start: int, size: int | None) -> bytes:
    system: Any
    system, path = url_to_fs(address)
    return bytes(system.cat_file(path) if size is None else system.cat_file(path, start=start, end=start + size))
