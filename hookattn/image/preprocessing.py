"""How a model wants its images: the sizes it takes, how photos are resized and cut for that, and the colours it knows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import TokenError
from .pixels import import_pillow
from .tokens import Size
from .trunk import reductions_of

Crop = Literal["none", "center"]
RESAMPLED = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""How a photo can be resized, by the numbers that Pillow gives them."""
_CROPPED = ("center", "squash", "border")
_MOST_PIXELS = 2**27  # of a photo that is resized before it is cut


class Preprocessing(NamedTuple):
    """What timm's data config tells, with its defaults.

    Attributes:
        input_size: (channels, height, width) of the model's own images.
        interpolation: how a photo is resized: "bilinear", "bicubic", ...
        mean: of each channel, which is subtracted.
        std: of each channel, by which the rest is divided.
        crop_pct: which part of the resized photo is left when its middle is cut out.
        crop_mode: "center" cuts off what is too long, "squash" changes the shape first, "border" adds borders instead.
        multiple: what the height and the width of images of other sizes have to be multiples of.
        any_size: whether the model takes images of other sizes.
        strict: whether it is known that it refuses them.
        model: whose class it was found in; "" where it is not known.
    """

    input_size: tuple[int, int, int] = (3, 224, 224)
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    crop_pct: float = 0.875
    crop_mode: str = "center"
    multiple: int = 1
    any_size: bool = False
    strict: bool = False
    model: str = ""


def preprocessing_of(model: nn.Module | Mapping[str, Any] | Preprocessing) -> Preprocessing:
    """How a model of timm, or a data config as timm resolves it, wants images; what was found before is that again.

    Raises:
        TokenError: the model does not tell.
    """
    if isinstance(model, Preprocessing):
        return model
    if isinstance(model, Mapping):
        return _from_config(model)
    holder: Any = next((m for m in model.modules() if isinstance(getattr(m, "pretrained_cfg", None), Mapping)), None)
    if holder is None:
        raise TokenError(
            f"{type(model).__name__} does not say how it wants its images; in its place give a dict such as "
            '{"input_size": (3, 224, 224), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "crop_pct": 1.0}.'
        )
    told, embed = _from_config(holder.pretrained_cfg), getattr(holder, "patch_embed", None)
    strict = getattr(embed, "strict_img_size", None)
    own = getattr(embed, "img_size", None)
    if isinstance(own, tuple):  # the model was made for another size than its weights
        told = told._replace(input_size=(told.input_size[0], *own))
    any_size = not (holder.pretrained_cfg.get("fixed_input_size", False) if strict is None else strict)
    multiple, name = max(reductions_of(holder), default=1), type(model).__name__
    return told._replace(multiple=multiple, any_size=any_size, strict=bool(strict), model=name)


def _from_config(config: Mapping[str, Any]) -> Preprocessing:
    given = {name: config.get(name) for name in Preprocessing._fields[:6]}
    plain = {name: v.tolist() if isinstance(v, (np.ndarray, Tensor)) else v for name, v in given.items()}
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in plain.items() if v}
    found = Preprocessing(**values)
    _check(found)
    if found.input_size[0] not in (1, 3) or {len(found.mean), len(found.std)} != {found.input_size[0]}:
        raise TokenError(
            f"a photo has 1 or 3 channels with a mean and a std each, not {found.input_size[0]}, {len(found.mean)} and "
            f"{len(found.std)}; make the model's input yourself."
        )
    return found


def _check(told: Preprocessing) -> None:
    """Raise a TokenError for what is not such as `Preprocessing` has it."""
    right = {
        "input_size": (_are(told.input_size, Integral) and len(told.input_size) == 3, "three whole numbers, (3, 224, 224)"),
        "interpolation": (told.interpolation in RESAMPLED, f"one of {', '.join(RESAMPLED)}"),
        "mean": (_are(told.mean, Real), "a number for each channel, (0.5, 0.5, 0.5)"),
        "std": (_are(told.std, Real) and all(told.std), "a number for each channel, none of them 0, (0.5, 0.5, 0.5)"),
        "crop_pct": (_are((told.crop_pct,), Real) and told.crop_pct > 0, "a number above 0, 1.0 for all of the photo"),
        "crop_mode": (told.crop_mode in _CROPPED, f"one of {', '.join(_CROPPED)}"),
    }
    for name, (is_right, what) in right.items():
        if not is_right:
            raise TokenError(f"{name}={getattr(told, name)!r} of the preprocessing is no such thing: it is {what}.")


def _are(values: Any, kind: type) -> bool:
    return isinstance(values, tuple) and all(isinstance(value, kind) and not isinstance(value, bool) for value in values)


class Plan(NamedTuple):
    """What becomes of a photo: it is resized, and a box of that is what the model gets.

    Attributes:
        resized: (height, width) of the whole photo in pixels of the model's input.
        corner: (row, column) in it where the model's input begins; negative where it has a border.
        size: (height, width) of the model's input.
    """

    resized: Size
    corner: tuple[int, int]
    size: Size


def plan_whole(photo_size: Size, size: Size | int | None, model: Preprocessing) -> Plan:
    """Keep a whole photo, in its own shape up to what the model's multiples allow."""
    if isinstance(size, tuple):
        return Plan(size, (0, 0), size)
    most = model.input_size[1] * model.input_size[2] if size is None else size * size
    scale = math.sqrt(most / (photo_size[0] * photo_size[1])) / model.multiple
    rows, columns = (max(1, round(n * scale)) for n in photo_size)
    if 1 in (rows, columns):  # of a strip the shape is given up, not the budget
        longest = max(1, most // model.multiple**2)
        rows, columns = min(rows, longest), min(columns, longest)
    found = rows * model.multiple, columns * model.multiple
    return Plan(found, (0, 0), found)


def most_cells(size: Size | int | None, model: Preprocessing) -> int:
    """How many cells of the model's multiple, rows x columns, a whole photo of any shape becomes at most in `plan_whole`."""
    if isinstance(size, tuple):
        return size[0] // model.multiple * (size[1] // model.multiple)
    cells = (model.input_size[1] * model.input_size[2] if size is None else size * size) / model.multiple**2
    # the narrowest photo of so many rows is the one whose rows were rounded up by half a cell
    return max(int(cells), *(rows * round(cells / (rows - 0.5)) for rows in range(2, math.isqrt(math.ceil(cells)) + 2)))


def plan_crop(photo_size: Size, size: Size | int | None, model: Preprocessing) -> Plan:
    """Resize a photo and cut out its middle, as timm's own transform does, to the pixel."""
    target: Size = model.input_size[1:] if size is None else (size, size) if isinstance(size, int) else size
    scaled = [math.floor(n / model.crop_pct) for n in target]
    ratios = [n / goal for n, goal in zip(photo_size, scaled)]
    if model.crop_mode == "squash":
        resized = scaled
    elif model.crop_mode == "border":
        resized = [round(n / max(ratios)) for n in photo_size]
    elif scaled[0] == scaled[1]:  # torchvision's rule, which rounds down
        resized = [scaled[0] if n == min(photo_size) else int(scaled[0] * n / min(photo_size)) for n in photo_size]
    else:
        resized = [round(n / min(ratios)) for n in photo_size]
    rows, columns = (max(1, n) for n in resized)
    if rows * columns > _MOST_PIXELS:
        raise TokenError(
            f"a photo of {photo_size[0]} x {photo_size[1]} pixels is too long a strip to cut its middle out: it would be "
            f"resized to {rows} x {columns}. Take crop='none', or a part of the photo."
        )
    corner = (_middle(rows, target[0]), _middle(columns, target[1]))
    return Plan((rows, columns), corner, target)


def _middle(n: int, length: int) -> int:
    """Where the middle part of a length begins; before 0 where it is longer than all there is."""
    return round((n - length) / 2) if n >= length else -((length - n) // 2)


def make_input(image: Any, plan: Plan, model: Preprocessing) -> Tensor:
    """What the model gets of an RGB image of PIL: (channels, height, width), normalised."""
    pil = import_pillow()
    grey = model.input_size[0] == 1
    image = image.convert("L") if grey else image
    (height, width), (top, left) = plan.resized, plan.corner
    if image.size != (width, height):
        image = image.resize((width, height), pil.Resampling[model.interpolation.upper()])
    fill = tuple(round(255 * v) for v in model.mean) if model.crop_mode == "border" else (0,) * model.input_size[0]
    canvas = pil.new(image.mode, plan.size[::-1], fill[0] if grey else fill)
    canvas.paste(image, (-left, -top))
    x = torch.from_numpy(np.array(canvas)).reshape(*plan.size, -1).permute(2, 0, 1).contiguous().float().div(255)
    mean, std = (torch.tensor(v, dtype=torch.float32, device="cpu")[:, None, None] for v in (model.mean, model.std))
    return x.sub_(mean).div_(std)
