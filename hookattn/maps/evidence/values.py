"""The values that a forward is taken down with: those of a call, moved a little, or others where they are no numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...calls.arguments import copy_structure, is_cache
from ...errors import UnreadableError

HALF = (torch.float16, torch.bfloat16)


def exact(t: Tensor) -> Tensor:
    """A copy, in float32 if it is of less."""
    return t.detach().float() if t.dtype in HALF else t.detach().clone()


def moved(t: Tensor, random: torch.Generator, spread: float, most: float = torch.inf, *, drawn: bool = False) -> Tensor:
    """A copy, moved a little; where it is odd, or if `drawn` wherever it is finite, numbers of this spread."""
    t = exact(t)
    if not t.is_floating_point():
        return t
    less, more = (torch.rand(t.shape, generator=random, device="cpu").to(t) for _ in range(2))
    near = t * (1 - 0.01 * less) + 0.01 * (more - 0.5)  # infinite or large parts of a mask, which are below zero, stay such
    return torch.where(is_odd(t, most) | (t.isfinite() if drawn else False), spread * (less - more), near)


def is_odd(t: Tensor, most: float) -> Tensor:
    """Where a tensor is NaN, or as large as that."""
    return ~(t < most) if t.is_floating_point() else torch.zeros((), dtype=torch.bool)


def varied_or_all(tensors: list[Tensor]) -> set[int]:
    """Ids of tensors of more than a few values, or of all if there are none: a mask of zeros may be asked where it is zero."""
    floats = [t for t in tensors if t.is_floating_point() and not t.is_nested and t.layout is torch.strided]
    varied = [t for t in floats if torch.unique(t.detach().flatten()[:4096]).numel() > 3]
    return set(map(id, varied or floats))


def own_arguments(args: Any, kwargs: Any, copied: Callable[[Tensor], Tensor]) -> tuple[Any, Any, list[Tensor]]:
    """The arguments with each tensor copied, once however often it is given, in caches too; and the copies.

    Raises:
        UnreadableError: one of them is no plain tensor, or is changed by a forward and cannot be copied.
    """
    copies: dict[int, Tensor] = {}

    def own(t: Tensor) -> Tensor:
        if t.is_nested or t.is_quantized or t.layout is not torch.strided:
            raise UnreadableError(f"it was called with a nested, quantised or sparse tensor ({t.layout})")
        if id(t) not in copies:
            copies[id(t)] = copied(t)
        return copies[id(t)]

    def ours(value: Any) -> Any:
        if isinstance(value, Tensor):
            return own(value)
        other = copy_structure(value, own) if is_cache(value) else value
        if other is value and callable(getattr(value, "update", None)):
            raise UnreadableError(f"it was called with a {type(value).__name__}, which its forward changes")
        return other

    args, kwargs = pytree.tree_map(ours, (args, kwargs), is_leaf=is_cache)
    return args, kwargs, list(copies.values())
