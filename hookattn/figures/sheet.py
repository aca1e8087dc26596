"""Many panels on one sheet, with what is written around them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from .draw import COLOURS, SIGNED, Ground, draw_ground, draw_panel
from .layout import GAP, INK, LETTER, LINE, MARGIN, TEXT, TITLE, Grid, Page, Strip, fit_grid, fit_strip, text_width
from .panels import Panel
from .scales import Scale, count_clipped, make_scales

UNITS = "times uniform (1: all keys alike)"
_BAR = {"patches": "#c7c7cc", "cls": "#0072b2", "reg": "#d55e00", "dist": "#009e73", "padding": "#f0e442"}  # Okabe and Ito
_OTHER = "#cc79a7"
_BAR_HIGH, _NARROWEST = 0.06, 3.0  # inches
_EXPLAINED = {
    "panel": "colours run from 0 to the peak of the panel over its share on patches",
    "layer": "colours run from 0 to the highest peak of the layer",
    "all": "colours run from 0 to the highest peak of all",
    "log": "colours are logarithmic, up to the highest peak of all",
}


@dataclass(frozen=True)
class Style:
    """How panels are drawn; what every picture takes by name.

    Attributes:
        scale, vmin, vmax, norm: see `make_scales`.
        cmap: colours of matplotlib; if none are given, others where there are values below zero.
        alpha: how much of the image the highest attention covers.
        smooth: True blurs patches into each other.
        threshold: draw a line around the fewest patches that hold this share of what goes to patches.
        dpi: dots per inch of a sheet.
    """

    scale: Scale = "panel"
    vmin: float | None = None
    vmax: float | None = None
    norm: Normalize | None = None
    cmap: Any = COLOURS
    alpha: float = 0.85
    smooth: bool = False
    threshold: float | None = None
    dpi: float = 160

    @property
    def is_shared(self) -> bool:
        """Whether all panels have one scale."""
        return self.norm is not None or self.vmax is not None or self.scale in ("all", "log")

    def cells(self, panels: Sequence[Panel]) -> list[Cell]:
        """Choose from what to what the colours of each panel run."""
        norms = make_scales(panels, self.scale, self.vmin, self.vmax, self.norm)
        cmap = SIGNED if self.cmap == COLOURS and any(panel.is_signed for panel in panels) else self.cmap
        return [Cell(panel, norm, cmap, _describe(panel, norm)) for panel, norm in zip(panels, norms)]

    def draw(self, ax: Axes, cell: Cell, ground: Ground) -> Any:
        """Draw one panel on axes."""
        alpha = None if ground.pixels is None or not cell.is_over else self.alpha
        return draw_panel(ax, cell.panel, ground, cell.norm, cell.cmap, alpha, self.smooth, self.threshold)


@dataclass(frozen=True)
class Cell:
    """A panel with its colours, and lines that are written under it.

    Attributes:
        has_bar: whether a bar below it shows what goes to patches and to other tokens.
        is_over: whether it is drawn over the image, if there is one.
    """

    panel: Panel
    norm: Normalize
    cmap: Any
    lines: tuple[str, ...] = ()
    has_bar: bool = True
    is_over: bool = True


@dataclass(frozen=True)
class Sheet:
    """What stands on a sheet.

    Attributes:
        title: a line above.
        rows: the name of each row, and its cells.
        columns: their names; none where cells name themselves.
        ground: what they are drawn on.
        strip: larger cells above them or on their left, by their captions; None for the image alone.
        notes: lines that explain it.
        is_bare: whether the image is drawn in the strip alone, and not below each cell.
    """

    title: str
    rows: Sequence[tuple[str, Sequence[Cell]]]
    columns: Sequence[str]
    ground: Ground
    strip: Mapping[str, Cell | None] = field(default_factory=dict)
    notes: Sequence[str] = ()
    is_bare: bool = False

    def wrapped(self, across: int) -> Sheet:
        """The same with rows broken into lines of so many cells, which then bear the names of their columns."""
        rows = []
        for name, cells in self.rows:
            named = [replace(cell, lines=(column, *cell.lines)) for cell, column in zip(cells, self.columns)]
            rows += [("" if start else name, named[start : start + across]) for start in range(0, len(named), across)]
        return replace(self, rows=rows, columns=())


def draw_sheet(sheet: Sheet, style: Style) -> Figure:
    """Draw a sheet that is as large as what is on it."""
    names, cells = [name for name, _ in sheet.rows], [cell for _, row in sheet.rows for cell in row]
    across = max(len(row) for _, row in sheet.rows)
    grid = fit_grid(len(names), across, sheet.ground.wide, names, [cell.lines for cell in cells])
    strip = fit_strip(list(sheet.strip), sheet.ground.wide, grid)
    x, y = MARGIN + strip.left, MARGIN + 1.5 * LINE + strip.above
    width = 2 * MARGIN + max(strip.left + grid.size[0], strip.size[0], text_width(sheet.title) * TITLE / TEXT, _NARROWEST)
    free = width - 2 * MARGIN - strip.size[0] - 2 * GAP  # to the right of a strip that stands above
    is_beside = strip.above > 0 and free > _NARROWEST
    foot = _Foot(cells, sheet.notes, style, free if is_beside else width - 2 * MARGIN)
    height = y + max(grid.size[1], strip.size[1] - strip.above) + MARGIN + (0 if is_beside else GAP + foot.height)
    page = Page(width, height, style.dpi)
    page.write(MARGIN, MARGIN + LINE / 2, sheet.title, size=TITLE, colour=INK)
    _draw_strip(page, sheet, strip, style)
    _draw_grid(page, sheet, grid, style, x, y)
    if is_beside:
        foot.draw(page, width - MARGIN - free, MARGIN + 2.5 * LINE)
    else:
        foot.draw(page, MARGIN, height - MARGIN - foot.height)
    return page.figure


def _draw_strip(page: Page, sheet: Sheet, strip: Strip, style: Style) -> None:
    for i, (caption, cell) in enumerate(sheet.strip.items()):
        x, y = strip.place(i)
        x, y = MARGIN + x, MARGIN + 2.5 * LINE + y
        page.write(x, y - LINE / 2, caption)
        ax = page.axes(x, y, strip.width, strip.height)
        if cell is None:
            draw_ground(ax, sheet.ground, sheet.rows[0][1][0].panel)
        else:
            style.draw(ax, cell, sheet.ground)


def _draw_grid(page: Page, sheet: Sheet, grid: Grid, style: Style, left: float, top: float) -> None:
    bare = Ground(None, sheet.ground.size) if sheet.is_bare else sheet.ground
    for column, name in enumerate(sheet.columns):
        page.write(left + grid.place(0, column)[0], top + LINE / 2, name)
    for row, (name, cells) in enumerate(sheet.rows):
        page.write(left + grid.left - GAP, top + grid.place(row, 0)[1] + grid.height / 2, name, ha="right")
        for column, cell in enumerate(cells):
            x, y = grid.place(row, column)
            _draw_cell(page, cell, bare, style, left + x, top + y, grid)


class _Foot:
    """What explains a sheet: the colours of bars, those of panels if all have the same, the notes."""

    def __init__(self, cells: Sequence[Cell], notes: Sequence[str], style: Style, width: float) -> None:
        self._cells, self._width = cells, width
        self._notes = [line for note in notes for line in textwrap.wrap(note, int(width / LETTER))]
        self._scale = 2 * LINE if style.is_shared else 0.0

    @property
    def height(self) -> float:
        return 1.5 * LINE + self._scale + len(self._notes) * LINE

    def draw(self, page: Page, x: float, y: float) -> None:
        _write_legend(page, self._cells, x, y)
        y += 1.5 * LINE
        if self._scale:
            _draw_colours(page.axes(x, y, min(2.0, self._width / 2), 0.1), self._cells[0], page)
        for i, note in enumerate(self._notes):
            page.write(x, y + self._scale + (i + 0.5) * LINE, note)


def _describe(panel: Panel, norm: Normalize) -> tuple[str, ...]:
    """What is written under a panel: its share on patches, its entropy in nats, its peak; what is clipped."""
    if panel.is_empty:
        return ("NaN",)
    lines = (f"{panel.shares['patches']:.0%}, H {panel.entropy:.1f}, {panel.peak:.3g}x",)
    count = count_clipped(panel, norm)
    return (*lines, f"{count} over {norm.vmax:.3g}x") if count else lines


def _draw_cell(page: Page, cell: Cell, ground: Ground, style: Style, x: float, y: float, grid: Grid) -> None:
    style.draw(page.axes(x, y, grid.width, grid.height), cell, ground)
    below = y + grid.height + 0.03
    if cell.has_bar:
        start = x
        for kind, share in cell.panel.kinds.items():
            page.fill(start, below, share * grid.width, _BAR_HIGH, _BAR.get(kind, _OTHER))
            start += share * grid.width
        below += _BAR_HIGH
    for i, line in enumerate(cell.lines):
        page.write(x, below + (i + 0.5) * LINE, line)


def _write_legend(page: Page, cells: Sequence[Cell], x: float, y: float) -> None:
    """Name the colours of the bars."""
    kinds = dict.fromkeys(kind for cell in cells if cell.has_bar for kind in cell.panel.kinds)
    for kind in kinds:
        page.fill(x, y + LINE / 2 - 0.04, 0.12, 0.08, _BAR.get(kind, _OTHER))
        name = {"cls": "class token", "reg": "registers", "dist": "distillation token"}.get(kind, kind)
        page.write(x + 0.17, y + LINE / 2, name)
        x += 0.3 + text_width(name)


def _draw_colours(ax: Axes, cell: Cell, page: Page) -> None:
    ax.set_axis_on()
    bar = page.figure.colorbar(ScalarMappable(cell.norm, cell.cmap), cax=ax, orientation="horizontal")
    bar.ax.tick_params(labelsize=TEXT, length=2, pad=1)
    ax.text(1.03, 0.5, UNITS, transform=ax.transAxes, fontsize=TEXT, va="center")


def explain(style: Style, cells: Iterable[Cell] = ()) -> str:
    """A sentence for the foot of a sheet: what its figures mean."""
    how = "colours as given" if style.norm is not None or style.vmax is not None else _EXPLAINED[style.scale]
    if any(cell.panel.is_signed for cell in cells):
        how = "colours run as far below 0 (blue) as above (red)"
    return (
        f"Below each panel: the share on patches, the entropy H of the row in nats, the highest patch in {UNITS}. The {how}; "
        "patches over that are marked +."
    )
