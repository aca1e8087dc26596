"""How large the cells of a grid are on the image, and how far the grid sees it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .tokens import Size

Sides = tuple[float, float]


class Cells(NamedTuple):
    """The cells of a grid on an image, the first in its upper left corner.

    Attributes:
        size: (height, width) of a cell in pixels. Cells of layers that overlap are as large as the step from one to the next.
        seen: (height, width) in pixels of what the grid sees of the image; the rest fills no cell.
    """

    size: Sides
    seen: Sides


def find_cells(
    image_size: Size, grid_size: Size, patch_size: Size | None, stem_grid: Size | None, told: Iterable[int] = ()
) -> Cells:
    """The cells of a grid that a model made of an image in steps that divide it, each rounded up or down.

    Args:
        image_size: (height, width) of the image.
        grid_size: (rows, columns) of the grid.
        patch_size: (height, width) in pixels of the first step; None where it is not known.
        stem_grid: (rows, columns) after it; None where it is not known.
        told: heights of cells that the model has by its own word, which are looked at first.
    """
    rows, columns = grid_size
    if patch_size and stem_grid:
        patches = Cells(patch_size, _cover(stem_grid, patch_size, image_size))
        steps = [height // patch_size[0] for height in told if height >= patch_size[0]]
        if found := coarsen(patches, stem_grid, grid_size, steps) or coarsen(patches, stem_grid, grid_size):
            return found
    if patch_size and all(n in (s // p, -(-s // p)) for n, s, p in zip(grid_size, image_size, patch_size)):
        return Cells(patch_size, _cover(grid_size, patch_size, image_size))
    if patch_size or image_size[0] % rows or image_size[1] % columns:
        height, width = patch_size or (1, 1)
        count = image_size[0] / height, image_size[1] / width
        if found := coarsen(Cells((height, width), image_size), count, grid_size):
            return found
    return Cells((image_size[0] / rows, image_size[1] / columns), image_size)


def coarsen(cells: Cells, before: Sides, after: Size, steps: Iterable[int] | None = None) -> Cells | None:
    """The cells of a grid that is coarser by a whole number, or by a power of two; None if there is no such number.

    Args:
        cells: those of the finer grid.
        before: (rows, columns) of it.
        after: (rows, columns) of the coarser grid.
        steps: the numbers there may be; None for powers of two.
    """
    numbers = [2**i for i in range(1 + int(max(before)).bit_length())] if steps is None else list(steps)
    # of one or two cells two numbers may be true; most layers pad, which rounds up
    up = (s for s in numbers if all(-(-b // s) == a for a, b in zip(after, before)))
    down = (s for s in numbers if all(b // s == a for a, b in zip(after, before)))
    step = next(up, None) or next(down, None)
    if step is None:
        return None
    size = cells.size[0] * step, cells.size[1] * step
    return Cells(size, _cover(after, size, cells.seen))


def _cover(grid_size: Size, size: Sides, reach: Sides) -> Sides:
    """(height, width) of what cells cover of what can be seen at all."""
    return min(grid_size[0] * size[0], reach[0]), min(grid_size[1] * size[1], reach[1])
