"""What surrounds a call as far as it tells where its tokens lie: the model that cuts the image, the block that cuts windows."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Union

import torch
from torch import Tensor, nn

from ..errors import TokenError
from ..tokens import Size, Tokens, whole
from .sizes import pair, size_after

_EMBEDDINGS = ("patch_embed", "embeds", "pixel_embed")
_STEMS = (*_EMBEDDINGS, "patch_embeddings", "embeddings", "conv_proj", "to_patch_embedding", "conv1", "stem")
_CLASS = ("cls_token", "class_token", "class_embedding")
_DISTILLED = ("dist_token", "distillation_token")
_REGISTERS = ("reg_token", "register_tokens")
_PLAIN = frozenset({int, float, bool, str, type(None)})
_VOCABULARY = ("token_embedding", "word_embeddings", "text_embeddings", "embed_tokens", "wte")


class Patches(NamedTuple):
    """Images that came as patches, each with its own grid, padded to one length (NaFlex).

    Attributes:
        coordinates: (images, patches, 2), the row and column of each patch.
        valid: (images, patches), False where there is only padding.
        patch_size: (height, width) of a patch in pixels, where the patches themselves tell.
    """

    coordinates: Tensor
    valid: Tensor
    patch_size: Size | None = None


Given = tuple[tuple[Any, ...], dict[str, Any]]
"""What a module was called with, tensors by their sizes: positional, then by name."""

Images = Union[tuple[int, int, int], Patches, None]
"""(images, height, width), images that came as patches, or None where none were seen."""


class Setting(NamedTuple):
    """What surrounds a call of an attention module.

    Attributes:
        model: the recorded model.
        name: name of the module in it.
        images: the pictures the forward looked at.
        given: what the module was called with.
        around: the same of the block that cuts its input into windows, if there is such a block.
        facts: numbers of that block at the time, such as the size of a window.
    """

    model: nn.Module
    name: str
    images: Images = None
    given: Given = ((), {})
    around: Given | None = None
    facts: Mapping[str, Any] = MappingProxyType({})

    @property
    def module(self) -> Any:
        """The attention module."""
        return next(iter(self.path()))

    @property
    def trunk(self) -> nn.Module:
        """The part of the model that cuts the image into patches."""
        return trunk_of(self.model, self.name)

    @property
    def image_size(self) -> Size | None:
        """(height, width) of the images; None where none were seen, or each has its own."""
        return None if self.images is None or isinstance(self.images, Patches) else self.images[1:]

    def cell_size(self, grid_size: Size) -> tuple[float, float]:
        """(height, width) in pixels of a cell of a grid that covers the image.

        The image is as it came into the part of the model that cuts it. A grid of its patches has cells of their size, also
        where they reach over the border of the image or leave some of it out.

        Raises:
            TokenError: the size of the image or of its patches is not known.
        """
        patch = patch_size(self.trunk)
        if isinstance(self.images, Patches):
            patch = self.images.patch_size or patch
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
        height, width = (side / n for side, n in zip(self.image_size, grid_size))
        if patch and all(n in (s // p, -(-s // p)) for n, s, p in zip(grid_size, self.image_size, patch)):
            return patch
        return height, width

    def path(self) -> Iterator[nn.Module]:
        """The module and all that hold it, outwards to the model."""
        yield from reversed(list(path_to(self.model, self.name)))

    def holder(self, attribute: str) -> Any:
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
        """What the module was called with for one parameter of its forward, a tensor by its size."""
        return argument(self.module, self.given, name)

    def block_argument(self, block: nn.Module, name: str) -> Any:
        """What the block around the module was called with for one parameter of its forward, a tensor by its size."""
        assert self.around is not None  # a partition is asked only if the block was called
        return argument(block, self.around, name)

    def tokens(self, count: int, *, prefix: bool | None = None) -> Tokens:
        """What so many tokens of the whole image stand for.

        Args:
            count: how many there are.
            prefix: whether the model's prefix tokens are among them; None tries it with, then without them.

        Raises:
            TokenError: the count does not fit the image.
        """
        if not sees_patches(self.model, self.name):
            raise TokenError(
                f"{self.name!r} is outside of the part of the {type(self.model).__name__} that cuts the image into patches, so "
                "its tokens may be words, or what was made of patches; slice the map itself, m[...]."
            )
        trunk = self.trunk
        names = prefix_names(trunk)
        if isinstance(self.images, Patches):
            return _of_patches(self.images, {None: (names, ()), True: (names,), False: ((),)}[prefix], count)
        size = self.image_size
        for each in {None: (names, ()), True: (names,), False: ((),)}[prefix]:
            grid = grid_size(trunk, size, count - len(each), exactly=prefix is not None)
            if grid is not None:
                return whole(grid, each)
        seen = "an image of unknown size" if size is None else f"an image of {size[0]} x {size[1]} pixels"
        how = {None: "with or without", True: "with", False: "without"}[prefix]
        raise TokenError(
            f"{count} tokens are no grid of patches over {seen}, {how} {len(names)} prefix tokens "
            f"({type(trunk).__name__}); tokens may have been dropped or merged, pooled or cut into windows. Slice the map "
            "itself, m[...]."
        )


def plain_facts(module: nn.Module) -> dict[str, Any]:
    """Attributes of a module that are numbers, words or tuples of such."""
    return {name: value for name, value in vars(module).items() if isinstance(value, (int, float, str, tuple))}


class AsItWas:
    """A module whose numbers are those of an earlier time, all else as it is."""

    def __init__(self, module: nn.Module, facts: Mapping[str, Any]) -> None:
        self._module, self._facts = module, facts

    def __getattr__(self, name: str) -> Any:
        return self._facts[name] if name in self._facts else getattr(self._module, name)


def images_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Images:
    """The images among what a model or its stem is called with: (batch, channels, height, width), or patches of them."""
    named = {**kwargs, **args[0]} if args and isinstance(args[0], dict) else kwargs
    if named and (patches := _patches_in(args, named)) is not None:
        return patches
    for value in (*args, *named.values()):
        if isinstance(value, Tensor) and value.dim() == 4:
            images, _, height, width = value.shape
            return images, height, width
    return None


def _patches_in(args: tuple[Any, ...], named: Mapping[str, Any]) -> Patches | None:
    """The patches of images among arguments, told by the names of some."""
    coordinates, valid = named.get("patch_coord"), named.get("patch_valid")
    if isinstance(coordinates, Tensor):
        everywhere = torch.ones(coordinates.shape[:2], dtype=torch.bool)
        patches = next((a for a in (*args, *named.values()) if isinstance(a, Tensor) and a.dim() == 5), None)
        size = None if patches is None else (int(patches.shape[2]), int(patches.shape[3]))
        return Patches(coordinates, valid if isinstance(valid, Tensor) else everywhere, size)
    shapes, patches = named.get("spatial_shapes"), named.get("pixel_values")
    if isinstance(shapes, Tensor) and isinstance(patches, Tensor) and patches.dim() == 3:
        rows, columns = shapes.cpu().long().T[..., None]
        numbers = torch.arange(patches.shape[1]).expand(len(patches), -1)
        return Patches(torch.stack((numbers // columns, numbers % columns), dim=-1), numbers < rows * columns)
    return None


def sizes_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
    """What a module is called with, tensors by their sizes."""
    given = tuple([a.shape if type(a) is Tensor else _size(a) for a in args])
    return given, {name: a if type(a) in _PLAIN else _size(a) for name, a in kwargs.items()}


def argument(module: nn.Module, given: Given, name: str) -> Any:
    """One argument of a forward by the name it has there."""
    bound = inspect.signature(module.forward).bind(*given[0], **given[1])
    bound.apply_defaults()
    return bound.arguments[name]


def path_to(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The model, and module after module down to the one of that name."""
    yield model
    module: nn.Module | None = model
    for part in name.split("."):
        module = None if module is None else module._modules.get(part)
        if module is not None:
            yield module


def trunk_of(model: nn.Module, name: str = "") -> nn.Module:
    """The part of a model that cuts the image into patches for the module of that name: the outermost with a stem."""
    return next((m for m in path_to(model, name) if _stem_attribute(m) is not None), model)


def stem_of(trunk: nn.Module) -> nn.Module | None:
    """The module the image goes into first: `patch_embed`, else the first 2-d convolution of the stem."""
    name = _stem_attribute(trunk)
    stem: nn.Module = trunk if name is None else getattr(trunk, name)
    return stem if name in _EMBEDDINGS else next((m for m in stem.modules() if isinstance(m, nn.Conv2d)), None)


def stems_of(trunks: Iterable[nn.Module]) -> dict[nn.Module, list[nn.Module]]:
    """The modules that images go into first, each with the parts of the model it cuts them for."""
    stems: dict[nn.Module, list[nn.Module]] = {}
    for trunk in dict.fromkeys(trunks):
        if (stem := stem_of(trunk)) is not None:
            stems.setdefault(stem, []).append(trunk)
    return stems


def prefix_names(trunk: nn.Module) -> tuple[str, ...]:
    """Names of the tokens a model puts before its patches."""
    holders = [trunk, *(m for name in _STEMS if isinstance(m := getattr(trunk, name, None), nn.Module))]

    def first(names: tuple[str, ...]) -> Any:
        return next((t for m in holders for n in names if isinstance(t := getattr(m, n, None), Tensor)), None)

    def numbered(name: str, token: Any) -> list[str]:
        count = 0 if token is None else token.shape[-2] if token.dim() > 1 else 1
        return [f"{name}{i}" for i in range(count)]

    classes = numbered("cls", first(_CLASS))
    names = ["cls"] if len(classes) == 1 else classes
    names += ["dist"] * (first(_DISTILLED) is not None) + numbered("reg", first(_REGISTERS))
    count = next((n for m in holders if isinstance(n := getattr(m, "num_prefix_tokens", None), int)), len(names))
    return tuple((names + [f"prefix{i}" for i in range(len(names), count)])[:count])


def patch_size(trunk: nn.Module) -> Size | None:
    """(height, width) in pixels of the patches a model cuts its image into; None where it does not say."""
    holders = [trunk, *(m for name in _STEMS if isinstance(m := getattr(trunk, name, None), nn.Module))]
    sizes = (pair(size) for m in holders if isinstance(size := getattr(m, "patch_size", None), (int, tuple, list)))
    return next(((int(size[0]), int(size[1])) for size in sizes if len(size) == 2), None)


def grid_size(trunk: Any, image_size: Size | None, patches: int, *, exactly: bool = False) -> Size | None:
    """(rows, columns) of so many patches; None if they are no grid over the image.

    Args:
        exactly: take the word of a patch embedding that tells its grid, where else a coarser one would do.
    """
    embed: Any = next((m for name in _EMBEDDINGS if isinstance(m := getattr(trunk, name, None), nn.Module)), None)
    grid = None
    if image_size is None:
        grid = getattr(embed, "grid_size", None)
    elif hasattr(embed, "dynamic_feat_size"):
        grid = embed.dynamic_feat_size(image_size)
    if grid is None and image_size is not None and any("PatchDrop" in type(m).__name__ for m in trunk.modules()):
        stem = stem_of(trunk)
        grid, exactly = (size_after(image_size, stem), True) if isinstance(stem, nn.Conv2d) else (None, exactly)
    if grid is not None and grid[0] * grid[1] == patches:
        return int(grid[0]), int(grid[1])
    if image_size is None or (grid is not None and exactly):
        return None
    return _factors(patches, image_size) or _halved(patches, image_size)


def sees_patches(model: nn.Module, name: str) -> bool:
    """Whether a module may see patches: it is in the part of the model that cuts the image, and no words come into that part.

    A model in which no part is known to cut the image is such a part itself.
    """
    for module in reversed(list(path_to(model, name))):
        if _has_vocabulary(module):
            return False
        if _stem_attribute(module) is not None:
            return True
    return all(_stem_attribute(module) is None for module in model.modules())


def _stem_attribute(module: nn.Module) -> str | None:
    return next((n for n in _STEMS if isinstance(m := getattr(module, n, None), nn.Module) and not _has_vocabulary(m)), None)


def _has_vocabulary(module: nn.Module) -> bool:
    """Whether words come in here, directly or through what embeds them."""
    holders = [module, *(m for name in _STEMS if isinstance(m := getattr(module, name, None), nn.Module))]
    return any(isinstance(getattr(m, name, None), nn.Module) for m in holders for name in _VOCABULARY)


def _of_patches(images: Patches, prefixes: tuple[tuple[str, ...], ...], count: int) -> Tokens:
    """Tokens of images that came as patches, each laid in the upper left corner of a grid that holds them all."""
    given = images.valid.shape[1]
    prefix = next((names for names in prefixes if given + len(names) == count), None)
    if prefix is None:
        raise TokenError(
            f"{count} tokens are not the {given} patches that were given and {max(map(len, prefixes))} prefix tokens; some may "
            "have been dropped or merged. Slice the map itself, m[...]."
        )
    coordinates = images.coordinates.long().cpu()
    valid = images.valid.bool().cpu() & (coordinates >= 0).all(-1)  # Gemma marks padding by the coordinates
    rows, columns = (int(coordinates[..., i][valid].max()) + 1 for i in range(2))
    places = torch.where(valid, coordinates[..., 0] * columns + coordinates[..., 1], -1)
    return Tokens(prefix, (rows, columns), places[:, None])


def _size(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape
    if isinstance(value, (tuple, list)):
        return tuple([_size(v) for v in value])
    return value if isinstance(value, (int, float, str)) else None


def _factors(patches: int, image_size: Size) -> Size | None:
    """Rows and columns of patches that cover the image without a rest and are square to within a tenth."""
    height, width = image_size
    pairs = [(rows, patches // rows) for rows in range(1, patches + 1) if patches % rows == 0]
    grids = [(rows, columns) for rows, columns in pairs if height % rows == 0 and width % columns == 0]
    stretched = {grid: abs(math.log(height / grid[0] * grid[1] / width)) for grid in grids}
    best = min(grids, key=stretched.__getitem__, default=None)
    return best if best is not None and stretched[best] < math.log(1.1) else None


def _halved(patches: int, image_size: Size) -> Size | None:
    """Rows and columns that are left of the pixels when they are halved again and again, odd numbers rounded up."""
    rows, columns = image_size
    while rows * columns > max(1, patches):
        rows, columns = -(-rows // 2), -(-columns // 2)
    return (rows, columns) if rows * columns == patches else None
