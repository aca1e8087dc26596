"""A photo, what became of it before the model saw it, and the way there and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import TokenError
from .pixels import Source, read_photo
from .preprocessing import Crop, Plan, Preprocessing, make_input, plan_crop, plan_whole, preprocessing_of
from .tokens import Size

Point = tuple[float, float]


@dataclass(frozen=True, eq=False)
class Photo:
    """A photo as a model is shown it.

        photo = Photo.open("dog.jpg", model)
        with AttentionRecorder(model) as rec, torch.no_grad():
            model(photo.tensor[None])
        seen = rec.maps[-1].image(photo.to_input((0.4, 0.6)), size=photo.input_size)
        photo.place(seen)  # on the whole photo: (1, height, width), NaN where the model saw nothing

    A point is (y, x) in fractions of the height and the width of the photo, upright: of pixel (row, column) it is
    ((row + 0.5) / height, (column + 0.5) / width).

    Attributes:
        pixels: (height, width, 3) uint8 RGB, the whole photo upright.
        tensor: (channels, height, width), what the model is called with, normalised.
        crop: "none" where the model sees the whole photo, "center" where it sees its middle.
        resized: (height, width) of the whole photo in pixels of the model's input.
        corner: (row, column) there where the model's input begins; negative where it has a border.
        steps: what was done to the photo, in words.
    """

    pixels: Tensor
    tensor: Tensor
    crop: Crop
    resized: Size
    corner: tuple[int, int]
    steps: tuple[str, ...]

    @classmethod
    def open(
        cls,
        source: Source,
        model: nn.Module | Mapping[str, Any] | Preprocessing,
        *,
        size: Size | int | None = None,
        crop: Crop | None = None,
        ground: str = "white",
    ) -> Photo:
        """Make a model's input of a photo, as the model was trained to see photos.

        Args:
            source: a path, the bytes of a file, an image of PIL, an array (height, width, channels) or a tensor (channels,
                height, width); see `read_photo` for what becomes of its values.
            model: a model of timm, or timm's data config of one: `timm.data.resolve_model_data_config(model)`.
            size: (height, width) of the model's input, or one number; None for the model's own.
            crop: "none" shows the model the whole photo, in its own shape up to a multiple of what the model shrinks images by,
                with as many pixels as `size` squared; where `size` is two numbers, in that shape. "center" is what timm's
                transform does: the photo is resized and its middle cut out. None is "none" for models that take images of any
                size, "center" for others and for a data config.
            ground: the colour that lies behind what is transparent.

        Raises:
            HookattnError: it is no image that can be read.
            TokenError: the model does not take images of that shape, or does not tell how it wants them.
        """
        wanted, size = preprocessing_of(model), _check_size(size)
        if crop not in (None, "none", "center"):
            raise TokenError(f"crop={crop!r} is no choice: 'none' for the whole photo, 'center' for its middle, or None.")
        image, steps = read_photo(source, ground)
        upright = image.size[::-1]
        found: Crop = crop or ("none" if wanted.any_size else "center")
        plan = plan_whole(upright, size, wanted) if found == "none" else plan_crop(upright, size, wanted)
        if wanted.strict and plan.size != wanted.input_size[1:]:
            raise TokenError(_refuse(plan, wanted))
        # a copy: an array that is only looked at cannot be written to
        pixels = torch.from_numpy(np.array(image))
        steps += _describe(upright, plan)
        return cls(pixels, make_input(image, plan, wanted), found, plan.resized, plan.corner, tuple(steps))

    def __repr__(self) -> str:
        (rows, columns), (height, width) = self.size, self.input_size
        return f"Photo({rows} x {columns}, {'; '.join(self.steps)}; model's input {height} x {width})"

    @property
    def size(self) -> Size:
        """(height, width) of the photo in pixels, upright."""
        return self.pixels.shape[0], self.pixels.shape[1]

    @property
    def input_size(self) -> Size:
        """(height, width) of the model's input in pixels."""
        return self.tensor.shape[-2], self.tensor.shape[-1]

    @property
    def seen(self) -> tuple[float, float, float, float]:
        """(top, left, bottom, right) of what the model was shown of the photo, in fractions of it."""
        top, left = (max(0.0, p) for p in self.to_photo((0.0, 0.0)))
        bottom, right = (min(1.0, p) for p in self.to_photo((1.0, 1.0)))
        return top, left, bottom, right

    def to_input(self, point: Point) -> Point:
        """A point of the photo as the point of the model's input that `m.image` takes.

        Raises:
            TokenError: it is not on the photo, or the model was not shown that part.
        """
        if not all(0 <= p <= 1 for p in point):
            raise TokenError(f"the point {point} is not on the photo: fractions run from 0.0 to 1.0 of its height and width.")
        y, x = ((p * n - at) / side for p, n, at, side in zip(point, self.resized, self.corner, self.input_size))
        if not (0 <= y <= 1 and 0 <= x <= 1):
            top, left, bottom, right = self.seen
            raise TokenError(
                f"the model did not see the point {point} of the photo: it saw {top:.3f} to {bottom:.3f} of the height and "
                f"{left:.3f} to {right:.3f} of the width. Take a point there, or show it the whole photo: crop='none'."
            )
        return y, x

    def to_photo(self, point: Point) -> Point:
        """A point of the model's input as a point of the photo; not within 0 and 1 on a border around the photo."""
        y, x = ((p * side + at) / n for p, n, at, side in zip(point, self.resized, self.corner, self.input_size))
        return y, x

    def place(self, pictures: Tensor, size: Size | None = None) -> Tensor:
        """Lay pictures over the model's input onto the whole photo: each pixel gets what lies under its centre.

        Where patches do not fill the model's input, let the map draw them first: `m.image(query, size=photo.input_size)`.

        Args:
            pictures: (..., rows, columns), which cover the whole of the model's input.
            size: (height, width) to draw the photo at; None for its own pixels.

        Returns:
            (..., height, width); NaN where the model saw nothing.
        """
        places = [self._places_of(axis, n, pictures.shape[axis - 2]) for axis, n in enumerate(size or self.size)]
        rows, columns = (each.to(pictures.device) for each in places)
        inside = (rows >= 0)[:, None] & (columns >= 0)
        laid = pictures[..., rows.clamp(min=0)[:, None], columns.clamp(min=0)]
        return (laid if laid.is_floating_point() else laid.float()).masked_fill(~inside, torch.nan)

    def _places_of(self, axis: int, pixels: int, cells: int) -> Tensor:
        """The row (axis 0) or column of a picture over the model's input under each pixel of the photo; -1 where none is."""
        resized, at, side = self.resized[axis], self.corner[axis], self.input_size[axis]
        # in whole numbers, twice as large for the centres of pixels, so that none is rounded over an edge
        y = (2 * torch.arange(pixels, device="cpu") + 1) * resized - 2 * pixels * at
        places = (y * cells).div(2 * pixels * side, rounding_mode="floor")
        return places.masked_fill((y < 0) | (y >= 2 * pixels * side), -1)


def _check_size(size: Any) -> Any:
    sides = size if isinstance(size, (tuple, list)) else (size,)
    if size is None or (len(sides) in (1, 2) and all(type(n) is int and n > 0 for n in sides)):
        return tuple(size) if isinstance(size, list) else size
    raise TokenError(f"size={size!r} is no size: a number of pixels such as 224, or (height, width).")


def _describe(photo_size: Size, plan: Plan) -> list[str]:
    """What is done to a photo to fit a model, in words."""
    stretch = plan.resized[0] / photo_size[0] / (plan.resized[1] / photo_size[1])
    height, width = plan.resized
    steps = [f"resized to {height} x {width}"] if plan.resized != photo_size else []
    if abs(stretch - 1) > 0.01:
        steps += [f"{'heightened' if stretch > 1 else 'widened'} by {max(stretch, 1 / stretch) - 1:.0%}"]
    if plan.resized != plan.size:
        steps += [f"its middle of {plan.size[0]} x {plan.size[1]} shown to the model"]
    return steps


def _refuse(plan: Plan, wanted: Preprocessing) -> str:
    (_, height, width), (rows, columns) = wanted.input_size, plan.size
    return (
        f"this {wanted.model or 'model'} takes images of {height} x {width} alone, and the photo would come as one of {rows} x "
        f"{columns}. Take crop='center', or make the model for it: timm.create_model(..., img_size={plan.size}), or "
        "dynamic_img_size=True where it has that."
    )
