"""Who does the work on a cluster: actors, among which Ray Data shares out the blocks."""

from __future__ import annotations

import io
import logging
import os
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import HookattnError, MissingExtraError, StoreError
from .engines import Job
from .sent_errors import make_sendable
from .store import Store
from .work import Step, Task, take_blocks

_BUNDLES = 10_000  # that Ray keeps account of, of one block or more each


@dataclass(frozen=True)
class RayEngine:
    """Does the work of `extract` on a Ray cluster: each actor has the model, takes blocks and writes them to the store itself.

        extract(model, "s3://bucket/photos/", "s3://bucket/run.zarr", engine=RayEngine("auto", actors=(1, 16), gpus=1))

    Which actor takes which block, how many actors there are and what becomes of them where nodes come and go is Ray Data's. A
    block whose node dies is taken again elsewhere. Images and store have to be where all nodes see them: a shared folder, or an
    address (s3://); hookattn has to be installed on all of them. Figures are those of `run_here` with as many threads.

    Ray is connected to, or started on this machine, without a word and left at the end. Where `ray.init` was called before
    that is used, with the logs, the environment of its workers and the progress bars that it was given.

    Args:
        address: of a cluster, "HOST:6379" or "auto"; None for that of this machine, which is started where there is none.
        actors: how many, or the fewest and the most.
        gpus: of each actor, or a share of one.
        cpus: of each, which has as many threads; with `workers` that read images one more for each.
    """

    address: str | None = None
    actors: int | tuple[int, int] = 1
    gpus: float = 0
    cpus: float = 1

    def __post_init__(self) -> None:
        fewest, most = self._range
        if not 1 <= fewest <= most or self.cpus <= 0 or self.gpus < 0:
            raise HookattnError(f"{self}: actors is a number from 1 on, or the fewest and the most; cpus is more than 0.")

    def __call__(self, job: Job) -> None:
        """Do a job.

        Raises:
            HookattnError: there is no such cluster, or Ray has given up; what an actor raises is raised as it is.
            StoreError: nodes have written to some other store.
            MissingExtraError: ray is not installed.
        """
        ray = import_ray()
        if not job.pending:
            return
        order = _pack(job, self)
        with _connected(self.address), _answering_ray():
            self._look_for_room()
            ended = 0.0
            for steps in self._take(ray.put(order), job.pending):
                now = time.perf_counter()
                step = _sum(steps, now - ended if ended else None)
                ended = now
                job.report(step)
        _check_all_there(job)

    @property
    def _range(self) -> tuple[int, int]:
        return self.actors if isinstance(self.actors, tuple) else (self.actors, self.actors)

    def _take(self, order: Any, pending: Sequence[int]) -> Iterator[Sequence[Step]]:
        """Let actors take blocks: of each what it took, in whatever order they are done."""
        data = import_ray().data
        fewest, most = self._range
        blocks = data.from_items([{"block": each} for each in pending], override_num_blocks=min(len(pending), _BUNDLES))
        rows = blocks.map_batches(
            _Worker,
            batch_size=1,
            fn_constructor_args=(order,),
            compute=data.ActorPoolStrategy(min_size=fewest, max_size=most, max_tasks_in_flight_per_actor=2),
            num_cpus=self.cpus,
            num_gpus=self.gpus,
        ).iter_rows()
        try:
            with closing(iter(rows)) as found:  # which ends the actors, also where one of them has failed
                for row in found:
                    yield _unpack(row["outcome"])
        finally:
            _wait_for_scheduler()

    def _look_for_room(self) -> None:
        """Warn where an actor is larger than any node."""
        nodes = [node["Resources"] for node in import_ray().nodes() if node["Alive"]]
        if not any(node.get("CPU", 0) >= self.cpus and node.get("GPU", 0) >= self.gpus for node in nodes):
            warnings.warn(
                f"no node of the cluster has {self.cpus:g} CPU and {self.gpus:g} GPU; Ray waits until one is added.",
                stacklevel=5,
            )


class _Order(NamedTuple):
    """What actors are sent, once each.

    Attributes:
        model: as `torch.save` writes it.
        task: what is taken.
        where: the store.
        folder: in which paths are looked up.
        device: on which the model runs.
        threads, precision: as here, since figures depend on them.
    """

    model: bytes
    task: Task
    where: str
    folder: str
    device: str
    threads: int
    precision: str


class _Worker:
    """An actor: takes the blocks whose numbers it is given."""

    def __init__(self, order: Any) -> None:
        self._sent = order

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Write blocks; what comes back are steps, or the error, which Ray would wrap."""
        from ray import cloudpickle

        try:
            outcome: Any = [step for number in batch["block"] for step in self._take(int(number))]
        except Exception as error:
            outcome = make_sendable(error, cloudpickle.dumps), traceback.format_exc()
        return {"outcome": [cloudpickle.dumps(outcome)]}

    def _take(self, number: int) -> list[Step]:
        model, task, store = self._opened
        steps: list[Step] = []
        for block in take_blocks(model, task, [number], steps.append):
            store.write(block, task.layout.specs)
        return steps

    @cached_property  # not in the constructor, whose errors Ray tells in its own words
    def _opened(self) -> tuple[nn.Module, Task, Store]:
        from ray import cloudpickle

        order: _Order = cloudpickle.loads(import_ray().get(self._sent))
        if os.path.isdir(order.folder):
            os.chdir(order.folder)
        torch.set_num_threads(order.threads)
        torch.set_float32_matmul_precision(order.precision)
        model = torch.load(io.BytesIO(order.model), map_location=order.device, weights_only=False)
        store = Store(order.where)
        if store.find_facts() is None:
            raise StoreError(f"{order.where} is not there on a node of the cluster: {_SHARED}")
        return model, order.task, store


_SHARED = "name a folder that all nodes share, or an address (s3://)."


def import_ray() -> Any:
    """The module `ray`, imported when the first job is done on a cluster."""
    try:
        import ray.data
    except ImportError as error:
        raise MissingExtraError('work on a cluster needs Ray: pip install "hookattn[ray]".') from error
    return ray


def _pack(job: Job, engine: RayEngine) -> bytes:
    """An order, which is opened by an actor and not by Ray, so that the model goes to the actor's device."""
    from ray import cloudpickle

    where = job.store.where if job.store.folder is None else os.path.abspath(job.store.where)
    device, threads = "cuda" if engine.gpus else "cpu", max(1, int(engine.cpus))
    model = io.BytesIO()
    try:
        torch.save(job.model, model, pickle_module=cloudpickle)
        order = _Order(model.getvalue(), job.task, where, os.getcwd(), device, threads, torch.get_float32_matmul_precision())
        packed: bytes = cloudpickle.dumps(order)
    except Exception as error:  # whatever a model, a data set or a quantity holds
        raise HookattnError(
            f"the run cannot be sent to a cluster ({type(error).__name__}: {error}): what model, data set and "
            "quantities hold has to be such that it can be pickled; files are opened when an image is read."
        ) from error
    return packed


def _unpack(outcome: bytes) -> list[Step]:
    from ray import cloudpickle

    found = cloudpickle.loads(outcome)
    if isinstance(found, list):
        return found
    error, told = found
    if isinstance(error, HookattnError):
        raise error
    raise error from HookattnError(f"in an actor:\n{told}")


def _wait_for_scheduler() -> None:
    """Wait for Ray Data's own thread, which after two seconds is left to itself, and would start another Ray."""
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("ray.data."):
            thread.join(60)


def _sum(steps: Sequence[Step], seconds: float | None) -> Step:
    """Steps of one actor as one of all of them: by the clock of this process, the share of waiting as it was there."""
    own, waited = sum(step.seconds for step in steps), sum(step.waited for step in steps)
    seconds = own if seconds is None else seconds
    broken = {name: why for step in steps for name, why in step.broken.items()}
    return Step(sum(step.images for step in steps), broken, seconds, waited / (own or 1.0) * seconds)


def _check_all_there(job: Job) -> None:
    done = job.store.find_done(job.task.layout)
    if not all(done[number] for number in job.pending):
        raise StoreError(f"nodes have written to a {job.store.where} of their own: {_SHARED}")


@contextmanager
def _answering_ray() -> Iterator[None]:
    """Say what a failure of Ray itself means for the run."""
    from ray.data import exceptions
    from ray.exceptions import RayError

    try:
        yield
    except (RayError, getattr(exceptions, "ExecutionTimeoutError", RayError)) as error:  # the latter since 2.5x
        raise HookattnError(
            f"Ray has given up ({type(error).__name__}: {str(error).strip()}). What is in the store is whole: the same again "
            "goes on from there."
        ) from error


@contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """Have Ray for as long as the block lasts: as it is, or quietly."""
    ray = import_ray()
    if ray.is_initialized():
        yield
        return
    with _quiet():
        try:
            ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise HookattnError(f"there is no Ray at {address!r} ({error}): `ray start --head` begins a cluster.") from error
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _quiet() -> Iterator[None]:
    """Let Ray print no progress and no warnings, of which it has many; its files of logs have all."""
    ray = import_ray()
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        # what nodes tell of each other is printed where this says so, whatever ray.init was told
        printing = _set(ray._private.worker, _worker_logs_enabled=False)
        bars = _set(ray.data.DataContext.get_current(), enable_progress_bars=False, print_on_execution_start=False)
        with printing, bars:
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _set(target: Any, **values: Any) -> Iterator[None]:
    """Give attributes other values for as long as the block lasts."""
    before = {name: getattr(target, name, None) for name in values}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)
