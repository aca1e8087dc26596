"""A map as an array of xarray: axes by name, and where each query and each key lies on the image."""

from __future__ import annotations

from typing import Any

import numpy as np
from einops import repeat

from ..errors import MissingExtraError, TokenError
from ..image.tokens import Tokens
from .lazy import LazyArray

Coordinates = dict[str, Any]


class Labelled(LazyArray):
    """Base of maps: the whole map with names and coordinates."""

    @property
    def axes(self) -> tuple[str, str, str, str]:
        """Names of the four axes."""
        raise NotImplementedError

    @property
    def tokens(self) -> Tokens:
        """What the keys stand for."""
        raise NotImplementedError

    @property
    def query_tokens(self) -> Tokens:
        """What the queries stand for."""
        raise NotImplementedError

    def to_xarray(self) -> Any:
        """Compute the whole map as an `xarray.DataArray` with named axes and coordinates.

            a = m.to_xarray()
            a.sel(head=3, query=0)                  # one row: numbers of heads, queries and keys
            a.where(a.key_token == "patch")         # without class token and registers
            a.where(a.key_row >= 8).sum("key")      # what goes to the lower half

        Returns:
            An array with the axes (batch, head, query, key), each numbered. The first is called "batch_windows" or "sequence"
            where that is what it counts, see `axes`; the others "query_channel" and "key_channel" where channels attend to
            channels. Coordinates besides: `layer`, the name of the map; `query_token` and `key_token`, names of prefix tokens
            ("cls", "reg0") and "patch" for all others; `query_row`, `query_col`, `key_row` and `key_col` on the grid that
            covers the image, NaN for prefix tokens and padding, and the mean for a token that was pooled of several places;
            `image` and `window` where an image is cut into windows. Where it is not known what the tokens stand for, the
            attribute `no_places` says why.

        Raises:
            MissingExtraError: xarray is not installed.
            StaleMapError, UnreadableError: as when the map is sliced.
        """
        xarray, axes, attributes = import_xarray(), _dimensions(self.axes), dict[str, Any]()
        coordinates: Coordinates = {axis: range(size) for axis, size in zip(axes, self.shape)}
        try:
            sides = dict(zip(axes[2:], (self.query_tokens, self.tokens)))
        except TokenError as reason:
            sides, attributes["no_places"] = {}, str(reason)
        for side, tokens in sides.items():
            coordinates |= _places_of(side, tokens, axes[0], self.shape[0])
            attributes[f"{side}_grid_size"] = tokens.grid_size
        coordinates["layer"] = self.name
        return xarray.DataArray(self.numpy(), coordinates, axes, "attention", attributes)


def import_xarray() -> Any:
    """The module `xarray`, imported when the first array is made."""
    try:
        import xarray
    except ImportError as error:
        raise MissingExtraError('named axes need xarray: pip install "hookattn[table]". m.numpy() goes without.') from error
    return xarray


def _dimensions(axes: tuple[str, ...]) -> tuple[str, ...]:
    # an array of xarray has each name once, and names that can be typed after a dot
    first, head, queries, keys = (axis.replace(" * ", "_") for axis in axes)
    return (first, head, queries, keys) if queries != keys else (first, head, f"query_{queries}", f"key_{keys}")


def _places_of(side: str, tokens: Tokens, first: str, count: int) -> Coordinates:
    """Coordinates of queries or keys: names, rows and columns, by window or image where these differ."""
    # in cells of the grid, whose centres lie half a cell from their corner: (images or 1, windows, tokens, 2)
    places = tokens.centres((1.0, 1.0)).nanmean(3) - 0.5
    kinds = [*tokens.prefix, *("patch",) * (len(tokens) - len(tokens.prefix))]
    found: Coordinates = {f"{side}_token": (side, kinds)}
    whole, windows = len(places) == tokens.windows == 1, tokens.windows
    for name, each in zip(("row", "col"), places.unbind(-1)):
        by_window = repeat(each, "i w n -> (b i w) n", b=max(1, count // (len(each) * windows)))
        found[f"{side}_{name}"] = (side, each[0, 0].numpy()) if whole else ((first, side), by_window[:count].numpy())
    if windows > 1:
        numbers = np.arange(count)
        found["image"], found["window"] = (first, numbers // windows), (first, numbers % windows)
    return found
