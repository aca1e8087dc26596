"""Recipes: how a class of attention module makes its queries and keys, one file per mechanism.

A recipe mirrors the `forward` of the class and stops where the scores would be formed. What has no recipe is replayed.
"""

from __future__ import annotations

from . import (
    channels,
    cosine,
    decomposed,
    elsewhere,
    folded,
    grids,
    multihead,
    offsets,
    outlook,
    plain,
    pooling,
    reduced,
    relative,
    rotary,
    talking,
    twofold,
    windows,
)
from .projections import project
from .registry import file_form, find_form, find_recipe, is_known, recipe, registered
from .unreadable import unreadable

__all__ = [
    "channels",
    "cosine",
    "decomposed",
    "elsewhere",
    "file_form",
    "find_form",
    "find_recipe",
    "folded",
    "grids",
    "is_known",
    "multihead",
    "offsets",
    "outlook",
    "plain",
    "pooling",
    "project",
    "recipe",
    "reduced",
    "registered",
    "relative",
    "rotary",
    "talking",
    "twofold",
    "unreadable",
    "windows",
]
