"""`hookattn extract`: attention of a data set into a store that a stopped run goes on with."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch.distributed as dist
import typer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from ..errors import HookattnError
from ..extraction.engines import Engine, run_here
from ..extraction.extract import Progress, Summary, extract
from ..extraction.ray_engine import RayEngine
from ..extraction.store import Store, import_zarr
from .asked import Asked
from .models import read_size
from .output import console, name_bytes, printable, say
from .photos import Rate, load_asked, read_layers

_TOLD = 10  # broken images that are told one by one


class Where(NamedTuple):
    """Who does the work: "local" or "ray", and of Ray the address, how many actors, and GPUs of each."""

    engine: str
    address: str | None
    actors: str
    gpus: float


class Wanted(NamedTuple):
    """What is taken of which images, how it is stored, and who does it; as it was typed.

    Attributes:
        what, store_dtype, block, strict, batch, workers, image_column, label_column: as for `extraction.extract`.
        where: it runs.
    """

    what: str
    store_dtype: str
    batch: int
    workers: int
    block: int | None
    strict: bool
    image_column: str | None
    label_column: str | None
    where: Where


def extract_images(sources: Sequence[str], asked: Asked, wanted: Wanted, out: str, as_json: bool) -> None:
    """Extract what was asked for, with a bar, and tell what came of it."""
    import_zarr()
    engine = _find_engine(wanted.where)
    with _rank() as rank, _Told(hidden=rank > 0) as told:
        model = load_asked(_on_own_gpu(asked))
        summary = extract(
            model,
            list(sources) if len(sources) > 1 else sources[0],
            out,
            wanted.what,
            layers=read_layers(asked.layers),
            size=read_size(asked.img_size),
            crop=cast(Any, asked.crop),
            dtype=wanted.store_dtype,
            batch_size=wanted.batch,
            workers=wanted.workers,
            block=wanted.block,
            strict=wanted.strict,
            image_column=wanted.image_column,
            label_column=wanted.label_column,
            name=asked.model,
            engine=engine,
            report=told.add,
        )
        if rank == 0:
            _tell(summary, told.broken, asked.model, out, as_json)


def _tell(summary: Summary, broken: Mapping[str, str], model: str, out: str, as_json: bool) -> None:
    for name, why in list(broken.items())[:_TOLD]:
        say(f"left out: {printable(name)}: {why}")
    if len(broken) > _TOLD:
        say(f"left out: {len(broken) - _TOLD} more; the store's `error` says why")
    before = f", {summary.resumed} of them before" if summary.resumed else ""
    say(
        f"{summary.taken} of {summary.images} images of {model}{before}, {summary.broken} could not be read; "
        f"{summary.images_per_second:.1f} images/s, {summary.waited:.0%} of the time waiting for images"
    )
    size = _size_of(out)
    told = "" if size is None else f", {name_bytes(size)}"
    say(f"wrote {printable(out)}{told}; hookattn show takes it, and xarray.open_zarr")
    if as_json:
        figures = {**summary._asdict(), "images_per_second": summary.images_per_second, "bytes": size}
        typer.echo(json.dumps({"model": model, "store": out, **figures, "left_out": dict(broken)}))


def _size_of(out: str) -> int | None:
    folder = Store(out).folder
    return None if folder is None else sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _find_engine(where: Where) -> Engine:
    if where.engine == "local":
        return run_here
    if where.engine != "ray":
        raise HookattnError(f"--engine {where.engine!r} is none: local, or ray.")
    fewest, _, most = where.actors.partition(",")
    try:
        actors = (int(fewest), int(most or fewest))
    except ValueError as error:
        raise HookattnError(
            f"--actors {where.actors!r} is no number of actors: 4, or 1,8 for the fewest and the most."
        ) from error
    return RayEngine(where.address, actors=actors, gpus=where.gpus)


@contextmanager
def _rank() -> Iterator[int]:
    """The number of this process among those that torchrun started, which form a group meanwhile; 0 where it is alone."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield 0
        return
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def _on_own_gpu(asked: Asked) -> Asked:
    """The same on the GPU of this process, where torchrun starts one for each."""
    local = os.environ.get("LOCAL_RANK")
    return asked._replace(device=f"cuda:{local}") if asked.device == "cuda" and local is not None else asked


class _Told:
    """A bar that tells how far a run is, how fast, how long it still takes, and how much of it waits for images."""

    def __init__(self, *, hidden: bool) -> None:
        self.broken: dict[str, str] = {}
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
        waiting = TextColumn("{task.fields[waiting]}")
        self._bar = Bar(*columns, waiting, console=console, disable=hidden or not console.is_terminal, transient=True)
        self._task = self._bar.add_task("images", total=None, waiting="")

    def __enter__(self) -> _Told:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def add(self, now: Progress) -> None:
        """Tell of a batch."""
        self.broken |= now.broken
        share = now.waited / (now.seconds or 1.0)
        self._bar.update(self._task, completed=now.done, total=now.images, waiting=f"{share:.0%} waiting for images")
