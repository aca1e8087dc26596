"""Batches of images, read ahead by worker processes: none reaches over two blocks, and a broken image ends nothing."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import HookattnError
from .data_sets import Input
from .inputs import Inputs, explain
from .layout import Pending

T = TypeVar("T")


class Batch(NamedTuple):
    """Some images of one block.

    Attributes:
        block: its number.
        is_last: whether no more images of the block follow.
        groups: images of one size each: their numbers in the data set, and (images, channels, height, width).
        facts: label and hash of the images, by number.
        broken: images that could not be read, by number, with the reason.
    """

    block: int
    is_last: bool
    groups: list[tuple[list[int], Tensor]]
    facts: dict[int, tuple[str, str]]
    broken: dict[int, str]


def load_batches(
    inputs: Inputs, pending: Pending, size: int, workers: int, *, pin: bool, in_order: bool = False
) -> Iterator[Batch]:
    """Read the images of blocks, one block after the other, in batches of a size.

    Of a block, each worker reads batches that follow one another: so it need not read groups of rows of a table, or parts of a
    file, that others read, too.

    Args:
        inputs: the images.
        pending: which of them.
        size: how many a batch has, or fewer at the end of a block.
        workers: processes that read ahead; 0 to read when a batch is asked for.
        pin: whether to lay them where a GPU copies from.
        in_order: whether batches come in the order of the images, and workers take them in turn.
    """
    runs = 1 if in_order else max(1, workers)
    plan = [each for block, numbers in pending.items() for each in _plan_block(block, numbers, size, runs)]
    # a generator of its own: with none the loader draws from the global one, which is the user's
    generator = torch.Generator("cpu")
    loader = DataLoader(
        _Batches(inputs, plan),
        batch_size=None,
        num_workers=workers,
        pin_memory=pin,
        generator=generator,
        worker_init_fn=_leave_stopping_to_parent,
    )
    yield from loader


def _plan_block(block: int, numbers: Sequence[int], size: int, runs: int) -> list[tuple[int, list[int], bool]]:
    batches = _deal([[*numbers[first : first + size]] for first in range(0, len(numbers), size)], runs)
    return [(block, batch, place == len(batches)) for place, batch in enumerate(batches, 1)]


def _deal(batches: list[T], runs: int) -> list[T]:
    """Cut batches into runs of one length, or one more, and take one of each run in turn, as a loader hands out to workers."""
    length, longer = divmod(len(batches), runs)
    starts = [run * length + min(run, longer) for run in range(runs)]
    return [batches[starts[place % runs] + place // runs] for place in range(len(batches))]


@contextmanager
def answering_lost_workers() -> Iterator[None]:
    """Turn the end of a worker process, which is told wherever this process is, into an error that says what to do."""
    try:
        yield
    except (RuntimeError, HookattnError) as error:  # the latter where a map was being computed
        if (found := re.search(r"DataLoader worker[^\n.]*", str(error))) is None:
            raise
        raise HookattnError(
            f"a process that reads images is gone ({found[0]}), most often for want of memory: the same again goes on, with "
            "fewer workers."
        ) from error


def _leave_stopping_to_parent(_: int) -> None:
    # terminals and batch systems send them to all processes, and workers that end by themselves are waited for, and told of
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # not for good: a loader ends like this whom it has waited for in vain
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))


class _Batches(Dataset[Batch]):
    """Batches by number."""

    def __init__(self, inputs: Inputs, plan: Sequence[tuple[int, list[int], bool]]) -> None:
        self._inputs, self._plan = inputs, plan

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, place: int) -> Batch:
        block, numbers, is_last = self._plan[place]
        loaded, broken = dict[int, Input](), dict[int, str]()
        for number in numbers:
            try:
                loaded[number] = self._inputs.load(number)
            except Exception as error:  # of a file, of its decoder, or of somebody's data set
                broken[number] = explain(error)
        sizes: dict[Any, list[int]] = {}
        for number, each in loaded.items():
            sizes.setdefault(each.tensor.shape, []).append(number)
        groups = [(same, torch.stack([loaded[number].tensor for number in same])) for same in sizes.values()]
        facts = {number: (each.label, each.sha256) for number, each in loaded.items()}
        return Batch(block, is_last, groups, facts, broken)
