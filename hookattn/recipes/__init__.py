"""Recipes: how a class of attention module makes its queries and keys, one file per mechanism.

A recipe mirrors the `forward` of the class and stops where the scores would be formed. What has no recipe is replayed.
"""

from __future__ import annotations

from . import folded, multihead, plain, relative, rotary
from .projections import project
from .registry import file_form, find_form, find_recipe, is_known, recipe, registered
from .unreadable import unreadable

__all__ = [
    "file_form",
    "find_form",
    "find_recipe",
    "folded",
    "is_known",
    "multihead",
    "plain",
    "project",
    "recipe",
    "registered",
    "relative",
    "rotary",
    "unreadable",
]
