"""A photo as upright RGB of 8 bits, whatever it came as, and what was done to make it so."""

from __future__ import annotations

from io import BytesIO
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Union

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import HookattnError, MissingExtraError, TokenError

Source = Union[str, "PathLike[str]", bytes, npt.NDArray[Any], Tensor, Any]
"""A path, bytes of a file, an image of PIL, an array (height, width[, channels]) or a tensor ([channels, ]height, width)."""
_WIDE = ("I", "F")  # modes of more than 8 bits: "I", "I;16", "I;16B", ..., "F"


def read_photo(source: Source, ground: str) -> tuple[Any, list[str]]:
    """Make an upright RGB image of PIL of whatever shows a photo.

    Args:
        source: what shows it. Values of 16 bits and more are scaled from their smallest and largest to 0 and 255, and so are
            floats, but for those that lie in 0 to 1.
        ground: the colour that lies behind what is transparent, by a name or code that PIL knows.

    Returns:
        The image, and in words what was done to it.

    Raises:
        HookattnError: it is no image that can be read.
        TokenError: an array or tensor has not the shape of one photo.
    """
    pil, done = import_pillow(), list[str]()
    if isinstance(source, Tensor):
        image = _from_array(_channels_last(source), done)
    elif isinstance(source, np.ndarray):
        image = _from_array(source, done)
    elif isinstance(source, pil.Image):
        image = source
    else:
        image = _open(source)
    return _flatten(_turn(image, done), ground, done), done


def import_pillow() -> Any:
    """The module `PIL.Image`, imported when the first photo is read."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("photos need Pillow: pip install pillow. A tensor goes into the model without it.") from error
    return Image


def _open(path: Any) -> Any:
    pil = import_pillow()
    if not isinstance(path, (str, PathLike, bytes)):
        raise HookattnError(f"a photo is a path, an image of PIL, an array or a tensor, not {type(path).__name__}.")
    what = f"a file of {len(path)} bytes" if isinstance(path, bytes) else fspath(path)
    try:
        # read at once: PIL keeps a file open where it fails, and where there are more frames
        encoded = path if isinstance(path, bytes) else Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise HookattnError(f"{what} is no image that can be read ({error}).") from error
    try:
        image = pil.open(BytesIO(encoded))
        image.load()
    except (OSError, ValueError, SyntaxError, TypeError, AttributeError, pil.DecompressionBombError) as error:
        raise HookattnError(f"{what} is no image that can be read ({_explain(error, encoded)}.") from error
    return image


def _explain(error: Exception, encoded: bytes) -> str:
    """Why bytes are no image, and what to do about it."""
    from PIL import UnidentifiedImageError

    if not encoded:
        return "it is empty). Fetch it anew"
    if isinstance(error, UnidentifiedImageError):
        return f"of no kind that PIL knows, or broken where it begins, {encoded[:16]!r}). Fetch it anew, or save it as PNG"
    reason = str(error).rstrip(".")
    if isinstance(error, import_pillow().DecompressionBombError):
        return f"{reason}). Make it smaller, or set PIL.Image.MAX_IMAGE_PIXELS = None where it can be trusted"
    return f"{reason}). It is damaged, or ends too early: fetch it anew"


def _turn(image: Any, done: list[str]) -> Any:
    """Turn and mirror a photo as its EXIF says; of several frames the first."""
    from PIL import ImageOps

    orientation = image.getexif().get(0x0112, 1)
    if getattr(image, "n_frames", 1) > 1:
        done.append(f"the first of {image.n_frames} frames")
    if orientation in range(2, 9):
        done.append(f"turned upright (EXIF orientation {orientation})")
        image = ImageOps.exif_transpose(image)
    return image


def _flatten(image: Any, ground: str, done: list[str]) -> Any:
    """Colours of 8 bits of an image in any mode of PIL."""
    pil, mode = import_pillow(), image.mode
    if mode.startswith(_WIDE):
        values = np.asarray(image)
        image = pil.fromarray(_to_bytes(values, "32" if mode in _WIDE else "16", done))
    if mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("LA").convert("RGBA") if mode == "La" else image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            done.append(f"laid over {ground} where it is transparent")
        return pil.alpha_composite(pil.new("RGBA", image.size, ground), image).convert("RGB")
    if mode in ("CMYK", "YCbCr", "HSV"):
        done.append(f"converted from {mode}")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise HookattnError(f"the photo is in mode {mode!r}, which PIL does not convert; save it as RGB.") from error


def _channels_last(x: Tensor) -> npt.NDArray[Any]:
    """An array of a tensor: (channels, height, width) becomes (height, width, channels)."""
    if x.dim() not in (2, 3) or (x.dim() == 3 and x.shape[0] > 4):
        raise TokenError(
            "a tensor of one photo is (channels, height, width) with up to 4 channels, or (height, width), not "
            f"{tuple(x.shape)}; of a batch give x[0], of channels that come last x.permute(2, 0, 1)."
        )
    x = x.detach().cpu()
    x = x.float() if x.dtype == torch.bfloat16 else x
    array: npt.NDArray[Any] = (x.permute(1, 2, 0) if x.dim() == 3 else x).numpy()
    return array


def _from_array(array: npt.NDArray[Any], done: list[str]) -> Any:
    """An image of PIL of (height, width) or (height, width, channels): grey, grey and alpha, RGB, or RGBA."""
    flat = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    if flat.ndim not in (2, 3) or (flat.ndim == 3 and flat.shape[-1] not in (2, 3, 4)) or not flat.size:
        raise TokenError(
            f"an array of one photo is (height, width, channels) with up to 4 channels, or (height, width), not {array.shape}; "
            "of a batch give x[0], of channels that come first x.transpose(1, 2, 0)."
        )
    if flat.dtype != np.uint8:
        colours = flat.shape[-1] // 2 * 2 - 1 if flat.ndim == 3 and flat.shape[-1] in (2, 4) else None
        bits = str(flat.dtype.itemsize * 8)
        # alpha is a share, and has no range of its own
        parts = [flat] if colours is None else [flat[..., :colours], flat[..., colours:]]
        scaled = [_to_bytes(parts[0], bits, done), *(_to_share(part) for part in parts[1:])]
        flat = scaled[0] if colours is None else np.concatenate(scaled, -1)
    return import_pillow().fromarray(np.ascontiguousarray(flat))


def _to_bytes(values: npt.NDArray[Any], bits: str, done: list[str]) -> npt.NDArray[np.uint8]:
    """Values as 0 to 255: of their own range, or of 0 to 1 where they are floats of that range or truth values."""
    numbers = values.astype(np.float64)
    finite = numbers[np.isfinite(numbers)]
    if not finite.size:
        raise HookattnError("the photo has no finite value, so there is nothing to see in it.")
    low, high = float(finite.min()), float(finite.max())
    if values.dtype.kind in "bf" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    else:
        done.append(f"values of {bits} bits scaled from {low:g} to {high:g}")
    numbers = np.nan_to_num(numbers, nan=low, posinf=high, neginf=low)
    return np.rint((numbers - low) / ((high - low) or 1.0) * 255).astype(np.uint8)


def _to_share(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Alpha as 0 to 255: integers as shares of the largest of their type, floats as shares of 1."""
    most = np.iinfo(values.dtype).max if values.dtype.kind in "iu" else 1.0
    return np.rint(np.clip(np.nan_to_num(values.astype(np.float64) / most), 0, 1) * 255).astype(np.uint8)
