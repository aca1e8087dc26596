"""Where the queries and keys of a map lie on the image, as the layout of its class and the block around it tell."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from ..errors import LayoutError, TokenError
from ..image.geometry import Geometry
from ..image.images import Patches
from ..image.snapshot import ModuleSnapshot
from ..image.tokens import Size, Tokens
from ..image.trunk import path_to
from .registry import Shape, attends_to_channels, find_layout, find_partition, qualified_name


def find_block(model: nn.Module, name: str) -> nn.Module | None:
    """The innermost block around a module that cuts its input into windows."""
    return find_blocks(model, [name])[name]


def find_blocks(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module | None]:
    """`find_block` for several modules by name; what is around many is looked at once."""
    cuts: dict[nn.Module, bool] = {}
    found: dict[str, nn.Module | None] = {}
    for name in names:
        found[name] = None
        for module in path_to(model, name):
            if module not in cuts:
                cuts[module] = find_partition(module) is not None
            if cuts[module]:
                found[name] = module
    return found


def find_windows(geometry: Geometry) -> Tokens | None:
    """What an attention module is given by the block around it that cuts windows; None where there is no such block.

    Raises:
        TokenError: there is one, but somebody else called the module.
        LayoutError: its partition returned no `Tokens`.
    """
    if (block := geometry.block) is None or (find := find_partition(block)) is None:
        return None
    if geometry.block_arguments is None:
        raise TokenError(
            f"{geometry.name!r} was called, but not the {type(block).__name__} around it that cuts the image for it, so it is "
            "not known where its tokens lie; slice the map itself, m[...]."
        )
    windows: Any = find(ModuleSnapshot(block, geometry.block_settings), geometry)
    if not isinstance(windows, Tokens):
        raise LayoutError(
            f"the partition of {qualified_name(type(block))} returned {_describe(windows)}; return the Tokens that the "
            "attention inside is given, such as hookattn.image.cut_windows((rows, columns), window)."
        )
    return windows


T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Places:
    """Where the axes of a map lie, once and for all: what a map knows that outlives its model, or goes into a file.

    Attributes:
        axes: what the four axes are.
        tokens: what queries and keys stand for, or why that is not known.
        cell_sizes: (height, width) in pixels of a cell of their grids, or why that is not known.
    """

    axes: tuple[str, str, str, str]
    tokens: tuple[Tokens, Tokens] | str
    cell_sizes: dict[Size, tuple[float, float] | str]

    def cell_size(self, grid_size: Size) -> tuple[float, float]:
        """See `Geometry.cell_size`."""
        return raise_reason(self.cell_sizes[grid_size])


def settle(geometry: Geometry | Places, shape: Shape) -> Places:
    """The places of a map of this shape, for good."""
    if isinstance(geometry, Places):
        return geometry
    tokens = keep_reason(lambda: find_tokens(geometry, shape))
    grids = () if isinstance(tokens, str) else dict.fromkeys(each.grid_size for each in tokens)
    cell_sizes = {grid: keep_reason(partial(geometry.cell_size, grid)) for grid in grids}
    return Places(name_axes(geometry, shape), tokens, cell_sizes)


def keep_reason(find: Callable[[], T]) -> T | str:
    """What is found, or in words why it is not known, for `raise_reason` to raise when somebody asks."""
    try:
        return find()
    except TokenError as error:
        return str(error)


def raise_reason(found: T | str) -> T:
    """What was found; raises the reason that was kept instead."""
    if isinstance(found, str):
        raise TokenError(found)
    return found


def find_tokens(geometry: Geometry | Places, shape: Shape) -> tuple[Tokens, Tokens]:
    """What the queries and the keys of a map stand for.

    Raises:
        TokenError: they are channels, or windows or grids of a kind that is not known.
        LayoutError: what a layout or a partition returned does not fit the map.
    """
    if isinstance(geometry, Places):
        return raise_reason(geometry.tokens)
    module = geometry.module
    if attends_to_channels(module):
        raise TokenError(f"{geometry.name!r} attends from channels to channels, which lie nowhere on the image; slice m[...].")
    try:
        queries, keys = _lay_out(module, geometry, shape)
    except LayoutError:
        raise
    except TokenError as error:
        if pieces := _explain_pieces(geometry, shape, 1):  # says more than a count that is no grid
            raise TokenError(pieces) from error
        raise
    if pieces := _explain_pieces(geometry, shape, keys.windows):
        raise LayoutError(pieces)
    if (len(queries), len(keys)) != shape[2:]:
        raise LayoutError(
            f"{geometry.name!r} has {shape[2]} queries and {shape[3]} keys, not the {len(queries)} and {len(keys)} that its "
            "image makes; slice the map itself, m[...]."
        )
    return geometry.measured(queries, keys)


def name_axes(geometry: Geometry | Places, shape: Shape) -> tuple[str, str, str, str]:
    """What the four axes of a map are."""
    if isinstance(geometry, Places):
        return geometry.axes
    if attends_to_channels(geometry.module):
        return "batch", "head", "channel", "channel"
    return _name_first_axis(geometry, shape), "head", "query", "key"


def _name_first_axis(geometry: Geometry, shape: Shape) -> str:
    images, entries = _count_images(geometry), shape[0]
    if geometry.frames and geometry.may_be_frames(shape[3]):
        return "sequence"
    if images and entries and images % entries == 0:  # fewer where an entry holds several: frames of a clip, tiles
        return "batch"
    try:
        return "batch" if find_tokens(geometry, shape)[1].windows == 1 else "batch * windows"
    except TokenError:
        return "batch" if not images and entries == _count_batch(geometry) else "sequence"


def _count_batch(geometry: Geometry) -> int:
    """How many entries the module itself was called with, by its first tensor; 0 without one, 1 if that is not batched."""
    args, kwargs = geometry.arguments
    size = next((each for each in (*args, *kwargs.values()) if isinstance(each, torch.Size)), None)
    if size is None or len(size) < 3:
        return int(size is not None)
    return size[0 if getattr(geometry.module, "batch_first", True) else 1]


def find_queries(shape: Shape, keys: Tokens) -> Tokens:
    """The queries where nothing is known but their number: the keys themselves, the class token, or some without a place."""
    if shape[2] == shape[3]:
        return keys
    if shape[2] == 1 and keys.prefix[:1] == ("cls",):
        return Tokens(("cls",), (0, 0))
    return Tokens(tuple(f"query{i}" for i in range(shape[2])), (0, 0))


def _lay_out(module: nn.Module, geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    """Queries and keys as the layout of the class tells; without one what the block cut, else all tokens of the image."""
    found = find_layout(module)
    if found is None:  # most blocks that cut windows hold a class that is used without windows too
        keys = find_windows(geometry) or geometry.tokens(shape[3])
        return find_queries(shape, keys), keys
    both: Any = found(geometry, shape)
    whose = f"the layout of {qualified_name(type(module))} returned"
    if not (isinstance(both, tuple) and len(both) == 2 and all(isinstance(tokens, Tokens) for tokens in both)):
        raise LayoutError(
            f"{whose} {_describe(both)}; return two Tokens, of the queries and of the keys, such as `tokens, tokens` with "
            "tokens = hookattn.image.whole_grid((rows, columns))."
        )
    if both[0].windows != both[1].windows:
        raise LayoutError(
            f"{whose} queries in {both[0].windows} windows and keys in {both[1].windows}; return both for the same windows."
        )
    return both[0], both[1]


def _explain_pieces(geometry: Geometry, shape: Shape, windows: int) -> str | None:
    """What is wrong if the first axis of a map does not hold so many windows of each image; None if it does."""
    images = _count_images(geometry)
    if shape[0] % windows == 0 and images in (0, shape[0] // windows):
        return None
    return (
        f"{geometry.name!r} sees {images or 'its'} images as {shape[0]} pieces (windows, or some such), and it is not known "
        "how a piece lies on its image; slice the map itself, m[...]."
    )


def _count_images(geometry: Geometry) -> int:
    """How many images the forward looked at; 0 where that is not known."""
    images = geometry.images
    return 0 if images is None else len(images.valid) if isinstance(images, Patches) else images[0]


def _describe(value: Any) -> str:
    """What a layout or a partition returned, as an error names it."""
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {', '.join(type(part).__name__ for part in value) or 'nothing'}"
    return f"a {type(value).__name__}"
