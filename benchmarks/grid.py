"""A grid of pictures with a caption above each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from command import save_figure
from matplotlib.figure import Figure

CELL, GAP, LINE = 1.4, 0.05, 0.2  # inches
Picture = tuple[str, Callable[[Any], None]]
"""A caption, or "", and what draws on axes."""


def draw_grid(rows: Sequence[Sequence[Picture]], path: Path) -> None:
    """All rows have as many pictures; a row without captions takes no room for them."""
    lines = [LINE if any(caption for caption, _ in row) else 0.0 for row in rows]
    width, height = len(rows[0]) * (CELL + GAP) - GAP, len(rows) * (CELL + GAP) - GAP + sum(lines)
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    for i, row in enumerate(rows):
        y = i * (CELL + GAP) + sum(lines[: i + 1])
        for j, (caption, draw) in enumerate(row):
            x = j * (CELL + GAP)
            axes = figure.add_axes((x / width, 1 - (y + CELL) / height, CELL / width, CELL / height))
            axes.set_axis_off()
            draw(axes)
            figure.text(x / width, 1 - (y - LINE / 2) / height, caption, fontsize=6.5, color="#6e6e73", va="center")
    save_figure(figure, path)
