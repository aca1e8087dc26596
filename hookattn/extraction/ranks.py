"""Processes of one run, as `torchrun` starts them: the first makes the store, and each takes its share of the blocks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is."""

    rank: int = 0
    count: int = 1

    @classmethod
    def here(cls) -> Ranks:
        """As the process group tells; one of one where none is initialised."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_first(self) -> bool:
        """Whether this is the process that makes the store."""
        return self.rank == 0

    def if_first(self, held: Callable[[], AbstractContextManager[object]]) -> AbstractContextManager[object]:
        """A block that the first process is in; the others are in none."""
        return held() if self.is_first else nullcontext()

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, in all of them; what it raises, raised in all."""
        if self.count == 1:
            return make()
        told: list[object] = [None, None]
        if self.is_first:
            try:
                told[0] = make()
            except Exception as error:
                told[1] = error
        dist.broadcast_object_list(told)
        if isinstance(told[1], Exception):
            raise told[1]
        return told[0]  # type: ignore[return-value]

    def wait(self) -> None:
        """Wait for all processes."""
        if self.count > 1:
            dist.barrier()
