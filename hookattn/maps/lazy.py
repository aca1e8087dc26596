"""What is computed when it is sliced, and then only the part that is asked for, a chunk of rows at a time if it is large."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..attention.narrowing import ALL, Pick
from ..attention.softmax import Chunk
from ..attention.sources import Source, chunk_of
from ..conditions.meta import without_values
from .as_array import AsArray
from .established import TellWhy
from .transfer import copy_to_cpu

# On a CPU, statistics of 1,025 tokens are 1.15 times as fast as with 2**21, and that 1.5 to 1.8 times as fast as with 2**24.
# On an H200 those of 4,097 tokens are 1.7 times as fast with 2**25 as with 2**24, and no faster with 2**26.
_CHUNK = 2**20
T = TypeVar("T")
Shape = tuple[int, int, int, int]
Visit = Callable[[slice, slice, Tensor], None]
"""What is called with a chunk: which items of the batch it is of, which rows, and (items, heads, rows, keys) itself."""


class Spec(NamedTuple):
    """Shape, dtype and device of a map or a gradient, known before anything of it is computed."""

    shape: Shape
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, eq=False)
class Delivery:
    """Where slices go and as what: None leaves them as they come."""

    dtype: torch.dtype | None = None
    device: torch.device | None = None

    def __call__(self, tensor: Tensor) -> Tensor:
        if self.is_as_it_comes:
            return tensor
        if self.device is not None and self.device.type == "cpu":
            return copy_to_cpu(tensor, self.dtype)
        return tensor.to(device=self.device, dtype=self.dtype)

    @property
    def is_as_it_comes(self) -> bool:
        """Whether slices stay as they are computed."""
        return self.dtype is None and self.device is None


class LazyArray(AsArray):
    """Base of maps and gradients: an array (batch, heads, queries, keys), of which slices are computed from a `Source`."""

    def __init__(self, name: str, deliver: Delivery) -> None:
        self.name, self._deliver = name, deliver

    def open(self) -> AbstractContextManager[Source]:
        """What it is computed from, and what has to be set meanwhile, for as long as the block lasts."""
        raise NotImplementedError

    def _spec(self) -> Spec:
        with self.open() as source:
            return Spec(source.shape, source.dtype, source.device)

    @property
    def shape(self) -> Shape:
        """(batch, heads, queries, keys)."""
        return self._spec().shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that slices have."""
        return self._deliver.dtype or self._spec().dtype

    @property
    def device(self) -> torch.device:
        """The device that slices lie on."""
        return self._deliver.device or self._spec().device

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Tensor:
        return self._deliver(self.read(index))

    def read(self, index: Any) -> Tensor:
        """Compute what an index picks, of the dtype and on the device that it is computed in."""
        with self.open() as source:
            picks, rest = split_index(index, source.shape)
            with TellWhy(self.name, IndexError, ValueError):  # of an index that does not fit
                values = source.narrow(*picks).values()
            return self._check(values)[rest]

    def visit(self, visit: Visit, batch: Pick = ALL, heads: Pick = ALL, rows: Pick = ALL) -> None:
        """Compute a part of it chunk by chunk and hand each on; items and rows are counted from where the part begins."""
        with self.open() as source:
            with TellWhy(self.name):
                part = source.narrow(batch, heads, rows)
            visit_chunks(self.name, part, visit, lambda part: self._check(part.values()))

    def visit_with_scores(self, visit: Callable[[slice, slice, Chunk], None]) -> None:
        """The same of all of it, each chunk with the scores it is the softmax of, where these are there."""

        def form(part: Source) -> Chunk:
            chunk = chunk_of(part)
            self._check(chunk.values)
            return chunk

        with self.open() as source:
            visit_chunks(self.name, source, visit, form)

    def _check(self, computed: Tensor) -> Tensor:
        """What was computed; an UnreadableError if it has no values, unless it was asked for so."""
        if computed.is_meta and (self._deliver.device is None or self._deliver.device.type != "meta"):
            raise without_values(self.name)
        return computed


def split_index(index: Any, shape: tuple[int, ...]) -> tuple[tuple[Pick, Pick, Pick], Any]:
    """Split an index into what narrows (batch, heads, rows) before anything is computed, and what is left to do on that.

    Raises:
        IndexError: too many indices, or one out of range.
    """
    if index is Ellipsis:
        return (ALL, ALL, ALL), index
    items = [*index] if isinstance(index, tuple) else [index]
    # Masks, None, several lists: torch's rules for these mix axes, so the whole is computed and torch applies them itself.
    if not {*map(type, items)} <= _SIMPLE and not _is_orthogonal(items):
        _check_numbers(items, shape)
        return (ALL, ALL, ALL), index
    missing = 4 - len(items)
    if Ellipsis in items:
        at, missing = items.index(Ellipsis), missing + 1
        items[at : at + 1] = [ALL] * missing
    else:
        items += [ALL] * missing
    if missing < 0 or Ellipsis in items:
        raise IndexError(f"a map has 4 axes (batch, head, query, key), which {index!r} does not fit")
    picks, rest = _pick_and_rest(items, shape)
    rest[3] = items[3]  # keys are picked last: a row's softmax needs all of them
    return (picks[0], picks[1], picks[2]), tuple(rest)


_SIMPLE = frozenset({slice, int, type(Ellipsis)})


def _pick_and_rest(items: list[Any], shape: tuple[int, ...]) -> tuple[list[Pick], list[Any]]:
    """For each axis what it is narrowed to, and what is left to do; of a number, to take it off."""
    picks: list[Pick] = [ALL] * 4
    rest: list[Any] = [ALL] * 4
    for at, item in enumerate(items):
        if type(item) is slice:
            if item != ALL:
                picks[at] = item
        elif isinstance(item, list):
            _check_range(at, item, shape)
            picks[at] = torch.as_tensor(item, device="cpu")
        else:
            _check_range(at, [item], shape)
            # one row stays an axis while it is computed, and goes afterwards
            picks[at], rest[at] = slice(item % shape[at], item % shape[at] + 1), 0
    return picks, rest


def _check_range(at: int, numbers: Iterable[int], shape: tuple[int, ...]) -> None:
    """Raise an IndexError for what an axis does not have."""
    # before any device sees it: a kernel that reads out of range ends the use of a GPU by the whole process
    for number in numbers:
        if not -shape[at] <= number < shape[at]:
            raise IndexError(f"{('batch', 'head', 'query', 'key')[at]} {number} is out of range: there are {shape[at]}")


def _check_numbers(items: list[Any], shape: tuple[int, ...]) -> None:
    """Check the numbers in an index that is left to torch, each along the axis that torch counts it to."""
    arrays = [_as_array(i) for i in items]
    axes = [_axes_of(i, a) for i, a in zip(items, arrays)]
    at = 0
    for item, array, count in zip(items, arrays, axes):
        if array is not None and array.dtype not in (torch.bool, torch.uint8) and array.numel() and at < len(shape):
            _check_range(at, map(int, array.aminmax()), shape)
        at += len(shape) - sum(axes) if item is Ellipsis else count


def _as_array(item: Any) -> Tensor | None:
    """What torch picks by the numbers of, or as a mask; None for an item that is neither."""
    if isinstance(item, Tensor) or item is None or item is Ellipsis or isinstance(item, (slice, bool)):
        return item if isinstance(item, Tensor) else None
    return torch.as_tensor(item, device="cpu")


def _axes_of(item: Any, array: Tensor | None) -> int:
    """How many axes an item of an index stands for."""
    if array is None:
        return int(isinstance(item, slice))
    return array.ndim if array.dtype in (torch.bool, torch.uint8) else 1


def _is_orthogonal(items: list[Any]) -> bool:
    """Whether each item picks along an axis of its own."""
    return all(_is_simple(i) for i in items) and sum(_is_list(i) for i in items) <= 1


def _is_simple(item: Any) -> bool:
    """Whether an item of an index picks along one axis and leaves the others alone."""
    # bools are masks to torch, and tensors and arrays have rules of their own, though both count as integers by __index__
    integer = hasattr(item, "__index__") and not isinstance(item, (bool, Tensor)) and getattr(item, "ndim", 0) == 0
    return isinstance(item, slice) or item is Ellipsis or integer or _is_list(item)


def _is_list(item: Any) -> bool:
    return isinstance(item, list) and bool(item) and all(type(i) is int for i in item)


def visit_chunks(name: str, part: Source, visit: Callable[[slice, slice, T], None], form: Callable[[Source], T]) -> None:
    """Compute a part of a map in chunks: some rows of one item of the batch, or all rows of several.

    A chunk has 2**20 elements on a CPU, 2**25 elsewhere, or one row of all heads of an item if that is more.
    """
    most = _CHUNK if part.device.type == "cpu" else 32 * _CHUNK
    batch, _, rows, _ = part.shape
    for items in spans(batch, most // max(1, prod(part.shape[1:]))):
        with TellWhy(name):
            few = part.narrow(items)
            cuts = list(spans(rows, most // max(1, prod(few.shape) // max(1, rows))))
            few = few.prepare() if len(cuts) > 1 else few  # else each chunk of rows would project all keys anew
        for span in cuts:
            with TellWhy(name):
                chunk = form(few.narrow(rows=span))
            visit(items, span, chunk)


def spans(count: int, step: int) -> Iterator[slice]:
    """Slices one after the other up to a count, each of `step` or, at the end, fewer."""
    # one slice also of nothing: a batch of no images has maps, pictures and figures of none
    step = max(1, step)
    yield from (slice(start, min(start + step, count)) for start in range(0, max(1, count), step))
