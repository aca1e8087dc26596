"""What is drawn of a map in one place: the row of a query in one head, on the grid of the image."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Union

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from torch import Tensor

from ..analysis.layers import LayerMaps, find_gap, layers_in
from ..analysis.rollouts import roll_row
from ..attention.narrowing import ALL
from ..errors import TokenError
from ..image.tokens import Query, Tokens
from ..maps.attention_map import AttentionMap
from ..maps.picture import mean_of_rows, select_queries

Maps = Union[LayerMaps, AttentionMap]
"""What pictures take: a recorder, its `rec.maps`, a slice or a list of these, or one map."""
Head = Union[int, str]
Heads = Union[Head, Sequence[Head], None]
"""Which heads: numbers, "mean" or "max" over all of them, a list of these; None for each head."""
Box = tuple[float, float, float, float]
"""(top, left, height, width) in fractions of the model's input."""

Floats = npt.NDArray[np.float64]
_NAMES = {"cls": "class token", "dist": "distillation token", "mean": "mean of all patches"}


@dataclass(frozen=True, eq=False)
class Panel:
    """The row of a query in one head.

    Attributes:
        name: of the map.
        head: its number, "mean" or "max".
        query: in words: "class token", "patch (3, 7)".
        values: (rows, columns), what each patch gets.
        uniform: what each key would get if the head looked at all alike: the sum of the row over the number of keys, without
            regard to signs; of a map, whose rows sum to 1, 1 / keys.
        shares: what goes to "patches", to each prefix token, and to "padding" where there is some; sums to 1.
        entropy: of the row, in nats.
        grid: where the grid of patches lies.
        marks: where the query lies, one patch or, with windows that overlap, several; none for a prefix token.
    """

    name: str
    head: Head
    query: str
    values: Floats
    uniform: float
    shares: Mapping[str, float]
    entropy: float
    grid: Box
    marks: tuple[Box, ...]

    @property
    def times_uniform(self) -> Floats:
        """(rows, columns), in units of what each key would get if the head looked at all alike."""
        return self.values / self.uniform

    @property
    def is_signed(self) -> bool:
        """Whether something is below zero, as what works against the rest: a map has nothing there, but what it brings may."""
        return bool((self.values < 0).any())

    @property
    def peak(self) -> float:
        """The highest patch, in these units."""
        return float(np.nanmax(self.times_uniform, initial=0.0))

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing but NaN."""
        return bool(np.isnan(self.values).all())

    def less(self, other: Panel) -> Panel:
        """What this one gives to each patch more than another, or less."""
        return replace(self, values=self.values - other.values)

    @property
    def kinds(self) -> dict[str, float]:
        """What goes to patches, to tokens of each kind ("cls", "reg", ...) and to padding."""
        found: dict[str, float] = {}
        for name, share in self.shares.items():
            kind = "reg" if re.fullmatch(r"reg\d+", name) else name
            found[kind] = found.get(kind, 0.0) + share
        return found


def maps_in(given: Maps) -> list[AttentionMap]:
    """The maps that a picture is made of, first layer first.

    Raises:
        ValueError: there is none.
    """
    if isinstance(given, AttentionMap):
        return [given]
    if not (found := layers_in(given)):
        raise ValueError("there is no map to draw: give a recorder, rec.maps, or some of rec.maps[:].")
    return found


def find_chain(maps: Sequence[AttentionMap]) -> list[AttentionMap]:
    """The maps that a rollout can be made of: from all tokens of an image to the same tokens, layer after layer; else none.

    Layers follow each other if their names count on by one, see `find_gap`.
    """
    square = [m for m in maps if m.shape[2] == m.shape[3]]
    try:
        tokens = [m.tokens for m in square]
    except TokenError:
        return []
    alike = len({(each.grid_size, len(each)) for each in tokens}) == 1 and all(each.windows == 1 for each in tokens)
    return square if len(square) > 1 and alike and find_gap(square) is None else []


def name_query(query: Query) -> str:
    """A query in words."""
    if isinstance(query, str):
        return f"register {query[3:]}" if query.startswith("reg") else _NAMES.get(query, query)
    if isinstance(query, tuple):
        is_patch = all(isinstance(each, Integral) for each in query)
        return f"patch ({query[0]}, {query[1]})" if is_patch else f"point ({query[0]:.3g}, {query[1]:.3g})"
    return f"token {query}"


def read_panels(m: AttentionMap, query: Query = "cls", heads: Heads = None, index: int = 0) -> list[Panel]:
    """Compute the row of a query, of one image, for each head that is asked for.

    Args:
        m: the map.
        query: as in `AttentionMap.image`.
        heads: see `Heads`.
        index: which image of the batch.

    Raises:
        TokenError: there is no such query, head or image, or it is not known where the keys lie.
    """
    queries, keys = m.query_tokens, m.tokens
    images = m.shape[0] // keys.windows
    if not -images <= index < images:
        raise TokenError(f"there is no image {index}: index= runs from 0 to {images - 1}.")
    index %= images
    selected = select_queries(queries, keys, query)
    rows = mean_of_rows(m, ALL, selected, image=index).double().cpu()  # (1, windows, heads, keys)
    marks = _marks_of(of_image(queries, index), selected[index % len(selected)]) if query != "mean" else ()
    keys = of_image(keys, index)
    panels = []
    for head in _pick_heads(heads, m.shape[1]):
        row = rows.mean(2) if head == "mean" else rows.amax(2) if head == "max" else rows[:, :, int(head)]
        panels.append(_panel_of(m.name, head, name_query(query), row, keys, marks))
    return panels


def row_of_rollout(maps: Sequence[AttentionMap], query: Query, index: int) -> Panel:
    """The row of a query in the rollout of maps from all tokens to the same tokens, of one image."""
    tokens = maps[-1].tokens
    selected = tokens.select(query)
    selected = selected[index % len(selected)].flatten()
    row = roll_row(list(maps), query, batch=slice(index, index + 1)).double().cpu()[None]
    marks = _marks_of(of_image(tokens, index), selected[None]) if query != "mean" else ()
    return _panel_of("rollout", "mean", name_query(query), row, of_image(tokens, index), marks)


def _panel_of(name: str, head: Head, query: str, row: Tensor, keys: Tokens, marks: tuple[Box, ...]) -> Panel:
    """The panel of (1, windows, keys) of one image."""
    values, sizes = keys.lay_out(row[:, :, None])[0, 0], row.abs()
    share = sizes / (total := sizes.sum())  # of the largest over heads, which is more than 1
    shares = {"patches": float(keys.lay_out(sizes[:, :, None])[0, 0].sum() / total)}
    shares |= {name: float(share[..., i].sum()) for i, name in enumerate(keys.prefix)}
    if (rest := 1 - sum(shares.values())) > 1e-6:
        shares["padding"] = rest
    entropy = float(-torch.xlogy(share, share).sum())
    # the largest over heads is drawn beside them; a row that sums to 1 but for rounding is that of a map
    is_of_map = head == "max" or not abs(float(total) - 1) > 1e-3
    uniform = (1.0 if is_of_map else float(total)) / row.shape[-1]
    return Panel(name, head, query, values.numpy(), uniform, shares, entropy, (0.0, 0.0, *keys.extent), marks)


def of_image(tokens: Tokens, index: int) -> Tokens:
    """Tokens as they lie on one image, where each has a grid of its own."""
    if tokens.places is None or len(tokens.places) == 1:
        return tokens
    (rows, columns), common = tokens.covered()[index], tokens.grid_size[1]
    places = tokens.places[[index]]
    return replace(
        tokens, grid_size=(rows, columns), places=torch.where(places < 0, -1, places // common * columns + places % common)
    )


def _marks_of(tokens: Tokens, selected: Tensor) -> tuple[Box, ...]:
    """Where the patches of (windows, tokens) that are marked lie on the model's input."""
    rows, columns = tokens.grid_size
    if not rows * columns:
        return ()
    height, width = (reach / n for reach, n in zip(tokens.extent, (rows, columns)))
    numbers = rearrange(tokens.patches[0], "w (n spread) -> w n spread", spread=tokens.spread)
    chosen = sorted({*numbers[selected[:, len(tokens.prefix) :]].flatten().tolist()})
    return tuple([(n // columns * height, n % columns * width, height, width) for n in chosen if n >= 0])


def _pick_heads(heads: Heads, count: int) -> list[Head]:
    """The heads that are asked for, one by one.

    Raises:
        TokenError: there is no such head.
    """
    if heads is None:
        return list(range(count))
    asked = [heads] if isinstance(heads, (int, str)) else list(heads)
    for head in asked:
        if head not in ("mean", "max") and not (isinstance(head, int) and -count <= head < count):
            raise TokenError(
                f"there is no head {head!r}: heads='mean', 'max', numbers from 0 to {count - 1}, or a list of these."
            )
    return [head % count if isinstance(head, int) else head for head in asked]
