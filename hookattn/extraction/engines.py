"""Who does the work: this process, a thread of which writes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import NamedTuple

from torch import nn

from .layout import Pending
from .store import Store
from .work import Step, Task, take_blocks
from .writer import Writer


class Job(NamedTuple):
    """What is to be done, in a store that is there.

    Attributes:
        model: in eval mode, where it is to run.
        task: what is taken of images, and how.
        store: where blocks go.
        pending: images that are to be taken; taking some twice does no harm.
        report: is told of each batch.
    """

    model: nn.Module
    task: Task
    store: Store
    pending: Pending
    report: Callable[[Step], None]


Engine = Callable[[Job], None]
"""Does a job, or raises."""


def run_here(job: Job) -> None:
    """Do a job in this process: images are read ahead, and blocks are written while the next is taken."""
    # closed, so that nothing is left on the model where the writer fails, whoever holds its error
    with (
        Writer(partial(job.store.write, specs=job.task.layout.specs)) as writer,
        closing(take_blocks(job.model, job.task, job.pending, job.report)) as blocks,
    ):
        for block in blocks:
            writer.put(block)
