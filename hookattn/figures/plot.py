"""Pictures of maps, drawn with matplotlib: `pip install "hookattn[plot]"`.

    artist = plot.attention(m, (0.4, 0.6), head=3, image=photo)     # one map on axes
    plot.overview(rec, image=photo).savefig("attention.png")        # all layers and heads

Each picture says layer, head and query, marks the patch that asks, and draws patches as patches. Colours are in units of what
each key would get if the head looked at all alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Union

import numpy as np

from ..analysis.layers import check_one
from ..errors import MissingExtraError, TokenError, UnreadableError
from ..image.tokens import Query, Size
from ..maps.attention_map import AttentionMap

try:
    from matplotlib.axes import Axes
    from matplotlib.colors import CenteredNorm
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
except ImportError as error:
    raise MissingExtraError('plots need matplotlib: pip install "hookattn[plot]".') from error

from .charts import distances, heatmap, scatter, statistics
from .draw import SIGNED, Ground, Image, shown_image
from .frames import animate, overlay
from .layout import TEXT, TITLE, wrap, wrap_ragged
from .panels import Head, Heads, Maps, Panel, find_chain, maps_in, name_query, of_image, read_panels, row_of_rollout
from .sheet import UNITS, Cell, Sheet, Style, draw_sheet, explain

__all__ = [
    "animate",
    "attention",
    "compare",
    "distances",
    "heads",
    "heatmap",
    "layers",
    "overlay",
    "overview",
    "scatter",
    "shown_image",
    "statistics",
]
Queries = Union[Query, list[Query]]
_ACROSS = 13  # panels side by side where layers have unlike numbers of heads


def attention(
    m: AttentionMap,
    query: Query = "cls",
    head: Head = "mean",
    image: Image = None,
    ax: Axes | None = None,
    *,
    index: int = 0,
    colorbar: bool = True,
    **style: Any,
) -> AxesImage:
    """Draw what a query attends to in one map, on axes, and return the artist.

    Args:
        m: the map.
        query: as in `AttentionMap.image`; a point is one of the photo where `image` is a `Photo`.
        head: its number, "mean" or "max" over heads.
        image: what it is drawn over: a `Photo`, the model's input (height, width, 3), or None for the map alone.
        ax: where to draw; None makes a figure, which is `artist.figure`.
        index: which image of the batch.
        colorbar: whether to draw one.
        style: `scale`, `vmin`, `vmax`, `norm`, `cmap`, `alpha`, `smooth`, `threshold`, see `hookattn.figures.sheet.Style`.

    Returns:
        The artist; its array is (rows, columns), in units of what each key would get if the head looked at all alike.

    Raises:
        TokenError: there is no such query, head or image, or it is not known where the keys lie.
    """
    check_one("plot.attention", m)
    chosen, ground = Style(**style), Ground(image, _size_of(m, index))
    (cell,) = chosen.cells(read_panels(m, ground.to_input(query), head, index))
    if ax is None:
        ax = Figure(figsize=(4.2 * max(1.0, ground.wide), 4.2), dpi=chosen.dpi, layout="constrained").add_subplot()
    drawn: AxesImage = chosen.draw(ax, cell, ground)
    ax.set_title(f"{_short(m.name)}, {_name_head(cell.panel.head)}, {cell.panel.query}", fontsize=TITLE, parse_math=False)
    shares = ", ".join(f"{share:.1%} {kind}" for kind, share in cell.panel.kinds.items())
    below = "\n".join([f"{shares}; entropy {cell.panel.entropy:.2f} nats", *cell.lines[1:]])
    ax.text(0.5, -0.02, below, transform=ax.transAxes, ha="center", va="top", fontsize=TEXT, parse_math=False)
    if colorbar:
        ax.figure.colorbar(drawn, ax=ax, shrink=0.8, label=UNITS)
    return drawn


def heads(
    m: AttentionMap, query: Queries = "cls", heads: Heads = None, image: Image = None, *, index: int = 0, **style: Any
) -> Figure:
    """Draw the heads of one map side by side, in as many rows as it takes; for a list of queries, a row for each.

    Args:
        m: the map.
        query: one, or a list of them.
        heads: numbers, "mean", "max" or a list of these; None for each head.
        image, index, style: as in `attention`; `dpi` too.

    Raises:
        TokenError: as `attention`.
    """
    check_one("plot.heads", m)
    ground = Ground(image, _size_of(m, index))
    rows = [(name_query(q), read_panels(m, ground.to_input(q), heads, index)) for q in _listed(query)]
    columns = [_name_head(panel.head) for panel in rows[0][1]]
    return _draw_rows(_short(m.name), rows, columns, ground, Style(**style))


def layers(
    maps: Maps, query: Queries = "cls", head: Head = "mean", image: Image = None, *, index: int = 0, **style: Any
) -> Figure:
    """Draw one head of every layer, or the mean of its heads; for a list of queries, a row for each.

    Args:
        maps: a recorder, `rec.maps`, some of them, or one.
        query: one, or a list of them.
        head, image, index, style: as in `attention`; `dpi` too.

    Raises:
        TokenError, ValueError: as `overview`.
    """
    shown, asked = maps_in(maps), _listed(query)
    ground = Ground(image, _size_of(shown[0], index))
    for q in asked:
        _check_place(shown, q)
    rows = [(name_query(q), [read_panels(m, ground.to_input(q), head, index)[0] for m in shown]) for q in asked]
    return _draw_rows(_name_head(head), rows, [_short(m.name) for m in shown], ground, Style(**style))


def overview(
    maps: Maps,
    query: Queries = "cls",
    heads: Heads = None,
    image: Image = None,
    *,
    index: int = 0,
    title: str = "",
    **style: Any,
) -> Figure:
    """Draw a forward on one sheet: a row for each layer, with the mean of its heads and each of them; the image; the rollout.

    Args:
        maps: a recorder, `rec.maps`, some of them, or one.
        query: whose attention is shown; with a list of them, columns are queries, and the mean of heads is shown.
        heads: numbers, "mean", "max" or a list of these; None for the mean and all of them.
        image, index, style: as in `attention`; `dpi` too.
        title: a line above the picture.

    Returns:
        A figure; `figure.savefig("attention.png")` writes it.

    Raises:
        TokenError: a map does not lie on the image, there is no such query, head or image, or the query is another place in
            each layer.
        ValueError: there are no maps, or the sheet would be too large.
    """
    shown, asked, chosen = maps_in(maps), _listed(query), Style(**style)
    ground, several = Ground(image, _size_of(shown[0], index)), len(asked) > 1
    for q in asked:
        _check_place(shown, q)
    rows: list[tuple[str, list[Panel]]] = []
    for m in shown:
        each: Heads = ["mean", *range(m.shape[1])] if heads is None and not several else "mean" if heads is None else heads
        rows.append((_short(m.name), [p for q in asked for p in read_panels(m, ground.to_input(q), each, index)]))
    longest = max((row for _, row in rows), key=len)
    columns = [panel.query if several else _name_head(panel.head) for panel in longest]
    strip: dict[str, Cell | None] = {} if image is None else {"what the model sees" if not ground.is_photo else "photo": None}
    if not several and (rolled := _roll_out(shown, ground.to_input(asked[0]), index)) is not None:
        strip |= dict(zip([rolled.name], chosen.cells([rolled])))
    line = ", ".join(filter(None, [title, "" if several else name_query(asked[0])]))
    sheet = replace(_sheet(line, rows, columns, ground, chosen, strip), is_bare=True)
    counts = [len(row) for _, row in rows]
    return draw_sheet(sheet.wrapped(wrap_ragged(counts)) if min(counts) < max(counts) > _ACROSS else sheet, chosen)


def compare(
    a: Maps, b: Maps, query: Query = "cls", head: Head = "mean", image: Image = None, *, index: int = 0, **style: Any
) -> Figure:
    """Draw two maps on one scale, or those of two forwards layer by layer, and beside them what the second has more.

    Args:
        a, b: as many maps of each; those of a pair have one grid.
        query, head, image, index, style: as in `attention`; `dpi` too.

    Raises:
        TokenError: as `attention`.
        ValueError: there are more of one than of the other, or the grids of a pair differ.
    """
    first, second, chosen = maps_in(a), maps_in(b), Style(**{"scale": "layer", **style})
    if len(first) != len(second):
        raise ValueError(f"there are {len(first)} maps on one side and {len(second)} on the other: give as many of each.")
    ground = Ground(image, _size_of(first[0], index))
    rows: list[tuple[str, list[Cell]]] = []
    for pair in zip(first, second):
        one, other = (read_panels(m, ground.to_input(query), head, index)[0] for m in pair)
        more = other.less(one)
        largest = float(np.nanmax(np.abs(more.times_uniform), initial=0.0))
        lines = (f"moved {np.nansum(np.abs(more.values)) / 2:.1%}", f"up to {largest:.3g}x")
        difference = Cell(more, CenteredNorm(0, largest or 1.0), SIGNED, lines, has_bar=False, is_over=False)
        name = _short(one.name) if one.name == other.name else f"{_short(one.name)}, {_short(other.name)}"
        rows.append((name, [*chosen.cells([one, replace(other, name=one.name)]), difference]))
    notes = [explain(chosen), "Moved: the share of the row that lies on other patches; red is more in the second, blue less."]
    title = f"{_name_head(head)}, {name_query(query)}"
    return draw_sheet(Sheet(title, rows, ("first", "second", "second - first"), ground, notes=notes), chosen)


def _draw_rows(
    title: str, rows: Sequence[tuple[str, Sequence[Panel]]], columns: Sequence[str], ground: Ground, style: Style
) -> Figure:
    """Draw rows of panels by query; a single one is broken into several."""
    if len(rows) > 1:
        return draw_sheet(_sheet(title, rows, columns, ground, style), style)
    across = wrap(len(columns), ground.wide)
    (query, panels) = rows[0]
    return draw_sheet(_sheet(f"{title}, {query}", [("", panels)], columns, ground, style).wrapped(across), style)


def _sheet(
    title: str,
    rows: Sequence[tuple[str, Sequence[Panel]]],
    columns: Sequence[str],
    ground: Ground,
    style: Style,
    strip: dict[str, Cell | None] | None = None,
) -> Sheet:
    cells = style.cells([panel for _, row in rows for panel in row])
    each = iter(cells)
    placed = [(name, [next(each) for _ in row]) for name, row in rows]
    return Sheet(title, placed, columns, ground, strip or {}, [explain(style, cells)])


def _check_place(maps: Sequence[AttentionMap], query: Query) -> None:
    """Refuse the (row, col) of a patch, or its number, where layers have several grids."""
    grids = dict.fromkeys(m.query_tokens.grid_size for m in maps if m.shape[2] > 1)
    if len(grids) > 1 and not isinstance(query, str) and not (isinstance(query, tuple) and isinstance(query[0], float)):
        sizes = ", ".join(f"{rows} x {columns}" for rows, columns in grids)
        raise TokenError(
            f"the layers have grids of {sizes} patches, and {query!r} is another place on each. Name a point in fractions of "
            "the image, query=(0.4, 0.6), or draw the layers of one grid."
        )


def _roll_out(maps: Sequence[AttentionMap], query: Query, index: int) -> Panel | None:
    """The row of the query in the rollout of all maps; None where they do not follow each other, from all tokens to all."""
    if not (chain := find_chain(maps)):
        return None
    try:
        panel = row_of_rollout(chain, query, index)
    except UnreadableError:  # rows that were saved without the others
        return None
    return replace(panel, name=f"rollout, {_short(chain[0].name)} to {_short(chain[-1].name)}")


def _size_of(m: AttentionMap, index: int) -> Size:
    """(height, width) of the model's input that a map is of; of its grid, where none was seen."""
    (rows, columns), reach = of_image(m.tokens, index).grid_size, m.tokens.extent
    try:
        height, width = m._geometry.cell_size(m.tokens.grid_size)
    except TokenError:
        height = width = 1.0
    return round(rows * height / reach[0]), round(columns * width / reach[1])


def _listed(query: Queries) -> list[Query]:
    return query if isinstance(query, list) else [query]


def _name_head(head: Head) -> str:
    return f"head {head}" if isinstance(head, int) else {"mean": "mean of heads", "max": "largest of heads"}.get(head, head)


def _short(name: str) -> str:
    return name.removesuffix(".attn")
