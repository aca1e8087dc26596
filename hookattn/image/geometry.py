"""What of a call outlives its tensors and tells where its tokens lie: sizes, images, the block that cuts windows."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import LayoutError, TokenError
from .cells import Cells, coarsen, find_cells
from .images import Images, Patches
from .sizes import STRIDING, pair
from .tokens import Size, Tokens
from .trunk import Cut, cut_of, grid_size, path_to, reductions_of, sees_patches, stem_grid, trunk_of
from .windows import whole_grid

_PLAIN = frozenset({int, float, bool, str, type(None)})
ArgumentSizes = tuple[tuple[Any, ...], dict[str, Any]]
"""What a module was called with, tensors by their sizes: positional, then by name."""


class Geometry(NamedTuple):
    """What surrounds a call of an attention module; what a layout or a partition tells its tokens from.

    `argument`, `block_argument` and `tokens` are what most need; `module` is the attention.

    Attributes:
        model: the recorded model.
        name: name of the module in it.
        module: the attention module.
        images: the pictures the forward looked at.
        arguments: what the module was called with, tensors by their sizes.
        block: the block around it that cuts its input into windows; None if there is no such block.
        block_arguments: what that block was called with, likewise; None if nobody called it.
        block_settings: numbers of that block at the time, such as the size of a window.
        cut: how the model cut the image then; None where its stem was not called.
        frames: how many frames a clip may have that the model was called with.
    """

    model: nn.Module
    name: str
    module: Any
    images: Images = None
    arguments: ArgumentSizes = ((), {})
    block: nn.Module | None = None
    block_arguments: ArgumentSizes | None = None
    block_settings: Mapping[str, Any] = MappingProxyType({})
    cut: Cut | None = None
    frames: tuple[int, ...] = ()

    @property
    def trunk(self) -> nn.Module:
        """The part of the model that cuts the image into patches."""
        return trunk_of(self.model, self.name) if self.cut is None else self.cut.trunk

    @property
    def _cut(self) -> Cut:
        return cut_of(self.trunk) if self.cut is None else self.cut

    @property
    def image_size(self) -> Size | None:
        """(height, width) of the images; None where none were seen, or each has its own."""
        return None if self.images is None or isinstance(self.images, Patches) else self.images[1:]

    def cell_size(self, grid_size: Size) -> tuple[float, float]:
        """(height, width) in pixels of a cell of a grid over the image.

        The image is as it came into the part of the model that cuts it. Cells are as large as the step from one to the next,
        also where layers overlap, reach over the border of the image or leave some of it out.

        Raises:
            TokenError: the size of the image or of its patches is not known, or the grid has none.
        """
        if not all(grid_size):
            raise TokenError(f"tokens of {self.name!r} without a grid of patches have no size in pixels.")
        if isinstance(self.images, Patches):
            patch = self.images.patch_size or self._cut.patch_size
            if patch is None:
                raise TokenError(
                    f"the {type(self.trunk).__name__} around {self.name!r} was given patches and has no `patch_size`, so they "
                    "have no size in pixels; set that attribute to (height, width), or slice the map itself, m[...]."
                )
            return patch
        if self.image_size is None:
            raise TokenError(
                f"no image was seen before {self.name!r} ran, so its tokens have no place in pixels; inside the block of the "
                "recorder, call the model on images (batch, channels, height, width), or slice the map itself, m[...]."
            )
        return self._find_cells(self.image_size, grid_size).size

    def _find_cells(self, image_size: Size, grid_size: Size) -> Cells:
        cut = self._cut
        return cut.remember(
            (find_cells, image_size, grid_size),
            lambda: find_cells(image_size, grid_size, cut.patch_size, stem_grid(cut, image_size), reductions_of(cut.trunk)),
        )

    def measured(self, queries: Tokens, keys: Tokens) -> tuple[Tokens, Tokens]:
        """Queries and keys with how much of the image their grids cover and see, where that is known."""
        size = self.image_size
        if size is None or not all(size):
            return queries, keys
        if queries is keys and keys.places is None:  # of the whole grid, as most are: one for all layers
            asked = (_measure, keys.prefix, keys.grid_size, keys.spread, keys.extent, keys.seen, size)
            return self._cut.remember(asked, lambda: self._measure_both(keys, keys, size))
        return self._measure_both(queries, keys, size)

    def _measure_both(self, queries: Tokens, keys: Tokens, size: Size) -> tuple[Tokens, Tokens]:
        cells = {each.grid_size: self._find_cells(size, each.grid_size) for each in (queries, keys) if all(each.grid_size)}
        if len(cells) == 2:  # what the attention itself tells of how it makes one of the other says more than sizes
            strides = sorted({pair(m.stride)[0] for m in self.module.modules() if isinstance(m, STRIDING)})
            found = coarsen(cells[queries.grid_size], queries.grid_size, keys.grid_size, strides)
            cells[keys.grid_size] = found or cells[keys.grid_size]
        measured = _measure(queries, cells, size)
        return measured, measured if keys is queries else _measure(keys, cells, size)

    def path(self) -> Iterator[nn.Module]:
        """The module and all that hold it, outwards to the model."""
        yield from reversed(path_to(self.model, self.name))

    def may_be_frames(self, count: int) -> bool:
        """Whether so many tokens may be the same patch in all frames of a clip, which are as many as the patches of a frame."""
        sees_frames = self.images is not None and not isinstance(self.images, Patches)
        return sees_frames and {count, count - len(self._cut.prefix)} & {*self.frames} != set()

    def _check_are_patches(self, count: int) -> None:
        if self.may_be_frames(count):
            raise TokenError(
                f"the {count} tokens of {self.name!r} may be frames of a clip or patches of a frame, since there are as many "
                "of one as of the other; call the model on clips of another length, or slice the map itself, m[...]."
            )

    @property
    def _called(self) -> tuple[int, ...]:
        """The shape of the first tensor that the attention was called with, without the batch."""
        args, kwargs = self.arguments
        return next((tuple(each[1:]) for each in (*args, *kwargs.values()) if isinstance(each, torch.Size)), ())

    def find_holder(self, attribute: str) -> Any:
        """The innermost module around the call, itself included, that has such an attribute.

        Raises:
            TokenError: there is none.
        """
        for module in self.path():
            if hasattr(module, attribute):
                return module
        raise TokenError(
            f"{self.name!r} is in no module with {attribute!r}, so it is not known where its tokens lie; slice m[...]."
        )

    def argument(self, name: str) -> Any:
        """What the attention was called with for one parameter of its `forward`: a tensor by its shape, all else as it is.

        Raises:
            LayoutError: its forward has no such parameter.
        """
        return _bind(self.module, self.arguments, name)

    def block_argument(self, block: nn.Module, name: str) -> Any:
        """What the block that cuts windows was called with for one parameter of its `forward`, a tensor by its shape.

            _, rows, columns, _ = geometry.block_argument(self, "x")  # in a partition, whose first argument is the block

        Raises:
            LayoutError: its forward has no such parameter, or no block that cuts windows is around the attention.
        """
        if self.block is None or self.block_arguments is None:
            raise LayoutError(f"no block around {self.name!r} cuts windows; use geometry.argument({name!r}) in a layout.")
        return _bind(block, self.block_arguments, name)

    def tokens(self, count: int, *, prefix: bool | None = None) -> Tokens:
        """What so many tokens of the whole image stand for.

        Args:
            count: how many there are.
            prefix: whether the model's prefix tokens are among them; None tries it with, then without them.

        Raises:
            TokenError: the count does not fit the image, or the module does not see patches.
        """
        cut = self._cut
        if not cut.remember((sees_patches, self.model, self.name), lambda: sees_patches(self.model, self.name)):
            raise TokenError(
                f"{self.name!r} is outside of the part of the {type(self.model).__name__} that cuts the image into patches, so "
                "its tokens may be words, or what was made of patches; slice the map itself, m[...]."
            )
        names, size, called = cut.prefix, self.image_size, self._called
        # where it is not known whether prefix tokens are among them, with them is tried first
        prefixes = {None: (names, ()), True: (names,), False: ((),)}[prefix]
        if isinstance(self.images, Patches):
            return _lay_out_patches(self.images, prefixes, count)
        for each in prefixes:
            asked = size, count - len(each), prefix is not None, called
            if (grid := cut.remember((grid_size, *asked), partial(grid_size, cut, *asked))) is not None:
                self._check_are_patches(count)
                return whole_grid(grid, each)
        seen = "an image of unknown size" if size is None else f"an image of {size[0]} x {size[1]} pixels"
        how = {None: "with or without", True: "with", False: "without"}[prefix]
        raise TokenError(
            f"{count} tokens are no grid of patches over {seen}, {how} {len(names)} prefix tokens "
            f"({type(cut.trunk).__name__}); tokens may have been dropped or merged, pooled or cut into windows. Slice the map "
            "itself, m[...]."
        )


def _measure(tokens: Tokens, cells: dict[Size, Cells], size: Size) -> Tokens:
    if (found := cells.get(tokens.grid_size)) is None:
        return tokens
    height, width = (n * side / all_of_it for n, side, all_of_it in zip(tokens.grid_size, found.size, size))
    return replace(tokens, extent=(height, width), seen=(found.seen[0] / size[0], found.seen[1] / size[1]))


def measure_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> ArgumentSizes:
    """What a module is called with, tensors by their sizes."""
    # runs in every recorded call: what is a plain tensor or a number takes no function call
    positional: tuple[Any, ...] = ()
    for value in args:
        positional += (value.shape if type(value) is Tensor else _size(value),)
    named = {**kwargs}
    for name in kwargs:
        if type(value := kwargs[name]) not in _PLAIN:
            named[name] = _size(value)
    return positional, named


def _bind(module: nn.Module, arguments: ArgumentSizes, name: str) -> Any:
    """One argument of a forward by the name it has there."""
    bound = inspect.signature(module.forward).bind(*arguments[0], **arguments[1])
    bound.apply_defaults()
    if name not in bound.arguments:
        forward = getattr(module.forward, "__qualname__", "forward")
        raise LayoutError(f"{forward} has no parameter {name!r}, only {', '.join(bound.arguments)}.")
    return bound.arguments[name]


def _lay_out_patches(images: Patches, prefixes: tuple[tuple[str, ...], ...], count: int) -> Tokens:
    """Tokens of images that came as patches, each laid in the upper left corner of a grid that holds them all."""
    patches = images.valid.shape[1]
    prefix = next((names for names in prefixes if patches + len(names) == count), None)
    if prefix is None:
        raise TokenError(
            f"{count} tokens are not the {patches} patches that were given and {max(map(len, prefixes))} prefix tokens; some "
            "may have been dropped or merged. Slice the map itself, m[...]."
        )
    coordinates = images.coordinates.long().cpu()
    valid = images.valid.bool().cpu() & (coordinates >= 0).all(-1)  # Gemma marks padding by the coordinates
    rows, columns = (int(coordinates[..., i][valid].max()) + 1 for i in range(2))
    # (images, patches): numbers on the common grid
    places = torch.where(valid, coordinates[..., 0] * columns + coordinates[..., 1], -1)
    return Tokens(prefix, (rows, columns), places[:, None])


def _size(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape
    if isinstance(value, (tuple, list)):
        return tuple([_size(v) for v in value])
    return value if isinstance(value, (int, float, str)) else None
