"""One run at a time writes to a store, and a run that was killed keeps nobody out."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.drawn import Drawn, small_vit
from support.inside import Note, hold_store

from hookattn.errors import StoreError

fcntl = pytest.importorskip("fcntl")
fsspec = pytest.importorskip("fsspec")
HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def other_process(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the store x.zarr."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / ".x.zarr.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        yield other
        other.kill()


def test_a_second_run_of_another_process_is_refused_until_that_is_killed(
    tmp_path: Path, other_process: subprocess.Popen[str]
) -> None:
    pytest.importorskip("zarr")
    from hookattn.extraction import extract

    with pytest.raises(StoreError, match=r"another run of another process writes to .*x\.zarr: let it end, or name another"):
        extract(small_vit(), Drawn(2), tmp_path / "x.zarr", "entropy")
    assert not (tmp_path / "x.zarr").exists()
    other_process.kill()
    other_process.wait()
    assert extract(small_vit(), Drawn(2), tmp_path / "x.zarr", "entropy").taken == 2
    assert [path.name for path in tmp_path.iterdir()] == ["x.zarr"]


def test_a_second_run_of_this_process_is_refused_by_any_name_of_the_store(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with hold_store(str(tmp_path / "x.zarr")):
        for name in (tmp_path / "x.zarr", tmp_path / "link" / "x.zarr"):
            with pytest.raises(StoreError, match="another run of this process"), hold_store(str(name)):
                pass
        with hold_store(str(tmp_path / "y.zarr")):
            pass
    with hold_store(str(tmp_path / "x.zarr")):
        pass
    with pytest.raises(KeyError), hold_store(str(tmp_path / "x.zarr")):
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_processes_that_were_forked_meanwhile_do_not_go_on_holding_it(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with hold_store(str(tmp_path / "x.zarr")):
        if not (child := os.fork()):
            os.read(reading, 1)
            os._exit(0)
    with hold_store(str(tmp_path / "x.zarr")):
        os.write(writing, b"x")
    os.waitpid(child, 0)


def note(**told: Any) -> None:
    fsspec.filesystem("memory").pipe("/bucket/x.zarr.lock", json.dumps({"run": "theirs", **told}).encode())


@pytest.mark.parametrize(
    ("told", "is_free"),
    [
        ({"host": "elsewhere", "pid": 7, "renewed": 5}, False),
        ({"host": "elsewhere", "pid": 7, "renewed": 90}, True),
        ({"host": socket.gethostname(), "pid": os.getpid(), "renewed": 5}, False),
        ({"host": socket.gethostname(), "pid": 2**22 + 1, "renewed": 5}, True),  # above what Linux gives
    ],
    ids=["renewed", "not renewed", "a process that runs", "a process that is gone"],
)
def test_at_an_address_who_writes_is_noted_beside_the_store(told: dict[str, Any], is_free: bool) -> None:
    files = fsspec.filesystem("memory")
    note(**{**told, "renewed": time.time() - told["renewed"]})
    if not is_free:
        who = rf"another run on {told['host']} \(process {told['pid']}\) writes to memory://"
        with pytest.raises(StoreError, match=who), hold_store("memory://bucket/x.zarr"):
            pass
        assert json.loads(files.cat("/bucket/x.zarr.lock"))["run"] == "theirs"
        files.rm("/bucket/x.zarr.lock")
        return
    with hold_store("memory://bucket/x.zarr"):
        assert json.loads(files.cat("/bucket/x.zarr.lock"))["pid"] == os.getpid()
        with pytest.raises(StoreError, match="another run of this process"), hold_store("memory://bucket/x.zarr"):
            pass
    assert not files.exists("/bucket/x.zarr.lock")


class Turns:
    """What says so many times that a run goes on, before it has ended."""

    def __init__(self, turns: int) -> None:
        self._left = iter(range(turns))

    def wait(self, _: float) -> bool:
        return next(self._left, None) is None


def test_what_is_noted_is_renewed_unless_another_run_has_taken_over() -> None:
    files, ours = fsspec.filesystem("memory"), Note("memory://bucket/x.zarr")
    assert ours.take() is None
    files.rm("/bucket/x.zarr.lock")
    ours.renew_until(Turns(2))
    assert json.loads(files.cat("/bucket/x.zarr.lock"))["run"] == ours.run
    note(host="elsewhere", renewed=time.time())
    ours.renew_until(Turns(2))
    assert json.loads(files.cat("/bucket/x.zarr.lock"))["run"] == "theirs"
    files.rm("/bucket/x.zarr.lock")


def test_a_store_that_knows_no_conditions_is_held_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    files = fsspec.filesystem("memory")
    whole = files.pipe_file

    def pipe_file(path: str, data: bytes, mode: str = "overwrite") -> None:
        if mode == "create":
            raise OSError("(NotImplemented) A header you provided implies functionality that is not implemented")
        whole(path, data)

    monkeypatch.setattr(type(files), "pipe_file", staticmethod(pipe_file))
    with hold_store("memory://bucket/x.zarr"):
        assert json.loads(files.cat("/bucket/x.zarr.lock"))["pid"] == os.getpid()
    note(host="elsewhere", renewed=time.time())
    with pytest.raises(StoreError, match="another run on elsewhere"), hold_store("memory://bucket/x.zarr"):
        pass
    files.pipe("/bucket/x.zarr.lock", b"nothing of ours")
    with hold_store("memory://bucket/x.zarr"):
        pass
    assert not files.exists("/bucket/x.zarr.lock")


def test_an_address_nobody_knows() -> None:
    with pytest.raises(StoreError, match=r"s9://x/y\.zarr cannot be written"), hold_store("s9://x/y.zarr"):
        pass
