"""The picture that `hookattn record` and `hookattn demo` write."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import HookattnError, TokenError
from ..image.photo import Photo
from ..image.tokens import Query
from ..maps.attention_map import AttentionMap
from ..recording.maps import Maps
from .files import write_out
from .output import printable, say


def save_picture(
    image: np.typing.ArrayLike | Photo | None, maps: Maps, query: Query | None, out: Path, title: str, index: int = 0
) -> None:
    """Draw all maps of an image that lie on it, and say which do not."""
    from ..figures.layout import TooLargeError
    from ..figures.plot import overview

    # with no map to draw, the last one is tried all the same: its error says why
    drawn = [m for m in maps.values() if _has_a_grid(m)] or maps[-1:]
    left_out = [m.name for m in maps.values() if m not in drawn]
    if left_out:
        say(f"left out of the picture, no grid of patches over the whole image: {', '.join(left_out)}")
    if query is None:
        query = "cls" if all(m.tokens.prefix[:1] == ("cls",) for m in drawn) else "mean"
    asked = [m for m in drawn if _has(m, query)] or drawn
    if len(asked) < len(drawn):
        others = ", ".join(m.name for m in drawn if m not in asked)
        say(f"left out of the picture, query {query!r} is not among theirs: {others}")
    drawn = asked
    try:
        figure = overview(drawn, query, image=image, title=title, index=index)
    except TooLargeError as error:
        size = str(error).split(":")[0]
        raise HookattnError(f"{title} is too long a strip to be drawn ({size}): a part of the photo can be.") from error
    write_out(out, figure.savefig)
    say(f"\nwrote {printable(out)}")


def _has(m: AttentionMap, query: Query) -> bool:
    """Whether a query is among those of a map."""
    try:
        m.query_tokens.select(query)
    except TokenError:
        return False
    return True


def _has_a_grid(m: AttentionMap) -> bool:
    """Whether it is known where the keys of a map lie on the image."""
    try:
        return bool(m.tokens)
    except TokenError:
        return False
