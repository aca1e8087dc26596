"""What a worker does, wherever it runs: reads the images of blocks, runs the model, and gives back whole blocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from ..errors import HookattnError
from .batches import Batch, answering_lost_workers, load_batches
from .inputs import DataSet, Inputs
from .layout import BROKEN, TAKEN, Block, Layout
from .quantities import Quantity
from .taking import Shapes, Taker


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
    model: nn.Module, task: Task, numbers: Iterable[int], report: Callable[[Step], None] = lambda _: None
) -> Iterator[Block]:
    """Take the blocks of these numbers, one after the other.

    Args:
        model: in eval mode, where it is to run.
        task: what is taken.
        numbers: of blocks.
        report: is told of each batch.

    Raises:
        HookattnError: an image cannot be read and the task is strict, the model does not take an image, or something cannot be
            taken of it.
    """
    taker, names = Taker(model, list(task.shapes.layers), task.quantities), task.inputs.names
    blocks = {number: task.layout.range_of(number) for number in numbers}
    # the first image that cannot be read is to be the first of all; and somebody's data set is asked as a loader asks it
    in_order = task.strict or isinstance(task.inputs, DataSet)
    batches = load_batches(task.inputs, blocks, task.batch_size, task.workers, pin=_is_on_gpu(model), in_order=in_order)
    block: Block | None = None
    before = time.perf_counter()
    with answering_lost_workers():
        for batch in batches:
            begun = time.perf_counter()
            broken = {names[number]: why for number, why in batch.broken.items()}
            if broken and task.strict:
                raise unreadable(*next(iter(broken.items())))
            if block is None:
                block = Block.empty(batch.block, *blocks[batch.block], task.layout.specs)
            _take_batch(taker, task, batch, block)
            ended = time.perf_counter()
            count = sum(len(numbers) for numbers, _ in batch.groups) + len(broken)
            report(Step(count, broken, ended - before, begun - before))
            before = ended
            if batch.is_last:
                yield block
                block = None


def unreadable(name: str, why: str) -> HookattnError:
    """What ends a run that is strict."""
    return HookattnError(f"{name} cannot be read ({why.rstrip('.')}). Without strict it is left out, and counted at the end.")


def _take_batch(taker: Taker, task: Task, batch: Batch, block: Block) -> None:
    """Put what is taken of a batch into its block."""
    for numbers, images in batch.groups:
        rows = [number - block.start for number in numbers]
        taken = taker.take(images, task.shapes)
        for name, values in taken.values.items():
            block.values[name][rows] = values
        block.grid[rows], block.status[rows] = taken.grid, TAKEN
    for number, (label, sha256) in batch.facts.items():
        block.label[number - block.start], block.sha256[number - block.start] = label, sha256
    for number, why in batch.broken.items():
        block.error[number - block.start], block.status[number - block.start] = why, BROKEN
        block.label[number - block.start] = task.inputs.label_of(number)


def _is_on_gpu(model: nn.Module) -> bool:
    return any(p.device.type == "cuda" for p in model.parameters())
