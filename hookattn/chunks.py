"""Parts of a map that are computed a chunk at a time, and what is added up over them without holding more than one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .functional import Source
from .projected import ALL, Pick

_CHUNK = 2**21
Visit = Callable[[slice, slice, Tensor], None]
"""What is called with a chunk: which items of the batch it is of, which rows, and (items, heads, rows, keys) itself."""


class Chunks(Protocol):
    """Has a part of a map computed and visited chunk by chunk; items and rows are counted from where the part begins."""

    def __call__(self, visit: Visit, batch: Pick = ALL, heads: Pick = ALL, rows: Pick = ALL) -> None: ...


def visit_chunks(part: Source, visit: Visit) -> None:
    """Compute a part of a map in chunks: some rows of one item of the batch, or all rows of several.

    A chunk has 2**21 elements on a CPU, which fit into its caches and into memory that is had without asking the system for it,
    2**24 elsewhere, or one row of all heads of an item if that is more.

    Args:
        part: what it is computed from.
        visit: called with each chunk.
    """
    most = _CHUNK if part.device.type == "cpu" else 8 * _CHUNK
    batch, _, rows, _ = part.shape
    for items in spans(batch, most // max(1, prod(part.shape[1:]))):
        few = part.narrow(items)
        cuts = list(spans(rows, most // max(1, prod(few.shape) // max(1, rows))))
        few = few.formed() if len(cuts) > 1 else few
        for span in cuts:
            visit(items, span, few.narrow(rows=span).probabilities())


def spans(count: int, step: int) -> Iterator[slice]:
    """Slices one after the other up to a count, each of so many or, at the end, fewer; at least one slice of at least one."""
    step = max(1, step)
    yield from (slice(start, min(start + step, count)) for start in range(0, max(1, count), step))


def mean_of_rows(chunks: Chunks, batch: int, heads: slice, selected: Tensor) -> Tensor:
    """The mean of some rows of each image, by the windows they are in.

    Of windows no others are computed than those that hold a selected row.

    Args:
        chunks: reads the map.
        batch: how many windows of all images there are.
        heads: which heads.
        selected: (images or 1, windows, queries), True where a row is selected.

    Returns:
        (images, windows, heads, keys), which sums to the mean over the windows of an image.
    """
    windows = selected.shape[1]
    weight = selected / selected.sum((1, 2), keepdim=True).clamp(min=1)
    asked, rows = (selected.any(0).any(axis).nonzero().flatten().tolist() or [0] for axis in (1, 0))
    only, within = slice(asked[0], None, windows) if len(asked) == 1 else ALL, slice(rows[0], rows[-1] + 1)
    weight = (weight[:, asked] if len(asked) == 1 else weight)[:, :, within]
    weight = weight.expand(batch // windows, -1, -1).flatten(0, 1)[:, None, :, None]
    sums: dict[int, Tensor] = {}

    def add(items: slice, span: slice, part: Tensor) -> None:
        share = (part * weight[items, :, span].to(part)).sum(2)
        sums[items.start] = sums[items.start] + share if items.start in sums else share

    chunks(add, only, heads, within)
    found = torch.cat(list(sums.values())).unflatten(0, (batch // windows, 1 if len(asked) == 1 else windows))  # type: ignore[no-untyped-call]
    return F.pad(found, (0, 0, 0, 0, asked[0], windows - 1 - asked[0])) if found.shape[1] < windows else found
