"""What is registered of classes, under their qualified names: recipes, axes, layouts and partitions.

A name is enough, so nothing here imports timm or any other package whose classes it knows.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import FunctionType
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ..attention.sources import Source
from ..image.geometry import Geometry
from ..image.tokens import Tokens

Shape = tuple[int, int, int, int]
"""Of a map: (batch, heads, queries, keys), windows counted as images."""

Recipe = Callable[..., Source]
Values = Callable[..., Tensor]
Layout = Callable[[Geometry, Shape], tuple[Tokens, Tokens]]
Partition = Callable[[Any, Geometry], Tokens]
T = TypeVar("T")
R = TypeVar("R", bound=Recipe)
L = TypeVar("L", bound=Layout)
P = TypeVar("P", bound=Partition)


def qualified_name(cls: type) -> str:
    """`package.module.Class`, the name a fact is registered under."""
    return f"{cls.__module__}.{cls.__qualname__}"


def qualified_names(module: nn.Module) -> list[str]:
    """Qualified names of a module's class and of all it is derived from, nearest first."""
    return [qualified_name(cls) for cls in type(module).__mro__]


class Registry(Generic[T]):
    """One fact each about classes of modules.

    Args:
        what: what a fact is called in an error.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._facts: dict[str, T] = {}
        # by class, with the forward that it is about: looked for in the bases of a class once, and asked at every reading
        self._found: WeakKeyDictionary[type, tuple[weakref.ref[Any], T | None]] = WeakKeyDictionary()
        self._found_in = self._facts

    def register(self, fact: T, *classes: str | type) -> None:
        """Register one fact for several classes; a name that does not exist here costs nothing.

        Raises:
            ValueError: one of the classes has such a fact already.
        """
        names = [cls if isinstance(cls, str) else qualified_name(cls) for cls in classes]
        for name in names:
            if name in self._facts:
                taken = self._facts[name]
                which = f"{taken.__module__}.{taken.__qualname__}" if hasattr(taken, "__qualname__") else repr(taken)
                raise ValueError(f"{name} has a {self.what} already, {which}; derive a class to read it otherwise")
        self._facts.update(dict.fromkeys(names, fact))
        self._found.clear()

    def find(self, module: nn.Module) -> T | None:
        """The fact about the class whose `forward` a module runs; None where there is none, or where somebody replaced it."""
        if "forward" in module.__dict__:  # replaced on the instance: what is known is of another forward
            return None
        cls = type(module)
        if self._found_in is not self._facts:
            self._found.clear()
            self._found_in = self._facts
        known, forward = self._found.get(cls), cls.forward
        if known is not None and known[0]() is forward:
            return known[1]
        found = self._find_in_bases(cls)
        if isinstance(forward, FunctionType):
            self._found[cls] = weakref.ref(forward), found
        return found

    def _find_in_bases(self, derived: type) -> T | None:
        found = None
        for cls in derived.__mro__:
            found = found or self._facts.get(qualified_name(cls))
            if "forward" in vars(cls):  # and not what a base of it, with another forward, is known for
                return found if _is_as_written(cls) else None
        return None

    def find_inherited(self, module: nn.Module) -> T | None:
        """The fact about a module's class, or the nearest it is derived from, be its forward another or not."""
        return next((self._facts[name] for name in qualified_names(module) if name in self._facts), None)

    def is_about(self, cls: type) -> bool:
        """Whether there is a fact about a class, or one it is derived from."""
        return any(qualified_name(base) in self._facts for base in cls.__mro__)

    def as_dict(self) -> dict[str, T]:
        """A copy of all facts by qualified name."""
        return dict(self._facts)


def _is_as_written(cls: type) -> bool:
    """Whether a class has the forward that stands in its source, decorated or not, and not one that was put in its place.

    A decorator leaves names as they are and comes from the package of the class, or from PyTorch (`torch.no_grad`).
    """
    forward: Any = vars(cls)["forward"]
    names = (getattr(forward, "__module__", None), getattr(forward, "__qualname__", None))
    package = getattr(forward, "__globals__", {}).get("__name__", "").partition(".")[0]
    return names == (cls.__module__, f"{cls.__qualname__}.forward") and package in (cls.__module__.partition(".")[0], "torch")


_RECIPES: Registry[Recipe] = Registry("recipe")
_AXES: Registry[str] = Registry("pattern of axes")
_VALUES: Registry[Values] = Registry("function for its values")
_LAYOUTS: Registry[Layout] = Registry("layout")
_PARTITIONS: Registry[Partition] = Registry("partition")
_UNNAMED: Registry[bool] = Registry("note that it forms a map")
_CHANNELS: Registry[bool] = Registry("note that it attends to channels")
_WHERE: dict[Recipe, Callable[[nn.Module], bool]] = {}


# Recipes


def recipe(
    *classes: str | type,
    axes: str | None = None,
    values: Values | None = None,
    where: Callable[[nn.Module], bool] | None = None,
) -> Callable[[R], R]:
    """Register the decorated function as the recipe of the classes, and of what is derived from them.

    A recipe has the signature of the `forward` it mirrors, with the module as `self`, and returns the `QK` of that call:

        @recipe("my_package.vit.Attention")
        def my_attention(self, x, attn_mask=None):
            q, k = project(self.qkv, x, "b n (parts h d) -> parts b h n d", parts=2, of=3, h=self.num_heads)
            return QK(q, k, scale=self.scale, mask=attn_mask)

    For a call that it does not describe, such as one with a mask of a kind it does not know, it returns `NotImplemented`, and
    the module's own forward is run in its stead. `hookattn.testing.check_recipe` proves a recipe.

    Args:
        classes: qualified names, or classes where they are at hand. A class of another version of a library that does not
            exist here costs nothing.
        axes: how the class lays out the map it forms itself, where that is not (batch, head, query, key), whatever of it is
            merged. In the notation of einops: b for images, w for windows, h for heads, q and k for queries and keys, such as
            "b h w q k"; "b q k" for a class that forms its map head by head. `check_recipe` proves it.
        values: makes what the map is multiplied onto, (batch, heads, keys, head_dim), of the same arguments, so that `m.v`
            need not run the forward: `lambda self, x, attn_mask=None: project_heads(self.v, x, self.num_heads)`. It may
            return `NotImplemented`, too, and `check_recipe` proves it.
        where: tells whether a module is described, for classes that other versions of a library have under the same name.

    Raises:
        ValueError: one of the classes has a recipe already.
    """

    def register(function: R) -> R:
        _RECIPES.register(function, *classes)
        if axes is not None:
            _AXES.register(axes, *classes)
        if values is not None:
            _VALUES.register(values, *classes)
        if where is not None:
            _WHERE[function] = where
        return function

    return register


def find_recipe(module: nn.Module) -> Recipe | None:
    """The recipe of the class whose `forward` a module runs; None where there is none, or where somebody replaced it."""
    return _if_described(module, _RECIPES.find(module))


def list_recipes() -> dict[str, Recipe]:
    """All recipes by qualified name."""
    return _RECIPES.as_dict()


def is_known(module: nn.Module) -> bool:
    """Whether a module's class, or one it is derived from, is known to form a map, be its forward another or not."""
    return _if_described(module, _RECIPES.find_inherited(module)) is not None or _UNNAMED.find_inherited(module) is not None


def may_be_known(cls: type) -> bool:
    """Whether a module of a class may be known to form a map, see `is_known`."""
    return _RECIPES.is_about(cls) or _UNNAMED.is_about(cls)


def _if_described(module: nn.Module, found: Recipe | None) -> Recipe | None:
    """A recipe, if it describes the module."""
    return None if found in _WHERE and not _WHERE[found](module) else found


def find_axes(module: nn.Module) -> str | None:
    """The axes of the map that a module forms itself, as its recipe tells them; None where they are in order."""
    return _AXES.find(module)


def find_values(module: nn.Module) -> Values | None:
    """What makes the values of a module that its recipe describes; None where its forward has to be run for them."""
    return None if find_recipe(module) is None else _VALUES.find(module)


def register_attention(*classes: str) -> None:
    """Note that modules of these classes form a map, where their names do not tell and they have no recipe."""
    _UNNAMED.register(True, *classes)


# Places of queries and keys on the image


def layout(*classes: str | type) -> Callable[[L], L]:
    """Register the decorated function as the layout of attention classes: it tells where their queries and keys lie.

    For attention that is given the whole image, or a grid that it cuts or pools itself. A layout takes the `Geometry` of a call
    and the shape (batch, heads, queries, keys) of its map, and returns the `Tokens` of the queries and of the keys:

        @layout("my_package.pooled.Attention")
        def my_tokens(geometry, shape):
            _, rows, columns, _ = geometry.argument("x")  # what `forward` was called with, tensors by their shapes
            queries = hookattn.image.whole_grid((rows, columns))
            return queries, hookattn.image.whole_grid((rows // 2, columns // 2))

    A grid is made by `whole_grid`, `cut_windows`, `cut_padded_windows`, `slide_windows` or `pool_windows` of `hookattn.image`;
    `geometry.module` is the attention, `geometry.tokens(count)` are the model's prefix tokens and patches. Where the places are
    not known, raise `hookattn.TokenError`. `hookattn.testing.check_recipe` proves a layout.

    Args:
        classes: qualified names, or classes where they are at hand.

    Raises:
        ValueError: one of the classes has a layout already.
        LayoutError: later, when a picture is asked for: what it returned is no pair of `Tokens`, or does not fit the map.
    """

    def register(function: L) -> L:
        _LAYOUTS.register(function, *classes)
        return function

    return register


def partition(*blocks: str | type) -> Callable[[P], P]:
    """Register the decorated function as the partition of block classes: it tells how they cut their input into windows.

    For attention that is given windows by the block around it, and cannot know where they come from. A partition takes the
    block and the `Geometry` of a call of the attention inside it, and returns the `Tokens` that the attention is given:

        @partition("my_package.swin.Block")
        def my_windows(self, geometry):
            _, rows, columns, _ = geometry.block_argument(self, "x")  # what the block was called with
            return hookattn.image.cut_windows((rows, columns), self.window_size, self.shift)

    Numbers and tuples of the block, such as `self.window_size`, are those at the time of the call. The windows of an image come
    one after the other in the batch of the attention. A layout of the attention's own class comes first; most need none.
    `hookattn.testing.check_recipe`, called with the block, proves a partition.

    Args:
        blocks: qualified names, or classes where they are at hand.

    Raises:
        ValueError: one of the classes has a partition already.
        LayoutError: later, when a picture is asked for: what it returned is no `Tokens`, or does not fit the map.
    """

    def register(function: P) -> P:
        _PARTITIONS.register(function, *blocks)
        return function

    return register


def find_layout(module: nn.Module) -> Layout | None:
    """The layout of the class whose `forward` a module runs; None where there is none."""
    return _LAYOUTS.find(module)


def find_partition(module: nn.Module) -> Partition | None:
    """The partition of the class whose `forward` a module runs; None where there is none."""
    return _PARTITIONS.find(module)


def register_channel_attention(*classes: str) -> None:
    """Note that attention of these classes goes from channels to channels, which lie nowhere on the image."""
    _CHANNELS.register(True, *classes)


def attends_to_channels(module: nn.Module) -> bool:
    """Whether the queries and keys of a module are channels."""
    return _CHANNELS.find(module) is not None
