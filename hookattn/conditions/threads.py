"""Where code runs: in which thread, and in which asyncio task if there is one."""

from __future__ import annotations

import asyncio
import threading
import weakref


class Here:
    """Remembers the thread and the asyncio task it is made in, and tells later whether what runs runs there.

    A task that is over binds nothing any more: what was opened in it goes on in its thread.
    """

    # Weak references: a recorder that is kept must keep neither a thread nor a task, and what that holds, alive.

    def __init__(self) -> None:
        self._mark = threading.local()  # asked at every recorded call, which finds the thread object by several
        self._mark.here = True
        thread = threading.current_thread()
        self._thread, self._name = weakref.ref(thread), thread.name
        task = _task()
        self._task = None if task is None else weakref.ref(task)
        self._task_name = "" if task is None else task.get_name()

    def __call__(self) -> bool:
        """Whether what runs now runs in that thread and that task."""
        # A thread that Python did not start forgets what it has marked. The object, not its number, which is used again.
        if not hasattr(self._mark, "here") and threading.current_thread() is not self._thread():
            return False
        if self._task is None:
            return True
        task = self._task()
        return task is None or task.done() or task is _task()

    def __str__(self) -> str:
        return f"thread {self._name!r}" + (f", task {self._task_name!r}" if self._task_name else "")


def _task() -> asyncio.Task[object] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no event loop runs in this thread
        return None
