"""Blocks are written by a thread of their own, while the model runs on; one at a time, and its first error ends the run."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Writer(Generic[T]):
    """Writes what it is given in another thread, while the next is made.

        with Writer(store.write) as writer:
            for block in blocks:
                writer.put(block)        # waits until the one before is written

    So there are two at a time: one that is written, and one that is made. When the block of code ends all has been written,
    also where somebody stops the waiting, as with Ctrl-C. What `write` raises is raised by the next `put`, or at the end, and
    nothing is written after it.
    """

    def __init__(self, write: Callable[[T], object]) -> None:
        self._write = write
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hookattn writer")
        self._last: Future[Any] | None = None

    def __enter__(self) -> Writer[T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        last = [] if self._last is None else [self._last]
        # not for the thread, which counts as ended once somebody has stopped the waiting for it, up to Python 3.12
        try:
            wait(last)
        finally:
            wait(last)  # stopped by somebody: what is under way is waited for all the same
            self._thread.shutdown()
        if error is None:
            for each in last:
                each.result()

    def put(self, block: T) -> None:
        """Have it written, as soon as the one before is."""
        before, self._last = self._last, self._thread.submit(self._write_after, self._last, block)
        if before is not None:
            before.result()

    def _write_after(self, before: Future[Any] | None, block: T) -> None:
        if before is not None:
            before.result()  # whose error is that of all after it
        self._write(block)
