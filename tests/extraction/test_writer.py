"""Writing beside the work: one at a time, all is written at the end, and the first error ends it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable

import pytest
from support.inside import Writer


def test_all_is_written_in_order_when_the_block_ends() -> None:
    written: list[int] = []
    with Writer(written.append) as writer:
        for number in range(20):
            writer.put(number)
    assert written == list(range(20))


def test_what_is_put_waits_until_the_one_before_is_written() -> None:
    may_write, stepped, put = threading.Semaphore(0), threading.Semaphore(0), list[int]()

    def produce() -> None:
        with Writer(lambda _: may_write.acquire()) as writer:
            for number in range(4):
                writer.put(number)
                put.append(number)
                stepped.release()

    producer = threading.Thread(target=produce)
    producer.start()
    for ahead in range(1, 5):
        assert stepped.acquire(timeout=30)
        assert not stepped.acquire(timeout=0.1)
        assert len(put) == ahead
        may_write.release()
    producer.join(timeout=30)
    assert not producer.is_alive()


def test_the_first_error_of_the_writer_is_raised_and_nothing_is_written_after_it() -> None:
    written: list[int] = []

    def write(number: int) -> None:
        if number == 2:
            raise OSError("the disk is full")
        written.append(number)

    with pytest.raises(OSError, match="the disk is full"):
        put_all(write, range(100))
    assert written == [0, 1]
    with pytest.raises(OSError, match="the disk is full"):
        put_all(write, [2])  # nothing is put after it


def put_all(write: Callable[[int], None], numbers: Iterable[int], error: Exception | None = None) -> None:
    with Writer(write) as writer:
        for number in numbers:
            writer.put(number)
        if error is not None:
            raise error


@pytest.mark.parametrize("ends", [False, True])
def test_who_stops_the_waiting_loses_nothing_that_was_put(ends: bool) -> None:
    """Where the second waits for the first, be it stopped again at the end, and where the end waits."""
    written, begun, may_write = list[int](), threading.Event(), threading.Event()

    def write(number: int) -> None:
        begun.set()
        assert may_write.wait(timeout=30)
        written.append(number)

    def stop() -> None:
        assert begun.wait(timeout=30)
        for _ in range(1 if ends else 2):
            time.sleep(0.2)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.2)
        may_write.set()

    stopper = threading.Thread(target=stop)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs the tests in the background
    stopper.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            put_all(write, [1] if ends else [1, 2])
        assert written == ([1] if ends else [1, 2])
    finally:
        stopper.join(timeout=30)
        signal.signal(signal.SIGINT, before)


def test_an_error_of_the_work_is_the_one_that_is_raised_and_what_was_done_is_written() -> None:
    written: list[int] = []
    with pytest.raises(KeyError):
        put_all(written.append, [1, 2], KeyError())
    assert written == [1, 2]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hookattn writer")]
