"""Which recipe reads which class: filed by qualified name, so that no class has to be imported to be known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from ..functional import QK

Recipe = Callable[..., QK]
R = TypeVar("R", bound=Recipe)

_RECIPES: dict[str, Recipe] = {}


def qualified_name(cls: type) -> str:
    """`package.module.Class`, the name a recipe is filed under."""
    return f"{cls.__module__}.{cls.__qualname__}"


def recipe(*classes: str | type) -> Callable[[R], R]:
    """File the decorated function as the recipe of the classes, and of what is derived from them.

    A recipe has the signature of the `forward` it mirrors, with the module as `self`, and returns the `QK` of that call:

        @recipe("my_package.vit.Attention")
        def my_attention(self, x, attn_mask=None):
            q, k = project(self.qkv, x, "b n (parts h d) -> parts b h n d", parts=2, of=3, h=self.num_heads)
            return QK(q, k, scale=self.scale, mask=attn_mask)

    Args:
        classes: qualified names, or classes where they are at hand. A class of another version of a library that does not
            exist here costs nothing.

    Raises:
        ValueError: one of the classes has a recipe already.
    """
    names = [cls if isinstance(cls, str) else qualified_name(cls) for cls in classes]

    def file(function: R) -> R:
        for name in names:
            if name in _RECIPES:
                taken = _RECIPES[name]
                raise ValueError(
                    f"{name} has a recipe already, {taken.__module__}.{taken.__qualname__}; derive a class to read it otherwise"
                )
        _RECIPES.update(dict.fromkeys(names, function))
        return function

    return file


def find_recipe(module: nn.Module) -> Recipe | None:
    """The recipe of the class whose `forward` a module runs; None where there is none, or where somebody replaced it."""
    if "forward" in vars(module):
        return None
    for cls in type(module).__mro__:
        if (found := _RECIPES.get(qualified_name(cls))) is not None or "forward" in vars(cls):
            return found
    return None


def is_known(module: nn.Module) -> bool:
    """Whether a module's class, or one it is derived from, has a recipe, be its forward another or not."""
    return any(name in _RECIPES for name in names_of(module))


def names_of(module: nn.Module) -> list[str]:
    """Qualified names of a module's class and of all it is derived from, nearest first."""
    return [qualified_name(cls) for cls in type(module).__mro__]


def registered() -> dict[str, Any]:
    """A copy of what is filed: qualified name to recipe."""
    return dict(_RECIPES)
