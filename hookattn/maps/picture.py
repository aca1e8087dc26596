"""What a query attends to, laid out on the image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.projection import ALL
from ..errors import TokenError
from .lazy import Chunks


def mean_of_rows(chunks: Chunks, batch: int, heads: slice, selected: Tensor) -> Tensor:
    """The mean of some rows of each image, by the windows they are in.

    Of windows no others are computed than those that hold a selected row.

    Args:
        chunks: reads the map.
        batch: how many windows of all images there are.
        heads: which heads.
        selected: (images or 1, windows, queries), True where a row is selected.

    Returns:
        (images, windows, heads, keys), which sums to the mean over the windows of an image.
    """
    windows = selected.shape[1]
    weight = selected / selected.sum((1, 2), keepdim=True).clamp(min=1)
    asked, rows = (selected.any(0).any(axis).nonzero().flatten().tolist() or [0] for axis in (1, 0))
    only, within = slice(asked[0], None, windows) if len(asked) == 1 else ALL, slice(rows[0], rows[-1] + 1)
    weight = (weight[:, asked] if len(asked) == 1 else weight)[:, :, within]
    weight = weight.expand(batch // windows, -1, -1).flatten(0, 1)[:, None, :, None]
    sums: dict[int, Tensor] = {}

    def add(items: slice, span: slice, part: Tensor) -> None:
        share = (part * weight[items, :, span].to(part)).sum(2)
        sums[items.start] = sums[items.start] + share if items.start in sums else share

    chunks(add, only, heads, within)
    found = torch.cat(list(sums.values())).unflatten(0, (batch // windows, 1 if len(asked) == 1 else windows))  # type: ignore[no-untyped-call]
    return F.pad(found, (0, 0, 0, 0, asked[0], windows - 1 - asked[0])) if found.shape[1] < windows else found


def pick_heads(heads: str | int | None, count: int) -> slice:
    if heads is None or heads == "mean":
        return ALL
    if isinstance(heads, int) and -count <= heads < count:
        return slice(heads % count, heads % count + 1)
    raise TokenError(f"heads={heads!r} is no choice: heads='mean', heads=None for all, or a number from 0 to {count - 1}.")
