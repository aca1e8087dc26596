"""`hookattn extract`: attention of a data set into a store that a stopped run goes on with."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import current_thread, main_thread
from typing import Any, NamedTuple, cast

import torch.distributed as dist
import typer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column
from torch.distributed.rendezvous import rendezvous

from ..errors import HookattnError, listed
from ..extraction.engines import Engine, run_here
from ..extraction.extract import Progress, Summary, extract
from ..extraction.plan import KINDS
from ..extraction.quantities import find_quantities
from ..extraction.ray_engine import RayEngine
from ..extraction.read import open_run
from ..extraction.store import Store, import_zarr
from .asked import RETRY, Asked
from .models import read_size, without_revision
from .output import console, name_bytes, print_error, printable, say, say_left_out, say_missing
from .photos import Rate, load_asked, read_layers


class Where(NamedTuple):
    """Who does the work: "local" or "ray", and of Ray the address, how many actors, and GPUs of each; None if not given."""

    engine: str
    address: str | None
    actors: str | None
    gpus: float | None


class Wanted(NamedTuple):
    """What is taken of which images, how it is stored, and who does it; as it was typed.

    Attributes:
        what, store_dtype, block, strict, retry, batch, workers, image_column, label_column: as for `extraction.extract`.
        where: it runs.
    """

    what: str
    store_dtype: str
    batch: int
    workers: int
    block: int | None
    strict: bool
    retry: bool
    image_column: str | None
    label_column: str | None
    where: Where


def extract_images(sources: Sequence[str], asked: Asked, wanted: Wanted, out: str, as_json: bool) -> None:
    """Extract what was asked for, with a bar, and tell what came of it."""
    import_zarr()
    _check(wanted, out)
    engine = _find_engine(wanted.where, asked.device)
    with _one_prints() as rank, _answering_stop(out):
        summary = _extract(sources, asked, wanted, out, engine, is_hidden=rank > 0)
        if rank == 0:
            _tell(summary, asked.model, out, as_json)


def _check(wanted: Wanted, out: str) -> None:
    """Check what can be checked before the model is loaded."""
    find_quantities(wanted.what)
    if wanted.store_dtype not in KINDS:
        raise HookattnError(f"--store-dtype {wanted.store_dtype!r} is none of {', '.join(KINDS)}.")
    if not out.strip():
        raise HookattnError(f"-o {out!r} names no store: -o NAME.zarr.")


def _extract(sources: Sequence[str], asked: Asked, wanted: Wanted, out: str, engine: Engine, *, is_hidden: bool) -> Summary:
    with _Told(is_hidden=is_hidden) as told:
        return extract(
            lambda: load_asked(_on_own_gpu(asked)),
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
            retry=wanted.retry,
            image_column=wanted.image_column,
            label_column=wanted.label_column,
            name=without_revision(asked.model),
            engine=engine,
            report=told.add,
        )


def _tell(summary: Summary, model: str, out: str, as_json: bool) -> None:
    # of the store, since another run or another process may have met them
    run, size = open_run(out), _size_of(out)
    say_left_out(broken := run.broken())
    say_missing(missing := run.facts["missing"], len(run.layers))
    left_out = f"{summary.broken} could not be read{f' ({RETRY} tries them again)' if broken else ''}"
    say(f"{summary.taken} of {summary.images} images of {model}, {left_out}; {_name_pace(summary)}")
    large = "" if size is None else f", {name_bytes(size)}"
    say(f"wrote {printable(out)}{large}; hookattn show takes it, and xarray.open_zarr")
    if as_json:
        figures = {**summary._asdict(), "images_per_second": summary.images_per_second, "bytes": size}
        told = {**figures, "missing": missing, "left_out": broken, "tried_again_by": RETRY if broken else None}
        typer.echo(json.dumps({"model": model, "store": out, **told}))


def _name_pace(summary: Summary) -> str:
    if summary.resumed == summary.images:
        return "all were done before"
    before = f"{summary.resumed} were done before, the others at " if summary.resumed else ""
    return f"{before}{summary.images_per_second:.1f} images/s, {summary.waited:.0%} of the time waiting for images"


def _size_of(out: str) -> int | None:
    folder = Store(out).folder
    return None if folder is None else sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _find_engine(where: Where, device: str) -> Engine:
    if where.engine not in ("local", "ray"):
        raise HookattnError(f"--engine {where.engine!r} is none: local, or ray.")
    if where.engine == "local":
        if given := [f"--{name}" for name, value in where._asdict().items() if name != "engine" and value is not None]:
            raise HookattnError(f"{listed(given)} would change nothing without Ray: add --engine ray, or leave it out.")
        return run_here
    if device != "cpu" and not where.gpus:
        raise HookattnError(
            f"--device {device} would change nothing under Ray, whose actors run on the GPUs that they are given: --gpus 1, "
            "or a share of one, without --device."
        )
    return RayEngine(where.address, actors=_read_actors(where.actors or "1"), gpus=where.gpus or 0)


def _read_actors(text: str) -> tuple[int, int]:
    fewest, _, most = text.partition(",")
    try:
        return int(fewest), int(most or fewest)
    except ValueError as error:
        raise HookattnError(f"--actors {text!r} is no number of actors: 4, or 1,8 for the fewest and the most.") from error


@contextmanager
def _one_prints() -> Iterator[int]:
    """The number of this process among those that torchrun started, which form a group meanwhile; 0 where it is alone.

    The first of them prints. Of errors, that of the first process which fails is told: others meet the same, or cannot go on
    without it.
    """
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield 0
        return
    store, rank, count = next(rendezvous("env://"))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    console.quiet = rank > 0
    try:
        yield rank
    except Exception:
        if store.add("hookattn failed", 1) > 1:
            raise typer.Exit(1) from None
        raise
    finally:
        console.quiet = False
        dist.destroy_process_group()


class _Ended(KeyboardInterrupt):
    """Somebody ends the process, as batch systems do a while before they kill it."""


@contextmanager
def _answering_stop(out: str) -> Iterator[None]:
    """Answer who stops a run, by Ctrl-C or SIGTERM: what was taken has been written by then."""

    def end(*_: object) -> None:
        raise _Ended

    before = signal.signal(signal.SIGTERM, end) if current_thread() is main_thread() else None
    try:
        yield
    except KeyboardInterrupt as stopped:
        print_error(f"stopped; the same command goes on with what is in {out}.")
        number = signal.SIGTERM if isinstance(stopped, _Ended) else signal.SIGINT
        raise typer.Exit(128 + number) from None  # as a shell tells that somebody stopped it
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _on_own_gpu(asked: Asked) -> Asked:
    """The same on the GPU of this process, where torchrun starts one for each."""
    local = os.environ.get("LOCAL_RANK")
    return asked._replace(device=f"cuda:{local}") if asked.device == "cuda" and local is not None else asked


class _Told:
    """A bar that tells how far a run is, how fast, how long it still takes, and how much of it waits for images."""

    def __init__(self, *, is_hidden: bool) -> None:
        figures = (kind(table_column=Column(no_wrap=True)) for kind in (MofNCompleteColumn, Rate, TimeRemainingColumn))
        columns = (TextColumn("{task.description}"), BarColumn(), *figures)
        more = TextColumn("{task.fields[more]}", table_column=Column(no_wrap=False))  # what gives way in a narrow terminal
        disable = is_hidden or not console.is_terminal
        self._bar = Bar(*columns, more, console=console, disable=disable, transient=True)
        self._task = self._bar.add_task("images", total=None, more="")
        self._broken, self._is_first = 0, True

    def __enter__(self) -> _Told:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def add(self, now: Progress) -> None:
        """Tell of a batch."""
        self._broken += len(now.broken)
        left_out = f", {self._broken} left out" if self._broken else ""
        more = f"{now.waited / (now.seconds or 1.0):.0%} waiting for images{left_out}"
        self._bar.start()  # not before: there is one such line at a time, and the model's is the first
        whose = f"images of process {now.process + 1} of {now.processes}" if now.processes > 1 else "images"
        # images of runs before this one are no part of how fast it is
        tell = self._bar.reset if self._is_first else self._bar.update
        tell(self._task, completed=now.done, total=now.images, description=whose, more=more)
        self._is_first = False
