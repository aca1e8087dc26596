"""Scenes to try attention on: one shape on a textured ground, among bars, dots and noise.

A scene is drawn from its seed alone, so the same number is the same picture everywhere. The mask that comes with it says
where the shape is, which is what an attention map can be judged by.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

SHAPES = ("disc", "square", "triangle", "star", "cross", "ring")
SIZE = 96
_SUPERSAMPLING = 3  # Pillow draws without antialiasing: drawn three times as large, edges are smooth
Pixels = npt.NDArray[np.uint8]
Point = tuple[float, float]


class Scene(NamedTuple):
    """One drawn scene.

    Attributes:
        image: (height, width, 3) uint8 RGB.
        mask: (height, width) bool, True where the shape is.
        label: the index of the shape in `SHAPES`.
    """

    image: Pixels
    mask: npt.NDArray[np.bool_]
    label: int


def draw(seed: int, size: int = SIZE) -> Scene:
    """Draw the scene of a seed.

    Args:
        seed: any non-negative integer; scenes of different seeds are independent.
        size: height and width in pixels.
    """
    # The order in which numbers are drawn makes the scene of a seed; the model was trained on scenes drawn in this one.
    rng = np.random.default_rng(seed)
    big = size * _SUPERSAMPLING
    label = int(rng.integers(len(SHAPES)))
    texture = _texture(rng, size)
    ground = texture.mean(axis=(0, 1))
    canvas = Image.fromarray(texture).resize((big, big), Image.Resampling.BILINEAR)
    _clutter(rng, ImageDraw.Draw(canvas), big)
    stencil = _stencil(rng, SHAPES[label], big)
    canvas.paste(_colour_away_from(rng, ground), (0, 0), stencil)
    image = np.asarray(canvas.resize((size, size), Image.Resampling.BOX), dtype=np.float64)
    image += rng.normal(0.0, rng.uniform(4, 12), image.shape)
    mask = np.asarray(stencil.resize((size, size), Image.Resampling.BOX)) > 127
    return Scene(np.clip(image, 0, 255).astype(np.uint8), mask, label)


def _texture(rng: np.random.Generator, size: int) -> Pixels:
    """Two octaves of smooth colour noise and a faint stripe pattern around a random base colour."""
    ground = np.full((size, size, 3), rng.uniform(40, 215, 3))
    for cells, amplitude in ((3, 40), (9, 22)):
        coarse = rng.normal(0, 1, (cells, cells)).astype(np.float32)
        smooth = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
        ground += np.asarray(smooth)[..., None] * rng.uniform(0, amplitude, 3)
    y, x = np.mgrid[0 : 1 : size * 1j, 0 : 1 : size * 1j]
    angle, frequency = rng.uniform(0, math.pi), rng.uniform(20, 70)
    stripes = np.sin(frequency * (x * math.cos(angle) + y * math.sin(angle)))
    ground += stripes[..., None] * rng.uniform(0, 12)
    texture: Pixels = np.clip(ground, 0, 255).astype(np.uint8)
    return texture


def _clutter(rng: np.random.Generator, pen: ImageDraw.ImageDraw, big: int) -> None:
    """Thin bars and small dots in random colours: things that stand out and mean nothing."""
    for _ in range(rng.integers(2, 6)):
        x, y, angle, length = *rng.uniform(0, big, 2), rng.uniform(0, math.pi), rng.uniform(0.15, 0.6) * big
        end = (x + length * math.cos(angle), y + length * math.sin(angle))
        pen.line([(x, y), end], fill=_colour(rng), width=int(rng.uniform(0.010, 0.022) * big))
    for _ in range(rng.integers(3, 9)):
        x, y, radius = *rng.uniform(0, big, 2), rng.uniform(0.010, 0.025) * big
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=_colour(rng))


def _stencil(rng: np.random.Generator, shape: str, big: int) -> Image.Image:
    """The shape as a mask at a random size, place and rotation; never cut by the border."""
    radius = rng.uniform(0.14, 0.20) * big
    x, y = rng.uniform(radius, big - radius, 2)
    turn = rng.uniform(0, 2 * math.pi)
    stencil = Image.new("L", (big, big))
    pen = ImageDraw.Draw(stencil)
    if shape in ("disc", "ring"):
        outer = 0.92 * radius
        pen.ellipse([x - outer, y - outer, x + outer, y + outer], fill=255)
        if shape == "ring":
            inner = 0.5 * radius
            pen.ellipse([x - inner, y - inner, x + inner, y + inner], fill=0)
    else:
        pen.polygon([(x + radius * px, y + radius * py) for px, py in _outline(shape, turn)], fill=255)
    return stencil


def _outline(shape: str, turn: float) -> list[Point]:
    """Corners of a polygon within the unit circle, rotated by `turn` radians."""
    if shape == "cross":
        arm = 0.3
        quarter = [(arm, -0.95), (arm, -arm), (0.95, -arm), (0.95, arm)]
        corners = [_rotate(p, k * math.pi / 2) for k in range(4) for p in quarter[:3]]
        return [_rotate(p, turn) for p in corners]
    radii = {"square": [1.0] * 4, "triangle": [1.0] * 3, "star": [1.0, 0.42] * 5}[shape]
    step = 2 * math.pi / len(radii)
    return [(r * math.cos(turn + k * step), r * math.sin(turn + k * step)) for k, r in enumerate(radii)]


def _rotate(point: Point, angle: float) -> Point:
    x, y = point
    return x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (int(c) for c in rng.integers(0, 256, 3))
    return red, green, blue


def _colour_away_from(rng: np.random.Generator, ground: npt.NDArray[np.float64]) -> tuple[int, int, int]:
    """A random colour at least 100 (of 441, RGB distance) from the mean of the ground."""
    while True:
        colour = _colour(rng)
        if float(np.linalg.norm(np.asarray(colour) - ground)) >= 100:
            return colour
