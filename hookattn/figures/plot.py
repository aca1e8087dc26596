"""Pictures of maps, drawn with matplotlib: `pip install "hookattn[plot]"`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from ..analysis.rollouts import rollout
from ..errors import MissingExtraError, TokenError
from ..image.photo import Photo
from ..image.tokens import Query
from ..maps.attention_map import AttentionMap

try:
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise MissingExtraError('plots need matplotlib: pip install "hookattn[plot]".') from error


COLOURS = "inferno"
_INK, _PALE = "#1d1d1f", "#6e6e73"
_UNSEEN = "#d4d4d8"
_LONGEST = 480  # pixels of the longer side of a photo
_CELL, _GAP, _LINE = 0.72, 0.06, 0.2  # inches; a cell is one head of one layer, a line one of text


def overview(image: npt.ArrayLike | Photo, maps: Sequence[AttentionMap], query: Query = "cls", *, title: str = "") -> Figure:
    """One picture of a forward: the image, what the query attends to per layer and head, and the rollout.

    Args:
        image: (height, width, 3) RGB as the model saw it, uint8 or floats in 0 to 1; or the photo that it was shown, which is
            drawn whole, pale where the model did not see it.
        maps: maps of a forward, first layer first; the first item of the batch is shown.
        query: whose attention is shown, see `AttentionMap.image`; a point is one of the photo.
        title: a line above the picture.

    Returns:
        A figure; `figure.savefig("attention.png")` writes it.

    Raises:
        TokenError: a map does not lie on the image, there is no such query, or it is another place in each layer.
        ValueError: there are no maps.
    """
    shown, canvas = list(maps), _Canvas(image)
    if not shown:
        raise ValueError("there is no map to draw: give some of rec.maps[:].")
    grids = dict.fromkeys(m.query_tokens.grid_size for m in shown if m.shape[2] > 1)
    if len(grids) > 1 and not isinstance(query, str) and not _is_point(query):
        sizes = ", ".join(f"{rows} x {columns}" for rows, columns in grids)
        raise TokenError(
            f"the layers have grids of {sizes} patches, and {query!r} is another place on each. Name a point in fractions of "
            "the image, query=(0.4, 0.6), or draw the layers of one grid."
        )
    size, asked, query = canvas.size, query, canvas.asked(query)
    rows, columns = len(shown), 1 + max(m.shape[1] for m in shown)
    tall = max(rows * (_CELL + _GAP) - _GAP, 3 * 1.3)
    side = (tall - 2 * _LINE) / 3
    wide, label = size[1] / size[0], 0.2 + 0.058 * max(len(_short(m.name)) for m in shown)
    page = _Page(side * wide + label + columns * (_CELL * wide + _GAP) + 3 * _GAP, tall + 3 * _LINE + 2 * _GAP)
    page.write(_GAP, _LINE / 2, title, 9, _INK)
    panels: dict[str, Tensor | None] = {
        "what the model sees": None,
        f"{_short(shown[-1].name)}, mean of heads": canvas.lay(shown[-1].image(query, size=canvas.input_size)[0]),
    }
    square = [m for m in shown if m.shape[2] == m.shape[3]]
    if square and all(_sees_all(m, square[0]) for m in square):
        caption = f"rollout of {len(square)} layer" + "s" * (len(square) > 1)
        panels[caption] = canvas.lay(_rollout_image(square, query, canvas.input_size))
    top, colours = 2 * _LINE, colormaps[COLOURS].with_extremes(bad=_UNSEEN)
    for i, (caption, attention) in enumerate(panels.items()):
        y = top + i * (side + _LINE)
        page.write(_GAP, y - _LINE / 2, caption, 6.5, _PALE)
        overlay(page.axes(_GAP, y, side * wide, side), canvas.pixels, attention, canvas.unseen)
    left = side * wide + label + _GAP
    at = [left + column * (_CELL * wide + _GAP) + _GAP * (column > 0) for column in range(columns)]
    for column, x in enumerate(at):
        page.write(x, top - _LINE / 2, f"head {column - 1}" if column else "mean", 6, _PALE)
    for row, m in enumerate(shown):
        y = top + row * (_CELL + _GAP)
        page.write(left - 2 * _GAP, y + _CELL / 2, _short(m.name), 6, _PALE, ha="right")
        heads = canvas.lay_small(m, query)
        for x, panel in zip(at, [heads.mean(0), *heads]):
            axes = page.axes(x, y, _CELL * wide, _CELL)
            axes.imshow(panel.numpy(), cmap=colours, interpolation="nearest", vmin=0, vmax=_bright(panel), aspect="auto")
    note = f"what query {asked!r} attends to; each panel runs from 0 to what one patch in 200 exceeds"
    page.write(left, top + tall + _LINE / 2, note, 5.5, _PALE)
    return page.figure


class _Page:
    """A figure on which things are placed in inches from its upper left corner."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        # no pyplot: it would keep the figure alive, and choose a backend for whoever calls
        self.figure = Figure(figsize=(width, height), dpi=160, facecolor="white")

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Axes without ticks or frame; matplotlib itself counts from below, in fractions of the figure."""
        axes = self.figure.add_axes((x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height))
        axes.set_axis_off()
        return axes

    def write(self, x: float, y: float, text: str, size: float, colour: str, ha: Literal["left", "right"] = "left") -> None:
        self.figure.text(x / self.width, 1 - y / self.height, text, fontsize=size, color=colour, ha=ha, va="center")


class _Canvas:
    """What attention is drawn on: an image as the model saw it, or a whole photo of which it saw a part."""

    def __init__(self, image: npt.ArrayLike | Photo) -> None:
        self._photo = image if isinstance(image, Photo) else None
        self.pixels = _shrink(image) if isinstance(image, Photo) else _rgb(image)
        self.size = self.pixels.shape[0], self.pixels.shape[1]
        self.input_size = self.size if self._photo is None else self._photo.input_size
        self.unseen = self.lay(torch.zeros(1, 1)).isnan().numpy()

    def asked(self, query: Query) -> Query:
        """A query as maps take it: a point of the photo is another of the model's input."""
        if self._photo is None or not (isinstance(query, tuple) and _is_point(query)):
            return query
        return self._photo.to_input((float(query[0]), float(query[1])))

    def lay(self, pictures: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Pictures over the model's input on what is drawn: NaN where the model saw nothing."""
        return pictures.cpu() if self._photo is None else self._photo.place(pictures.float().cpu(), size or self.size)

    def lay_small(self, m: AttentionMap, query: Query) -> Tensor:
        """(heads, height, width): what a query of the first image attends to, head by head."""
        if self._photo is None:
            return m.image(query, heads=None)[0].float().cpu()
        height, width = (max(1, side // 3) for side in self.size)
        return self.lay(m.image(query, heads=None, size=self.input_size)[0], (height, width))


def _shrink(photo: Photo) -> npt.NDArray[np.float64]:
    """A photo as (height, width, 3) floats, no larger than it is drawn."""
    most = max(1.0, max(photo.size) / _LONGEST)
    size = [max(1, round(side / most)) for side in photo.size]
    pixels = F.interpolate(photo.pixels.permute(2, 0, 1)[None].float(), size, mode="area")
    return _rgb(pixels[0].permute(1, 2, 0).double().numpy() / 255)


def overlay(
    axes: Axes, image: npt.ArrayLike, attention: Tensor | None = None, unseen: npt.NDArray[np.bool_] | None = None
) -> None:
    """Draw an image, lit where attention is: its light and colour fade towards where there is none.

    Args:
        axes: where to draw.
        image: (height, width, 3) RGB.
        attention: (rows, columns) of any size, not negative, NaN where nothing was seen; None draws the image as it is.
        unseen: (height, width), True where the model did not see the image, which is drawn pale.
    """
    pixels = _rgb(image)
    grey = pixels.mean(-1, keepdims=True)
    if attention is not None:
        light = F.interpolate(attention.float()[None, None], pixels.shape[:2], mode="nearest-exact")[0, 0]
        unseen = light.isnan().cpu().numpy()
        strength = (light / _bright(attention)).clamp(max=1).nan_to_num().cpu().numpy()[..., None]
        heat = np.asarray(colormaps[COLOURS](strength[..., 0]))[..., :3]
        # by looks: dark enough for the light to stand out, and light enough to see where one is
        dimmed = (0.72 + 0.1 * strength) * (strength * pixels + (1 - strength) * grey)
        drawn = np.clip(0.85 * dimmed + 0.5 * heat * strength, 0, 1)
    else:
        drawn = pixels
    if unseen is not None:
        drawn = np.where(unseen[..., None], 0.75 + 0.2 * grey, drawn)
    axes.imshow(drawn, interpolation="lanczos", aspect="auto")


def _bright(attention: Tensor) -> float:
    """The value that is drawn brightest: what one patch in 200 exceeds."""
    # not the largest: one patch that draws most of the attention would leave all else black; and never 0, to divide by
    found = float(attention.float().nanquantile(0.995))
    return max(found, 1e-12) if found == found else 1.0


def _sees_all(m: AttentionMap, first: AttentionMap) -> bool:
    """Whether a map is of all tokens, and of the same ones as the first, so that it may stand in a rollout with it."""
    whole = m.tokens.windows == 1 and m.tokens.grid_size == first.tokens.grid_size
    return whole and m.shape[3] == first.shape[3]


def _rollout_image(maps: Sequence[AttentionMap], query: Query, size: tuple[int, int]) -> Tensor:
    """The row of the query in the rollout of all maps, over the patches: (height, width)."""
    tokens = maps[-1].tokens
    joint = rollout(maps)[:1]  # of the first image alone, as everything in the picture
    selected = tokens.select(query)[:1].flatten(1).to(joint)
    row = (selected / selected.sum())[:, None] @ joint
    return tokens.stretch(tokens.lay_out(row[:, None]), size)[0, 0]


def _is_point(query: Query) -> bool:
    return isinstance(query, tuple) and any(isinstance(part, float) for part in query)


def _short(name: str) -> str:
    return name.removesuffix(".attn")


def _rgb(image: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """An image as (height, width, 3) floats in 0 to 1, of uint8 or floats."""
    pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[-1] != 3:
        raise ValueError(f"an image is (height, width, 3), not {pixels.shape}.")
    scaled: npt.NDArray[np.float64] = pixels / 255 if pixels.dtype == np.uint8 else pixels.astype(np.float64)
    return scaled


def shown_image(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> npt.NDArray[np.float64]:
    """Undo a model's normalisation: (3, height, width) to (height, width, 3) in 0 to 1."""
    pixels = x.detach().cpu() * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    return _rgb(pixels.clamp(0, 1).permute(1, 2, 0).double().numpy())
