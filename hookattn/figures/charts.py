"""Figures of heads as charts: entropy and distance by layer, one against the other, and any of them as a heat map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log
from typing import Any, NamedTuple, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import CenteredNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from ..analysis.heads import HeadSummary, summarize_heads
from .layout import TEXT, text_width
from .panels import Maps, maps_in

_COLOURS = "viridis"
_ENTROPY, _DISTANCE = "entropy of rows, nats", "mean attention distance, pixels"


def statistics(maps: Maps | Sequence[HeadSummary], *, dpi: float = 160) -> Figure:
    """Draw the entropy and the mean attention distance of each head, by layer, one beside the other.

    Args:
        maps: a recorder, `rec.maps`, some of them, or one; or figures of heads that were taken before.
        dpi: dots per inch.

    Source: figures 7 and 11 of Dosovitskiy et al. 2021, "An image is worth 16x16 words"; figure 3 of Raghu et al. 2021, "Do
    Vision Transformers see like convolutional neural networks?".
    """
    given = [each for each in maps if isinstance(each, HeadSummary)] if isinstance(maps, Sequence) else []
    rows = given or summarize_heads(maps_in(cast(Maps, maps)))
    figure = Figure(figsize=(9, 3.6), dpi=dpi, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(*_by_depth(rows, lambda row: log(row.keys)), color="0.6", lw=0.8, ls="--", label="all keys alike: log(keys)")
    _by_layer(left, rows, lambda row: row.entropy, _ENTROPY)
    left.legend(fontsize=TEXT, frameon=False)
    _by_layer(right, rows, lambda row: row.distance, _DISTANCE)
    return figure


def distances(maps: Maps, ax: Axes | None = None) -> PathCollection:
    """Draw the mean attention distance of each head by layer, on axes, and return the artist.

    Args:
        maps: a recorder, `rec.maps`, some of them, or one.
        ax: where to draw; None makes a figure, which is `artist.figure`.

    Source: figure 7 of Dosovitskiy et al. 2021, "An image is worth 16x16 words".
    """
    return _by_layer(ax or _axes(), summarize_heads(maps_in(maps)), lambda row: row.distance, _DISTANCE)


def scatter(maps: Maps, ax: Axes | None = None) -> PathCollection:
    """Draw each head by its entropy and its mean attention distance, coloured by layer, on axes, and return the artist.

    Args:
        maps: a recorder, `rec.maps`, some of them, or one.
        ax: where to draw; None makes a figure, which is `artist.figure`.
    """
    rows, ax = summarize_heads(maps_in(maps)), ax or _axes()
    drawn = ax.scatter(
        [row.distance for row in rows], [row.entropy for row in rows], c=[row.depth for row in rows], cmap=_COLOURS, s=14
    )
    ax.set(xlabel=_DISTANCE, ylabel=_ENTROPY)
    _plain(ax)
    ax.figure.colorbar(drawn, ax=ax, label="layer")
    return drawn


def heatmap(rows: Sequence[NamedTuple], figure: str = "", ax: Axes | None = None) -> AxesImage:
    """Draw a figure of every head, layers down and heads across, on axes, and return the artist.

        plot.heatmap(head_importance(model, loader, loss))
        plot.heatmap(summarize_heads(rec), "entropy")

    Args:
        rows: figures of heads, one row for each layer and head.
        figure: which column; "" for the last one.
        ax: where to draw; None makes a figure as large as it takes, which is `artist.figure`.

    Returns:
        The artist; its array is (layers, heads), masked where a layer has no such head. Colours run from zero on, or to both
        sides of it if there are figures below.

    Raises:
        ValueError: there are no rows, or there is no such column.
    """
    fields = rows[0]._fields if rows else ()
    if not fields or (figure and figure not in fields):
        raise ValueError(f"there is no {figure!r} to draw: figures are {', '.join(fields)}, of head_importance() or others.")
    figure = figure or fields[-1]
    table = [row._asdict() for row in rows]
    layers, heads = list(dict.fromkeys(row["layer"] for row in table)), max(row["head"] for row in table) + 1
    values = np.full((len(layers), heads), np.nan)
    for row in table:
        values[layers.index(row["layer"]), row["head"]] = row[figure]
    return _draw_cells(ax, values, [layer.removesuffix(".attn") for layer in layers], figure)


def _draw_cells(ax: Axes | None, values: Any, names: Sequence[str], label: str) -> AxesImage:
    """Cells of colour, with what each row of them is called."""
    rows, columns = values.shape
    if ax is None:
        size = (1.5 + text_width(max(names, key=len)) + 0.3 * columns, max(2.0, 0.9 + 0.22 * rows))
        ax = Figure(figsize=size, dpi=160, layout="constrained").add_subplot()
    around_zero = bool((values < 0).any())
    norm = CenteredNorm() if around_zero else Normalize(vmin=0)
    drawn = ax.imshow(values, "RdBu_r" if around_zero else _COLOURS, norm=norm, aspect="auto", interpolation="nearest")
    ax.set_xlabel("head", fontsize=TEXT)
    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    ax.set_yticks(range(rows), names, fontsize=TEXT, parse_math=False)
    ax.tick_params(labelsize=TEXT, length=0)
    ax.spines[:].set_visible(False)
    bar = ax.figure.colorbar(drawn, ax=ax)
    bar.set_label(label, fontsize=TEXT)
    bar.ax.tick_params(labelsize=TEXT)
    return drawn


def _by_layer(ax: Axes, rows: Sequence[HeadSummary], figure: Callable[[HeadSummary], float], name: str) -> PathCollection:
    """A dot for each head, and a line through the means of layers."""
    heads = max(row.head for row in rows) + 1
    drawn = ax.scatter(
        [row.depth for row in rows], [*map(figure, rows)], c=[row.head / heads for row in rows], cmap=_COLOURS, s=12, zorder=2
    )
    ax.plot(*_by_depth(rows, figure), color="0.25", lw=1, zorder=1)
    ax.set(xlabel="layer", ylabel=name)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    _plain(ax)
    return drawn


def _by_depth(rows: Sequence[HeadSummary], figure: Callable[[HeadSummary], float]) -> tuple[list[int], list[float]]:
    """Layers, and the mean of their heads."""
    depths = sorted({row.depth for row in rows})
    values = [[figure(row) for row in rows if row.depth == depth] for depth in depths]
    return depths, [float(np.mean(each)) for each in values]


def _plain(ax: Any) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_ylim(bottom=0)


def _axes() -> Axes:
    return Figure(figsize=(4.6, 3.6), dpi=160, layout="constrained").add_subplot()
