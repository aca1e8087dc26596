"""Tokens and the image they come from: grids, windows, prefix tokens; a photo that is shown to a model.

A layout or a partition of your own returns `Tokens`, made by one of the functions of windows from what `Geometry` tells.

From top to bottom, an import may only point down:

    photo          a photo, what became of it before the model saw it, and the way there and back
    preprocessing  how a model wants its images
    pixels         a photo as upright RGB of 8 bits
    geometry       what of a call outlives its tensors: sizes, images, the block that cuts windows
    trunk          how a model cuts its image into patches
    snapshot       a module as it was in a forward
    cells          how large the cells of a grid are on the image
    images         what a model looks at, found among its arguments
    windows        tokens of a whole grid, and of a grid that is cut or pooled
    sizes          how large a feature map is after convolutions and pools
    tokens         what an axis of a map stands for
"""

from __future__ import annotations

from .geometry import Geometry
from .photo import Photo
from .tokens import Tokens
from .windows import cut_padded_windows, cut_windows, pool_windows, slide_windows, whole_grid

__all__ = [
    "Geometry",
    "Photo",
    "Tokens",
    "cut_padded_windows",
    "cut_windows",
    "pool_windows",
    "slide_windows",
    "whole_grid",
]
