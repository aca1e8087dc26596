"""Which layout tells where the queries and keys of a class lie, and which partition how a block cuts its input into windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from ..classes import ByClass
from ..errors import TokenError
from ..tokens import Tokens
from .setting import AsItWas, Patches, Setting, path_to

Shape = tuple[int, int, int, int]
Layout = Callable[[Setting, Shape], tuple[Tokens, Tokens]]
Partition = Callable[[Any, Setting], Tokens]
L = TypeVar("L", bound=Layout)
P = TypeVar("P", bound=Partition)

_LAYOUTS: ByClass[Layout] = ByClass("layout")
_PARTITIONS: ByClass[Partition] = ByClass("partition")
_CHANNELS: ByClass[bool] = ByClass("mark")


def layout(*classes: str | type) -> Callable[[L], L]:
    """File the decorated function as the layout of the attention classes: it tells where queries and keys lie.

    A layout takes the `Setting` of a call and the shape of its map and returns the `Tokens` of its queries and of its keys.
    """

    def file(function: L) -> L:
        _LAYOUTS.file(function, *classes)
        return function

    return file


def partition(*blocks: str | type) -> Callable[[P], P]:
    """File the decorated function as the partition of the block classes: it tells how they cut their input into windows.

    A partition takes the block and the `Setting` of a call inside it, whose `around` is what the block was called with, and
    returns the `Tokens` that the attention inside receives.
    """

    def file(function: P) -> P:
        _PARTITIONS.file(function, *blocks)
        return function

    return file


def channels(*classes: str) -> None:
    """Note that attention of these classes goes from channels to channels."""
    _CHANNELS.file(True, *classes)


def block_of(model: nn.Module, name: str) -> nn.Module | None:
    """The innermost block around a module that cuts its input into windows."""
    around = [m for m in path_to(model, name) if _PARTITIONS.of(m) is not None]
    return around[-1] if around else None


def windows_of(setting: Setting) -> Tokens | None:
    """What an attention module receives from the block around it that cuts windows; None where there is no such block.

    Raises:
        TokenError: there is one, but somebody else called the module.
    """
    block = block_of(setting.model, setting.name)
    if block is None:
        return None
    if setting.around is None:
        raise TokenError(
            f"{setting.name!r} was called, but not the {type(block).__name__} around it that cuts the image for it, so it is "
            "not known where its tokens lie; slice the map itself, m[...]."
        )
    found = _PARTITIONS.of(block)
    assert found is not None  # block_of has looked
    return found(AsItWas(block, setting.facts), setting)


def received(setting: Setting, otherwise: Callable[[], Tokens]) -> Tokens:
    """What the block around an attention module cuts for it, else what it receives without such a block."""
    tokens = windows_of(setting)
    return otherwise() if tokens is None else tokens


def axes_of(setting: Setting, shape: Shape) -> tuple[str, str, str, str]:
    """What the four axes of a map are."""
    if _CHANNELS.of(setting.module):
        return "batch", "head", "channel", "channel"
    if _count(setting) == shape[0] or (setting.images is None and not _in_windows(setting, shape)):
        return "batch", "head", "query", "key"
    return "batch * windows", "head", "query", "key"


def _in_windows(setting: Setting, shape: Shape) -> bool:
    """Whether a map is of windows, as far as is known."""
    try:
        return tokens_of(setting, shape)[1].windows > 1
    except TokenError:
        return False


def tokens_of(setting: Setting, shape: Shape) -> tuple[Tokens, Tokens]:
    """What the queries and the keys of a map stand for.

    Raises:
        TokenError: they are channels, or windows or grids of a kind that is not known.
    """
    if _CHANNELS.of(setting.module):
        raise TokenError(f"{setting.name!r} attends from channels to channels, which lie nowhere on the image; slice m[...].")
    found = _LAYOUTS.of(setting.module) or _same_or_unknown
    try:
        queries, keys = found(setting, shape)
    except TokenError:
        _check_pieces(setting, shape, 1)  # windows of an unknown kind say more than a count that is no grid
        raise
    _check_pieces(setting, shape, keys.windows)
    assert queries.windows == keys.windows  # a layout gives both for the same windows
    if (len(queries), len(keys)) != shape[2:]:
        raise TokenError(
            f"{setting.name!r} has {shape[2]} queries and {shape[3]} keys, not the {len(queries)} and {len(keys)} that its "
            "image makes; slice the map itself, m[...]."
        )
    return queries, keys


def _check_pieces(setting: Setting, shape: Shape, windows: int) -> None:
    """Raise TokenError unless the first axis of a map holds so many windows of each image."""
    images = _count(setting)
    if shape[0] % windows or (images and shape[0] != images * windows):
        raise TokenError(
            f"{setting.name!r} sees {images or 'its'} images as {shape[0]} pieces (windows, or some such), and it is not known "
            "how a piece lies on its image; slice the map itself, m[...]."
        )


def _count(setting: Setting) -> int:
    """How many images the forward looked at; 0 where that is not known."""
    images = setting.images
    return 0 if images is None else len(images.valid) if isinstance(images, Patches) else images[0]


def _same_or_unknown(setting: Setting, shape: Shape) -> tuple[Tokens, Tokens]:
    """Queries and keys of a class without a layout: what the block cut, else all tokens of the image."""
    keys = windows_of(setting)
    if keys is None:
        keys = setting.tokens(shape[3])
    return queries_of(shape, keys), keys


def queries_of(shape: Shape, keys: Tokens) -> Tokens:
    """The queries where nothing is known but their number: the keys themselves, the class token, or some without a place."""
    if shape[2] == shape[3]:
        return keys
    if shape[2] == 1 and keys.prefix[:1] == ("cls",):
        return Tokens(("cls",), (0, 0))
    return Tokens(tuple(f"query{i}" for i in range(shape[2])), (0, 0))
