"""Tokens of a whole grid, and of a grid that is cut or pooled: what a layout or a partition is made of.

Grids, windows and shifts are (rows, columns); windows and shifts may be one number for both. The grid goes through attention
window by window, the windows of an image row by row, and so do the tokens of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Union

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..errors import TokenError
from .sizes import pair
from .tokens import Size, Tokens

Sides = Union[int, Sequence[int]]
"""(rows, columns), or one number for both."""


def whole_grid(grid_size: Sequence[int], prefix: tuple[str, ...] = ()) -> Tokens:
    """All patches of a grid in one window, row by row, for attention that sees the whole image.

    Args:
        grid_size: (rows, columns) of patches.
        prefix: names of the tokens before the patches, such as ("cls",).

    Raises:
        TokenError: the grid has not two sides, as where attention was called with a list of tokens.
    """
    if len(grid_size) != 2:
        raise TokenError(f"tokens of shape {' x '.join(map(str, grid_size))} are no grid of (rows, columns); slice m[...].")
    rows, columns = grid_size
    return Tokens(prefix, (int(rows), int(columns)))


def cut_windows(grid_size: Sequence[int], window: Sides, shift: Sides = 0, *, strided: bool = False) -> Tokens:
    """A grid that is rolled, padded and cut into windows that do not overlap, as in timm's Swin, MaxViT and SAM.

        cut_windows((14, 14), 7, shift=3)  # 4 windows of 49 tokens

    Args:
        grid_size: (rows, columns) of patches.
        window: of one window; the grid is padded at its lower and right border to a multiple. Padding lies nowhere.
        shift: by how much the grid is rolled up and left before it is padded and cut.
        strided: a window takes patches at equal distances from all over the grid, as MaxViT's grid attention does, and not
            neighbours.

    Raises:
        TokenError: the window has no rows or no columns.
    """
    # the same on numbers of places as the block does on features: what stands where is read off
    places = _number(grid_size).roll([-n for n in pair(shift)], (0, 1))
    return _cut(grid_size, _pad(places, window), window, strided=strided)


def cut_padded_windows(grid_size: Sequence[int], window: Sides, shift: Sides = 0) -> Tokens:
    """A grid that is padded first, then rolled and cut, as in the Swin of torchvision and of transformers.

    It differs from `cut_windows` where the grid is no multiple of the window and shifted: padding then stands in the midst of
    the last windows.

    Args:
        grid_size: (rows, columns) of patches.
        window: of one window.
        shift: by how much the padded grid is rolled up and left.

    Raises:
        TokenError: the window has no rows or no columns.
    """
    places = _pad(_number(grid_size), window).roll([-n for n in pair(shift)], (0, 1))
    return _cut(grid_size, places, window)


def slide_windows(grid_size: Sequence[int], window: int, step: int, border: int) -> Tokens:
    """Square windows that overlap, as `torch.nn.functional.unfold` takes them: a halo, or a neighbourhood of each token.

        slide_windows((14, 14), window=3, step=1, border=1)  # 196 windows of 9 tokens

    Args:
        grid_size: (rows, columns) of patches.
        window: side of one window.
        step: distance from one window to the next.
        border: how far the grid is padded on each side. Padding lies nowhere.
    """
    rows, columns = (int(n) for n in grid_size)
    padded = F.pad(_number(grid_size), (border,) * 4, value=-1)
    windows = padded.unfold(0, window, step).unfold(1, window, step)
    return Tokens((), (rows, columns), rearrange(windows, "h w y x -> 1 (h w) (y x)"))


def pool_windows(tokens: Tokens, window: Sequence[int], stride: Sequence[int]) -> Tokens:
    """Tokens that are pooled inside their windows: each stands for a cell of a grid that is coarser by the stride.

    A cell that is not full at the border of the grid is left out of the coarser grid, and a token of such a cell or of padding
    stands for nothing.

    Args:
        tokens: what is pooled, in windows, without prefix tokens.
        window: (rows, columns) of one window.
        stride: (rows, columns) of one cell.
    """
    rows, columns = (n // s for n, s in zip(tokens.grid_size, stride))
    # a pooled token is named by the first place of its cell
    corners = rearrange(tokens.patches, "i w (y x) -> i w y x", y=window[0], x=window[1])[..., :: stride[0], :: stride[1]]
    places = corners.flatten(-2)
    row, column = places // tokens.grid_size[1] // stride[0], places % tokens.grid_size[1] // stride[1]
    inside = (places >= 0) & (row < rows) & (column < columns)
    return Tokens((), (rows, columns), torch.where(inside, row * columns + column, -1))


def _number(grid_size: Sequence[int]) -> Tensor:
    """(rows, columns): the number of each patch, row by row."""
    rows, columns = (int(n) for n in grid_size)
    return torch.arange(rows * columns, device="cpu").reshape(rows, columns)


def _pad(places: Tensor, window: Sides) -> Tensor:
    """Places with -1 below and to the right, up to whole windows."""
    height, width = pair(window)
    if height < 1 or width < 1:
        raise TokenError(f"a window of {height} x {width} cuts nothing: give (rows, columns), or use whole_grid.")
    return F.pad(places, (0, -places.shape[1] % width, 0, -places.shape[0] % height), value=-1)


def _cut(grid_size: Sequence[int], places: Tensor, window: Sides, *, strided: bool = False) -> Tokens:
    """Tokens of places that are whole windows."""
    size: Size = (int(grid_size[0]), int(grid_size[1]))
    # strided, the rows of a window stand h apart: (y h) and not (h y)
    pattern = "(y h) (x w) -> 1 (h w) (y x)" if strided else "(h y) (w x) -> 1 (h w) (y x)"
    return Tokens((), size, rearrange(places, pattern, y=pair(window)[0], x=pair(window)[1]))
