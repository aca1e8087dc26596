"""The conformance test of a recipe, a layout or a partition, for those who write their own.

From top to bottom, an import may only point down:

    conformance  a recipe against replay and the module's own output
    places       where tokens are said to lie against what changes when one place of the input does
"""

from __future__ import annotations

from .conformance import check_recipe

__all__ = ["check_recipe"]
