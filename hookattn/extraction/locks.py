"""Who writes to a store: one run at a time."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

from ..errors import MissingExtraError, StoreError

_HELD: set[str] = set()
"""Stores that runs of this process write to: of itself a process gets a lock of a file again."""
_RENEWED, _LASTS = 15.0, 60.0  # seconds: how often what is noted at an address is renewed, and how long it counts


@contextmanager
def hold_store(where: str) -> Iterator[None]:
    """Hold a store for as long as the block lasts.

    Of a folder the system lets go where the process is killed. At an address (s3://) who writes is noted in an object beside
    the store, renewed while it lasts, and counts for a minute after the last time; two runs that begin in the same second may
    both go on there.

    Raises:
        StoreError: another run holds it.
    """
    key = where if "://" in where else os.path.realpath(where)
    if key in _HELD:
        raise _taken(where, "of this process")
    _HELD.add(key)
    try:
        with _hold_address(where) if "://" in where else _hold_folder(where):
            yield
    finally:
        _HELD.discard(key)


def _taken(where: str, whose: str) -> StoreError:
    return StoreError(f"another run {whose} writes to {where}: let it end, or name another store.")


@contextmanager
def _hold_folder(where: str) -> Iterator[None]:
    folder = Path(where).absolute()
    beside = folder.with_name(f".{folder.name}.lock")
    made = [each for each in folder.parents if not each.exists()]
    try:
        beside.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(beside, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise StoreError(f"{where} cannot be written ({error.strerror}); name another store.") from error
    try:
        # the one before may have removed the file between our opening and our locking it
        if not _lock(file) or not (beside.exists() and os.path.samestat(os.fstat(file), os.stat(beside))):
            raise _taken(where, "of another process")
        try:
            yield
        finally:
            with suppress(OSError):  # the next run makes it again
                beside.unlink()
                for each in made:  # that nothing came into
                    each.rmdir()
    finally:
        os.close(file)


def _lock(file: int) -> bool:
    """Lock a file for this process alone; False where another has it."""
    try:
        # not flock, which processes that are forked to read images would go on holding
        from fcntl import LOCK_EX, LOCK_NB, lockf
    except ImportError:  # Windows
        import msvcrt

        def take() -> None:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:

        def take() -> None:
            lockf(file, LOCK_EX | LOCK_NB)

    try:
        take()
    except OSError:
        return False
    return True


@contextmanager
def _hold_address(where: str) -> Iterator[None]:
    try:
        note = _Note(where)
        other = note.take()
    except ImportError as error:
        raise MissingExtraError(f"{where} needs a package: {error}") from error
    except Exception as error:  # whatever fsspec and a store's client raise
        raise StoreError(f"{where} cannot be written ({error}).") from error
    if other is not None:
        raise _taken(where, f"on {other.get('host')} (process {other.get('pid')})")
    ended = Event()
    renewing = Thread(target=note.renew_until, args=(ended,), name="hookattn lock", daemon=True)
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join()
        note.remove()


class _Note:
    """The object beside a store that says who writes to it."""

    def __init__(self, where: str) -> None:
        from fsspec.core import url_to_fs

        self.run = uuid.uuid4().hex
        self._files, path = url_to_fs(where)
        self._path = f"{path.rstrip('/')}.lock"

    def take(self) -> dict[str, Any] | None:
        """Note that it is us, unless somebody else writes: then what is noted of them."""
        if (other := self.read()) is not None and not _is_over(other):
            return other
        self.write()
        other = self.read() or {}
        return None if other.get("run") == self.run else other  # who wrote after us

    def read(self) -> dict[str, Any] | None:
        """What it says; None where there is none."""
        self._files.invalidate_cache()
        try:
            found = json.loads(self._files.cat_file(self._path))
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def write(self) -> None:
        """Say that it is us, now."""
        told = {"run": self.run, "host": socket.gethostname(), "pid": os.getpid(), "renewed": time.time()}
        self._files.pipe_file(self._path, json.dumps(told).encode())

    def renew_until(self, ended: Event) -> None:
        """Say so again and again."""
        while not ended.wait(_RENEWED):
            with suppress(Exception):  # the network may be back next time
                self.write()

    def remove(self) -> None:
        """Say that nobody writes."""
        with suppress(Exception):  # it is over by itself
            self._files.rm_file(self._path)


def _is_over(other: dict[str, Any]) -> bool:
    """Whether who was noted writes no longer: it was not renewed, or its process is gone from this machine."""
    if time.time() - float(other.get("renewed", 0)) > _LASTS:
        return True
    return other.get("host") == socket.gethostname() and not _runs(int(other.get("pid", 0)))


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
