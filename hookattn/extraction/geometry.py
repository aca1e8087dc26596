"""Where tokens lie, in plain values: noted in the store when it is made, and read back with its maps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..image.tokens import Size, Tokens
from ..maps.attention_map import AttentionMap
from ..recipes.places import Places, settle

Facts = dict[str, Any]
_PLAIN = ("prefix", "grid_size", "spread", "extent", "seen")


def describe_layers(maps: Mapping[str, AttentionMap]) -> dict[str, Facts]:
    """Of each layer heads, queries and keys, and where its tokens lie or why that is not known."""
    return {name: {"shape": list(m.shape[1:]), **_describe(settle(m._geometry, m.shape))} for name, m in maps.items()}


def read_places(facts: Facts, grid: Size | None) -> Places:
    """Where the axes of a map lie; for an image with a grid of its own, on that."""
    tokens = facts["tokens"]
    if isinstance(tokens, str):
        return Places(tuple(facts["axes"]), tokens, {})
    both = tuple(_read_tokens(each, grid) for each in tokens)
    cell = facts["cell_size"]
    cells = {each.grid_size: cell if isinstance(cell, str) else (cell[0], cell[1]) for each in both}
    return Places(tuple(facts["axes"]), (both[0], both[1]), cells)


def _describe(places: Places) -> Facts:
    facts: Facts = {"axes": list(places.axes)}
    if isinstance(places.tokens, str):
        return {**facts, "tokens": places.tokens, "cell_size": places.tokens}
    if any(each.places is not None for each in places.tokens):
        why = "the store does not keep where tokens of windows or of pools lie; record the image with the model"
        return {**facts, "tokens": why, "cell_size": why}
    grid = places.tokens[1].grid_size
    cell = places.cell_sizes[grid]
    told = [{name: getattr(each, name) for name in _PLAIN} for each in places.tokens]
    return {**facts, "tokens": told, "cell_size": cell if isinstance(cell, str) else list(cell)}


def _read_tokens(facts: Facts, grid: Size | None) -> Tokens:
    prefix, grid_size, spread, extent, seen = (facts[name] for name in _PLAIN)
    if grid is None or not all(grid_size):  # a class token that looks at patches has no grid itself
        return Tokens(tuple(prefix), tuple(grid_size), None, spread, tuple(extent), tuple(seen))
    return Tokens(tuple(prefix), grid)
