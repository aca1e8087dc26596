"""Blocks are written by a thread of their own, while the model runs on; one at a time, and its first error ends the run."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Writer(Generic[T]):
    """Writes what it is given in another thread, while the next is made.

        with Writer(store.write) as writer:
            for block in blocks:
                writer.put(block)        # waits until the one before is written

    So there are two at a time: one that is written, and one that is made. When the block of code ends all has been written.
    What `write` raises is raised by the next `put`, or at the end, and nothing is written after it.
    """

    def __init__(self, write: Callable[[T], object]) -> None:
        self._write = write
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hookattn writer")
        self._last: Future[Any] | None = None

    def __enter__(self) -> Writer[T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._thread.shutdown()
        if error is None:
            self._wait()

    def put(self, block: T) -> None:
        """Have it written, as soon as the one before is."""
        self._wait()
        self._last = self._thread.submit(self._write, block)

    def _wait(self) -> None:
        if self._last is not None:
            self._last.result()
