"""Extract attention from a data set into a store, or go on where a run stopped."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from torch import nn

from ..errors import ModelError, StoreError
from ..image.preprocessing import Crop
from ..image.tokens import Size
from ..recording.selection import Layers
from .data_sets import DataSet, Input
from .engines import Engine, Job, run_here
from .inputs import Opened, Source, check_how_shown, describe_source, find_inputs, list_paths, open_source
from .layout import BROKEN, TAKEN, Pending
from .locks import hold_store
from .manifest import check_same_run, list_versions
from .plan import Reading, check_numbers, describe, find_coordinates, find_readable, find_reading, plan_run
from .quantities import Quantity, What, find_quantities
from .ranks import Ranks, meet_ranks
from .store import Facts, Store, import_zarr
from .work import Step, Task


class Progress(NamedTuple):
    """How far a run is, after a batch; under `torchrun`, how far this process is.

    Attributes:
        done: images that are done with, those of runs before this one too.
        images: how many that will be in the end: all, but for the shares of other processes.
        broken: images of the batch that could not be read, by name, with the reason.
        seconds: since the first batch was asked for.
        waited: the part of them in which the model waited for images.
        process, processes: the number of this process, from 0 on, and how many share the work.
    """

    done: int
    images: int
    broken: Mapping[str, str]
    seconds: float
    waited: float
    process: int = 0
    processes: int = 1


Report = Callable[[Progress], None]


class Summary(NamedTuple):
    """What came of a run.

    Attributes:
        images: in the data set.
        taken: of which there is something in the store, from runs before this one too.
        broken: that could not be read; the store's `error` says why, and the same again with `retry=True` tries once more.
        resumed: images that runs before this one had done with.
        seconds: this run took, from its first batch on.
        waited: the share of them in which the model waited for images, between 0 and 1.
    """

    images: int
    taken: int
    broken: int
    resumed: int
    seconds: float
    waited: float

    @property
    def images_per_second(self) -> float:
        """Of this run."""
        return (self.images - self.resumed) / self.seconds if self.seconds else 0.0


def extract(
    model: nn.Module | Callable[[], nn.Module],
    source: Source,
    out: str | os.PathLike[str],
    what: str | Quantity | Iterable[What] = "cls,entropy,distance",
    *,
    layers: Layers = None,
    size: Size | int | None = None,
    crop: Crop | None = "center",
    dtype: str = "float16",
    batch_size: int | None = None,
    workers: int | None = None,
    block: int | None = None,
    strict: bool = False,
    retry: bool = False,
    preprocessing: Mapping[str, Any] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    name: str | None = None,
    engine: Engine = run_here,
    report: Report = lambda _: None,
) -> Summary:
    """Run a model over a data set, and write what is asked of its attention into a Zarr store; or go on where a run stopped.

        model = timm.create_model("vit_small_patch16_224", pretrained=True).eval()
        extract(model, "photos/", "run.zarr", what="cls,entropy,distance")
        xarray.open_zarr("run.zarr").entropy.mean("image")        # (layer, head)

    The store has an array for each quantity, (image, layer, head, ...), with names of images and layers as coordinates; see
    `hookattn.extraction.open` for maps of it. Images are written a block at a time, or a part of one where something raises
    (a KeyboardInterrupt, an image): what was taken before is written first. A run is gone on with by the same call. Where it
    was killed, or the disk was full, that repeats what was not written: the block in work, and the one on its way to the disk.
    What a store was begun with is noted in it, and what does not agree is refused.

    Under `torchrun`, with a process group that is initialised, each process takes its share of the blocks.

    Args:
        model: in eval mode, on the device it is to run on; or what loads it, which is called when all else has been looked at.
        source: a folder, a list, an archive, a table or a data set of photos, see `open_images`; or an array, a column, a
            generator or a set of paths (sorted); or a data set of torch, or a `DataLoader`, of which data set, batch size and
            workers are taken. Images are stored in the order of the data set.
        out: a folder, by habit NAME.zarr, or an address that fsspec knows ("s3://bucket/run.zarr", "gs://...").
        what: names from `QUANTITIES`, with commas between them or in a list, in which a `Quantity` of one's own may be.
        layers: as for `AttentionRecorder`.
        size, crop: of photos, as in `Photo.open`. With crop="none" images have grids of their own: arrays are as long as the
            longest can be, NaN beyond the tokens of an image, `grid_rows` and `grid_cols` tell how many it has; its patches
            follow the prefix tokens row by row.
        dtype: of what grows with the number of tokens: "float16", "float32", or "uint8" for shares of the largest of each row,
            which is in `NAME_max`: the value is NAME / 255 * NAME_max. Figures of heads are float32.
        batch_size: images in a forward; 32 if not given.
        workers: processes that read images ahead; none if not given.
        block: images that are written together; None for up to 1,024, in at most 128 MB.
        strict: end the run at the first image that cannot be read; else it is left NaN, and `error` of the store says why.
        retry: read images again that could not be read; what is there of the others stays as it is.
        preprocessing: how the model wants photos, where it does not tell: a data config as timm resolves it.
        image_column, label_column: of a table.
        name: of the model, for the store; None for that of its architecture.
        engine: who does the work: `run_here`, or `RayEngine(...)`.
        report: is told how far the run is after each batch.

    Returns:
        What came of it, over all runs on this store.

    Raises:
        StoreError: the store is another run's, in use, or cannot be written.
        HookattnError: there are no images that can be read, or something is asked for that the model does not have.
        ModelError: it is no model, or in training mode.
        MissingExtraError: zarr is not installed.
    """

    def look() -> tuple[Source, Opened, Reading, Sequence[Quantity], Input | None]:
        import_zarr()
        quantities, (images, reading) = find_quantities(what), find_reading(source, batch_size, workers, strict)
        check_numbers(dtype, block, reading)
        opened = open_source(images := list_paths(images), image_column, label_column)
        check_how_shown(opened, size, crop, preprocessing)
        # what a data set makes of an image asks no model, and may be no image at all
        first = find_readable(opened, strict=reading.strict) if isinstance(opened, DataSet) else None
        return images, opened, reading, quantities, first

    def plan() -> Planned:
        loaded = model() if callable(model) and not isinstance(model, nn.Module) else model
        if not isinstance(loaded, nn.Module):
            raise ModelError(f"a {type(loaded).__name__} is no model: give an nn.Module, or a function that loads one.")
        if any(module.training for module in loaded.modules()):
            raise ModelError("the model is in training mode, in which each image changes the figures of others: model.eval().")
        inputs = find_inputs(opened, loaded, size, crop, preprocessing)
        task = plan_run(loaded, layers, inputs, quantities, dtype, block, reading, first)
        return Planned(loaded, task, describe(loaded, task, name, describe_source(images, opened, image_column, label_column)))

    store = Store(out)
    with meet_ranks() as ranks, ExitStack() as held:
        images, opened, reading, quantities, first = ranks.together(look)
        ranks.from_first(lambda: _hold(store, held))
        return _run(ranks.together(plan), store, engine, report, ranks, retry=retry)


class Planned(NamedTuple):
    """A model, what is taken with it, and what that is in plain values."""

    model: nn.Module
    task: Task
    facts: Facts


def _hold(store: Store, held: ExitStack) -> None:
    """Keep other runs out, and see that there is nothing else, before anything takes long."""
    held.enter_context(hold_store(store.where))
    store.find_facts()


def _run(planned: Planned, store: Store, engine: Engine, report: Report, ranks: Ranks, *, retry: bool) -> Summary:
    """Do what is left to do of a task, as the one of several processes that this is."""
    model, task, facts = planned
    pending = ranks.from_first(lambda: _begin(store, task, facts, retry=retry))
    ranks.together(lambda: _open(store, task, facts, ranks))
    resumed = task.layout.images - _count(pending)
    share = {number: pending[number] for number in [*pending][ranks.rank :: ranks.count]}
    meter = _Meter(report, resumed, resumed + _count(share), ranks)
    ranks.together(lambda: engine(Job(model, task, store, share, meter.add)))
    status = store.status()
    taken, broken = (int((status == kind).sum()) for kind in (TAKEN, BROKEN))
    return Summary(task.layout.images, taken, broken, resumed, meter.seconds, meter.waited / (meter.seconds or 1.0))


def _count(pending: Pending) -> int:
    return sum(map(len, pending.values()))


def _open(store: Store, task: Task, facts: Facts, ranks: Ranks) -> None:
    """Open the store that the first process has made or found, for the same run."""
    if ranks.is_first:
        return
    there = store.find_facts()
    if there is None:
        raise StoreError(
            f"{store.where} is not there for process {ranks.rank}: name a folder that all nodes share, or an address."
        )
    _check_same(store, there, task, facts)


def _check_same(store: Store, there: Facts, task: Task, facts: Facts) -> None:
    names = lambda: (store.read("image"), find_coordinates(task)["image"][1])  # noqa: E731
    check_same_run(there["run"], facts["run"], store.where, names)


class _Meter:
    """Adds up what batches took, and tells how far the run is."""

    def __init__(self, report: Report, done: int, images: int, ranks: Ranks) -> None:
        self._report, self._done, self._images, self._ranks = report, done, images, (ranks.rank, ranks.count)
        self.seconds = self.waited = 0.0

    def add(self, step: Step) -> None:
        self._done += step.images
        self.seconds += step.seconds
        self.waited += step.waited
        self._report(Progress(self._done, self._images, step.broken, self.seconds, self.waited, *self._ranks))


def _begin(store: Store, task: Task, facts: Facts, *, retry: bool) -> Pending:
    """Make the store, or check that it is this run's; which images are to be taken."""
    there = store.find_facts()
    if there is None:
        store.create(task.layout, find_coordinates(task), {**facts, "versions": [list_versions()]})
    else:
        _check_same(store, there, task, facts)
        store.remove_leftovers()
        if (versions := list_versions()) not in there["versions"]:
            store.note({**there, "versions": [*there["versions"], versions]})
    return store.find_pending(task.layout, retry=retry)
