"""Blocks are written by a thread of their own, while the model runs on; few wait, and its first error ends the run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from queue import Full, Queue
from threading import Thread
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")
_WAITING = 1  # blocks that are done and wait for the one that is written


class Writer(Generic[T]):
    """Writes what it is given in another thread, one after the other.

        with Writer(store.write) as writer:
            for block in blocks:
                writer.put(block)        # waits where the one before last is not written yet

    When the block ends all that was put has been written. What `write` raises is raised by the next `put`, or at the end, and
    nothing is written after it.
    """

    def __init__(self, write: Callable[[T], object]) -> None:
        self._write = write
        self._queue: Queue[T | None] = Queue(_WAITING)
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, name="hookattn writer", daemon=True)

    def __enter__(self) -> Writer[T]:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._hand_over(None)
        self._thread.join()
        if error is None:
            self._check()

    def put(self, block: T) -> None:
        """Give it a block, and wait until there is room for one."""
        self._check()
        self._hand_over(block)
        self._check()

    def _hand_over(self, block: T | None) -> None:
        while self._thread.is_alive():
            with suppress(Full):  # the writer may have ended meanwhile
                self._queue.put(block, timeout=0.5)
                return

    def _run(self) -> None:
        try:
            while (block := self._queue.get()) is not None:
                self._write(block)
        except BaseException as error:
            self._error = error

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
