"""The values that a forward is taken down with: those of a call, moved a little, or others where they would hide something."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...calls.arguments import copy_structure, is_cache
from ...errors import UnreadableError
from ..sites import tensors_in

HALF = (torch.float16, torch.bfloat16)
LARGE = 10  # makes one-hot rows of a softmax, and closes gates


def exact(t: Tensor) -> Tensor:
    """A copy, in float32 if it is of less."""
    return t.detach().float() if t.dtype in HALF else t.detach().clone()


def moved(t: Tensor, random: torch.Generator) -> Tensor:
    """A copy, moved a little."""
    t = exact(t)
    if not t.is_floating_point():
        return t
    less, more = (torch.rand(t.shape, generator=random, device="cpu").to(t) for _ in range(2))
    return t * (1 - 0.01 * less) + 0.01 * (more - 0.5)


def drawn(t: Tensor, random: torch.Generator, size: float = 2.0) -> Tensor:
    """Numbers of at most this size in its place, none of them near zero."""
    t = exact(t)
    if not t.is_floating_point():
        return t
    less, sign = (torch.rand(t.shape, generator=random, device="cpu").to(t) for _ in range(2))
    return size * (1 - 0.5 * less) * torch.where(sign < 0.5, -1, 1)


def _moved_or_drawn(t: Tensor, random: torch.Generator) -> Tensor:
    return drawn(t, random) if has_large(t) else moved(t, random)


def _drawn_weights(t: Tensor, random: torch.Generator) -> Tensor:
    """Numbers that make what comes out about as large as what goes in, however many are summed up."""
    return drawn(t, random, 0.2 if t.dim() < 2 else max(1, math.prod(t.shape[1:])) ** -0.5)


class Numbers(NamedTuple):
    """What is put in the place of tensors, by what they are."""

    argument: Callable[[Tensor, torch.Generator], Tensor]
    parameter: Callable[[Tensor, torch.Generator], Tensor]


ORDINARY = Numbers(_moved_or_drawn, _drawn_weights)
OWN_WEIGHTS = Numbers(_moved_or_drawn, moved)
OWN = Numbers(moved, moved)


def copying(args: Any, kwargs: Any, random: torch.Generator, numbers: Numbers = ORDINARY) -> Callable[[Tensor], Tensor]:
    """How arguments are copied: with other numbers, but for masks and the like."""
    changed = _masks_aside(tensors_in((args, kwargs)))
    return lambda t: numbers.argument(t, random) if id(t) in changed else exact(t)


def draw_arguments(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Arguments with numbers drawn in their place, for what depends on no values; masks and the like stay as they are."""
    copied = copying(args, kwargs, torch.Generator().manual_seed(3), ORDINARY._replace(argument=drawn))
    return own_arguments(args, kwargs, lambda t: copied(t).to(t.dtype))[:2]


def has_large(t: Tensor) -> bool:
    """Whether there is NaN, infinity or something large in a tensor."""
    if not t.is_floating_point() or t.is_meta or not t.numel():
        return False
    return not bool((t.detach().abs() < LARGE).all())


def is_bounded(t: Tensor) -> bool:
    """Whether there is neither NaN in a tensor nor infinity, but for that below zero, which masks have beside other numbers."""
    return not t.is_floating_point() or t.is_meta or not t.numel() or bool(t.detach().amax().isfinite())


def _masks_aside(tensors: list[Tensor]) -> set[int]:
    """Ids of tensors that are no masks, or of all if there are none: a mask of zeros may be asked where it is zero."""
    floats = [t for t in tensors if t.is_floating_point() and not t.is_nested and t.layout is torch.strided]
    return {id(t) for t in floats if not _may_be_mask(t)} or set(map(id, floats))


def _may_be_mask(t: Tensor) -> bool:
    """Whether a tensor has but a few values, the largest of which is 0 or 1."""
    values = torch.unique(t.detach().flatten()[:4096])
    return values.numel() <= 3 and float(values[-1:].sum()) in (0, 1)


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
