"""Recipes: how a class of attention module makes its queries and keys, one file per mechanism.

A recipe mirrors the `forward` of the class and stops where the scores would be formed. What has no recipe is replayed.
"""

from __future__ import annotations

from . import multihead, plain, relative, rotary
from .projections import project
from .registry import find_recipe, is_known, names_of, recipe, registered

__all__ = ["find_recipe", "is_known", "multihead", "names_of", "plain", "project", "recipe", "registered", "relative", "rotary"]
