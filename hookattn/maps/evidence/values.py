"""The values that a forward is taken down with: those of a call, moved a little, or others where they are no numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...calls.arguments import copy_structure, is_cache
from ...errors import UnreadableError
from .seen import tensors_in

HALF = (torch.float16, torch.bfloat16)
LARGE = 1e4  # as no input is that does not overflow, or hide what is added to it


def exact(t: Tensor) -> Tensor:
    """A copy, in float32 if it is of less."""
    return t.detach().float() if t.dtype in HALF else t.detach().clone()


def moved(t: Tensor, random: torch.Generator, spread: float, *, drawn: bool = False) -> Tensor:
    """A copy, moved a little; if it is odd or `drawn`, numbers of this spread in place of its own."""
    t = exact(t)
    if not t.is_floating_point():
        return t
    less, more = (torch.rand(t.shape, generator=random, device="cpu").to(t) for _ in range(2))
    if drawn or is_odd(t):
        return torch.where(t == -torch.inf, t, spread * (less - more))
    return t * (1 - 0.01 * less) + 0.01 * (more - 0.5)  # infinite or large parts of a mask stay such


def copying(args: Any, kwargs: Any, random: torch.Generator, *, drawn: bool = False) -> Callable[[Tensor], Tensor]:
    """How arguments are copied: moved a little, but for masks and the like; if `drawn`, numbers are drawn in their place."""
    varied = _varied_or_all(tensors_in((args, kwargs)))
    return lambda t: moved(t, random, 4.0, drawn=drawn) if id(t) in varied or is_odd(t) else exact(t)


def draw_arguments(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Arguments with numbers drawn in their place, for what depends on no values; masks and the like stay as they are."""
    copied = copying(args, kwargs, torch.Generator().manual_seed(3), drawn=True)
    return own_arguments(args, kwargs, lambda t: copied(t).to(t.dtype))[:2]


def is_odd(t: Tensor) -> bool:
    """Whether there is NaN, infinity or something large in a tensor; below zero, where masks have it, whether all is large."""
    if not t.is_floating_point() or t.is_meta or not t.numel():
        return False
    return not -LARGE < float(t.detach().amax()) < LARGE


def _varied_or_all(tensors: list[Tensor]) -> set[int]:
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
