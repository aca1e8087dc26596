"""Ray itself: connected to quietly and left again, and what its failures mean for a run."""

from __future__ import annotations

import logging
import signal
import tempfile
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import HookattnError, MissingExtraError


def import_ray() -> Any:
    """The module `ray`, imported when the first job is done on a cluster."""
    try:
        import ray.data
    except ImportError as error:
        raise MissingExtraError('work on a cluster needs Ray: pip install "hookattn[ray]".') from error
    return ray


def wait_for_threads(others: Collection[threading.Thread] = ()) -> None:
    """Wait for threads of Ray Data that schedule and read, which it leaves to themselves, and which would start another Ray.

    Args:
        others: those that were there before, of whatever else runs in this process.
    """
    end = time.monotonic() + 60
    for thread in set(threading.enumerate()).difference(others, [threading.current_thread()]):
        run = getattr(thread, "_target", None) or type(thread).run
        # what fetches ahead sleeps for good where a run has failed
        if (getattr(run, "__module__", None) or "").startswith(_THREADS) and thread.name != "Prefetcher":
            thread.join(max(0.0, end - time.monotonic()))


_THREADS = tuple(f"ray.data._internal.{each}" for each in ("execution.streaming_executor", "block_batching", "util"))
"""Where those threads come from."""


@contextmanager
def replacing_actors() -> Iterator[None]:
    """Have actors replaced that Ray loses before they begin, three in a row, where it can and nobody has said otherwise."""
    context = import_ray().data.DataContext.get_current()
    own = getattr(context, _LOST, None) != 0
    with _set(context, **({} if own else {_LOST: 3})):
        yield


_LOST = "max_consecutive_actor_init_deaths"


@contextmanager
def answering_ray() -> Iterator[None]:
    """Say what a failure of Ray itself means for the run."""
    from ray.data import exceptions
    from ray.exceptions import RayError

    try:
        yield
    except (RayError, getattr(exceptions, "ExecutionTimeoutError", RayError)) as error:  # the latter since 2.5x
        raise HookattnError(
            f"Ray has given up ({type(error).__name__}: {str(error).strip()}). What is in the store is whole: the same again "
            "goes on from there."
        ) from error


@contextmanager
def counting_tries(name: str) -> Iterator[int]:
    """How often something of this name was begun on this machine, by processes that ended before it did, and with this time."""
    path = Path(tempfile.gettempdir(), name)
    with path.open("ab") as file:
        file.write(b"x")
    try:
        yield path.stat().st_size
    finally:
        path.unlink()


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Have Ray for as long as the block lasts: as it is, or quietly."""
    ray = import_ray()
    if ray.is_initialized():
        yield
        return
    with _quiet():
        try:
            with _leaving_sigterm():
                ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise HookattnError(f"there is no Ray at {address!r} ({error}): `ray start --head` begins a cluster.") from error
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _leaving_sigterm() -> Iterator[None]:
    """Have SIGTERM answered as before: Ray, when it begins, has it end this process with a traceback of C++."""
    mine = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    yield
    if mine and before is not None:  # None: not put on by Python
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Let Ray print no progress and no warnings, of which it has many; its files of logs have all."""
    ray = import_ray()
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        # what nodes tell of each other is printed where this says so, whatever ray.init was told
        printing = _set(ray._private.worker, _worker_logs_enabled=False)
        bars = _set(ray.data.DataContext.get_current(), enable_progress_bars=False, print_on_execution_start=False)
        with printing, bars:
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _set(target: Any, **values: Any) -> Iterator[None]:
    """Give attributes other values for as long as the block lasts."""
    before = {name: getattr(target, name, None) for name in values}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)
