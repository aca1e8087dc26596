"""How large the cells of a grid are on the image, and how far the grid sees it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .tokens import Size


class Cells(NamedTuple):
    """The cells of a grid on an image, the first in its upper left corner.

    Attributes:
        size: (height, width) of a cell in pixels. Cells of layers that overlap are as large as the step from one to the next.
        seen: (height, width) in pixels of what the grid sees of the image; the rest fills no cell.
    """

    size: tuple[float, float]
    seen: tuple[float, float]


def find_cells(image_size: Size, grid_size: Size, patch_size: Size | None, stem_grid: Size | None) -> Cells:
    """The cells of a grid that a model made of an image in steps that divide it, each rounded up or down.

    Args:
        image_size: (height, width) of the image.
        grid_size: (rows, columns) of the grid.
        patch_size: (height, width) in pixels of the first step; None where it is not known.
        stem_grid: (rows, columns) after it; None where it is not known.
    """
    rows, columns = grid_size
    if patch_size and stem_grid:
        reach = _cover(stem_grid, patch_size, image_size)
        for steps in _powers(stem_grid, grid_size):
            size = patch_size[0] * steps, patch_size[1] * steps
            return Cells(size, _cover(grid_size, size, reach))
    if patch_size and all(n in (s // p, -(-s // p)) for n, s, p in zip(grid_size, image_size, patch_size)):
        return Cells(patch_size, _cover(grid_size, patch_size, image_size))
    if stem_grid is None and (patch_size or image_size[0] % rows or image_size[1] % columns):
        first = patch_size or (1, 1)
        for steps in _powers((image_size[0] / first[0], image_size[1] / first[1]), grid_size):
            size = first[0] * steps, first[1] * steps
            return Cells(size, _cover(grid_size, size, image_size))
    return Cells((image_size[0] / rows, image_size[1] / columns), image_size)


def _powers(before: tuple[float, float], after: Size) -> Iterator[int]:
    """Powers of two that divide the sides of one grid to those of another: rounded up, as most do, then down."""
    powers = [2**i for i in range(1 + int(max(before)).bit_length())]
    yield from (p for p in powers if all(-(-b // p) == a for a, b in zip(after, before)))
    yield from (p for p in powers if all(b // p == a for a, b in zip(after, before)))


def _cover(grid_size: Size, size: Size, reach: tuple[float, float]) -> tuple[float, float]:
    """(height, width) of what cells cover of what can be seen at all."""
    return min(grid_size[0] * size[0], reach[0]), min(grid_size[1] * size[1], reach[1])
