"""Which recipe reads which class, and how the axes of a class's own softmax are folded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from ..classes import ByClass
from ..functional import Source

Recipe = Callable[..., Source]
R = TypeVar("R", bound=Recipe)

_RECIPES: ByClass[Recipe] = ByClass("recipe")
_FORMS: ByClass[str] = ByClass("form")
_WHERE: dict[Recipe, Callable[[nn.Module], bool]] = {}


def recipe(*classes: str | type, form: str | None = None, where: Callable[[nn.Module], bool] | None = None) -> Callable[[R], R]:
    """File the decorated function as the recipe of the classes, and of what is derived from them.

    A recipe has the signature of the `forward` it mirrors, with the module as `self`, and returns the `QK` of that call:

        @recipe("my_package.vit.Attention")
        def my_attention(self, x, attn_mask=None):
            q, k = project(self.qkv, x, "b n (parts h d) -> parts b h n d", parts=2, of=3, h=self.num_heads)
            return QK(q, k, scale=self.scale, mask=attn_mask)

    For a call that it does not describe, such as one with a mask of a kind it does not know, it returns `NotImplemented`, and
    the module's own forward is run in its stead.

    Args:
        classes: qualified names, or classes where they are at hand. A class of another version of a library that does not
            exist here costs nothing.
        form: see `file_form`, for a class that folds its map.
        where: tells whether a module is described, for classes that other versions of a library have under the same name.

    Raises:
        ValueError: one of the classes has a recipe already.
    """

    def file(function: R) -> R:
        _RECIPES.file(function, *classes)
        if form is not None:
            file_form(form, *classes)
        if where is not None:
            _WHERE[function] = where
        return function

    return file


def file_form(form: str, *classes: str | type) -> None:
    """Tell how a class lays out the axes of the map it forms itself, where that is not (batch, head, query, key).

    Args:
        form: the axes in the notation of einops: b for images, w for windows, h for heads, q and k for queries and keys;
            "b h w q k", "(b h) q k", "b q k" for a class that forms its map head by head. Windows count as images to whoever
            reads the map: (images * windows, heads, queries, keys).
        classes: qualified names, or classes.

    Raises:
        ValueError: one of the classes has a form already.
    """
    _FORMS.file(form, *classes)


def find_recipe(module: nn.Module) -> Recipe | None:
    """The recipe of the class whose `forward` a module runs; None where there is none, or where somebody replaced it."""
    return _where(module, _RECIPES.of(module))


def find_form(module: nn.Module) -> str | None:
    """The form of the map that a module forms itself; None where none is filed."""
    return _FORMS.of(module)


def is_known(module: nn.Module) -> bool:
    """Whether a module's class, or one it is derived from, has a recipe or a form, be its forward another or not."""
    return _where(module, _RECIPES.inherited(module)) is not None or _FORMS.inherited(module) is not None


def _where(module: nn.Module, found: Recipe | None) -> Recipe | None:
    """A recipe, if it describes the module."""
    return None if found in _WHERE and not _WHERE[found](module) else found


def registered() -> dict[str, Any]:
    """A copy of what is filed: qualified name to recipe."""
    return _RECIPES.filed()
