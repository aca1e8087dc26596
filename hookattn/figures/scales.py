"""How attention becomes colour: from what to what a panel runs, and what lies above that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from matplotlib.colors import CenteredNorm, LogNorm, Normalize

from .panels import Floats, Panel

Scale = Literal["panel", "layer", "all", "log"]
_SCALES = ("panel", "layer", "all", "log")
_FAR = 3.0  # times what all but one patch in 200 stay below: a peak higher than that is clipped
_DECADES = 100.0  # times less than the highest: where a logarithmic scale begins


def make_scales(
    panels: Sequence[Panel],
    scale: Scale = "panel",
    vmin: float | None = None,
    vmax: float | None = None,
    norm: Normalize | None = None,
) -> list[Normalize]:
    """Choose for each panel from what to what its colours run, in units of what each key would get if all were alike.

    Args:
        panels: what is drawn beside each other.
        scale: "panel" runs from 0 to the peak of the panel divided by the share that goes to patches, so that a head that gives
            5 % of its attention to patches is at most 5 % bright; "layer" and "all" run to the highest peak of the panels of a
            layer, or of all; "log" too, from a hundredth of it on, in powers of ten.
        vmin, vmax: where colours begin and end instead.
        norm: of matplotlib, for all panels, instead of all this.

    Where some have values below zero, as projections of contributions have, all run as far below it as above.

    Raises:
        ValueError: the scale is none of these words.
    """
    if scale not in _SCALES:
        raise ValueError(f"scale={scale!r} is no choice: {', '.join(map(repr, _SCALES))}.")
    if norm is not None:
        return [norm] * len(panels)
    highest: dict[object, float] = {}
    is_signed = any(panel.is_signed for panel in panels)
    for panel in panels:
        highest[_group(panel, scale)] = max(highest.get(_group(panel, scale), 0.0), _peak(panel, scale))
    found: list[Normalize] = []
    for panel in panels:
        top = highest[_group(panel, scale)] if vmax is None else vmax
        if is_signed:
            found.append(CenteredNorm(0.0, top))
        elif scale == "log":
            found.append(LogNorm(top / _DECADES if vmin is None else vmin, top, clip=True))
        else:
            found.append(Normalize(vmin or 0.0, top))
    return found


def find_clipped(panel: Panel, norm: Normalize) -> Floats:
    """(clipped, 2): rows and columns of the patches that get more than the colours tell apart."""
    if norm.vmax is None:
        return np.zeros((0, 2))
    return np.argwhere(np.abs(panel.times_uniform) > norm.vmax * (1 + 1e-6)).astype(np.float64)


def count_clipped(panel: Panel, norm: Normalize) -> int:
    """How many patches get more than the colours tell apart."""
    return len(find_clipped(panel, norm))


def _group(panel: Panel, scale: Scale) -> object:
    return {"panel": id(panel), "layer": panel.name}.get(scale, "all")


def _peak(panel: Panel, scale: Scale) -> float:
    """Where the colours of a panel would end; never 0, to divide by."""
    sizes = np.abs(panel.times_uniform)
    values = sizes[sizes > 0]  # neither NaN nor what lies outside of a window
    if not values.size:
        return 1.0
    high, most = float(values.max()), float(np.quantile(values, 0.995))
    # One peak that draws nearly everything would leave all else black, and what is below uniform is nothing to look at.
    reached = high if high <= _FAR * most else max(most, min(1.0, high))
    return reached / (max(panel.shares["patches"], 1e-6) if scale == "panel" else 1.0)
