"""Where the queries and keys of a map lie, in pixels of the image, on the device that the map is computed on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from einops import rearrange
from torch import Tensor

from ..conditions.cuda_graphs import is_capturing
from ..errors import TokenError
from ..image.tokens import Tokens
from ..maps.attention_map import AttentionMap

_MOST = 8  # of one kind of tokens: devices, dtypes, sizes of cells
# Of tokens that are the same for all layers and forwards, so that a device is sent their places once.
_KNOWN: WeakKeyDictionary[Tokens, dict[Any, Places]] = WeakKeyDictionary()
Sides = tuple[float, float]


class Places(NamedTuple):
    """Where queries and keys of a map lie, on the device and in the dtype of its chunks.

    Attributes:
        middles: (2, items or 1, queries, 1), of the places that a query stands for, y and x.
        is_query: (items or 1, queries), False for prefix tokens and padding.
        places: of each that a key stands for, (2, items or 1, 1, keys).
        share: (items or 1, keys), how much of what a key stands for lies on the image.
    """

    middles: Tensor
    is_query: Tensor
    places: tuple[Tensor, ...]
    share: Tensor

    def cut(self, items: slice, rows: slice) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """Middles of some queries of some items, and places and shares of the keys of these items."""
        middles = self.middles.narrow(2, rows.start, rows.stop - rows.start)
        if len(self.share) == 1:
            return middles, self.places, self.share
        return middles[:, items], tuple([each[:, items] for each in self.places]), self.share[items]


def places_of(m: AttentionMap) -> Callable[[Tensor], Places]:
    """What finds the places of a map, of the dtype and on the device of a tensor.

    Raises:
        TokenError: it is not known where they are, or there are no patches among them.
    """
    queries, keys, batch = m.query_tokens, m.tokens, m.shape[0]
    sizes = [_cell_size(m, tokens, which) for tokens, which in ((queries, "queries"), (keys, "keys"))]

    def find(like: Tensor) -> Places:
        if queries is not keys or keys.places is not None or is_capturing():  # what a graph makes is there when it is replayed
            return _find_places(queries, keys, sizes, batch, like)
        # as tensors that are made in inference mode or by modes of others are of no use to anybody else, and those that are on
        # their way in one stream of a GPU to no other
        known, stream = _KNOWN.setdefault(keys, {}), torch.cuda.current_stream(like.device) if like.is_cuda else None
        asked = sizes[0], like.dtype, like.device, stream, torch.is_inference_mode_enabled()
        if (places := known.get(asked)) is None:
            places = _find_places(queries, keys, sizes, batch, like)
            if len(known) < _MOST and type(places.share) is Tensor:
                known[asked] = places
        return places

    return find


def _cell_size(m: AttentionMap, tokens: Tokens, which: str) -> Sides:
    """(height, width) of a patch that queries or keys stand for, see `Geometry.cell_size`."""
    if all(tokens.grid_size) if tokens.places is None else bool((tokens.places >= 0).any()):
        return m._geometry.cell_size(tokens.grid_size)
    raise TokenError(
        f"the {which} of {m.name!r} are no patches ({', '.join(tokens.prefix[:4])}), and distances are from patch to patch. "
        'Ask for layers in which patches look at patches, or see where a token looks: m.image("cls").'
    )


def _find_places(queries: Tokens, keys: Tokens, sizes: list[Sides], batch: int, like: Tensor) -> Places:
    """Of centres of patches, see `Tokens.centres`; items of the batch are windows of images in turn."""
    # nobody waits for the device, on which the model may run
    both = [
        _of_items(tokens.centres(size).to(like.device, like.dtype, non_blocking=True), batch)
        for tokens, size in zip((queries, keys), sizes)
    ]
    middles = rearrange(both[0].nanmean(-2), "i q yx -> yx i q 1")
    places = rearrange(both[1], "i k s yx -> s yx i 1 k").unbind()
    return Places(middles, _share(both[0]).bool(), places, _share(both[1]))


def _of_items(centres: Tensor, batch: int) -> Tensor:
    """(items or 1, tokens, spread, 2): the centres of each item of the batch, of all where they are the same."""
    images, windows = centres.shape[:2]
    if images == windows == 1:
        return centres[0]
    numbers = torch.arange(batch, device=centres.device)
    return centres[numbers // windows % images, numbers % windows]


def _share(centres: Tensor) -> Tensor:
    """(items, tokens): how much of what a token stands for lies on the image."""
    return 1 - centres.isnan().any(-1).to(centres).mean(-1)
