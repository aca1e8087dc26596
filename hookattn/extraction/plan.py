"""What a run is: what is taken of which images, and how it is laid out in the store."""

from __future__ import annotations

import json
from collections.abc import Sequence, Sized
from numbers import Integral
from typing import Any, NamedTuple, cast

import numpy as np
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from ..errors import HookattnError, explained
from ..image.preprocessing import most_cells
from ..recording.maps import name_model
from ..recording.selection import Layers
from .data_sets import Input
from .inputs import Inputs, Photos, explain
from .layout import Array, Layout, Spec
from .manifest import hash_names, hash_weights
from .quantities import Quantity
from .store import FORMAT, Facts
from .taking import Shapes, Taker
from .work import Task, unreadable

_BLOCK_BYTES, _BLOCK_IMAGES = 2**27, 1024  # of what is stored; in memory there are two blocks, in float32
_TRIED = 64  # images that are tried to find one that can be read
KINDS = ("float16", "float32", "uint8")
"""What maps, rows and keys can be stored as."""


class Reading(NamedTuple):
    """How images are read.

    Attributes:
        batch_size: images in a forward.
        workers: processes that read ahead.
        strict: whether an image that cannot be read ends the run.
    """

    batch_size: int
    workers: int
    strict: bool


def find_reading(source: Any, batch_size: int | None, workers: int | None, strict: bool) -> tuple[Any, Reading]:
    """What images are read from, and how: of a `DataLoader` its data set, batch size and workers.

    Raises:
        HookattnError: something is asked for that the loader tells otherwise.
    """
    if not isinstance(source, DataLoader):
        return source, Reading(32 if batch_size is None else batch_size, workers or 0, strict)
    for name, given, own in (("batch_size", batch_size, source.batch_size), ("workers", workers, source.num_workers)):
        if given is not None and own is not None:
            raise HookattnError(f"{name} is that of the DataLoader, {own}: set it there, or give its data set alone.")
    _check_sampler(source)
    return source.dataset, Reading(source.batch_size or batch_size or 32, source.num_workers, strict)


def _check_sampler(loader: DataLoader[Any]) -> None:
    if isinstance(loader.dataset, IterableDataset) or isinstance(loader.sampler, DistributedSampler):
        return  # refused elsewhere; or a share of the images, as each process takes one here
    images, chosen = len(cast(Sized, loader.dataset)), len(cast(Sized, loader.sampler))
    if chosen != images:
        raise HookattnError(
            f"the sampler of the DataLoader chooses {chosen} of {images} images, and is not asked here: give "
            "torch.utils.data.Subset(dataset, indices)."
        )


def check_numbers(dtype: str, block: int | None, reading: Reading) -> None:
    """Check what is stored as what, and how much at once.

    Raises:
        HookattnError: a number or dtype makes no sense.
    """
    if dtype not in KINDS:
        raise HookattnError(f"dtype={dtype!r} is not stored: {', '.join(KINDS)}.")
    numbers = (reading.batch_size, 1), (reading.workers, 0), (1 if block is None else block, 1)
    if any(not isinstance(number, Integral) or number < least for number, least in numbers):
        raise HookattnError(
            "batch_size and block are numbers of images from 1 on, and workers a number of processes from 0 on."
        )


def plan_run(
    model: nn.Module,
    layers: Layers,
    inputs: Inputs,
    quantities: Sequence[Quantity],
    dtype: str,
    block: int | None,
    reading: Reading,
    first: Input | None = None,
) -> Task:
    """Run the model on one image, the first where it is there already, and lay out what all will give.

    Raises:
        HookattnError: no image can be read, or something cannot be had of the model.
    """
    first = first or find_readable(inputs, strict=reading.strict)
    with Taker(model, layers, quantities) as taker:
        shapes = taker.probe(first.tensor[None])
    if isinstance(inputs, Photos) and inputs.varies:
        shapes = shapes.with_room_for(most_cells(inputs.size, inputs.preprocessing), quantities)
    specs = [_specify(quantity, shapes, dtype) for quantity in quantities]
    layout = Layout(len(inputs.names), int(block or _choose_block(specs)), specs)
    return Task(inputs, quantities, shapes, layout, *reading)


def describe(model: nn.Module, task: Task, name: str | None, source: Facts | None) -> Facts:
    """What a run is, in plain values: `run` is what has to be the same to go on with it."""
    layout, shapes = task.layout, task.shapes
    revision = {"revision": task.inputs.revision} if task.inputs.revision else {}
    run = {
        "model": {"name": name or name_model(model), "class": type(model).__name__, "weights": hash_weights(model)},
        "dtype": str(next((p.dtype for p in model.parameters()), None)).removeprefix("torch."),
        "preprocessing": task.inputs.describe(),
        "layers": list(shapes.layers),
        "what": {spec.name: {"dims": list(spec.dims), "shape": list(spec.shape), "dtype": spec.dtype} for spec in layout.specs},
        "block": layout.block,
        "images": {"count": layout.images, "names": hash_names(task.inputs.names), **revision},
    }
    varies = isinstance(task.inputs, Photos) and task.inputs.varies
    found = {"layers": shapes.layers, "missing": shapes.missing, "varies": varies}
    # of whoever fetched the model; weights tell whether it is the same
    facts = {"format": FORMAT, "run": run, **found, "source": source, "model_revision": getattr(model, "hub_commit", None)}
    # numbers may be of numpy, and are compared with what a store gives back
    plain: Facts = json.loads(json.dumps(facts, default=lambda value: value.tolist()))
    return plain


def find_coordinates(task: Task) -> dict[str, tuple[tuple[str, ...], Array]]:
    """Arrays that are known before the first image, with the names of their axes."""
    shapes = task.shapes
    found: dict[str, tuple[tuple[str, ...], Array]] = {
        "image": (("image",), np.array([_storable(name) for name in task.inputs.names], object)),
        "layer": (("layer",), np.array(list(shapes.layers), object)),
        "depth": (("layer",), np.arange(len(shapes.layers))),
    }
    axes = {dim: size for spec in task.layout.specs for dim, size in zip(spec.dims, spec.shape)}
    if "head" in axes:
        found["head"] = (("head",), np.arange(axes["head"]))
    tokens = shapes.tokens
    if tokens is not None and axes.get("key") == len(tokens):
        rows, columns = np.divmod(np.arange(len(tokens) - len(tokens.prefix)), tokens.grid_size[1])
        nowhere = np.full(len(tokens.prefix), np.nan)
        kinds = [*tokens.prefix, *["patch"] * len(rows)]
        found["key_token"] = (("key",), np.array(kinds, object))
        found["key_row"], found["key_col"] = ((("key",), np.concatenate([nowhere, each])) for each in (rows, columns))
    return found


def find_readable(inputs: Inputs, *, strict: bool) -> Input:
    """The first image that can be read.

    Raises:
        HookattnError: there is none among the first of them; or, if strict, the first cannot be.
    """
    reasons = dict[str, str]()  # and the first image of each
    for index in range(min(_TRIED, len(inputs.names))):
        try:
            return inputs.load(index)
        except Exception as error:  # of a file, of its decoder, or of somebody's data set
            why = explain(error).rstrip(".")
            if strict:
                raise unreadable(inputs.names[index], why) from error
            reasons.setdefault(why, inputs.names[index])
    which = "none of the images" if len(inputs.names) <= _TRIED else f"none of the first {_TRIED} images"
    raise HookattnError(f"{which} can be read. {explained(f'{name}: {why}' for why, name in reasons.items())}")


def _specify(quantity: Quantity, shapes: Shapes, dtype: str) -> Spec:
    kind = "float32" if not quantity.is_large else "float16" if dtype == "uint8" and not quantity.bounded else dtype
    return Spec(quantity.name, quantity.axes, shapes.shapes[quantity.name], kind, quantity.units)


def _choose_block(specs: Sequence[Spec]) -> int:
    """As many images as are held until they are written together: a power of two, whatever the size of batches."""
    count = max(1, min(_BLOCK_IMAGES, _BLOCK_BYTES // max(1, sum(spec.bytes for spec in specs))))
    return int(2 ** (count.bit_length() - 1))


def _storable(name: str) -> str:
    # bytes of a file's name that are no letters are written as escapes
    return name.encode("utf-8", "backslashreplace").decode()
