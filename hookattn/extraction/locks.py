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
from .clients import advise, describe_missing, is_address, is_whole_bucket, reason_of

_HELD: set[str] = set()
"""Stores that runs of this process write to: of itself a process gets a lock of a file again."""
_ENDED: set[str] = set()
"""Runs of this process that have ended: what one noted is still there where its store could not be reached at its end."""
_RENEWED, _LASTS = 15.0, 60.0  # seconds: how often what is noted at an address is renewed, and how long it counts


@contextmanager
def hold_store(where: str) -> Iterator[None]:
    """Hold a store for as long as the block lasts.

    Of a folder the system lets go where the process is killed. At an address (s3://) who writes is noted in an object beside
    the store, renewed while it lasts, and counts for a minute after the last time. Two runs that begin together are told apart
    there, but not two that go on in the same second where a third was killed.

    Raises:
        StoreError: another run holds it, or it cannot be written.
        MissingExtraError: the client of an address is not installed.
    """
    if is_whole_bucket(where):
        raise StoreError(f"{where} is a whole bucket: name a store in it, {where.rstrip('/')}/NAME.zarr.")
    key = where.rstrip("/") if is_address(where) else os.path.realpath(where)
    if key in _HELD:
        raise _taken(where, "of this process")
    _HELD.add(key)
    try:
        with _hold_address(where) if is_address(where) else _hold_folder(where):
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
        raise MissingExtraError(f"{where} cannot be written: {describe_missing(error, where)}") from error
    except Exception as error:  # whatever fsspec and a store's client raise
        raise StoreError(f"{where} cannot be written: {reason_of(error)} {advise(where, error)}".rstrip()) from error
    if other is not None:
        taken = _taken(where, f"on {other.get('host')} (process {other.get('pid')})")
        raise StoreError(f"{taken} Where that was killed, the same again goes on a minute later.")
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
        other = self.read()
        if other is not None and not _is_over(other):
            return other
        self.write(is_first=other is None)
        other = self.read() or {}
        return None if other.get("run") == self.run else other  # who wrote before or after us

    def read(self) -> dict[str, Any] | None:
        """What it says; None where there is none."""
        try:
            found = json.loads(self._files.cat_file(self._path))
        except FileNotFoundError:
            return None
        except ValueError:  # nothing that a run has written
            return {}
        return found if isinstance(found, dict) else {}

    def write(self, *, is_first: bool = False) -> None:
        """Say that it is us, now; where we are to be the first, only if nobody has said so meanwhile."""
        told = {"run": self.run, "host": socket.gethostname(), "pid": os.getpid(), "renewed": time.time()}
        data = json.dumps(told).encode()
        try:
            self._files.pipe_file(self._path, data, mode="create" if is_first else "overwrite")
        except FileExistsError:
            pass
        except Exception as error:
            # which stores that are like S3 answer to a condition that they do not know
            if not is_first or "NotImplemented" not in repr(error.__cause__ or error):
                raise
            self._files.pipe_file(self._path, data)

    def renew_until(self, ended: Event) -> None:
        """Say so again and again."""
        while not ended.wait(_RENEWED):
            with suppress(Exception):  # the network may be back next time
                if self._is_ours():
                    self.write()

    def remove(self) -> None:
        """Say that nobody writes."""
        _ENDED.add(self.run)
        with suppress(Exception):  # it is over by itself
            if self._is_ours():
                self._files.rm_file(self._path)

    def _is_ours(self) -> bool:
        """Whether nobody else has taken over, as where we could not say for long that we are there."""
        return (self.read() or {}).get("run") in (None, self.run)


def _is_over(other: dict[str, Any]) -> bool:
    """Whether who was noted writes no longer: it has ended, it was not renewed, or its process is gone from this machine."""
    if other.get("run") in _ENDED or time.time() - float(other.get("renewed", 0)) > _LASTS:
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
