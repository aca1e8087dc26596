"""Who does the work on a cluster: actors, among which Ray Data shares out the blocks."""

from __future__ import annotations

import io
import os
import socket
import threading
import time
import traceback
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import HookattnError, StoreError, listed
from .engines import Job
from .layout import Pending
from .ray_session import answering_ray, connected, counting_tries, import_ray, replacing_actors, wait_for_threads
from .sent_errors import make_sendable
from .store import Store
from .work import Step, Task, take_blocks

_BUNDLES = 10_000  # that Ray keeps account of, of one block or more each
_TRIES = 4  # of a block whose process ends, on one node
_LOST = 8  # blocks that may be given up before it is no fault of theirs


@dataclass(frozen=True)
class RayEngine:
    """Does the work of `extract` on a Ray cluster: each actor has the model, takes blocks and writes them to the store itself.

        extract(model, "s3://bucket/photos/", "s3://bucket/run.zarr", engine=RayEngine("auto", actors=(1, 16), gpus=1))

    Which actor takes which block, how many actors there are and what becomes of them where nodes come and go is Ray Data's. A
    block whose node or process dies is taken again, four times at most; then the run ends with an error that names its images,
    when all others are done. Images and store have to be where all nodes see them: a shared folder, or an
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
            HookattnError: there is no such cluster, a block has ended all processes that took it, or Ray has given up; what an
                actor raises is raised as it is.
            StoreError: nodes have written to some other store.
            MissingExtraError: ray is not installed.
        """
        ray = import_ray()
        if not job.pending:
            return
        _check_device(job.model, self.gpus)
        order, lost = _pack(job, self), list[int]()
        with connected(self.address), replacing_actors(), answering_ray():
            self._look_for_room()
            ended = 0.0
            for number, steps in self._take(ray.put(order), [*job.pending]):
                now = time.perf_counter()
                step = _sum(steps, now - ended if ended else None)
                ended = now
                lost += [] if steps else [number]
                job.report(step)
                _check_none_lost(job, lost, _LOST)
        _check_none_lost(job, lost)
        _check_all_there(job)

    @property
    def _range(self) -> tuple[int, int]:
        return self.actors if isinstance(self.actors, tuple) else (self.actors, self.actors)

    def _take(self, order: Any, numbers: Sequence[int]) -> Iterator[tuple[int, Sequence[Step]]]:
        """Let actors take blocks: of each its number and what it took, none where it was given up; in any order."""
        data, others = import_ray().data, threading.enumerate()
        fewest, most = self._range
        blocks = data.from_items([{"block": each} for each in numbers], override_num_blocks=min(len(numbers), _BUNDLES))
        rows = blocks.map_batches(
            _Worker,
            batch_size=1,
            fn_constructor_args=(order, uuid.uuid4().hex, _TRIES),
            compute=data.ActorPoolStrategy(min_size=fewest, max_size=most, max_tasks_in_flight_per_actor=2),
            num_cpus=self.cpus,
            num_gpus=self.gpus,
        ).iter_rows()
        try:
            with closing(iter(rows)) as found:  # which ends the actors, also where one of them has failed
                for row in found:
                    yield int(row["block"]), _unpack(row["outcome"])
        finally:
            wait_for_threads(others)

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
        pending: of which images.
        where: the store.
        folder: in which paths are looked up.
        device: on which the model runs.
        threads, precision: as here, since figures depend on them.
    """

    model: bytes
    task: Task
    pending: Pending
    where: str
    folder: str
    device: str
    threads: int
    precision: str


class _Worker:
    """An actor: takes the blocks whose numbers it is given.

    Args:
        order: where it is.
        run: a name of this run.
        tries: how often a block is taken whose process ends each time; Ray would take it for ever.
    """

    def __init__(self, order: Any, run: str, tries: int) -> None:
        self._sent, self._run, self._tries = order, run, tries

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Write blocks; what comes back are steps, or the error, which Ray would wrap."""
        from ray import cloudpickle

        try:
            outcome: Any = [step for number in batch["block"] for step in self._take(int(number))]
        except Exception as error:
            outcome = make_sendable(error, cloudpickle.dumps), traceback.format_exc()
        return {"block": batch["block"], "outcome": [cloudpickle.dumps(outcome)]}

    def _take(self, number: int) -> list[Step]:
        steps: list[Step] = []
        with counting_tries(f"hookattn {self._run} {number}") as tries:
            if tries <= self._tries:
                model, task, pending, store = self._opened
                for block in take_blocks(model, task, {number: pending[number]}, steps.append):
                    store.write(block, task.layout.specs)
        return steps

    @cached_property  # not in the constructor, whose errors Ray tells in its own words
    def _opened(self) -> tuple[nn.Module, Task, Pending, Store]:
        from ray import cloudpickle

        order: _Order = cloudpickle.loads(import_ray().get(self._sent))
        if os.path.isdir(order.folder):
            os.chdir(order.folder)
        _check_seen(order.device)
        torch.set_num_threads(order.threads)
        torch.set_float32_matmul_precision(order.precision)
        model = torch.load(io.BytesIO(order.model), map_location=order.device, weights_only=False)
        store = Store(order.where)
        if store.find_facts() is None:
            raise StoreError(f"{order.where} is not there on a node of the cluster: {_SHARED}")
        return model, order.task, order.pending, store


_SHARED = "name a folder that all nodes share, or an address (s3://)."


def _pack(job: Job, engine: RayEngine) -> bytes:
    """An order, which is opened by an actor and not by Ray, so that the model goes to the actor's device."""
    from ray import cloudpickle

    where = job.store.where if job.store.folder is None else os.path.abspath(job.store.where)
    device, threads = "cuda" if engine.gpus else "cpu", max(1, int(engine.cpus))
    model = io.BytesIO()
    try:
        torch.save(job.model, model, pickle_module=cloudpickle)
        figures = threads, torch.get_float32_matmul_precision()
        order = _Order(model.getvalue(), job.task, job.pending, where, os.getcwd(), device, *figures)
        packed: bytes = cloudpickle.dumps(order)
    except Exception as error:  # whatever a model, a data set or a quantity holds
        raise HookattnError(
            f"the run cannot be sent to a cluster ({type(error).__name__}: {error}): what model, data set and "
            "quantities hold has to be such that it can be pickled; files are opened when an image is read."
        ) from error
    return packed


def _check_device(model: nn.Module, gpus: float) -> None:
    """Check that a model on a GPU is not sent to actors that have none, where other figures would come out, slowly."""
    device = next((p.device for p in model.parameters() if p.device.type != "cpu"), None)
    if device is not None and not gpus:
        raise HookattnError(f"the model is on {device}, and actors have no GPU: RayEngine(gpus=1), or a share of one.")


def _check_seen(device: str) -> None:
    """Check, in an actor, that PyTorch sees the GPU that Ray has given it."""
    if device == "cuda" and not torch.cuda.is_available():
        raise HookattnError(
            f"an actor on {socket.gethostname()} was given a GPU by Ray, and PyTorch {torch.__version__} sees none there: "
            "install a build of PyTorch for the driver of that node, or leave out gpus=."
        )


def _unpack(outcome: bytes) -> list[Step]:
    from ray import cloudpickle

    found = cloudpickle.loads(outcome)
    if isinstance(found, list):
        return found
    error, told = found
    if isinstance(error, HookattnError):
        raise error
    raise error from HookattnError(f"in an actor:\n{told}")


def _sum(steps: Sequence[Step], seconds: float | None) -> Step:
    """Steps of one actor as one of all of them: by the clock of this process, the share of waiting as it was there."""
    own, waited = sum(step.seconds for step in steps), sum(step.waited for step in steps)
    seconds = own if seconds is None else seconds
    broken = {name: why for step in steps for name, why in step.broken.items()}
    return Step(sum(step.images for step in steps), broken, seconds, waited / (own or 1.0) * seconds)


def _check_none_lost(job: Job, lost: Sequence[int], most: int = 1) -> None:
    """Check that fewer blocks than so many were given up."""
    names = job.task.inputs.names
    ends = [(images[0], images[-1]) for images in map(job.pending.__getitem__, lost)]
    told = [names[first] if first == last else f"{names[first]} to {names[last]}" for first, last in ends]
    if len(told) >= most:
        raise HookattnError(
            f"the process that took {listed(told)} ended each of {_TRIES} times: most often a decoder that crashes on one of "
            "the images, or want of memory. What is in the store is whole, and the same again tries these once more, with "
            "smaller batches if you like."
        )


def _check_all_there(job: Job) -> None:
    if job.store.find_pending(job.task.layout).keys() & job.pending.keys():
        raise StoreError(f"nodes have written to a {job.store.where} of their own: {_SHARED}")
