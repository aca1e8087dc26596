"""Where the queries and keys of a map lie on the image, as the layout of its class and the block around it tell."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..errors import TokenError
from ..image.geometry import AsItWas, Geometry
from ..image.images import Patches
from ..image.tokens import Tokens
from ..image.trunk import path_to
from .registry import CHANNELS, LAYOUTS, PARTITIONS, Shape


def block_of(model: nn.Module, name: str) -> nn.Module | None:
    """The innermost block around a module that cuts its input into windows."""
    around = [m for m in list(path_to(model, name)) if PARTITIONS.of(m) is not None]
    return around[-1] if around else None


def windows_of(geometry: Geometry) -> Tokens | None:
    """What an attention module receives from the block around it that cuts windows; None where there is no such block.

    Raises:
        TokenError: there is one, but somebody else called the module.
    """
    block = block_of(geometry.model, geometry.name)
    if block is None:
        return None
    if geometry.around is None:
        raise TokenError(
            f"{geometry.name!r} was called, but not the {type(block).__name__} around it that cuts the image for it, so it is "
            "not known where its tokens lie; slice the map itself, m[...]."
        )
    found = PARTITIONS.of(block)
    assert found is not None  # block_of has looked
    return found(AsItWas(block, geometry.facts), geometry)


def received(geometry: Geometry, otherwise: Callable[[], Tokens]) -> Tokens:
    """What the block around an attention module cuts for it, else what it receives without such a block."""
    tokens = windows_of(geometry)
    return otherwise() if tokens is None else tokens


def axes_of(geometry: Geometry, shape: Shape) -> tuple[str, str, str, str]:
    """What the four axes of a map are."""
    if CHANNELS.of(geometry.module):
        return "batch", "head", "channel", "channel"
    if _count(geometry) == shape[0] or (geometry.images is None and not _in_windows(geometry, shape)):
        return "batch", "head", "query", "key"
    return "batch * windows", "head", "query", "key"


def _in_windows(geometry: Geometry, shape: Shape) -> bool:
    """Whether a map is of windows, as far as is known."""
    try:
        return tokens_of(geometry, shape)[1].windows > 1
    except TokenError:
        return False


def tokens_of(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    """What the queries and the keys of a map stand for.

    Raises:
        TokenError: they are channels, or windows or grids of a kind that is not known.
    """
    if CHANNELS.of(geometry.module):
        raise TokenError(f"{geometry.name!r} attends from channels to channels, which lie nowhere on the image; slice m[...].")
    found = LAYOUTS.of(geometry.module) or _same_or_unknown
    try:
        queries, keys = found(geometry, shape)
    except TokenError:
        _check_pieces(geometry, shape, 1)  # windows of an unknown kind say more than a count that is no grid
        raise
    _check_pieces(geometry, shape, keys.windows)
    assert queries.windows == keys.windows  # a layout gives both for the same windows
    if (len(queries), len(keys)) != shape[2:]:
        raise TokenError(
            f"{geometry.name!r} has {shape[2]} queries and {shape[3]} keys, not the {len(queries)} and {len(keys)} that its "
            "image makes; slice the map itself, m[...]."
        )
    return queries, keys


def _check_pieces(geometry: Geometry, shape: Shape, windows: int) -> None:
    """Raise TokenError unless the first axis of a map holds so many windows of each image."""
    images = _count(geometry)
    if shape[0] % windows or (images and shape[0] != images * windows):
        raise TokenError(
            f"{geometry.name!r} sees {images or 'its'} images as {shape[0]} pieces (windows, or some such), and it is not "
            "known how a piece lies on its image; slice the map itself, m[...]."
        )


def _count(geometry: Geometry) -> int:
    """How many images the forward looked at; 0 where that is not known."""
    images = geometry.images
    return 0 if images is None else len(images.valid) if isinstance(images, Patches) else images[0]


def _same_or_unknown(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    """Queries and keys of a class without a layout: what the block cut, else all tokens of the image."""
    keys = windows_of(geometry)
    if keys is None:
        keys = geometry.tokens(shape[3])
    return queries_of(shape, keys), keys


def queries_of(shape: Shape, keys: Tokens) -> Tokens:
    """The queries where nothing is known but their number: the keys themselves, the class token, or some without a place."""
    if shape[2] == shape[3]:
        return keys
    if shape[2] == 1 and keys.prefix[:1] == ("cls",):
        return Tokens(("cls",), (0, 0))
    return Tokens(tuple(f"query{i}" for i in range(shape[2])), (0, 0))
