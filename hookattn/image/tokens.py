"""What the tokens of a map stand for: prefix tokens first, then patches of the image, all of them or a window of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Union

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from ..errors import TokenError

Size = tuple[int, int]
Query = Union[str, int, tuple[int, int], tuple[float, float]]


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens along one axis of a map.

    Attributes:
        prefix: names of the tokens before the patches: "cls", "dist", "reg0", "reg1", ...
        grid_size: (rows, columns) of the patches that cover the image.
        places: (images or 1, windows, patches): which patch of the grid, counted row by row, each token stands for; -1 for
            padding. None where one window holds all patches row by row.
        spread: how many places, one after the other, a token stands for: more than 1 where it was pooled of patches that
            form no cell of a coarser grid.
        extent: how much of the height and the width of the image the grid covers: less than 1 where a rest is left out that
            fills no patch, more where the image is padded.
        seen: how much of the height and the width of the image the model looks at: less than 1 where a rest is left out.
    """

    prefix: tuple[str, ...]
    grid_size: Size
    places: Tensor | None = None
    spread: int = 1
    extent: tuple[float, float] = (1.0, 1.0)
    seen: tuple[float, float] = (1.0, 1.0)

    @property
    def num_prefix_tokens(self) -> int:
        """How many tokens stand before the first patch."""
        return len(self.prefix)

    @property
    def windows(self) -> int:
        """Into how many pieces attention cuts an image; 1 where every token sees the whole of it."""
        return 1 if self.places is None else self.places.shape[1]

    def __len__(self) -> int:
        """Tokens along the axis, those of one window."""
        count = self.grid_size[0] * self.grid_size[1] if self.places is None else self.places.shape[-1]
        return len(self.prefix) + count // self.spread

    def index(self, query: Query) -> int:
        """The number of a token, prefix tokens first, then the patches of the image row by row.

        Args:
            query: a name ("cls", "reg0"), the (row, col) of a patch, negative from the end, a point of the image as fractions
                (0.0 to 1.0) of its height and width, or a number.

        Raises:
            TokenError: there is no such token; the message names what there is.
        """
        rows, columns = self.grid_size
        count = len(self.prefix) + rows * columns
        if isinstance(query, str):
            if query not in self.prefix:
                raise TokenError(f"there is no {query!r} token. {self.choices()}")
            return self.prefix.index(query)
        if isinstance(query, tuple) and len(query) == 2 and all(isinstance(i, Real) for i in query):
            if _is_point(query) and not all(0 <= fraction <= 1 for fraction in query):
                raise TokenError(f"the point {query} is not in the image: fractions run from 0.0 to 1.0. {self.choices()}")
            if not rows * columns:
                raise TokenError(f"there are no patches, so none at {query}. {self.choices()}")
            row, column = self._patch_at(query) if _is_point(query) else map(int, query)
            if not (-rows <= row < rows and -columns <= column < columns):
                raise TokenError(f"there is no patch {query}. {self.choices()}")
            return self.num_prefix_tokens + row % rows * columns + column % columns
        if isinstance(query, Integral) and not isinstance(query, bool):  # True is an Integral
            if not -count <= query < count:
                raise TokenError(f"there is no token {query}. {self.choices()}")
            return int(query) % count
        raise TokenError(f"{query!r} is no query. {self.choices()}")

    def select(self, query: Query) -> Tensor:
        """(images or 1, windows, tokens): True for the tokens a query stands for; "mean" stands for all patches.

        Raises:
            TokenError: there is no such token.
        """
        names = torch.arange(len(self.prefix), device="cpu").expand(*self.patches.shape[:2], -1)
        patches = torch.where(self.patches < 0, -1, self.patches + len(self.prefix))  # numbered as by `index`
        tokens = torch.cat((names, patches), dim=-1)
        if query == "mean":
            return self._gathered(tokens >= (len(self.prefix) if patches.shape[-1] else 0))
        selected = self._gathered(tokens == self._index_by_image(query))
        if not bool(selected.flatten(1).any(1).all()):
            raise TokenError(f"{query!r} is not among the tokens of every image. {self.choices()}")
        return selected

    def lay_out(self, rows: Tensor) -> Tensor:
        """Put what (images, windows, heads, tokens) get onto the grid.

        Returns:
            (images, heads, rows, columns); a patch that stands in several windows gets the sum.
        """
        given = repeat(rows[..., len(self.prefix) :] / self.spread, "b w h n -> b h (w n spread)", spread=self.spread)
        if self.places is None:  # row by row already
            return rearrange(given, "b h (r c) -> b h r c", r=self.grid_size[0])
        # what padding gets goes to one place more, which is cut off
        area = self.grid_size[0] * self.grid_size[1]
        places = torch.where(self.places < 0, area, self.places).to(given.device)
        places = repeat(places, "i w n -> (i b) h (w n)", b=len(given) // len(places), h=given.shape[1])
        laid = given.new_zeros(*given.shape[:2], area + 1).scatter_add(-1, places, given)
        return rearrange(laid[..., :area], "b h (r c) -> b h r c", r=self.grid_size[0])

    def centres(self, cell_size: tuple[float, float]) -> Tensor:
        """Where the tokens lie on the image, in float64.

        Args:
            cell_size: (height, width) of a cell of the grid in pixels.

        Returns:
            (images or 1, windows, tokens, spread, 2), the y and x in pixels of the centre of each place a token stands for; NaN
            for prefix tokens and padding.
        """
        places = rearrange(self.patches, "i w (n spread) -> i w n spread", spread=self.spread)
        columns = max(1, self.grid_size[1])
        cells = torch.stack((places // columns, places % columns), dim=-1)
        centres = (cells + 0.5) * torch.tensor(cell_size, dtype=torch.float64, device="cpu")
        # -1 has a row and a column too, and they are wrong
        centres = centres.masked_fill(places[..., None] < 0, torch.nan)
        return F.pad(centres, (0, 0, 0, 0, len(self.prefix), 0), value=torch.nan)

    def stretch(self, pixels: Tensor, size: Size) -> Tensor:
        """Draw pictures on the grid as pixels of the image: each gets what the patch under its centre has.

        Images that have grids of their own are stretched each by its own.

        Args:
            pixels: (images, heads, rows, columns).
            size: (height, width) of the whole image.

        Returns:
            (images, heads, height, width); NaN where no patch lies.
        """
        if self.places is None or len(self.places) < 2:
            return self._stretch(pixels, size)
        return torch.stack([replace(self, grid_size=grid)._stretch(own, size) for grid, own in zip(self.covered(), pixels)])

    def _stretch(self, pixels: Tensor, size: Size) -> Tensor:
        centres = ((torch.arange(n, dtype=torch.float64, device="cpu") + 0.5) / n for n in size)
        rows, columns = (self._cells_at(each, axis).to(pixels.device) for axis, each in enumerate(centres))
        inside = (rows >= 0)[:, None] & (columns >= 0)
        return pixels[..., rows.clamp(min=0)[:, None], columns.clamp(min=0)].masked_fill(~inside, torch.nan)

    def choices(self) -> str:
        """A sentence that lists the queries there are."""
        rows, columns = self.grid_size
        shown = [*self.prefix[:6], *("...",) * (len(self.prefix) > 6)]
        names = "".join(f"query={name!r}, " for name in shown) or "no class token and no other prefix token; "
        if not rows * columns:
            return f"There is: query='mean', {names}query=i with i from 0 to {len(self.prefix) - 1}."
        return (
            f"There is: {names}query='mean' (of all patches), query=(row, col) with rows 0 to {rows - 1} and columns 0 to "
            f"{columns - 1}, query=(y, x) with fractions of the image, query=i with i from 0 to "
            f"{len(self.prefix) + rows * columns - 1}."
        )

    def _gathered(self, marks: Tensor) -> Tensor:
        """Marks of prefix tokens and places as marks of tokens: a token is marked if one of its places is."""
        if self.spread == 1:
            return marks
        named, placed = marks.tensor_split((len(self.prefix),), dim=-1)
        placed = rearrange(placed, "i w (n spread) -> i w n spread", spread=self.spread)
        return torch.cat((named, placed.any(-1)), dim=-1)

    @property
    def patches(self) -> Tensor:
        """`places`, given or not."""
        if self.places is not None:
            return self.places
        found: Tensor | None = self.__dict__.get("_patches")
        if found is None:
            found = torch.arange(self.grid_size[0] * self.grid_size[1], device="cpu")[None, None]
            if type(found) is Tensor:  # what a mode of others makes is of no use to maps that are read without
                self.__dict__["_patches"] = found
        return found

    def covered(self) -> list[Size]:
        """(rows, columns) of the patches of each image, in the upper left corner of the grid."""
        columns = self.grid_size[1]
        shown = [places[places >= 0] for places in self.patches]
        return [(int((places // columns).max()) + 1, int((places % columns).max()) + 1) for places in shown]

    def _patch_at(self, point: tuple[float, float]) -> Size:
        row, column = (
            int(self._cells_at(torch.tensor([p], dtype=torch.float64, device="cpu"), axis)) for axis, p in enumerate(point)
        )
        if row < 0 or column < 0:
            raise TokenError(
                f"the point {point} lies where no patch does: patches end at {tuple(round(reach, 3) for reach in self.seen)} "
                f"of the image, and the rest, which fills none, is left out. {self.choices()}"
            )
        return row, column

    def _cells_at(self, fractions: Tensor, axis: int) -> Tensor:
        """The row (axis 0) or column (axis 1) under fractions of the height or width of the image; -1 where none is."""
        n, seen = self.grid_size[axis], self.seen[axis]
        # pixels are rarely exact as fractions of an image: one in a million of a cell is no other cell
        cells = (fractions / self.extent[axis] * n + 1e-6).floor().long().clamp(max=n - 1)
        # the border of the image belongs to the last patch, that of a rest to the rest
        return cells.masked_fill((fractions > seen - 1e-6 / n) & (seen < 1), -1)

    def _index_by_image(self, query: Query) -> int | Tensor:
        """The number of a token, image by image where a point lies on another patch in each: (images, 1, 1)."""
        index = self.index(query)
        # the same point lies on another patch where images have grids of their own
        if len(self.patches) == 1 or not _is_point(query):
            return index
        found = [replace(self, grid_size=size)._patch_at(query) for size in self.covered()]  # type: ignore[arg-type]
        columns = self.grid_size[1]
        return torch.tensor([self.num_prefix_tokens + row * columns + column for row, column in found], device="cpu")[
            :, None, None
        ]


def _is_point(query: Query) -> bool:
    """Whether a query is a point of the image and not the (row, col) of a patch."""
    return isinstance(query, tuple) and not all(isinstance(i, Integral) for i in query)
