"""What a model looks at, found among its arguments: images, or patches of images (NaFlex)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Union

import torch
from torch import Tensor

from .tokens import Size


class Patches(NamedTuple):
    """Images that came as patches, each with its own grid, padded to one length (NaFlex).

    Attributes:
        coordinates: (images, patches, 2), the row and column of each patch.
        valid: (images, patches), False where there is only padding.
        patch_size: (height, width) of a patch in pixels, where the patches themselves tell.
    """

    coordinates: Tensor
    valid: Tensor
    patch_size: Size | None = None


Images = Union[tuple[int, int, int], Patches, None]
"""(images, height, width), images that came as patches, or None where none were seen."""


def images_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Images:
    """The images among what a model or its stem is called with: (batch, channels, height, width), or patches of them."""
    named = _named_in(args, kwargs)
    if named and (patches := _patches_in(args, named)) is not None:
        return patches
    for value in (*args, *named.values()):  # the first that has the shape of images
        if isinstance(value, Tensor) and value.dim() == 4:
            images, _, height, width = value.shape
            return images, height, width
    return None


def frames_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    """How many frames a clip may have that a model is called with: of 5 axes, channels are the second or the third."""
    values = (*args, *_named_in(args, kwargs).values())
    clip = next((v for v in values if isinstance(v, Tensor) and v.dim() == 5), None)
    return () if clip is None else tuple(clip.shape[1:3])


def _named_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments that have names; a model may take all of its input in one dict."""
    return {**kwargs, **args[0]} if args and isinstance(args[0], dict) else kwargs


def _patches_in(args: tuple[Any, ...], named: Mapping[str, Any]) -> Patches | None:
    """The patches of images among arguments, told by the names of some."""
    # timm's NaFlex names coordinates, transformers' SigLIP 2 the grid of each image
    coordinates, valid = named.get("patch_coord"), named.get("patch_valid")
    if isinstance(coordinates, Tensor):
        everywhere = torch.ones(coordinates.shape[:2], dtype=torch.bool, device="cpu")
        patches = next((a for a in (*args, *named.values()) if isinstance(a, Tensor) and a.dim() == 5), None)
        size = None if patches is None else (int(patches.shape[2]), int(patches.shape[3]))
        return Patches(coordinates, valid if isinstance(valid, Tensor) else everywhere, size)
    shapes, patches = named.get("spatial_shapes"), named.get("pixel_values")
    if isinstance(shapes, Tensor) and isinstance(patches, Tensor) and patches.dim() == 3:
        rows, columns = shapes.cpu().long().T[..., None]
        numbers = torch.arange(patches.shape[1], device="cpu").expand(len(patches), -1)
        return Patches(torch.stack((numbers // columns, numbers % columns), dim=-1), numbers < rows * columns)
    return None
