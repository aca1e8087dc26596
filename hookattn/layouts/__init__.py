"""Layouts: where the queries and keys of a class lie on the image, one file per mechanism.

A partition tells how a block cuts its input into windows, a layout what an attention class makes of its own input. What has
neither sees all tokens of the image: prefix tokens, then the grid of patches.
"""

from __future__ import annotations

from . import covariance, elsewhere, grids, sequences, windows
from .registry import axes_of, block_of, channels, layout, partition, tokens_of
from .setting import Images, Patches, Setting, images_in, plain_facts, sizes_of, stems_of, trunk_of

__all__ = [
    "Images",
    "Patches",
    "Setting",
    "axes_of",
    "block_of",
    "channels",
    "covariance",
    "elsewhere",
    "grids",
    "images_in",
    "layout",
    "partition",
    "plain_facts",
    "sequences",
    "sizes_of",
    "stems_of",
    "tokens_of",
    "trunk_of",
    "windows",
]
