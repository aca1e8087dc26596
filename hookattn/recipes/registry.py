"""What is filed of classes of attention under their qualified names: recipes, forms, layouts, partitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import nn

from ..attention.sources import Source
from ..image.geometry import Geometry
from ..image.tokens import Tokens

T = TypeVar("T")


def qualified_name(cls: type) -> str:
    """`package.module.Class`, the name a fact is filed under."""
    return f"{cls.__module__}.{cls.__qualname__}"


def names_of(module: nn.Module) -> list[str]:
    """Qualified names of a module's class and of all it is derived from, nearest first."""
    return [qualified_name(cls) for cls in type(module).__mro__]


class ByClass(Generic[T]):
    """What is known of classes of modules, each with one fact.

    Args:
        what: what one fact is called in an error.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._facts: dict[str, T] = {}

    def file(self, fact: T, *classes: str | type) -> None:
        """File one fact under several classes; a name that does not exist here costs nothing.

        Raises:
            ValueError: one of the classes has such a fact already.
        """
        names = [cls if isinstance(cls, str) else qualified_name(cls) for cls in classes]
        for name in names:
            if name in self._facts:
                taken = self._facts[name]
                who = f"{taken.__module__}.{taken.__qualname__}" if hasattr(taken, "__qualname__") else repr(taken)
                raise ValueError(f"{name} has a {self.what} already, {who}; derive a class to read it otherwise")
        self._facts.update(dict.fromkeys(names, fact))

    def of(self, module: nn.Module) -> T | None:
        """The fact about the class whose `forward` a module runs; None where there is none, or where somebody replaced it."""
        if "forward" in vars(module):
            return None
        for cls in type(module).__mro__:
            if (found := self._facts.get(qualified_name(cls))) is not None or "forward" in vars(cls):
                return found
        return None

    def inherited(self, module: nn.Module) -> T | None:
        """The fact about a module's class, or the nearest it is derived from, be its forward another or not."""
        return next((self._facts[name] for name in names_of(module) if name in self._facts), None)

    def filed(self) -> dict[str, T]:
        """A copy of what is filed: qualified name to fact."""
        return dict(self._facts)


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


Shape = tuple[int, int, int, int]
Layout = Callable[[Geometry, Shape], tuple[Tokens, Tokens]]
Partition = Callable[[Any, Geometry], Tokens]
L = TypeVar("L", bound=Layout)
P = TypeVar("P", bound=Partition)
LAYOUTS: ByClass[Layout] = ByClass("layout")
PARTITIONS: ByClass[Partition] = ByClass("partition")
CHANNELS: ByClass[bool] = ByClass("mark")


def layout(*classes: str | type) -> Callable[[L], L]:
    """File the decorated function as the layout of the attention classes: it tells where queries and keys lie.

    A layout takes the `Geometry` of a call and the shape of its map and returns the `Tokens` of its queries and of its keys.
    """

    def file(function: L) -> L:
        LAYOUTS.file(function, *classes)
        return function

    return file


def partition(*blocks: str | type) -> Callable[[P], P]:
    """File the decorated function as the partition of the block classes: it tells how they cut their input into windows.

    A partition takes the block and the `Geometry` of a call inside it, whose `around` is what the block was called with, and
    returns the `Tokens` that the attention inside receives.
    """

    def file(function: P) -> P:
        PARTITIONS.file(function, *blocks)
        return function

    return file


def channels(*classes: str) -> None:
    """Note that attention of these classes goes from channels to channels."""
    CHANNELS.file(True, *classes)
