"""What actors on the nodes of a cluster are sent by tests."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from support.inside import Worker


def wait_for(happened: Callable[[], bool]) -> None:
    """Wait until something has happened, or fail when it has not for long."""
    deadline = time.monotonic() + 120
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError("what the test waits for does not happen")
        time.sleep(0.02)


@dataclass
class Stuck:
    """Account of images that are read: two nodes take part, and one of them is stuck in its second block until it is killed.

    Attributes:
        folder: in which there is a file for each image read.
        node: that is to be killed.
        block: images in one.
    """

    folder: Path
    node: str
    block: int

    def __call__(self, index: int) -> None:
        import ray

        if not ray.is_initialized():  # the first image, as it is looked at to plan the run
            return
        here = ray.get_runtime_context().get_node_id()
        self.folder.joinpath(f"{here}-{index:03d}-{time.time_ns()}").touch()
        wait_for(lambda: len({node for node, _ in self.read()}) > 1)
        if here == self.node and len(self.stuck()) > self.block:
            wait_for(lambda: False)

    def read(self) -> list[tuple[str, int]]:
        """Nodes and images, the first first."""
        names = [path.name.split("-") for path in self.folder.iterdir()]
        return [(node, int(index)) for node, index, _ in sorted(names, key=lambda name: int(name[2]))]

    def stuck(self) -> list[int]:
        """What was read on the node that is to be killed."""
        return [index for node, index in self.read() if node == self.node]


@dataclass
class KillElsewhere:
    """Account of images that are read: the one of this number ends the process that reads it, but this one.

    Attributes:
        folder: in which there is a file for each image read in another process.
        index: of the image.
    """

    folder: Path
    index: int
    here: int = os.getpid()

    def __call__(self, index: int) -> None:
        if os.getpid() != self.here:
            self.folder.joinpath(f"{index} {time.time_ns()}").touch()
            if index == self.index and self.read().count(index) < 6:  # which is more often than it is to be tried
                os.kill(os.getpid(), signal.SIGKILL)

    def read(self) -> list[int]:
        """Images that other processes have read."""
        return sorted(int(path.name.split()[0]) for path in self.folder.iterdir())


@dataclass
class FailElsewhere:
    """A quantity of all layers that can be had in this process, and raises in others."""

    error: type[Exception]
    here: int = os.getpid()

    def __call__(self, maps: Any) -> Tensor:
        if os.getpid() != self.here:
            raise self.error("not of these maps")
        return next(iter(maps.values()))[:, :, 0, 0]


class LostTwice(Worker):
    """An actor that cannot be made twice in each run.

    Args:
        order, run, tries: as of others.
    """

    def __init__(self, order: Any, run: str, tries: int) -> None:
        path = Path(tempfile.gettempdir(), f"lost {run}")
        with path.open("ab") as file:
            file.write(b"x")
        if path.stat().st_size < 3:
            raise RuntimeError("lost")
        path.unlink()
        super().__init__(order, run, tries)
