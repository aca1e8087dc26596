"""Processes of one run, as `torchrun` starts them: the first makes the store, and each takes its share of the blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from .sent_errors import make_sendable

T = TypeVar("T")
_LASTS = timedelta(days=365)  # the fastest waits for the slowest; a process that dies is noticed at once


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is.

    Attributes:
        rank: its number.
        count: how many there are.
        group: through which they tell each other what came of their work.
    """

    rank: int = 0
    count: int = 1
    group: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this is the process that makes the store."""
        return self.rank == 0

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, in all of them; what it raises, raised in all."""
        told: list[Any] = [self.together(make if self.is_first else lambda: None)]
        if self.count > 1:
            dist.broadcast_object_list(told, src=0, group=self.group)
        made: T = told[0]
        return made

    def together(self, do: Callable[[], T]) -> T:
        """Do something in all processes, and wait until all have done it; what one raises, raised in all.

        So nothing that one of them raises leaves the others waiting for it: they end what they are at, and raise it too.
        """
        if self.count == 1:
            return do()
        try:
            done, error = do(), None
        except Exception as raised:
            error = raised
        told: list[Exception | None] = [None] * self.count
        dist.all_gather_object(told, error and make_sendable(error), group=self.group)
        if first := error or next((each for each in told if each is not None), None):
            raise first
        return done


@contextmanager
def meet_ranks() -> Iterator[Ranks]:
    """The processes of the process group for as long as the block lasts; one of one where none is initialised."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        yield Ranks()
        return
    # a group of its own: that of a training sends through GPUs, and gives up after minutes
    group = dist.new_group(backend="gloo", timeout=_LASTS)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), group)
    finally:
        dist.destroy_process_group(group)
