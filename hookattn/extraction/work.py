"""What a worker does, wherever it runs: reads the images of blocks, runs the model, and gives back whole blocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Union

from torch import nn

from ..errors import HookattnError, listed
from .batches import Batch, answering_lost_workers, load_batches
from .data_sets import DataSet
from .inputs import Inputs
from .layout import BROKEN, TAKEN, Array, Block, Layout, Pending
from .quantities import Quantity
from .taking import Shapes, Taken, Taker

_Rows = Union[slice, list[int]]
"""Which images of a block."""


@dataclass(frozen=True)
class Task:
    """What is the same for all blocks of a run; it can be pickled if what is asked for can.

    Attributes:
        inputs: the images.
        quantities: what is taken of each.
        shapes: what the model gives.
        layout: how it is stored.
        batch_size: images in a forward.
        workers: processes that read images ahead, of each worker.
        strict: whether an image that cannot be read ends the run.
    """

    inputs: Inputs
    quantities: Sequence[Quantity]
    shapes: Shapes
    layout: Layout
    batch_size: int
    workers: int
    strict: bool


class Step(NamedTuple):
    """How far a batch has brought a run.

    Attributes:
        images: of the batch, broken ones too.
        broken: its images that could not be read, by name, with the reason.
        seconds: from the end of the batch before to the end of this one.
        waited: the part of them in which the model waited for images.
    """

    images: int
    broken: dict[str, str]
    seconds: float
    waited: float


def take_blocks(
    model: nn.Module, task: Task, pending: Pending, report: Callable[[Step], None] = lambda _: None
) -> Generator[Block, None, None]:
    """Take images, one block after the other; the model is recorded until the generator ends or is closed.

    Where something raises, such as somebody who stops the run, what was taken before comes as a block of its own first.

    Args:
        model: in eval mode, where it is to run.
        task: what is taken.
        pending: of which images.
        report: is told of each batch.

    Raises:
        HookattnError: an image cannot be read and the task is strict, the model does not take an image, or something cannot be
            taken of it.
    """
    # the first image that cannot be read is to be the first of all; and somebody's data set is asked as a loader asks it
    in_order = task.strict or isinstance(task.inputs, DataSet)
    batches = load_batches(task.inputs, pending, task.batch_size, task.workers, pin=_is_on_gpu(model), in_order=in_order)
    before = time.perf_counter()
    known = task.shapes.layers
    modules = [name for name in known if name.rpartition("#")[0] not in known]  # name#1 is the second call of one
    taken: Block | None = None
    try:
        with answering_lost_workers(), Taker(model, modules, task.quantities) as taker:
            for begun in _one_behind(_begin(taker, task, batches)):
                taken = begun.block
                _finish(begun, task)
                ended = time.perf_counter()
                count = len(begun.batch.facts) + len(begun.batch.broken)
                broken = {task.inputs.names[number]: why for number, why in begun.batch.broken.items()}
                report(Step(count, broken, ended - before, begun.waited))
                before = ended
                if begun.batch.is_last:
                    whole, taken = taken, None
                    yield whole
    except BaseException:
        if taken is not None:  # so not where nobody asks for more, which is so between two blocks
            yield taken
        raise


class _Begun(NamedTuple):
    """A batch of which all is under way that is taken; on a GPU it may still run.

    Attributes:
        block: where it goes.
        taken: of each of its groups: which images of the block, where values of theirs are, and what is on its way there.
        waited: seconds the model has waited for it.
    """

    batch: Batch
    block: Block
    taken: list[tuple[_Rows, dict[str, Array], Taken]]
    waited: float

    @property
    def has_ended(self) -> bool:
        """Whether all has been taken."""
        return all(taken.copies.are_made for _, _, taken in self.taken)


def _begin(taker: Taker, task: Task, batches: Iterable[Batch]) -> Iterator[_Begun]:
    """Run the model on batches, one after the other."""
    last: _Begun | None = None
    asked = time.perf_counter()
    for batch in batches:
        # while it runs on the batch before, it waits for nothing
        waited = time.perf_counter() - asked if last is None or last.has_ended else 0.0
        if batch.broken and task.strict:
            number, why = next(iter(batch.broken.items()))
            raise unreadable(task.inputs.names[number], why)
        if last is None or last.batch.is_last:
            block = Block.empty(batch.block, *task.layout.range_of(batch.block), task.layout.specs)
        taken = []
        for numbers, images in batch.groups:
            rows = _rows_of([number - block.start for number in numbers])
            out = {name: values[rows] for name, values in block.values.items()}
            with _naming([task.inputs.names[number] for number in numbers]):
                taken.append((rows, out, taker.take(images, task.shapes, out)))
        last = _Begun(batch, block, taken, waited)
        yield last
        asked = time.perf_counter()


@contextmanager
def _naming(names: list[str]) -> Iterator[None]:
    """Say in what is raised about images which they are."""
    try:
        yield
    except HookattnError as error:
        raise type(error)(f"{error} Shown were: {listed(names)}.") from error


def _one_behind(batches: Iterable[_Begun]) -> Iterator[_Begun]:
    """Batches that have ended at once, each other when the next has been begun: so no GPU waits for this process."""
    last: _Begun | None = None
    try:
        for each in batches:
            if last is not None:
                yield last
            last = each
            if each.has_ended:
                last = None
                yield each
    except (Exception, KeyboardInterrupt):  # of the next: what is there is not lost
        if last is not None:
            yield last
        raise
    if last is not None:
        yield last


def unreadable(name: str, why: str) -> HookattnError:
    """What ends a run that is strict."""
    return HookattnError(f"{name} cannot be read ({why.rstrip('.')}). Without strict it is left out, and counted at the end.")


def _rows_of(numbers: list[int]) -> _Rows:
    """Numbers as a slice, whose values are not copied, where they follow one another."""
    follow = numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    return slice(numbers[0], numbers[0] + len(numbers)) if follow else numbers


def _finish(begun: _Begun, task: Task) -> None:
    """Wait for what is taken of a batch, and put what is known of its images into their block."""
    batch, block = begun.batch, begun.block
    for number, (label, sha256) in batch.facts.items():
        block.label[number - block.start], block.sha256[number - block.start] = label, sha256
    for number, why in batch.broken.items():
        block.error[number - block.start], block.label[number - block.start] = why, task.inputs.label_of(number)
        block.status[number - block.start] = BROKEN  # last, as below: somebody may stop the run at any line
    for rows, out, taken in begun.taken:
        taken.copies.finish()
        if not isinstance(rows, slice):
            for name, values in out.items():
                block.values[name][rows] = values
        block.grid[rows] = taken.grid
        block.status[rows] = TAKEN


def _is_on_gpu(model: nn.Module) -> bool:
    return any(p.device.type == "cuda" for p in model.parameters())
