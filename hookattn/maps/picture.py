"""What a query attends to: its rows, and these laid out on the image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.narrowing import ALL
from ..errors import TokenError
from ..image.tokens import Query, Size, Tokens
from .lazy import LazyArray


def draw_rows(
    m: LazyArray, queries: Tokens, keys: Tokens, query: Query, heads: str | int | None, size: Size | int | None
) -> Tensor:
    """Compute the picture of a query: its row over the patches, on the grid of the image; see `AttentionMap.image`."""
    picked = _pick_heads(heads, m.shape[1])
    pixels = keys.lay_out(mean_of_rows(m, picked, select_queries(queries, keys, query)))
    if size is not None:
        pixels = keys.stretch(pixels, (size, size) if isinstance(size, int) else size)
    return pixels if heads is None else pixels.mean(1)


def index_of_row(name: str, queries: Tokens, keys: Tokens, query: Query) -> tuple[slice, slice, int]:
    """The index of the row of a query in a map of this name, of every image and head; see `AttentionMap.rows`."""
    if queries.places is None:  # all tokens in one window
        return ALL, ALL, queries.index(query)
    at = select_queries(queries, keys, query).nonzero()
    if len(at) != 1:
        raise TokenError(
            f"{query!r} stands in {len(at)} rows of {name!r}, of several windows or images: see m.image({query!r}), or slice "
            "the map itself, m[...]."
        )
    _, window, row = at[0].tolist()
    return slice(window, None, queries.windows), ALL, row


def select_queries(queries: Tokens, keys: Tokens, query: Query) -> Tensor:
    """Mark the tokens that a query stands for: (images or 1, windows, queries), True for these."""
    try:
        return queries.select(query)
    except TokenError as error:
        if len(queries) == len(keys):
            raise
        raise TokenError(
            f"{query!r} is not among the queries: this map has {len(queries)}, which are not the {len(keys)} tokens it "
            f"looks at. {queries.choices()}"
        ) from error


def mean_of_rows(m: LazyArray, heads: slice, selected: Tensor, image: int | None = None) -> Tensor:
    """Compute the mean of some rows of each image, by the windows they are in.

    Args:
        selected: (images or 1, windows, queries), True where a row is selected.
        image: the one image that it is computed of; None for all.

    Returns:
        (images, windows, heads, keys), which sums to the mean over the windows of an image.
    """
    windows, batch, first = selected.shape[1], m.shape[0], 0
    if image is not None:
        selected = selected[[image % len(selected)]]
        batch, first = windows, image * windows
    weight = selected / selected.sum((1, 2), keepdim=True).clamp(min=1)
    # A single window, which is the usual question, is a slice of the batch, in which windows lie image by image; where rows
    # are in several, all windows are computed. Without any row the first stands for it: no images have a mean as well.
    asked, rows = (selected.any(0).any(axis).nonzero().flatten().tolist() or [0] for axis in (1, 0))
    whole = ALL if image is None else slice(first, first + batch)
    only = slice(first + asked[0], first + batch, windows) if len(asked) == 1 else whole
    within = slice(rows[0], rows[-1] + 1)
    weight = (weight[:, asked] if len(asked) == 1 else weight)[:, :, within]
    weight = weight.expand(batch // windows, -1, -1).flatten(0, 1)[:, None, :, None]
    sums: dict[int, Tensor] = {}

    def add(items: slice, span: slice, part: Tensor) -> None:
        share = (part * weight[items, :, span].to(part.device, part.dtype, non_blocking=True)).sum(2)
        sums[items.start] = sums[items.start] + share if items.start in sums else share

    m.visit(add, only, heads, within)
    found = torch.cat(list(sums.values())).unflatten(0, (batch // windows, 1 if len(asked) == 1 else windows))  # type: ignore[no-untyped-call]
    return F.pad(found, (0, 0, 0, 0, asked[0], windows - 1 - asked[0])) if found.shape[1] < windows else found


def _pick_heads(heads: str | int | None, count: int) -> slice:
    """The heads that are drawn, as a slice; a TokenError for what names none."""
    if heads is None or heads == "mean":
        return ALL
    if isinstance(heads, int) and -count <= heads < count:
        return slice(heads % count, heads % count + 1)
    raise TokenError(f"heads={heads!r} is no choice: heads='mean', heads=None for all, or a number from 0 to {count - 1}.")
