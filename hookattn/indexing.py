"""What an index of a map asks for: a part of (batch, heads, rows) to compute, and the rest, which is left to the tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .projected import ALL, Pick


def split_index(index: Any, shape: tuple[int, ...]) -> tuple[tuple[Pick, Pick, Pick], Any]:
    """Part an index into what narrows (batch, heads, rows) beforehand and what is left to do on the narrowed block.

    Raises:
        IndexError: too many indices, or one out of range.
    """
    items = list(index) if isinstance(index, tuple) else [index]
    if not all(_is_simple(i) for i in items) or sum(_is_list(i) for i in items) > 1:
        return (ALL, ALL, ALL), index
    dots = [place for place, item in enumerate(items) if item is Ellipsis]
    if len(items) - len(dots) > 4 or len(dots) > 1:
        raise IndexError(f"a map has 4 axes (batch, head, query, key), which {index!r} does not fit")
    at = dots[0] if dots else len(items)
    items[at : at + 1] = [ALL] * (4 - len(items) + len(dots))
    picks: list[Pick] = []
    rest: list[Any] = []
    for item, length, axis in zip(items, shape, ("batch", "head", "query", "key")):
        if isinstance(item, slice):
            picks, rest = [*picks, item], [*rest, ALL]
        elif _is_list(item):
            picks, rest = [*picks, torch.as_tensor(item)], [*rest, ALL]
        elif -length <= item < length:
            picks, rest = [*picks, slice(item % length, item % length + 1)], [*rest, 0]
        else:
            raise IndexError(f"{axis} {item} is out of range: there are {length}")
    rest[3] = items[3]
    return (picks[0], picks[1], picks[2]), tuple(rest)


def _is_simple(item: Any) -> bool:
    """Whether an item of an index picks along one axis and leaves the others alone."""
    integer = hasattr(item, "__index__") and not isinstance(item, (bool, Tensor)) and getattr(item, "ndim", 0) == 0
    return isinstance(item, slice) or item is Ellipsis or integer or _is_list(item)


def _is_list(item: Any) -> bool:
    return isinstance(item, list) and bool(item) and all(type(i) is int for i in item)
