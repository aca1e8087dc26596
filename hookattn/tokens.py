"""What the tokens of a map stand for: prefix tokens first, then the patches of the image, row by row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Union

from torch import nn

from .errors import TokenError

Size = tuple[int, int]
Query = Union[str, int, tuple[int, int]]


@dataclass(frozen=True)
class Tokens:
    """The tokens along the key axis of a map, and along its query axis where queries and keys are the same tokens.

    Attributes:
        prefix: names of the tokens before the patches: "cls", "dist", "reg0", "reg1", ...
        grid_size: (rows, columns) of the patches that follow.
    """

    prefix: tuple[str, ...]
    grid_size: Size

    @property
    def num_prefix_tokens(self) -> int:
        """How many tokens stand before the first patch."""
        return len(self.prefix)

    def __len__(self) -> int:
        return len(self.prefix) + self.grid_size[0] * self.grid_size[1]

    def index(self, query: Query) -> int:
        """Where a token stands: by name ("cls", "reg0"), by (row, col) of its patch, negative from the end, or by number.

        Raises:
            TokenError: there is no such token; the message names what there is.
        """
        rows, columns = self.grid_size
        if isinstance(query, str):
            if query not in self.prefix:
                raise TokenError(f"there is no {query!r} token. {self.choices()}")
            return self.prefix.index(query)
        if isinstance(query, tuple) and len(query) == 2:
            row, column = query
            if not (-rows <= row < rows and -columns <= column < columns):
                raise TokenError(f"there is no patch {query}. {self.choices()}")
            return self.num_prefix_tokens + row % rows * columns + column % columns
        if isinstance(query, Integral) and not isinstance(query, bool):
            if not -len(self) <= query < len(self):
                raise TokenError(f"there is no token {query}. {self.choices()}")
            return query % len(self)
        raise TokenError(f"{query!r} is no query. {self.choices()}")

    def choices(self) -> str:
        """A sentence that lists the queries there are."""
        rows, columns = self.grid_size
        names = "".join(f"query={name!r}, " for name in self.prefix) or "no class token and no other prefix token; "
        return (
            f"There is: {names}query='mean' (of all patches), query=(row, col) with rows 0 to {rows - 1} and columns 0 to "
            f"{columns - 1}, query=i with i from 0 to {len(self) - 1}."
        )


def tokens_of(model: nn.Module, image_size: Size | None, count: int) -> Tokens:
    """Work out what `count` tokens of a model stand for when it looks at an image of `image_size`.

    Args:
        model: any model; timm's `num_prefix_tokens`, `cls_token`, `dist_token`, `reg_token` and `patch_embed` are read where
            it or a model inside it has them.
        image_size: (height, width) in pixels of what reached the patch embedding, None if that is not known.
        count: the length of the axis.

    Raises:
        TokenError: the count does not fit the image.
    """
    trunk = trunk_of(model)
    prefix = _prefix_names(trunk)
    for names in (prefix, ()):
        grid = _grid_size(trunk, image_size, count - len(names))
        if grid is not None:
            return Tokens(names, grid)
    seen = "an image of unknown size" if image_size is None else f"an image of {image_size[0]} x {image_size[1]} pixels"
    raise TokenError(
        f"{count} tokens are no grid of patches over {seen}, with or without {len(prefix)} prefix tokens "
        f"({type(trunk).__name__}). Windows, pooled tokens and channels are no token grid; slice the map itself, m[...]."
    )


def trunk_of(model: nn.Module) -> nn.Module:
    """The model that cuts the image into patches: the outermost one with a `patch_embed`, else the model itself."""
    return next((m for m in model.modules() if isinstance(getattr(m, "patch_embed", None), nn.Module)), model)


def stem_of(model: nn.Module) -> nn.Module | None:
    """The module the image goes into first: `patch_embed`, else the first 2-d convolution."""
    embed = getattr(trunk_of(model), "patch_embed", None)
    return embed if embed is not None else next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)


def _prefix_names(trunk: Any) -> tuple[str, ...]:
    cls = next((t for n in ("cls_token", "class_token") if (t := getattr(trunk, n, None)) is not None), None)
    registers = getattr(trunk, "reg_token", None)
    names = ["cls"] * (cls is not None) + ["dist"] * (getattr(trunk, "dist_token", None) is not None)
    names += [f"reg{i}" for i in range(0 if registers is None else registers.shape[-2])]
    count = getattr(trunk, "num_prefix_tokens", len(names))
    return tuple((names + [f"prefix{i}" for i in range(len(names), count)])[:count])


def _grid_size(trunk: Any, image_size: Size | None, patches: int) -> Size | None:
    """(rows, columns) of so many patches; None if they are no grid over the image."""
    embed: Any = getattr(trunk, "patch_embed", None)
    if image_size is None:
        grid = getattr(embed, "grid_size", None)
    elif hasattr(embed, "dynamic_feat_size"):
        grid = embed.dynamic_feat_size(image_size)
    else:
        grid = _factors(patches, image_size)
    return (int(grid[0]), int(grid[1])) if grid is not None and grid[0] * grid[1] == patches else None


def _factors(patches: int, image_size: Size) -> Size | None:
    """Rows and columns of patches that cover the image without a rest and are square to within a tenth."""
    height, width = image_size
    pairs = [(rows, patches // rows) for rows in range(1, patches + 1) if patches % rows == 0]
    grids = [(rows, columns) for rows, columns in pairs if height % rows == 0 and width % columns == 0]
    stretched = {grid: abs(math.log(height / grid[0] * grid[1] / width)) for grid in grids}
    best = min(grids, key=stretched.__getitem__, default=None)
    return best if best is not None and stretched[best] < math.log(1.1) else None
