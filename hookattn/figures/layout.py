"""Where things stand on a sheet, in inches, and how large they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

INK, PALE = "#1d1d1f", "#5f5f64"
TEXT, TITLE = 7.0, 9.0  # points, as printed
LINE, GAP, MARGIN = 0.15, 0.1, 0.15  # inches; a line is one of text
LETTER = 0.056  # inches, what a letter of 7 points takes on average, rather more
_LARGEST, _SMALLEST = 3.2, 0.95  # inches, how wide a panel is
_STRIP = 2.4  # inches, how wide a larger panel above others is
_WIDE = 9.0  # inches, how wide a sheet is unless its panels would be too small, or too large
_MOST = 300.0  # inches, how wide or high a sheet may be


class TooLargeError(ValueError):
    """A sheet would be larger than what can be drawn."""


class Page:
    """A figure on which things are placed in inches from its upper left corner.

    Raises:
        TooLargeError: it would be too large.
    """

    def __init__(self, width: float, height: float, dpi: float) -> None:
        if max(width, height) > _MOST or max(width, height) * dpi >= 2**16:  # which is what matplotlib draws at most
            raise TooLargeError(
                f"the sheet would be {width:.0f} x {height:.0f} inches at {dpi:.0f} dots for each: draw fewer layers, such as "
                "rec.maps[:12], fewer heads, heads=[0, 1], or with a smaller dpi=."
            )
        self.width, self.height = width, height
        # no pyplot: it would keep the figure alive, and choose a backend for whoever calls
        self.figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white")

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Axes without ticks or frame; matplotlib itself counts from below, in fractions of the figure."""
        axes = self.figure.add_axes((x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height))
        axes.set_axis_off()
        return axes

    def fill(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        """Fill a rectangle."""
        corner = x / self.width, 1 - (y + height) / self.height
        box = Rectangle(corner, width / self.width, height / self.height, color=colour, lw=0, transform=self.figure.transFigure)
        self.figure.add_artist(box)

    def write(
        self, x: float, y: float, text: str, *, size: float = TEXT, colour: str = PALE, ha: Literal["left", "right"] = "left"
    ) -> None:
        """Write a line whose middle is at a height y; what looks like mathematics is written as it is."""
        at = x / self.width, 1 - y / self.height
        self.figure.text(*at, text, fontsize=size, color=colour, ha=ha, va="center", parse_math=False)


@dataclass(frozen=True)
class Grid:
    """How large the panels of a sheet are, and what stands beside and below them, in inches.

    Attributes:
        rows, columns: of panels.
        width, height: of a panel.
        left: what names of rows take beside them.
        under: what is written below each takes.
    """

    rows: int
    columns: int
    width: float
    height: float
    left: float
    under: float

    @property
    def size(self) -> tuple[float, float]:
        """(width, height) of all of it, names of columns and rows included."""
        right, below = self.place(self.rows, self.columns)
        return right - GAP, below - GAP

    def place(self, row: int, column: int) -> tuple[float, float]:
        """(x, y) of the upper left corner of a panel, from that of the grid."""
        return self.left + column * (self.width + GAP), LINE + row * (self.height + self.under + GAP)


def fit_grid(rows: int, columns: int, wide: float, names: Sequence[str], lines: Sequence[Sequence[str]]) -> Grid:
    """Make panels as large as the sheet allows, and no smaller than what is written under them.

    Args:
        rows, columns: of panels.
        wide: width of a panel over its height.
        names: of the rows.
        lines: what is written under each panel.
    """
    left = max((text_width(name) for name in names), default=0.0)
    left += GAP if left else 0.0
    least = max([_SMALLEST, *[text_width(line) for each in lines for line in each]])
    width = max(least, min(_LARGEST * max(1.0, wide) ** 0.5, (_WIDE - left) / columns - GAP))
    return Grid(rows, columns, width, width / wide, left, 0.1 + LINE * max(map(len, lines)))


@dataclass(frozen=True)
class Strip:
    """How large the larger panels are, in inches, which stand side by side above a grid or one below the other on its left.

    Attributes:
        count: of them.
        width, height: of one.
        is_above: whether they stand above.
    """

    count: int
    width: float
    height: float
    is_above: bool

    @property
    def size(self) -> tuple[float, float]:
        """(width, height) of all of it, with a line above each."""
        across, down = (self.count, 1) if self.is_above else (1, self.count)
        return across * (self.width + GAP), down * (self.height + LINE + GAP) if self.count else 0.0

    @property
    def left(self) -> float:
        """How far it pushes a grid to the right."""
        return 0.0 if self.is_above or not self.count else self.size[0] + GAP

    @property
    def above(self) -> float:
        """How far it pushes a grid down."""
        return self.size[1] if self.is_above else 0.0

    def place(self, i: int) -> tuple[float, float]:
        """(x, y) of the upper left corner of one, from that of the first."""
        return (i * (self.width + GAP), 0.0) if self.is_above else (0.0, i * (self.height + LINE + GAP))


def fit_strip(captions: Sequence[str], wide: float, grid: Grid) -> Strip:
    """Place larger panels where they leave the least of the sheet empty."""
    if not (count := len(captions)):
        return Strip(0, 0.0, 0.0, is_above=True)
    least = max([grid.width, *map(text_width, captions)])
    width, height = grid.size
    across = max(least, min(_STRIP * max(1.0, wide), width / count - GAP))
    down = max(least, min(_LARGEST * min(1.0, wide), (height / count - LINE - GAP) * wide))
    above, beside = Strip(count, across, across / wide, is_above=True), Strip(count, down, down / wide, is_above=False)
    of_above = max(width, above.size[0]) * (height + above.size[1])
    return above if of_above < (width + beside.left) * max(height, beside.size[1]) else beside


def text_width(text: str) -> float:
    """About what a line of 7 points takes, in inches."""
    return len(text) * LETTER


def wrap(count: int, wide: float) -> int:
    """How many of so many panels stand side by side, so that a sheet is a little wider than high."""
    return max(1, min(count, round(math.sqrt(count * 1.8 / wide))))


def wrap_ragged(counts: Sequence[int]) -> int:
    """How many panels stand side by side where rows have unlike numbers of them and may take several lines."""
    return min(range(6, 14), key=lambda across: (across * sum(math.ceil(count / across) for count in counts), -across))
