"""One panel drawn on axes: its patches, where the query lies, what is clipped; over the image if there is one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Union

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm, Normalize
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from torch import Tensor

from ..analysis.masks import keep_mass
from ..image.photo import Photo
from ..image.tokens import Query, Size
from .panels import Box, Floats, Panel
from .scales import find_clipped

COLOURS = "inferno"
SIGNED = "RdBu_r"
MARK = "#2de2e6"  # seen on all of the colours above, and on most photos
_LONGEST = 960  # pixels of the longer side of a photo
_DIM = 0.35  # of the light of what the model did not see
_FRAME = 5.0  # points, how wide a frame around a patch is at least
_FADED = 0.75  # of the light of what attention is drawn over
Image = Union[Photo, npt.ArrayLike, None]
"""What pictures are drawn over: a photo, the model's input as (height, width, 3) RGB, uint8 or floats in 0 to 1, or nothing."""
Extent = tuple[float, float, float, float]
"""(left, right, bottom, top), as matplotlib has it."""


class Ground:
    """What panels are drawn on: a photo, the model's input, or nothing but the place where that was.

    Attributes:
        pixels: (height, width, 3) in 0 to 1; None for nothing.
        size: (height, width) of what is drawn, in pixels.
    """

    def __init__(self, image: Image, size: Size) -> None:
        self._photo = image if isinstance(image, Photo) else None
        self.pixels: Floats | None = None
        self.size: Size = size
        if isinstance(image, Photo):
            self.pixels, self.size = _shrink(image) * _light_of(image)[..., None], image.size
        elif image is not None:
            self.pixels = rgb(image)
            self.size = self.pixels.shape[0], self.pixels.shape[1]

    @property
    def is_photo(self) -> bool:
        """Whether it is a photo, of which the model may have seen a part."""
        return self._photo is not None

    @property
    def wide(self) -> float:
        """Its width over its height."""
        return self.size[1] / self.size[0]

    def faded(self) -> Ground:
        """The same without colours and darker, for attention to stand out."""
        grey = None if self.pixels is None else np.repeat(self.pixels.mean(-1, keepdims=True) * _FADED, 3, axis=-1)
        return Ground(grey, self.size)

    def to_input(self, query: Query) -> Query:
        """A query that is a point of the photo as one of the model's input; any other as it is."""
        is_point = isinstance(query, tuple) and any(isinstance(each, float) for each in query)
        return self._photo.to_input(query) if self._photo is not None and is_point else query  # type: ignore[arg-type]

    def place(self, box: Box) -> Extent:
        """Where a box in fractions of the model's input lies, in pixels."""
        top, left, height, width = box
        corners = [(top, left), (top + height, left + width)]
        if self._photo is not None:
            corners = [self._photo.to_photo(corner) for corner in corners]
        (upper, first), (lower, last) = [(y * self.size[0], x * self.size[1]) for y, x in corners]
        return first, last, lower, upper


def draw_ground(ax: Axes, ground: Ground, panel: Panel | None = None) -> None:
    """Draw the image alone, and where a panel's query lies on it."""
    height, width = ground.size
    ax.set_axis_off()
    if ground.pixels is not None:
        ax.imshow(ground.pixels, extent=(0, width, height, 0), interpolation="antialiased", aspect="equal")
    ax.set_xlim(0, width)
    ax.set_ylim(height, 0)
    for mark in () if panel is None else panel.marks:
        _outline(ax, ground.place(mark))


def draw_panel(
    ax: Axes,
    panel: Panel,
    ground: Ground,
    norm: Normalize,
    cmap: Any = COLOURS,
    alpha: float | None = None,
    smooth: bool = False,
    threshold: float | None = None,
) -> AxesImage:
    """Draw a panel; without `alpha` the image is not drawn below it. For the others see `plot.attention`."""
    if alpha is not None:
        draw_ground(ax, ground.faded())
    shown, extent = panel.times_uniform, ground.place(panel.grid)
    height = np.ma.filled(norm(shown), 0.0)
    height = np.abs(2 * height - 1) if isinstance(norm, CenteredNorm) else height
    # by the root: what is half as high still stands out
    cover = None if alpha is None else alpha * np.clip(np.nan_to_num(height), 0.0, 1.0) ** 0.5
    how = "bilinear" if smooth else "nearest"
    drawn = ax.imshow(shown, cmap=cmap, norm=norm, extent=extent, interpolation=how, aspect="equal", alpha=cover)
    draw_ground(ax, Ground(None, ground.size))
    points = _points_of_patch(ax, panel, extent, ground.size)
    for mark in panel.marks:
        _outline(ax, ground.place(mark), grown=max(1.0, _FRAME / max(points, 1e-3)))
    if len(clipped := find_clipped(panel, norm)):
        ax.plot(
            *_centres(clipped, panel, extent),
            ls="",
            marker="+",
            ms=min(4.0, 0.7 * points),
            mew=0.7,
            color="black",
            gid="clipped",
        )
    if threshold is not None:
        _contour(ax, panel.values, threshold, extent)
    return drawn


def rgb(image: npt.ArrayLike) -> Floats:
    """An image as (height, width, 3) floats in 0 to 1, of uint8 or floats.

    Raises:
        ValueError: it has another shape.
    """
    pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[-1] != 3:
        raise ValueError(f"an image is (height, width, 3), not {pixels.shape}: give a Photo, or the model's input as RGB.")
    scaled: Floats = pixels / 255 if pixels.dtype == np.uint8 else pixels.astype(np.float64)
    return scaled


def shown_image(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Floats:
    """Undo a model's normalisation: (3, height, width) to (height, width, 3) in 0 to 1."""
    pixels = x.detach().cpu() * torch.tensor(std, device="cpu")[:, None, None] + torch.tensor(mean, device="cpu")[:, None, None]
    return rgb(pixels.clamp(0, 1).permute(1, 2, 0).double().numpy())


def _shrink(photo: Photo) -> Floats:
    """A photo as (height, width, 3) in 0 to 1, no larger than it is drawn."""
    pixels = photo.pixels.permute(2, 0, 1)[None].double() / 255
    shrunk: Floats = F.interpolate(pixels, _shrunk(photo), mode="area")[0].permute(1, 2, 0).numpy()
    return shrunk


def _shrunk(photo: Photo) -> Size:
    most = max(1.0, max(photo.size) / _LONGEST)
    return max(1, round(photo.size[0] / most)), max(1, round(photo.size[1] / most))


def _light_of(photo: Photo) -> Floats:
    """(height, width): 1 where the model saw the photo, less elsewhere."""
    top, left, bottom, right = photo.seen
    height, width = _shrunk(photo)
    light = np.full((height, width), _DIM)
    light[round(top * height) : round(bottom * height), round(left * width) : round(right * width)] = 1.0
    return light


def _points_of_patch(ax: Axes, panel: Panel, extent: Extent, size: Size) -> float:
    """How wide a patch is drawn, in points, on axes of the size that they have now."""
    across = ax.get_window_extent().width / ax.figure.dpi * 72
    wide: float = across * (extent[1] - extent[0]) / size[1] / max(1, panel.values.shape[1])
    return wide


def _outline(ax: Axes, extent: Extent, grown: float = 1.0) -> None:
    """Draw a frame around a patch, so many times larger than it."""
    left, right, bottom, top = extent
    halo = [patheffects.withStroke(linewidth=2 * (linewidth := 1.3 if grown == 1 else 0.8), foreground="black")]
    width, height = (right - left) * grown, (bottom - top) * grown
    corner, size = ((left + right - width) / 2, (top + bottom - height) / 2), (width, height)
    ax.add_patch(Rectangle(corner, *size, fill=False, edgecolor=MARK, linewidth=linewidth, path_effects=halo, gid="query"))


def _centres(places: Floats, panel: Panel, extent: Extent) -> tuple[Floats, Floats]:
    """x and y of the centres of some patches, by rows and columns."""
    (left, right, bottom, top), (rows, columns) = extent, panel.values.shape
    return left + (places[:, 1] + 0.5) * (right - left) / columns, top + (places[:, 0] + 0.5) * (bottom - top) / rows


def _contour(ax: Axes, values: Floats, threshold: float, extent: Extent) -> None:
    """Draw the border, along edges of patches, of those that hold this share of what goes to patches."""
    mask = np.pad(keep_mass(torch.from_numpy(values), threshold).numpy(), 1)
    left, right, bottom, top = extent
    high, wide = (bottom - top) / values.shape[0], (right - left) / values.shape[1]
    level = np.argwhere(mask[1:, 1:-1] != mask[:-1, 1:-1])  # (row, column) of a patch with an edge above it
    upright = np.argwhere(mask[1:-1, 1:] != mask[1:-1, :-1])  # and on its left
    x, y = left + level[:, 1] * wide, top + level[:, 0] * high
    ax.hlines(y, x, x + wide, colors="white", linewidth=1)
    x, y = left + upright[:, 1] * wide, top + upright[:, 0] * high
    ax.vlines(x, y, y + high, colors="white", linewidth=1)
