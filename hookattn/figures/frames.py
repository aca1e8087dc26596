"""Attention over an image, and over one image after another: overlays of one scale, and films of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.animation import FFMpegWriter, PillowWriter
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from ..errors import MissingExtraError
from .draw import COLOURS, rgb

Frame = tuple[npt.ArrayLike, Tensor]
"""An image (height, width, 3), and attention over it (rows, columns)."""


def overlay(
    image: npt.ArrayLike,
    attention: Tensor | None,
    ax: Axes | None = None,
    *,
    alpha: float = 0.85,
    cmap: Any = COLOURS,
    vmax: float | None = None,
    smooth: bool = False,
) -> AxesImage:
    """Draw attention over an image, on axes, and return the artist.

    Args:
        image: (height, width, 3) RGB, uint8 or floats in 0 to 1.
        attention: (rows, columns) that cover the image, not negative, such as `m.image("cls")[0]`; None for the image alone.
        ax: where to draw; None makes a figure, which is `artist.figure`.
        alpha: how much of the image the highest attention covers; where there is none it stays as it is.
        cmap: colours of matplotlib.
        vmax: what is drawn brightest; the highest of the attention if None. One figure for several pictures makes them
            comparable.
        smooth: True blurs patches into each other.

    Raises:
        ValueError: the image or the attention has another shape.
    """
    pixels, shown = rgb(image), np.zeros((1, 1)) if attention is None else _checked(attention)
    height, width = pixels.shape[:2]
    if ax is None:
        ax = Figure(figsize=(4, 4 * height / width), dpi=160).add_axes((0, 0, 1, 1))
    ax.set_axis_off()
    where: Any = {"extent": (0, width, height, 0), "aspect": "equal"}
    ax.imshow(pixels, interpolation="antialiased", **where)
    return ax.imshow(
        shown,
        cmap=cmap,
        vmin=0,
        vmax=(top := _top([shown], vmax)),
        alpha=_cover(shown, top, alpha),
        interpolation="bilinear" if smooth else "nearest",
        **where,
    )


def animate(frames: Iterable[Frame], out: str | Path, *, fps: float = 8, vmax: float | None = None, **style: Any) -> Path:
    """Write one overlay after the other, of one scale, as a film: a GIF, or an MP4 where ffmpeg is installed.

    Args:
        frames: images of one size, each with its attention.
        out: a path that ends in .gif or .mp4.
        fps: frames in a second.
        vmax: what is drawn brightest; the highest of all frames if None.
        style: `alpha`, `cmap`, `smooth` of `overlay`.

    Returns:
        The path.

    Raises:
        ValueError: there are no frames, they differ in size, or the path ends in something else.
        MissingExtraError: it ends in .mp4, and there is no ffmpeg.
    """
    path, shown = Path(out), [(rgb(image), attention) for image, attention in frames]
    if path.suffix.lower() not in (".gif", ".mp4"):
        raise ValueError(f"{path.name!r} ends in neither .gif nor .mp4, which are the films there are.")
    if not shown or len({pixels.shape for pixels, _ in shown}) > 1:
        raise ValueError(f"a film takes images of one size, at least one; given are {len(shown)}.")
    if path.suffix.lower() == ".mp4" and not FFMpegWriter.isAvailable():
        raise MissingExtraError("an MP4 needs ffmpeg, which was not found; install it, or write a .gif.")
    top = _top([_checked(attention) for _, attention in shown], vmax)
    height, width = shown[0][0].shape[:2]
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)
    writer = (PillowWriter if path.suffix.lower() == ".gif" else FFMpegWriter)(fps=fps)  # type: ignore[arg-type]
    with writer.saving(figure, str(path), dpi=100):
        for pixels, attention in shown:
            figure.clear()
            overlay(pixels, attention, figure.add_axes((0, 0, 1, 1)), vmax=top, **style)
            writer.grab_frame()
    return path


def _checked(attention: Tensor) -> npt.NDArray[np.float64]:
    if attention.dim() != 2:
        raise ValueError(
            f"attention is (rows, columns), not {tuple(attention.shape)}: take one image and head, m.image(...)[0]."
        )
    return attention.detach().to(torch.float64).cpu().numpy()


def _top(shown: Sequence[npt.NDArray[np.float64]], vmax: float | None) -> float:
    """What is drawn brightest; never 0, to divide by."""
    return max(max(float(np.nanmax(each, initial=0.0)) for each in shown), 1e-12) if vmax is None else vmax


def _cover(shown: npt.NDArray[np.float64], top: float, alpha: float) -> npt.NDArray[np.float64]:
    covered: npt.NDArray[np.float64] = alpha * np.clip(np.nan_to_num(shown) / top, 0, 1) ** 0.5
    return covered
